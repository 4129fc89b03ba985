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
  static constexpr bool kEightBits = sizeof(Element) == 1;
  using Scores = float[kTileN / 2];  // element 4 i + 2 r + e: row r, column 8 i + e
  // Packed: already wgmma's A operand. Of 16 bits in the same order; of 8, see tile/transpose.h.
  using Probabilities = uint32_t[kTileN * sizeof(Element) / 8];

  // A thread's sum bounds its largest probability. bfloat16 and the fp32 sums hold 2^30 easily; float16 ends at 65,504,
  // e4m3 at 448, where it saturates.
  static constexpr float kLargestSum = kEightBits ? 448.f : std::is_same_v<Element, Float16> ? 32768.f : 1073741824.f;
  // Eight bits are few, so small probabilities survive only if large ones reach up to their end: a row's largest is
  // taken to be 2^kHeadroom. Sums must be far enough from 448 for that, or rows of equal scores would go the long way
  // in every block. There the sums of even and of odd columns, kTileN / 8 each, bound the largest one by themselves.
  static constexpr float kHeadroom = !kEightBits ? 0.f : kTileN <= 96 ? 5.f : 4.f;
  static_assert(!kEightBits || kTileN / 8 * (kTileN <= 96 ? 32 : 16) < 400, "equal scores must not look unsafe");

  // A whole row's first sum must reach this: float16 loses bits below 2^-14, and 2^-10 of a sum still matters.
  static constexpr float kSmallestSum = std::is_same_v<Element, Float16> ? 0.0625f : 9.3132257e-10f;

  // A row of 8 bits has its head's descale in its scale: tiles of several heads have rows of several.
  static constexpr int kScales = kEightBits ? 2 : 1;

  float scale_log2[kScales];
  float row_max[2];  // what exponents are relative to; -inf until the row has met a key (that is not NaN)
  float row_sum[2];  // this thread's part of the denominator

  __device__ __forceinline__ float scale(int r) const { return scale_log2[r % kScales]; }

  __device__ __forceinline__ void reset() {
    row_max[0] = row_max[1] = -INFINITY;
    row_sum[0] = row_sum[1] = 0.f;
  }

  __device__ __forceinline__ bool met_no_key() const { return row_max[0] == -INFINITY || row_max[1] == -INFINITY; }

  /// The first block of a tile: no sum and no output yet, nothing to rescale.
  __device__ __forceinline__ void first(const Scores& s, Probabilities& p, bool exact) {
    if (kEightBits || exact || !first_from_zero(s, p)) {
#pragma unroll
      for (int r = 0; r < 2; ++r) row_max[r] = largest(s, r);
      exponentiate(s, p, row_sum);
    }
  }

  /// Another block. Optimistic: exponentiate with the maximum so far, and only then see whether that was safe. It
  /// nearly always is: no maximum, no shuffle and no rescaling in the common case, and still exact, since s is intact
  /// and a block whose sum grew too large (or is NaN) is done again with its true maximum. A warp does so together.
  template <int... kCounts>
  __device__ __forceinline__ void update(const Scores& s, Probabilities& p, bool exact, float (&... o)[kCounts]) {
    float sum[2];
    const bool safe = exponentiate(s, p, sum);
    if (__any_sync(~0u, exact || !safe)) take_maximum(s, p, sum, o...);
    row_sum[0] += sum[0];
    row_sum[1] += sum[1];
  }

  /// Either, by the same instructions: where each is met once or twice, it is fetching them that takes the time. A
  /// thread's own sum of a first block must not be too small. Only the first `rows` of the two exist.
  template <int... kCounts>
  __device__ __forceinline__ void take(const Scores& s, Probabilities& p, int rows, float (&... o)[kCounts]) {
    static_assert(!kEightBits, "8 bits want a first block's maximum");
    float sum[2] = {};
    bool safe = exponentiate_row<0>(s, p, sum[0]);
    if (rows > 1) safe = exponentiate_row<1>(s, p, sum[1]) && safe;
    if (__any_sync(~0u, !safe)) {
      take_maximum(s, p, sum, o...);
    } else {
      row_max[0] = finite(row_max[0]);
      row_max[1] = finite(row_max[1]);
    }
    row_sum[0] += sum[0];
    row_sum[1] += sum[1];
  }

  /// The same in two parts, for a loop that jumps over nothing. False: it was not safe, and redo() must follow.
  __device__ __forceinline__ bool attempt(const Scores& s, Probabilities& p, bool exact) {
    float sum[2];
    const bool safe = exponentiate(s, p, sum);
    if (__any_sync(~0u, exact || !safe)) return false;
    row_sum[0] += sum[0];
    row_sum[1] += sum[1];
    return true;
  }
  template <int kCount>
  __device__ __forceinline__ void redo(const Scores& s, Probabilities& p, float (&o)[kCount]) {
    float sum[2];
    take_maximum(s, p, sum, o);
    row_sum[0] += sum[0];
    row_sum[1] += sum[1];
  }

  /// No key at all, not even one of NaN, which leaves its mark in the sum.
  __device__ __forceinline__ bool met_nothing(int r) const { return row_max[r] == -INFINITY && row_sum[r] == 0.f; }

  /// What sums and outputs relative to `max` count where they are relative to `top`.
  __device__ __forceinline__ static float weight(float max, float top) { return arch::exp2_fast(max - finite(top)); }

  /// The whole quad's sum of row r.
  __device__ __forceinline__ float sum_of_row(int r) const {
    float sum = row_sum[r];
    sum += __shfl_xor_sync(~0u, sum, 1);
    return sum + __shfl_xor_sync(~0u, sum, 2);
  }

  struct Result {
    float scale;  // of the row's output; negative: no key was seen, and the output is 0 whatever the values hold
    float lse;    // natural logarithm
  };

  /// The row's denominator, with its head's sink (-inf: none).
  __device__ __forceinline__ Result finish(int r, float sink) const { return result(row_max[r], sum_of_row(r), sink); }

  /// The same of a row whose maximum and sum are known.
  __device__ __forceinline__ static Result result(float max, float sum, float sink) {
    constexpr float kLn2 = 0.6931471805599453f, kLog2e = 1.4426950408889634f;
    if (max == -INFINITY && sum == 0.f) return {-1.f, sink};  // a sum of NaN has met keys, NaN ones
    const float top = fmaxf(max, sink * kLog2e), shrink = arch::exp2_fast(max - top);
    sum = sum * shrink + arch::exp2_fast(sink * kLog2e - top);
    return {__fdividef(shrink, sum), (top + __log2f(sum)) * kLn2};
  }

 private:
  __device__ __forceinline__ static float finite(float x) { return x == -INFINITY ? 0.f : x; }

  /// Optimistic too: most scores are near 0, so exponents relative to 0 do. False: for a row of this warp they do not,
  /// since its sum is too large, too small or NaN.
  __device__ __forceinline__ bool first_from_zero(const Scores& s, Probabilities& p) {
    row_max[0] = row_max[1] = 0.f;
    bool safe = exponentiate(s, p, row_sum);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = row_sum[r];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      safe = safe && sum >= kSmallestSum;
    }
    return __all_sync(~0u, safe);
  }

  /// The block's true maximum counts from here on: for what was summed up before, and for the block, done again.
  template <int... kCounts>
  __device__ __forceinline__ void take_maximum(const Scores& s, Probabilities& p, float (&sum)[2],
                                               float (&... o)[kCounts]) {
    float rescale[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float new_max = fmaxf(row_max[r], largest(s, r));
      rescale[r] = arch::exp2_fast(row_max[r] - finite(new_max));
      row_max[r] = new_max;
      row_sum[r] *= rescale[r];
    }
    (multiply(o, rescale), ...);
    exponentiate(s, p, sum);
  }

  template <int kCount>
  __device__ __forceinline__ static void multiply(float (&o)[kCount], const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) o[i] *= factor[i / 2 % 2];
  }

  /// What exponents of row r are to be relative to if the quad's largest scaled score in s is the row's.
  __device__ __forceinline__ float largest(const Scores& s, int r) const {
    float a = s[2 * r] * scale(r), b = s[2 * r + 1] * scale(r);
#pragma unroll
    for (int i = 1; i < kTileN / 8; ++i) {
      a = fmaxf(a, s[4 * i + 2 * r] * scale(r));
      b = fmaxf(b, s[4 * i + 2 * r + 1] * scale(r));
    }
    a = fmaxf(a, b);
    a = fmaxf(a, __shfl_xor_sync(~0u, a, 1));
    return fmaxf(a, __shfl_xor_sync(~0u, a, 2)) - kHeadroom;
  }

  /// One row's probabilities of 16 bits and their sum; false: one may be too large, or all of a first block too small.
  template <int kRow>
  __device__ __forceinline__ bool exponentiate_row(const Scores& s, Probabilities& p, float& sum) const {
    const float shift = finite(row_max[kRow]);
    float part[2] = {};
#pragma unroll
    for (int word = 0; word < kTileN / 8; ++word) {
      float x[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        x[e] = arch::exp2_fast(fmaf(s[4 * word + 2 * kRow + e], scale(kRow), -shift));
        part[e] += x[e];
      }
      p[2 * word + kRow] = arch::pack<Element>(x[0], x[1]);
    }
    sum = part[0] + part[1];
    return sum <= kLargestSum && sum >= (row_max[kRow] == -INFINITY ? kSmallestSum : 0.f);
  }

  /// The probabilities and each row's sum of them, unrounded; false: one of them may be too large for an Element.
  __device__ __forceinline__ bool exponentiate(const Scores& s, Probabilities& p, float (&sum)[2]) const {
    const float shift[2] = {finite(row_max[0]), finite(row_max[1])};
    constexpr int kPairs = kEightBits ? 2 : 1;  // of a row's columns in a word
    float part[2][2] = {};
#pragma unroll
    for (int word = 0; word < kTileN / 8 / kPairs; ++word) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float x[2 * kPairs];
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
          const int at = 4 * (kPairs * word + pair) + 2 * r;
          x[2 * pair] = arch::exp2_fast(fmaf(s[at], scale(r), -shift[r]));
          x[2 * pair + 1] = arch::exp2_fast(fmaf(s[at + 1], scale(r), -shift[r]));
          part[r][0] += x[2 * pair];
          part[r][1] += x[2 * pair + 1];
        }
        if constexpr (kEightBits)
          p[2 * word + r] = arch::pack_e4m3(x[0], x[1], x[2], x[3]);
        else
          p[2 * word + r] = arch::pack<Element>(x[0], x[1]);
      }
    }
    sum[0] = part[0][0] + part[0][1];
    sum[1] = part[1][0] + part[1][1];
    if constexpr (kEightBits)
      return part[0][0] <= kLargestSum && part[0][1] <= kLargestSum && part[1][0] <= kLargestSum &&
             part[1][1] <= kLargestSum;
    return sum[0] <= kLargestSum && sum[1] <= kLargestSum;
  }
};

/// Scores become tanh(scale * score), to within 2e-7: what softcap multiplies. One scale, or one for each row of two.
template <int kCount, int kScales>
__device__ __forceinline__ void squash(float (&s)[kCount], const float (&scale)[kScales]) {
  float twice_log2[kScales];
#pragma unroll
  for (int r = 0; r < kScales; ++r) twice_log2[r] = 2 * 1.4426950408889634f * scale[r];
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    s[i] = 1.f - __fdividef(2.f, 1.f + arch::exp2_fast(s[i] * twice_log2[i / 2 % kScales]));
}

}  // namespace fa3
