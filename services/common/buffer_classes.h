#pragma once

// How many payload buffers of which sizes one node needs, derived from what a round can hold.

#include <cstdint>
#include <vector>

#include "model/config.h"
#include "runtime/buffer_pool.h"

namespace moebius::services {

// Rows of one dispatch frame, at most.
inline constexpr uint32_t kRowsPerFrame = 64;

// Nodes that one node exchanges rows with, at most.
inline constexpr uint32_t kMostPeers = 256;

// Buffers of a node that exchanges rows with up to `peers` others. A round has max_rows rows with
// top_k experts each, so
//   frames    peers + max_rows * min(top_k, peers) / kRowsPerFrame: a row goes once to each of its
//             destinations, and the last frame to each peer may be short;
//   answers   max_rows * top_k rows of BF16 in all, kept until the round is summed, and a quarter
//             more for losers of hedges that are on their way;
//   dispatch  max_rows * min(top_k, peers) encoded rows in all, until their sends complete;
//   route     4 of a whole step's hidden rows, for a router on another node.
// Sizes halve from the largest frame down to 4 KiB. Frames in (size / 2, size] are as many as bytes
// in all allow, at most all frames, so no split of a round over peers runs out. The smallest class
// also holds refusals, handshakes and heartbeats. An expert worker, which receives what others
// dispatch, lives on the same: a sender that finds no buffer there waits. For V3 and kMostPeers
// that is 1.4 GB of address space, of which a node touches what its rounds use.
std::vector<runtime::BufferClass> MakeBufferClasses(const model::ModelConfig& config,
                                                    uint32_t max_rows, uint32_t peers);

}  // namespace moebius::services
