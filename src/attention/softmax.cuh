// Online softmax, optimistic: see update().
#pragma once
#include <cmath>

#include "arch/convert.cuh"
#include "attention/block_range.h"

namespace fa3 {

/// The softmax of a thread's two rows of a wgmma accumulator (rows g and g + 8 of the warp's 16), which the four lanes
/// of a quad share. Exponents are base 2: a score s weighs 2^(s * scale_log2 - row_max).
template <class Element, int kTileN>
struct Softmax {
  using Scores = float[kTileN / 2];            // element 4 i + 2 r + e: row r, column 8 i + e
  using Probabilities = uint32_t[kTileN / 4];  // the same order, packed: already wgmma's A operand

  // A thread's sum bounds its largest probability. bfloat16 and the fp32 sums hold 2^30 easily; float16 ends at 65,504.
  static constexpr float kLargestSum = std::is_same_v<Element, __half> ? 32768.f : 1073741824.f;

  // A whole row's first sum must reach this: float16 loses bits below 2^-14, and 2^-10 of a sum still matters.
  static constexpr float kSmallestSum = std::is_same_v<Element, __half> ? 0.0625f : 9.3132257e-10f;

  float scale_log2;
  float row_max[2];  // what exponents are relative to; -inf until the row has met a key (that is not NaN)
  float row_sum[2];  // this thread's part of the denominator

  __device__ __forceinline__ void reset() {
    row_max[0] = row_max[1] = -INFINITY;
    row_sum[0] = row_sum[1] = 0.f;
  }

  __device__ __forceinline__ bool met_no_key() const { return row_max[0] == -INFINITY || row_max[1] == -INFINITY; }

  /// The first block of a tile: no sum and no output yet, nothing to rescale. Optimistic too: most scores are near 0,
  /// so exponents relative to 0 do. Where a row's sum is then too large, too small or NaN, its maximum is taken.
  __device__ __forceinline__ void first(const Scores& s, Probabilities& p, bool exact) {
    row_max[0] = row_max[1] = 0.f;
    exponentiate(s, p, row_sum);
    bool safe = !exact && row_sum[0] <= kLargestSum && row_sum[1] <= kLargestSum;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = row_sum[r];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      safe = safe && sum >= kSmallestSum;
    }
    if (__any_sync(~0u, !safe)) {
#pragma unroll
      for (int r = 0; r < 2; ++r) row_max[r] = largest(s, r);
      exponentiate(s, p, row_sum);
    }
  }

  /// Another block. Optimistic: exponentiate with the maximum so far, and only then see whether that was safe. It
  /// nearly always is: no maximum, no shuffle and no rescaling in the common case, and still exact, since s is intact
  /// and a block whose sum grew too large (or is NaN) is done again with its true maximum. A warp does so together.
  template <int kCount>
  __device__ __forceinline__ void update(const Scores& s, Probabilities& p, float (&o)[kCount], bool exact) {
    float sum[2];
    exponentiate(s, p, sum);
    const bool safe = sum[0] <= kLargestSum && sum[1] <= kLargestSum;
    if (__any_sync(~0u, exact || !safe)) {
      float rescale[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float new_max = fmaxf(row_max[r], largest(s, r));
        rescale[r] = arch::exp2_fast(row_max[r] - finite(new_max));
        row_max[r] = new_max;
        row_sum[r] *= rescale[r];
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) o[i] *= rescale[i / 2 % 2];
      exponentiate(s, p, sum);
    }
    row_sum[0] += sum[0];
    row_sum[1] += sum[1];
  }

  /// No key at all, not even one of NaN, which leaves its mark in the sum.
  __device__ __forceinline__ bool met_nothing(int r) const { return row_max[r] == -INFINITY && row_sum[r] == 0.f; }

  /// What sums and outputs relative to `max` count here.
  __device__ __forceinline__ float weight_of(int r, float max) const {
    return arch::exp2_fast(max - finite(row_max[r]));
  }

  struct Result {
    float scale;  // of the row's output; negative: no key was seen, and the output is 0 whatever the values hold
    float lse;    // natural logarithm
  };

  /// The row's denominator, with its head's sink (-inf: none).
  __device__ __forceinline__ Result finish(int r, float sink) const {
    constexpr float kLn2 = 0.6931471805599453f, kLog2e = 1.4426950408889634f;
    float sum = row_sum[r];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (row_max[r] == -INFINITY && sum == 0.f) return {-1.f, sink};  // a sum of NaN has met keys, NaN ones
    const float top = fmaxf(row_max[r], sink * kLog2e), shrink = arch::exp2_fast(row_max[r] - top);
    sum = sum * shrink + arch::exp2_fast(sink * kLog2e - top);
    return {__fdividef(shrink, sum), (top + __log2f(sum)) * kLn2};
  }

 private:
  __device__ __forceinline__ static float finite(float x) { return x == -INFINITY ? 0.f : x; }

  /// The quad's largest scaled score of row r.
  __device__ __forceinline__ float largest(const Scores& s, int r) const {
    float a = s[2 * r] * scale_log2, b = s[2 * r + 1] * scale_log2;
#pragma unroll
    for (int i = 1; i < kTileN / 8; ++i) {
      a = fmaxf(a, s[4 * i + 2 * r] * scale_log2);
      b = fmaxf(b, s[4 * i + 2 * r + 1] * scale_log2);
    }
    a = fmaxf(a, b);
    a = fmaxf(a, __shfl_xor_sync(~0u, a, 1));
    return fmaxf(a, __shfl_xor_sync(~0u, a, 2));
  }

  __device__ __forceinline__ void exponentiate(const Scores& s, Probabilities& p, float (&sum)[2]) const {
    const float shift[2] = {finite(row_max[0]), finite(row_max[1])};
    float part[2][2] = {};
#pragma unroll
    for (int i = 0; i < kTileN / 8; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float low = arch::exp2_fast(fmaf(s[4 * i + 2 * r], scale_log2, -shift[r]));
        const float high = arch::exp2_fast(fmaf(s[4 * i + 2 * r + 1], scale_log2, -shift[r]));
        part[r][0] += low;
        part[r][1] += high;
        p[2 * i + r] = arch::pack<Element>(low, high);
      }
    }
    sum[0] = part[0][0] + part[0][1];
    sum[1] = part[1][0] + part[1][1];
  }
};

/// Scores become tanh(scale * score), to within 2e-7: what softcap multiplies.
template <int kCount>
__device__ __forceinline__ void squash(float (&s)[kCount], float scale) {
  const float twice_log2 = 2 * 1.4426950408889634f * scale;
#pragma unroll
  for (int i = 0; i < kCount; ++i) s[i] = 1.f - __fdividef(2.f, 1.f + arch::exp2_fast(s[i] * twice_log2));
}

}  // namespace fa3
