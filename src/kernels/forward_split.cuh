// Tiles that are split along the keys: each part is left in memory, and whoever is last joins them.
#pragma once
#include "arch/counter.cuh"
#include "arch/warpgroup.cuh"
#include "kernels/forward_epilogue.cuh"

namespace fa3 {

/// The parts of a warpgroup's rows. Each warpgroup of a tile stands alone, and none ever waits for another. A part in
/// memory has the maximum and the sum of each of 64 rows, then their outputs.
template <class Traits>
class PartRows {
  using RowSoftmax = Softmax<typename Traits::Element, Traits::kTileN>;
  static constexpr int kDim = Traits::kHeadDimV;

 public:
  static constexpr int kFloats = 64 * (2 + kDim);
  static constexpr int kBytes = Traits::kConsumers * kFloats * static_cast<int>(sizeof(float));  // of a tile's part

  __device__ __forceinline__ PartRows(const ForwardArgs& args, const TileHead& work, uint32_t thread)
      : args_(args),
        work_(work),
        thread_(thread % 128),
        warpgroup_(arch::uniform(thread / 128)),
        places_(args, work, Traits::kConsumers, warpgroup_),
        parts_(arch::uniform(work.parts)) {}

  /// The tile is not split.
  __device__ __forceinline__ bool all_here() const { return parts_ == 1; }

  /// Begin to count the parts that are there: early, since memory takes its time to answer.
  __device__ __forceinline__ void expect() const {
    if (parts_ > 1 && has_rows() && thread_ == 0) counter().open();
  }

