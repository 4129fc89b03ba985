// The rotation of rows that a thread can hold: all butterflies are in its own registers, and all signs are constants.
#pragma once
#include <cuda_pipeline_primitives.h>

#include "arch/convert.cuh"
#include "arch/warpgroup.cuh"
#include "kernels/quantize_lane.cuh"

namespace fa3 {

template <class Element, int kHeadDim_>
struct RowsTraits {
  using Type = Element;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr RowTile kTile{kHeadDim};
  static constexpr int kLanes = kTile.lanes(), kPart = kTile.part(), kRows = kTile.rows();
  static constexpr int kLoaded = kTile.loaded_words(), kHeld = kTile.held_words(), kWarpWords = kTile.warp_words();
  // A head dim is one block of the rotation, or two.
  static constexpr int kBlock = hadamard_block(0, kHeadDim), kRest = kHeadDim - kBlock;
  static_assert((kRest & (kRest - 1)) == 0, "a head dim of more than two blocks");
  static constexpr float kNorm = hadamard_norm(kBlock), kRestNorm = hadamard_norm(kRest);
};

/// A warp's rows of a step.
template <class T>
struct RowSpan {
  const typename T::Type* x;
  uint8_t* out;
  int rows;  // from 0 to T::kRows; there is a row at x even so

  __device__ __forceinline__ RowSpan(const QuantizeArgs& args, int unit, int step) {
    const int batch = unit / args.unit_heads, head = unit % args.unit_heads;
    const uint32_t row = step * uint32_t(args.step_rows) + threadIdx.x / 32 * T::kRows;
    rows = row < args.unit_rows ? static_cast<int>(min(args.unit_rows - row, uint32_t{T::kRows})) : 0;
    const int64_t first = min(row, args.unit_rows - 1);
    x = static_cast<const typename T::Type*>(args.x) + batch * args.x_unit[0] + head * args.x_unit[1] +
        first * args.rows.x[0];
    out = args.out + batch * args.out_unit[0] + head * args.out_unit[1] + first * args.rows.out[0];
  }
};

/// The scale of a unit with this amax, and what sums are multiplied with.
template <class T>
struct RowScale {
  float descale, factor, factor_rest;

  __device__ __forceinline__ explicit RowScale(float amax) : descale(descale_of(amax)) {
    factor = __fdiv_rn(T::kNorm, descale);
    factor_rest = __fdiv_rn(T::kRestNorm, descale);
  }
};

/// What a thread does with its row of a step, or its half of one. Only loads and stores go by others' rows, so that a
/// warp's lie side by side; a warp keeps to shared memory of its own.
template <class T>
class Rows {
 public:
  using Element = typename T::Type;
  using Values = float[T::kPart];
  using Span = RowSpan<T>;

  __device__ __forceinline__ Rows(const QuantizeArgs& args, uint4* memory)
      : args_(args), loaded_(memory + threadIdx.x / 32 * T::kWarpWords), held_(loaded_ + 32 * T::kLoaded) {}

  /// Loads are on their way after this.
  __device__ __forceinline__ void load(const Span& span) const {
    constexpr int kWords = T::kHeadDim / kGroup, kPartWords = T::kPart / kGroup, kAtOnce = 32 / kWords;
    const int lane = lane_anew(), word = lane % kWords, to = word / kPartWords * T::kLoaded + word % kPartWords;
    const int stride = static_cast<int>(args_.rows.x[0]), last = max(span.rows - 1, 0);
#pragma unroll
    for (int first = 0; first < T::kRows; first += kAtOnce) {
      const int row = first + lane / kWords;
      if (32 % kWords && (lane >= kAtOnce * kWords || row >= T::kRows)) continue;
      __pipeline_memcpy_async(loaded_ + row * T::kLanes * T::kLoaded + to,
                              span.x + min(row, last) * stride + word * kGroup, sizeof(uint4));
    }
    __pipeline_commit();
  }

  /// What was loaded last, after which the next loads may come.
  __device__ __forceinline__ void take(Values& v) const {
    __pipeline_wait_prior(0);
    __syncwarp();
    const int lane = lane_anew();
#pragma unroll
    for (int word = 0; word < T::kPart / kGroup; ++word) unpack(v, word, loaded_[lane * T::kLoaded + word]);
    __syncwarp();
  }

  /// Rotate what was taken, a step of a unit. Returns amax.
  __device__ __forceinline__ float scan(Values& v, int unit, int step) {
    float largest;
#pragma unroll 1                             // the code of a rotation is long
    for (bool wild = false;; wild = true) {  // the rare second look, for warps with a NaN or what counts as infinite
      if (wild) take_clipped(v, Span(args_, unit, step));
      rotate(v);
      if (wild) return largest_finite(v);
      largest = largest_of(v, 0, T::kBlock) * T::kNorm;
      if constexpr (T::kRest > 0)
        largest = arch::max_or_nan(largest, largest_of(v, T::kBlock, T::kPart) * T::kRestNorm);
      if (!__any_sync(kAllLanes, !(largest <= args_.limit))) return largest;
    }
  }

  /// Rotate what scan() has seen, and now was taken again.
  __device__ __forceinline__ void rotate_again(Values& v) const {
    if (wild_) clip(v);
    rotate(v);
  }

  /// Keep a step's sums until its scale is known.
  __device__ __forceinline__ void hold(const Values& v) const {
    uint4* own = held_ + lane_anew() * T::kHeld;
#pragma unroll
    for (int word = 0; word < T::kPart / 4; ++word)
      own[word] = make_uint4(__float_as_uint(v[4 * word]), __float_as_uint(v[4 * word + 1]),
                             __float_as_uint(v[4 * word + 2]), __float_as_uint(v[4 * word + 3]));
  }

