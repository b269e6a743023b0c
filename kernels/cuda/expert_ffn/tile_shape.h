#pragma once

// The tile of the grouped expert FFN: kTileColumns columns of two weight matrices (gate and up, or
// two neighbouring parts of down) times up to kTileRows rows of one expert, kTileK of K a stage.

namespace moebius::kernels::cuda {

inline constexpr int kTileColumns = 128;  // one quantisation block of the SwiGLU output
inline constexpr int kTileRows = 128;
inline constexpr int kTileK = 128;  // one scale on either side
// Up to so many rows of a tile are operand B, more are operand A (docs/adr/0013).
inline constexpr int kNarrowRows = 80;
inline constexpr int kMostExperts = 512;
// Experts of so many rows have the rows of their full tiles gathered once for all columns.
inline constexpr int kSharedRows = 2 * kTileRows;

// Places in ExpertWorkspace::counters(), 128 bytes apart because many CTAs count at once.
inline constexpr int kCounterTicket = 0;  // tiles handed out
inline constexpr int kCounterDone = 32;   // CTAs that need nothing any more
inline constexpr int kCounterTiles = 64;  // from here: finished column tiles of each tile of rows

// Bits of ExpertWorkspace::gathered(): the halves of a tile's rows are there, 0 and 1, and their
// scales.
inline constexpr int kGatheredScales = 2;

}  // namespace moebius::kernels::cuda
