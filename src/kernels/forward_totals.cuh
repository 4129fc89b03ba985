// Where sums of fp8 products move on to: O in fp32. Tensor cores keep 13 bits below the largest of what they add.
#pragma once
#include "arch/l2.cuh"
#include "arch/warpgroup.cuh"
#include "attention/softmax.cuh"
#include "kernels/forward_args.h"
#include "kernels/forward_traits.cuh"

namespace fa3 {

/// A thread's totals, in shared memory or, where it has no room, in this thread block's part of the workspace. Like o,
/// they count relative to their row's maximum, as it was at some time.
template <class Traits>
class Totals {
  using RowSoftmax = Softmax<typename Traits::Element, Traits::kTileN>;
  using Output = float[Traits::kColumnsO / 2];
  using RowMax = float[2];
  static constexpr int kVectors = Traits::kColumnsO / 8;  // of four floats
  static constexpr int kAtOnce = 4;                       // of them that are read; with fewer or more, ptxas spills
  // On top of sums of 2^32 at most: far from what fp32 holds.
  static constexpr float kMostGrowth = 1073741824.f;

 public:
  __device__ __forceinline__ Totals(const typename Traits::Args& args, ForwardShared<Traits>& shared)
      : args_(args), shared_(shared) {}

  /// Move o, which no product is under way to, to the totals, `again` with what is there, and begin anew.
  __device__ __forceinline__ void move(Output& o, const RowMax& row_max, bool again) {
    if constexpr (Traits::kSharedTotals)
      move_to_shared(o, row_max, again);
    else
      move_to_workspace(o, row_max, again);
#pragma unroll
    for (float& x : o) x = 0.f;
  }

  /// Add to o what went before it.
  __device__ __forceinline__ void add(Output& o, const RowMax& row_max) const {
    const float4* const totals = own();
#pragma unroll
    for (int first = 0; first < kVectors; first += kAtOnce) add(o, totals, first, row_max);
  }

 private:
  __device__ __forceinline__ void move_to_shared(Output& o, const RowMax& row_max, bool again) {
    float4* const totals = own();
#pragma unroll
    for (int first = 0; first < kVectors; first += kAtOnce) {
      if (again) add(o, totals, first, row_max);
#pragma unroll
      for (int i = first; i < smaller(first + kAtOnce, kVectors); ++i)
        totals[128 * i] = make_float4(o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]);
    }
    take(row_max);
  }

  /// The workspace is far. L2 adds, and nobody waits: so totals stay relative to the maximum of the first time, for as
  /// long as fp32 has room for how much that has grown.
  __device__ __forceinline__ void move_to_workspace(const Output& o, const RowMax& row_max, bool again) {
    float4* const totals = own();
    if (!again) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
        arch::store_to_l2(totals + 128 * i, make_float4(o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]));
      take(row_max);
      return;
    }
    // What is relative to no key's maximum would count for nothing later. There the growth is infinite, or NaN.
    float growth[2] = {arch::exp2_fast(row_max[0] - max_[0]), arch::exp2_fast(row_max[1] - max_[1])};
    if (!__all_sync(~0u, growth[0] <= kMostGrowth && growth[1] <= kMostGrowth)) {
      const float weight[2] = {weight_of(0, row_max), weight_of(1, row_max)};
#pragma unroll 1
      for (int i = 0; i < kVectors; ++i) {
        const float4 total = arch::load_from_l2(totals + 128 * i);
        arch::store_to_l2(totals + 128 * i, make_float4(total.x * weight[0], total.y * weight[0], total.z * weight[1],
                                                        total.w * weight[1]));
      }
      take(row_max);
      growth[0] = growth[1] = 1.f;
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      arch::add_to_l2(totals + 128 * i, make_float4(o[4 * i] * growth[0], o[4 * i + 1] * growth[0],
                                                    o[4 * i + 2] * growth[1], o[4 * i + 3] * growth[1]));
  }

  /// kAtOnce vectors, or as many as are left.
  __device__ __forceinline__ void add(Output& o, const float4* totals, int first, const RowMax& row_max) const {
    const float weight[2] = {weight_of(0, row_max), weight_of(1, row_max)};
    const int count = smaller(kAtOnce, kVectors - first);
    float4 total[kAtOnce];
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if constexpr (Traits::kSharedTotals)
        total[i] = totals[128 * (first + i)];
      else
        total[i] = arch::load_from_l2(totals + 128 * (first + i));
    }
#pragma unroll
    for (int i = 0; i < count; ++i) {
      float* const sums = o + 4 * (first + i);
      sums[0] = fmaf(total[i].x, weight[0], sums[0]);
      sums[1] = fmaf(total[i].y, weight[0], sums[1]);
      sums[2] = fmaf(total[i].z, weight[1], sums[2]);
      sums[3] = fmaf(total[i].w, weight[1], sums[3]);
    }
  }

  /// Where the first four are, of O's first 8 columns, that this thread has for itself. Those of the next 8 are 128
  /// vectors further, so that a warp's lie side by side.
  __device__ __forceinline__ float4* own() const {
    const uint32_t thread = arch::thread_anew(), place = thread / 128 * (kVectors * 128) + thread % 128;
    if constexpr (Traits::kSharedTotals)
      return shared_.totals + place;
    else
      return args_.totals + (blockIdx.x * (Traits::kConsumers * kVectors * 128) + place);
  }

  __device__ __forceinline__ void take(const RowMax& row_max) {
    max_[0] = row_max[0];
    max_[1] = row_max[1];
  }
  __device__ __forceinline__ float weight_of(int r, const RowMax& row_max) const {
    return RowSoftmax::weight(max_[r], row_max[r]);
  }

  const typename Traits::Args& args_;
  ForwardShared<Traits>& shared_;
  float max_[2];  // what the totals are relative to
};

}  // namespace fa3
