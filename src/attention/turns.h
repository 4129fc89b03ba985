// How many heads' blocks of keys the backward has side by side where they take turns.
#pragma once
#include <cmath>

#include "attention/block_range.h"

namespace fa3 {

/// Each block of keys of a head runs a step behind the one before it: taken sooner, it waits. So between two of them
/// come those of as many other heads as there are pieces of work begun within a step. Of the numbers from there on the
/// first that divides all heads: a rest of few heads would wait again. `rows_q` and `rows_k` are a typical sequence's,
/// `group` the query heads of each of the `heads`.
inline int heads_in_turn(const Visibility& visibility, int rows_q, int rows_k, int tile_m, int group, int heads) {
  constexpr double kThreadBlocks = 132;  // that work at a time: a Hopper's multiprocessors
  const QueryInterval seeing = visibility.queries(rows_k / 2, rows_q, rows_k);
  const double steps =
      (larger(seeing.end - seeing.begin, 0) / static_cast<double>(tile_m) + 0.5) * group;  // of a typical piece
  const double least = kThreadBlocks / steps;
  const int first = larger(static_cast<int>(std::ceil(least)), 1);
  for (int side_by_side = first; side_by_side <= smaller(2 * first, heads); ++side_by_side)
    if (heads % side_by_side == 0) return side_by_side;
  return smaller(first, larger(heads, 1));
}

}  // namespace fa3
