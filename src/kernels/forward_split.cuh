// Tiles that are split along the keys: the parts of a tile are left where others can read them, and joined.
#pragma once
#include "arch/cluster.cuh"
#include "arch/counter.cuh"
#include "arch/warpgroup.cuh"
#include "kernels/forward_epilogue.cuh"

namespace fa3 {

/// The parts of a warpgroup's rows. A part has the outputs of each of 64 rows, its maximum and its sum. Where the
/// thread blocks of a cluster have a tile's parts, they lie in shared memory, and each block joins its share of the
/// rows. Else they lie in device memory, and whoever is last joins them: each warpgroup of a tile stands alone, and
/// none ever waits for another.
template <class Traits>
class PartRows {
  using RowSoftmax = Softmax<typename Traits::Element, Traits::kTileN>;
  using Shared = ForwardShared<Traits>;
  static constexpr int kDim = Traits::kHeadDimV;
  static constexpr int kRowFloats = kDim + 8;  // the eighth row begins where banks repeat

 public:
  static constexpr int kFloats = 64 * kRowFloats;
  static constexpr int kBytes = Traits::kConsumers * kFloats * static_cast<int>(sizeof(float));  // of a tile's part
  /// A part lies over Q, K and V, which nobody needs any more.
  static constexpr bool kFitsShared = kBytes <= sizeof(Shared::q) + sizeof(Shared::k) + sizeof(Shared::v);

  __device__ __forceinline__ PartRows(const typename Traits::Args& args, Shared& shared, const TileHead& work,
                                      uint32_t thread)
      : args_(args),
        shared_(shared),
        work_(work),
        thread_(thread % 128),
        warpgroup_(arch::uniform(thread / 128)),
        places_(RowPlaces::of<Traits>(args, work, warpgroup_)),
        parts_(arch::uniform(work.parts)) {}

  /// Begin to count the parts that are there: early, since memory takes its time to answer.
  __device__ __forceinline__ void expect() const {
    if (!in_cluster() && has_rows() && thread_ == 0) counter().open();
  }

  /// Leave this part; true, for all of the warpgroup: join() is to follow.
  __device__ __forceinline__ bool leave(const float (&o)[kDim / 2], const RowSoftmax& softmax) const {
    if (in_cluster()) {
      // Consumers of other rows may not be done with what the part comes to lie over.
      if constexpr (Traits::kConsumers > 1) arch::barrier_sync(1 + 2 * Traits::kConsumers, 128 * Traits::kConsumers);
      write(o, softmax, own_part());
      arch::cluster_publish();
      return true;
    }
    if (!has_rows()) return false;
    write(o, softmax, part(work_.part));
    arch::barrier_sync(barrier(), 128);  // now the count below comes after all of the warpgroup's rows
    const bool last = thread_ == 0 && counter().add_in_order() + 1 == parts_;
    const bool all_here = arch::uniform(arch::barrier_any(barrier(), 128, last));
    if (last) counter().close();
    return all_here;
  }

  /// Join the parts and write the rows, or this block's share of them. Which sums are made does not depend on who was
  /// last, so the bits do not either.
  __device__ __forceinline__ void join() const {
    const uint32_t vectors = arch::uniform(larger(places_.positions, 0) * args_.packing().heads * kVectors);
    if (in_cluster())
      join_share(vectors);
    else
      join_all(vectors);
  }

 private:
  static constexpr uint32_t kVectors = kDim / 8;  // of a row: 4 columns of each half, so that neighbours read a stretch
  static constexpr int kTogether = 8;             // parts on their way at once

  /// Of a vector.
  struct Joined {
    float max, sum;
    float4 x[2];

    __device__ __forceinline__ void scale(float weight) {
      sum *= weight;
#pragma unroll
      for (float4& v : x) v = make_float4(v.x * weight, v.y * weight, v.z * weight, v.w * weight);
    }
  };

  /// Where a vector is, and whether its row exists.
  struct Place {
    uint32_t row, column;
    int position, head;
    bool exists;
  };

