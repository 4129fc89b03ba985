// Applying the mask to a thread's scores.
#pragma once
#include <cstdint>

#include "attention/block_range.h"

namespace fa3 {

/// Of a thread's columns 8 i and 8 i + 1, counted from its first, those before `end`: bit 2 i + e for column 8 i + e.
FA3_HOST_DEVICE uint32_t columns_before(int end) {
  const int whole = clamped(end, 0, 128);  // 32 columns of the thread's lie in 128
  const int count = whole / 8 * 2 + smaller(whole % 8, 2);
  return count >= 32 ? ~0u : (1u << count) - 1;
}

/// Scores of a wgmma accumulator: element 4 i + 2 r + e is row r (of two) and column 8 i + e from the thread's first.
/// Columns outside [begin, end) become `hidden`, the value that no maximum and no exponential notices.
template <int kCount>
FA3_HOST_DEVICE void hide_columns(float (&s)[kCount], int row, int begin, int end, float hidden) {
  static_assert(kCount <= 64, "a word has a bit for each of a row's scores");
  const uint32_t seen = columns_before(end) & ~columns_before(begin);
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i)
    if (!(seen >> i & 1)) s[4 * (i / 2) + 2 * row + i % 2] = hidden;
}

}  // namespace fa3
