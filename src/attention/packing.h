// Query heads that read the same keys may share a tile's rows.
#pragma once
#include <cstdint>

#include "arch/host_device.h"

namespace fa3 {

/// A warpgroup's 64 rows are `positions` queries of `heads` heads each: row = position * heads + head, and rows past
/// the last of these stand idle. One head is the plain tile of 64 queries. Packing pays where a sequence has fewer
/// queries than a tile has rows; then keys are loaded once for all of its heads.
struct Packing {
  int ratio;      // query heads of each KV head
  int heads;      // of them in one tile, at most 64; the last tile of a KV head may have fewer
  int positions;  // 64 / heads
  int rows;       // positions * heads
  int tiles;      // side by side for the heads of one KV head: ceil(ratio / heads)
  uint32_t reciprocal;

  /// Without packing, or with as many heads in a tile as fit, evenly.
  FA3_HOST_DEVICE static Packing of(int ratio, bool packed) {
    Packing packing;
    packing.ratio = ratio;
    packing.heads = packed ? ceil_div(ratio, ceil_div(ratio, 64)) : 1;
    packing.positions = 64 / packing.heads;
    packing.rows = packing.positions * packing.heads;
    packing.tiles = ceil_div(ratio, packing.heads);
    packing.reciprocal = 65536 / packing.heads + 1;
    return packing;
  }

  /// row / heads, for row < 64.
  FA3_HOST_DEVICE int position_of(int row) const { return static_cast<int>(row * reciprocal >> 16); }
  FA3_HOST_DEVICE int head_of(int row) const { return row - position_of(row) * heads; }
};

}  // namespace fa3
