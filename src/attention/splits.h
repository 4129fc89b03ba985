// Work split along the keys, so that few tiles keep many multiprocessors busy.
#pragma once
#include <climits>
#include <cstdint>

#include "arch/host_device.h"

namespace fa3 {

/// The first `whole_tiles` tiles are one piece of work each, every further one is `count` pieces of equally many
/// blocks.
struct Splits {
  int whole_tiles;  // INT_MAX: nothing is split
  int count;

  struct Piece {
    int tile;
    int part, parts;
  };

  FA3_HOST_DEVICE Piece at(int index) const {
    if (index < whole_tiles) return {index, 0, 1};
    const int rest = index - whole_tiles, tile = rest / count;
    return {whole_tiles + tile, rest - tile * count, count};
  }

  /// Pieces of so many tiles.
  FA3_HOST_DEVICE int64_t pieces(int64_t tiles) const {
    return tiles <= whole_tiles ? tiles : whole_tiles + (tiles - whole_tiles) * count;
  }

  /// Where a part of `blocks` blocks begins; part = parts is the end.
  FA3_HOST_DEVICE static int boundary(int blocks, int part, int parts) {
    return static_cast<int>(int64_t{blocks} * part / parts);
  }
};

inline constexpr Splits kNoSplits{INT_MAX, 1};

}  // namespace fa3