  __device__ __forceinline__ Place place(uint32_t i, uint32_t end) const {
    Place at{i / kVectors % 64, i % kVectors * 4};
    at.position = args_.packing().position_of(at.row);
    at.head = args_.packing().head_of(at.row);
    at.exists = i < end && places_.exist(at.position, at.head);
    return at;
  }

  /// In device memory: a thread joins a vector, part after part, several on their way at once.
  __device__ __forceinline__ void join_all(uint32_t end) const {
#pragma unroll 1
    for (uint32_t first = 0; first < end; first += 128) {  // a warp goes on together: see uniform() in the consumer
      const Place at = place(first + thread_, end);
      const Joined joined = join_parts(at);
      if (at.exists) store(destination(at), joined);
    }
  }

  /// In a cluster: a lane reads a part of a vector, and 2, 4, 8 or 16 lanes add up in a tree. Where the first vector
  /// goes is worked out before the parts are waited for.
  __device__ __forceinline__ void join_share(uint32_t end) const {
    const uint32_t share = args_.extras.splits.count.quotient(end + parts_ - 1), part = arch::uniform(work_.part);
    const uint32_t lanes = 2u << (31 - __clz(parts_ - 1)), mine = thread_ % 32 & (lanes - 1);
    end = smaller((part + 1) * share, end);
    const float* const from = arch::in_block(own_part(), smaller(mine, parts_ - 1));
    uint32_t first = part * share;
    Place at = place(first + thread_ / lanes, end);
    Destination to = destination(at);
    arch::cluster_acquire();
#pragma unroll 1
    while (true) {
      first += 128 / lanes;
      const bool more = first < end;
      Joined joined{-INFINITY, 0.f, {}};
      if (at.exists && mine < parts_) {
        const float* const here = from + at.row * kRowFloats;
        joined.max = here[kDim];
        joined.sum = here[kDim + 1];
#pragma unroll
        for (int half = 0; half < 2; ++half)
          joined.x[half] = *reinterpret_cast<const float4*>(here + at.column + half * (kDim / 2));
      }
      float top = joined.max;
#pragma unroll 1
      for (uint32_t step = 1; step < lanes; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
      joined.scale(RowSoftmax::weight(joined.max, top));
      joined.max = top;
#pragma unroll 1
      for (uint32_t step = 1; step < lanes; step *= 2) {
        joined.sum += __shfl_xor_sync(~0u, joined.sum, step);
#pragma unroll
        for (float4& v : joined.x) {
          v.x += __shfl_xor_sync(~0u, v.x, step);
          v.y += __shfl_xor_sync(~0u, v.y, step);
          v.z += __shfl_xor_sync(~0u, v.z, step);
          v.w += __shfl_xor_sync(~0u, v.w, step);
        }
      }
      if (!more) arch::cluster_arrive();  // what the lanes have exchanged has been read
      if (at.exists && mine == 0) store(to, joined);
      if (!more) break;
      at = place(first + thread_ / lanes, end);
      to = destination(at);
    }
    arch::cluster_wait();  // a block that ends takes its shared memory with it
  }

  /// Where a vector's columns of output go, and with the first of them the row's lse; and the row's sink.
  struct Destination {
    uint16_t* out;
    float* lse;  // or null
    float sink;
    uint32_t column;
  };

  __device__ __forceinline__ Destination destination(const Place& at) const {
    const int query_head = places_.first_head + at.head;
    const int64_t query = places_.first_row + at.position;
    Destination to{static_cast<uint16_t*>(args_.out), nullptr, -INFINITY, at.column};
    to.out += places_.batch * args_.out_stride[0] + query * args_.out_stride[1] + query_head * args_.out_stride[2];
    if (args_.lse && at.column == 0) {
      const int64_t* const stride = args_.lse_stride;
      to.lse = args_.lse + places_.batch * stride[0] + query_head * stride[1] + query * stride[2];
    }
    if (args_.has_sinks() && at.exists) to.sink = args_.extras.sinks[query_head];
    return to;
  }

  __device__ __forceinline__ void store(const Destination& to, const Joined& joined) const {
    const auto result = RowSoftmax::result(joined.max, joined.sum, to.sink);
    if (to.lse) *to.lse = result.lse;
    float scale = result.scale < 0 ? 0.f : result.scale * args_.kept_scale();
    if constexpr (RowSoftmax::kEightBits) scale *= work_.value_descale;
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t here = to.column + half * (kDim / 2);
      if (here < args_.head_dim_v) store_columns(to.out + here, joined.x[half], scale);
    }
  }

