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

// Places in ExpertWorkspace::counters(), 128 bytes apart because many CTAs count at once.
inline constexpr int kCounterTicket = 0;  // tiles handed out
inline constexpr int kCounterDone = 32;   // CTAs that need nothing any more
inline constexpr int kCounterTiles = 64;  // from here: finished column tiles of each tile of rows

// Words of ExpertWorkspace::gathered() for each tile that shares its rows: how many 128-blocks of
// either half of the rows are there (words 0 and 2), and whether all scales are (word 1).
inline constexpr int kGatheredWords = 4;

}  // namespace moebius::kernels::cuda
