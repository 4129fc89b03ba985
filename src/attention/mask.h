// Applying the mask to a thread's scores.
#pragma once
#include "attention/block_range.h"

namespace fa3 {

/// Scores of a wgmma accumulator: element 4 i + 2 r + e is row r (of two) and column 8 i + e from the thread's first.
/// Columns outside [begin, end) become `hidden`, the value that no maximum and no exponential notices.
template <int kCount>
FA3_HOST_DEVICE void hide_columns(float (&s)[kCount], int row, int begin, int end, bool bounded_left, float hidden) {
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
#pragma unroll
    for (int e = 0; e < 2; ++e)
      if (8 * i + e >= end) s[4 * i + 2 * row + e] = hidden;
  }
  if (!bounded_left) return;
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
#pragma unroll
    for (int e = 0; e < 2; ++e)
      if (8 * i + e < begin) s[4 * i + 2 * row + e] = hidden;
  }
}

}  // namespace fa3