  /// This warpgroup's rows of this part.
  __device__ __forceinline__ void write(const float (&o)[kDim / 2], const RowSoftmax& softmax, float* to) const {
    const uint32_t lane = thread_ % 32;
    const float sum[2] = {softmax.sum_of_row(0), softmax.sum_of_row(1)};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t row = thread_ / 32 * 16 + lane / 4 + 8 * r;
      if (!exists(row)) continue;
      float2* const columns = reinterpret_cast<float2*>(to + row * kRowFloats) + lane % 4;
      const bool empty = softmax.met_nothing(r);  // then o holds anything
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i)
        columns[4 * i] = make_float2(empty ? 0.f : o[4 * i + 2 * r], empty ? 0.f : o[4 * i + 2 * r + 1]);
      // From all four lanes, though one is read: a sector of 32 bytes that is written in part comes from memory first.
      columns[kDim / 2] = make_float2(softmax.row_max[r], sum[r]);
    }
  }

  __device__ __forceinline__ Joined join_parts(const Place& at) const {
    Joined joined{-INFINITY, 0.f, {}};
    const float* from = part(0) + at.row * kRowFloats;
#pragma unroll 1
    for (int first = 0; first < parts_; first += kTogether) {
      float2 head[kTogether];
      float4 x[kTogether][2];
#pragma unroll
      for (int n = 0; n < kTogether; ++n) {
        head[n] = make_float2(-INFINITY, 0.f);
        x[n][0] = x[n][1] = make_float4(0, 0, 0, 0);
        if (at.exists && first + n < parts_) {
          head[n] = __ldcg(reinterpret_cast<const float2*>(from + kDim));
#pragma unroll
          for (int half = 0; half < 2; ++half)
            x[n][half] = __ldcg(reinterpret_cast<const float4*>(from + at.column + half * (kDim / 2)));
        }
        from += Traits::kConsumers * kFloats;
      }
      float top = joined.max;
#pragma unroll
      for (int n = 0; n < kTogether; ++n) top = fmaxf(top, head[n].x);
      const float shrink = RowSoftmax::weight(joined.max, top);
      joined.max = top;
      joined.scale(shrink);
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
    if (args_.odd_out())
      store_elements(to, words);
    else
      *reinterpret_cast<uint2*>(to) = words;
  }

  __device__ __forceinline__ bool has_rows() const { return arch::uniform(places_.positions) > 0; }
  __device__ __forceinline__ bool exists(uint32_t row) const {
    return places_.exist(args_.packing().position_of(row), args_.packing().head_of(row));
  }

  /// The warpgroup's own barrier, as the consumer's.
  __device__ __forceinline__ int barrier() const { return 1 + Traits::kConsumers + warpgroup_; }

  __device__ __forceinline__ arch::Counter counter() const {
    return {args_.parts_done + (int64_t{work_.place} * Traits::kConsumers + warpgroup_), args_.ticket};
  }

  /// The tile's parts are those of a cluster's blocks: the launch says so. A pair's have parts of two tiles.
  __device__ __forceinline__ bool in_cluster() const {
    return kFitsShared && arch::cluster_size() > 1 && !(Traits::kPairs && args_.paired());
  }

  __device__ __forceinline__ float* own_part() const {
    return reinterpret_cast<float*>(shared_.q) + warpgroup_ * kFloats;
  }
  __device__ __forceinline__ float* part(int n) const {
    return args_.parts + ((int64_t{work_.place} * parts_ + n) * Traits::kConsumers + warpgroup_) * kFloats;
  }

  const typename Traits::Args& args_;
  Shared& shared_;
  const TileHead& work_;
  const uint32_t thread_;  // of the warpgroup's 128
  const int warpgroup_;
  const RowPlaces places_;
  const int parts_;
};

}  // namespace fa3
