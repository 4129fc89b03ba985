// How many heads' blocks of keys the backward has side by side.
#pragma once
#include <cmath>

#include "attention/block_range.h"

namespace fa3 {

inline constexpr int kThreadBlocks = 132;  // that work at a time: a Hopper's multiprocessors

/// Of the numbers from `least` on the first that divides all heads: a rest of few heads would not be like the others.
inline int even_section(int least, int heads) {
  least = larger(least, 1);
  for (int side_by_side = least; side_by_side <= smaller(2 * least, heads); ++side_by_side)
    if (heads % side_by_side == 0) return side_by_side;
  return smaller(least, larger(heads, 1));
}

/// Heads that fill the machine once. Under a mask, where the pieces of a head differ in length, fewer than these side
/// by side would let the longest ones of the last heads begin when others are at their end: several query heads on each
/// KV head make few pieces.
inline int heads_of_a_wave(int rows_k, int tile_n) { return kThreadBlocks / larger(ceil_div(rows_k, tile_n), 1); }

/// Under a mask, where so many fit into L2. With blocks of 64 keys adding to dQ is what limits: of long sequences, one
/// head of which has more blocks than run at a time, four side by side are faster, as measured at head dim 256.
inline int heads_under_mask(int fitting, int rows_k, int tile_n, int heads) {
  int least = heads_of_a_wave(rows_k, tile_n);
  if (least == 0 && tile_n == 64) least = 4;
  return fitting >= least ? larger(fitting, 1) : even_section(least, heads);
}

/// Under a mask, where blocks of keys take turns: for long sequences two to four would do if a turn took no time.
inline constexpr int kLeastInTurn = 8;

/// Where blocks of keys take turns, each block of a head runs a step behind the one before it: taken sooner, it waits.
/// So between two of them come those of as many other heads as there are pieces of work begun within a step. `rows_q`
/// and `rows_k` are a typical sequence's, `group` the query heads of each of the `heads`.
inline int heads_in_turn(const Visibility& visibility, int rows_q, int rows_k, int tile_m, int tile_n, int group,
                         int heads) {
  const QueryInterval seeing = visibility.queries(rows_k / 2, rows_q, rows_k);
  const double steps =
      (larger(seeing.end - seeing.begin, 0) / static_cast<double>(tile_m) + 0.5) * group;  // of a typical piece
  const int least = static_cast<int>(std::ceil(kThreadBlocks / steps));
  if (visibility.full()) return even_section(least, heads);
  return even_section(larger(larger(least, heads_of_a_wave(rows_k, tile_n)), kLeastInTurn), heads);
}

}  // namespace fa3