  /// Leave this part; true, for all of the warpgroup: all parts are there now. Without rows nothing is left.
  __device__ __forceinline__ bool leave(const float (&o)[kDim / 2], const RowSoftmax& softmax) const {
    if (!has_rows()) return false;
    float* const mine = part(work_.part);
    const uint32_t lane = thread_ % 32;
    const float sum[2] = {softmax.sum_of_row(0), softmax.sum_of_row(1)};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t row = thread_ / 32 * 16 + lane / 4 + 8 * r;
      if (!exists(row)) continue;
      if (lane % 4 == 0) __stcg(reinterpret_cast<float2*>(mine) + row, make_float2(softmax.row_max[r], sum[r]));
      float2* const to = reinterpret_cast<float2*>(mine + 128 + row * kDim) + lane % 4;
      const bool empty = softmax.met_nothing(r);  // then o holds anything
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i)
        __stcg(to + 4 * i, make_float2(empty ? 0.f : o[4 * i + 2 * r], empty ? 0.f : o[4 * i + 2 * r + 1]));
    }
    arch::barrier_sync(barrier(), 128);  // now the count below comes after all of the warpgroup's rows
    const bool last = thread_ == 0 && counter().add_in_order() + 1 == parts_;
    const bool all_here = arch::uniform(arch::barrier_any(barrier(), 128, last));
    if (last) counter().close();
    return all_here;
  }

  /// Read all parts back and write the rows: in order, so that the bits do not depend on who was last. A thread takes 4
  /// columns of each half of a row, for neighbours to read one stretch of memory, and several parts at once.
  __device__ __forceinline__ void join() const {
    constexpr uint32_t kVectors = kDim / 8;
    const uint32_t count = arch::uniform(places_.positions * args_.packing.heads * kVectors);
    float descale = 1.f;
    if constexpr (RowSoftmax::kEightBits) descale = args_.v_descale.at(work_.batch, work_.head_kv);
#pragma unroll 1
    for (uint32_t first = 0; first < count; first += 128) {  // a warp goes on together: see uniform() in the consumer
      const uint32_t i = first + thread_, row = i / kVectors % 64, column = i % kVectors * 4;
      const int position = args_.packing.position_of(row), head = args_.packing.head_of(row);
      const Joined joined = join_row(row, column);
      if (i >= count || !places_.exist(position, head)) continue;
      const int query_head = places_.first_head + head;
      const auto result = RowSoftmax::result(joined.max, joined.sum, args_.sinks ? args_.sinks[query_head] : -INFINITY);
      const int64_t query = places_.first_row + position;
      if (args_.lse && column == 0) {
        const int64_t* const stride = args_.lse_stride;
        args_.lse[places_.batch * stride[0] + query_head * stride[1] + query * stride[2]] = result.lse;
      }
      const float scale = result.scale < 0 ? 0.f : result.scale * descale * args_.dropout.scale;
      auto* const to = static_cast<uint16_t*>(args_.out) + places_.batch * args_.out_stride[0] +
                       query * args_.out_stride[1] + query_head * args_.out_stride[2];
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half) {
        const uint32_t here = column + half * (kDim / 2);
        if (here < args_.head_dim_v) store_columns(to + here, joined.x[half], scale);
      }
    }
  }

 private:
  static constexpr int kTogether = 8;  // parts on their way at once

  struct Joined {
    float max, sum;
    float4 x[2];
  };

  __device__ __forceinline__ Joined join_row(uint32_t row, uint32_t column) const {
    Joined joined{-INFINITY, 0.f, {}};
#pragma unroll 1
    for (int first = 0; first < parts_; first += kTogether) {
      float2 head[kTogether];
      float4 x[kTogether][2];
#pragma unroll
      for (int n = 0; n < kTogether; ++n) {
        head[n] = make_float2(-INFINITY, 0.f);
        x[n][0] = x[n][1] = make_float4(0, 0, 0, 0);
        if (first + n < parts_) {
          const float* const here = part(first + n);
          head[n] = __ldcg(reinterpret_cast<const float2*>(here) + row);
#pragma unroll
          for (int half = 0; half < 2; ++half)
            x[n][half] = __ldcg(reinterpret_cast<const float4*>(here + 128 + row * kDim + column + half * (kDim / 2)));
        }
      }
      float top = joined.max;
#pragma unroll
      for (int n = 0; n < kTogether; ++n) top = fmaxf(top, head[n].x);
      const float shrink = RowSoftmax::weight(joined.max, top);
      joined.max = top;
      joined.sum *= shrink;
#pragma unroll
      for (float4& sum : joined.x) sum = make_float4(sum.x * shrink, sum.y * shrink, sum.z * shrink, sum.w * shrink);
#pragma unroll
      for (int n = 0; n < kTogether; ++n) {
        const float weight = RowSoftmax::weight(head[n].x, top);
        joined.sum += weight * head[n].y;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          joined.x[half].x += weight * x[n][half].x;
          joined.x[half].y += weight * x[n][half].y;
          joined.x[half].z += weight * x[n][half].z;
          joined.x[half].w += weight * x[n][half].w;
        }
      }
    }
    return joined;
  }

  __device__ __forceinline__ void store_columns(uint16_t* to, const float4& x, float scale) const {
    const uint2 words = make_uint2(pack_output<Traits>(args_, x.x * scale, x.y * scale),
                                   pack_output<Traits>(args_, x.z * scale, x.w * scale));
    if (args_.out_vectors)
      *reinterpret_cast<uint2*>(to) = words;
    else
      store_elements(to, words);
  }

  __device__ __forceinline__ bool has_rows() const { return arch::uniform(places_.positions) > 0; }
  __device__ __forceinline__ bool exists(uint32_t row) const {
    return places_.exist(args_.packing.position_of(row), args_.packing.head_of(row));
  }

  /// The warpgroup's own barrier, as the consumer's.
  __device__ __forceinline__ int barrier() const { return 1 + Traits::kConsumers + warpgroup_; }

  __device__ __forceinline__ arch::Counter counter() const {
    return {args_.parts_done + (int64_t{work_.place} * Traits::kConsumers + warpgroup_), args_.ticket};
  }

  __device__ __forceinline__ float* part(int n) const {
    return args_.parts + ((int64_t{work_.place} * parts_ + n) * Traits::kConsumers + warpgroup_) * kFloats;
  }

  const ForwardArgs& args_;
  const TileHead& work_;
  const uint32_t thread_;  // of the warpgroup's 128
  const int warpgroup_;
  const RowPlaces places_;
  const int parts_;
};

}  // namespace fa3
