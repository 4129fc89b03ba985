// Tiles that are split along the keys: each part is left in memory, and whoever is last joins them.
#pragma once
#include "arch/counter.cuh"
#include "kernels/forward_epilogue.cuh"

namespace fa3 {

/// The parts of a warp's rows. Each warp of a tile stands alone, and nobody ever waits for another.
template <class Traits>
class PartRows {
 public:
  static constexpr int kWarps = 4 * Traits::kConsumers;
  static constexpr int kVectors = 1 + Traits::kHeadDimV / 8;  // a thread's: maxima and sums, then outputs
  static constexpr int kBytes = kWarps * 32 * kVectors * static_cast<int>(sizeof(float4));  // of one part of a tile

  __device__ __forceinline__ PartRows(const ForwardArgs& args, const TileHead& work, uint32_t thread)
      : args_(args),
        work_(work),
        thread_(thread),
        warpgroup_(arch::uniform(thread / 128)),
        warp_(thread / 32 % 4),
        lane_(thread % 32),
        parts_(arch::uniform(work.parts)) {}

  /// The tile is not split.
  __device__ __forceinline__ bool all_here() const { return parts_ == 1; }

  /// Leave this part; true: all parts are there now. A warp without rows leaves nothing.
  __device__ __forceinline__ bool leave(const float (&o)[Traits::kHeadDimV / 2],
                                        const Softmax<typename Traits::Element, Traits::kTileN>& softmax) const {
    const bool has_rows = 16 * warp_ < args_.packing.rows &&
                          query_of(args_, work_, Traits::kConsumers, warpgroup_, 16 * warp_) < work_.seqlen_q;
    if (!arch::uniform(has_rows)) return false;
    float4* mine = part(work_.part);
    __stcg(mine, make_float4(softmax.row_max[0], softmax.row_max[1], softmax.row_sum[0], softmax.row_sum[1]));
    const bool empty[2] = {softmax.met_nothing(0), softmax.met_nothing(1)};  // then o holds anything
#pragma unroll
    for (int i = 0; i < kVectors - 1; ++i)
      __stcg(mine + 32 * (i + 1), make_float4(empty[0] ? 0 : o[4 * i], empty[0] ? 0 : o[4 * i + 1],
                                              empty[1] ? 0 : o[4 * i + 2], empty[1] ? 0 : o[4 * i + 3]));
    __threadfence();
    __syncwarp();
    int before = 0;
    if (lane_ == 0) {
      const arch::Counter counter(args_.parts_done + int64_t{work_.place} * kWarps + 4 * warpgroup_ + warp_,
                                  args_.ticket);
      counter.open();
      before = counter.add();
      if (before + 1 == parts_) counter.close();
      __threadfence();
    }
    return __shfl_sync(~0u, before, 0) + 1 == parts_;
  }

  /// Read all parts back and write the rows: in order, so that the bits do not depend on who was last.
  __device__ __forceinline__ void join(StagedRows* staging,
                                       Softmax<typename Traits::Element, Traits::kTileN>& softmax) const {
    softmax.reset();
#pragma unroll 4
    for (int n = 0; n < parts_; ++n) {
      const float4 head = __ldcg(part(n));
      softmax.row_max[0] = fmaxf(softmax.row_max[0], head.x);
      softmax.row_max[1] = fmaxf(softmax.row_max[1], head.y);
    }
#pragma unroll 4
    for (int n = 0; n < parts_; ++n) {
      const float4 head = __ldcg(part(n));
      softmax.row_sum[0] += softmax.weight_of(0, head.x) * head.z;
      softmax.row_sum[1] += softmax.weight_of(1, head.y) * head.w;
    }
    const RowScales scales = finish_rows(args_, work_, Traits::kConsumers, thread_, softmax);
    const RowWriter<Traits> writer(args_, work_, thread_, scales, staging);
#pragma unroll 1
    for (int first = 0; first < kVectors - 1; first += kTogether) {  // many loads at once: each takes its time
      float4 sum[kTogether] = {};
#pragma unroll 2
      for (int n = 0; n < parts_; ++n) {
        const float4* here = part(n);
        const float4 head = __ldcg(here);
        const float weight[2] = {softmax.weight_of(0, head.x), softmax.weight_of(1, head.y)};
#pragma unroll
        for (int i = 0; i < kTogether; ++i)
          if (first + i < kVectors - 1) add(sum[i], __ldcg(here + 32 * (1 + first + i)), weight);
      }
#pragma unroll
      for (int i = 0; i < kTogether; i += 2)
        if (first + i < kVectors - 1) writer.put((first + i) / 2, sum[i], sum[i + 1]);
    }
  }

 private:
  static constexpr int kTogether = 4;  // vectors of a row

  __device__ __forceinline__ float4* part(int n) const {
    const int64_t index = (int64_t{work_.place} * parts_ + n) * kWarps + 4 * warpgroup_ + warp_;
    return args_.parts + index * (kVectors * 32) + lane_;
  }

  __device__ __forceinline__ static void add(float4& sum, const float4& x, const float (&weight)[2]) {
    sum.x += weight[0] * x.x;
    sum.y += weight[0] * x.y;
    sum.z += weight[1] * x.z;
    sum.w += weight[1] * x.w;
  }

  const ForwardArgs& args_;
  const TileHead& work_;
  const uint32_t thread_;
  const int warpgroup_, warp_, lane_, parts_;
};

}  // namespace fa3