  /// Round what is held.
  __device__ __forceinline__ void write(const Span& span, const RowScale<T>& scale) const {
    uint4* own = held_ + lane_anew() * T::kHeld;
#pragma unroll
    for (int word = 0; word < T::kPart / 16; ++word) {
      const float factor = word * 16 < T::kBlock ? scale.factor : scale.factor_rest;
      uint32_t codes[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint4 sums = own[4 * word + i];
        codes[i] = arch::pack_e4m3(__uint_as_float(sums.x) * factor, __uint_as_float(sums.y) * factor,
                                   __uint_as_float(sums.z) * factor, __uint_as_float(sums.w) * factor);
      }
      own[word] = make_uint4(codes[0], codes[1], codes[2], codes[3]);  // in place of sums that are done with
    }
    __syncwarp();
    constexpr int kWords = T::kHeadDim / 16, kPartWords = T::kPart / 16, kAtOnce = 32 / kWords;
    const int lane = lane_anew(), word = lane % kWords, from = word / kPartWords * T::kHeld + word % kPartWords;
    const int stride = static_cast<int>(args_.rows.out[0]);
#pragma unroll
    for (int first = 0; first < T::kRows; first += kAtOnce) {
      const int row = first + lane / kWords;
      if ((32 % kWords && lane >= kAtOnce * kWords) || row >= span.rows) continue;
      __stcs(reinterpret_cast<uint4*>(span.out + row * stride + word * 16), held_[row * T::kLanes * T::kHeld + from]);
    }
    __syncwarp();
  }

 private:
  /// For addresses that are not worth a register between two steps.
  static __device__ __forceinline__ int lane_anew() { return static_cast<int>(arch::thread_anew() % 32); }

  /// All ones in the second lane of a row.
  static __device__ __forceinline__ uint32_t second() { return -(threadIdx.x % T::kLanes); }

  /// The sign bits of a pair of dims.
  static __device__ __forceinline__ constexpr uint32_t signs(int dim) {
    return (hadamard_negates(dim) ? 0x8000u : 0) | (hadamard_negates(dim + 1) ? 0x80000000u : 0);
  }

  /// Eight elements; the signs of the first lane's dims are left to rotate().
  __device__ __forceinline__ void unpack(Values& v, int word, uint4 loaded) const {
    const uint32_t pairs[] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int dim = word * kGroup + 2 * i;
      uint32_t pair = pairs[i];
      if constexpr (T::kLanes > 1) pair ^= second() & (signs(dim) ^ signs(dim + T::kPart));
      const float2 two = arch::unpack<Element>(pair);
      v[dim] = two.x;
      v[dim + 1] = two.y;
    }
  }

  /// Once more what was taken, from where it was loaded.
  __device__ __forceinline__ void take_clipped(Values& v, const Span& span) const {
    const int lane = lane_anew(), row = min(lane / T::kLanes, max(span.rows - 1, 0));
    const Element* x = span.x + row * static_cast<int>(args_.rows.x[0]) + lane % T::kLanes * T::kPart;
#pragma unroll
    for (int word = 0; word < T::kPart / kGroup; ++word) unpack(v, word, reinterpret_cast<const uint4*>(x)[word]);
    clip(v);
  }

  static __device__ __forceinline__ void clip(Values& v) {
#pragma unroll
    for (int i = 0; i < T::kPart; ++i)
      if (fabsf(v[i]) > kHuge) v[i] = copysignf(kHuge, v[i]);
  }

  /// As rotate() of quantize_lane.cuh: the same sums in the same order.
  __device__ __forceinline__ void rotate(Values& v) const {
#pragma unroll
    for (int step = 1; step < T::kPart; step *= 2) {
#pragma unroll
      for (int i = 0; i < T::kPart; ++i) {
        if (i & step || step >= (i < T::kBlock ? T::kBlock : T::kRest)) continue;
        const float a = step == 1 && hadamard_negates(i) ? -v[i] : v[i];
        const float b = step == 1 && hadamard_negates(i + 1) ? -v[i + 1] : v[i + step];
        v[i] = a + b;
        v[i + step] = a - b;
      }
    }
    if constexpr (T::kLanes > 1) {
      const int lane = lane_anew();
      const float sign = lane % 2 ? -1.f : 1.f;
#pragma unroll
      for (int i = 0; i < T::kPart; ++i) v[i] = fmaf(sign, v[i], __shfl_sync(kAllLanes, v[i], lane ^ 1));
    }
  }

  /// The largest of these; NaN where one is. By fours, which do not wait for each other.
  static __device__ __forceinline__ float largest_of(const Values& v, int first, int end) {
    float largest[4] = {};
#pragma unroll
    for (int i = 0; i < T::kPart; ++i)
      if (i >= first && i < end) largest[i % 4] = arch::max_or_nan(largest[i % 4], fabsf(v[i]));
    return arch::max_or_nan(arch::max_or_nan(largest[0], largest[1]), arch::max_or_nan(largest[2], largest[3]));
  }

  /// amax of what is neither NaN nor infinite.
  __device__ __forceinline__ float largest_finite(const Values& v) {
    float largest = 0;
    bool infinite = false;
#pragma unroll
    for (int i = 0; i < T::kPart; ++i) {
      const float size = fabsf(v[i]) * (i < T::kBlock ? T::kNorm : T::kRestNorm);
      if (size <= args_.limit) largest = fmaxf(largest, size);
      infinite |= size > args_.limit;
    }
    wild_ |= __any_sync(kAllLanes, infinite);
    return largest;
  }

  const QuantizeArgs& args_;
  uint4 *loaded_, *held_;
  bool wild_ = false;  // of what this warp has seen some is infinite, or counts as that
};

}  // namespace fa3
