// Work split along the keys, so that few tiles keep many multiprocessors busy.
#pragma once
#include <climits>
#include <cstdint>

#include "arch/host_device.h"
#include "attention/divisor.h"

namespace fa3 {

/// The first `whole_tiles` tiles are one piece of work each, every further one is `count` pieces of equally many
/// blocks.
struct Splits {
  /// So that a square of it is an int.
  static constexpr int kMost = 46340;

  int whole_tiles;  // INT_MAX: nothing is split
  Divisor count;    // at most kMost

  FA3_HOST_DEVICE static constexpr Splits of(int whole_tiles, int count) { return {whole_tiles, Divisor::of(count)}; }

  struct Piece {
    int tile;
    int part, parts;
  };

  FA3_HOST_DEVICE Piece at(int index) const {
    if (index < whole_tiles) return {index, 0, 1};
    const int rest = index - whole_tiles, tile = count.quotient(rest);
    return {whole_tiles + tile, rest - tile * count.divisor, count.divisor};
  }

  /// Pieces of so many tiles.
  FA3_HOST_DEVICE int64_t pieces(int64_t tiles) const {
    return tiles <= whole_tiles ? tiles : whole_tiles + (tiles - whole_tiles) * count.divisor;
  }

  /// Where a part of `blocks` blocks begins: blocks * part / count, rounded down; part = count is the end.
  FA3_HOST_DEVICE int boundary(int blocks, int part) const {
    const int each = count.quotient(blocks), rest = blocks - each * count.divisor;
    return each * part + count.quotient(rest * part);
  }
};

inline constexpr Splits kNoSplits = Splits::of(INT_MAX, 1);

}  // namespace fa3
