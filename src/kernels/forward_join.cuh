// Parts of a tile of few rows, which the thread blocks of a cluster send each other and join: as soon as a part is
// made, with no barrier in between.
#pragma once
#include "arch/cluster.cuh"
#include "attention/softmax.cuh"
#include "kernels/forward_epilogue.cuh"

namespace fa3 {

/// What a thread block is sent of tiles of so many rows. A unit is 8 columns of a row; of each part of it every lane of
/// the quad that had it sends two numbers of output with the row's maximum and sum. The blocks share out units evenly,
/// rounded up.
template <int kColumns, int kRows>
struct SentUnits {
  static constexpr int kOfRow = kColumns / 8, kLanes = 4;
  static constexpr int kMost = kRows * kOfRow + kMostCluster - 1;  // of all parts
  float4 lane[kMost][kLanes];
  arch::Barrier full;

  static constexpr int rows_in(int bytes) {
    return (bytes / (kLanes * static_cast<int>(sizeof(float4))) - (kMostCluster - 1)) / kOfRow;
  }
};

template <class Traits>
class ClusterJoin {
  using RowSoftmax = Softmax<typename Traits::Element, Traits::kTileN>;
  using Units = SentUnits<Traits::kHeadDimV, Traits::kMostJoinedRows>;
  static constexpr int kPartsOfLane = 4;

 public:
  /// Before the part is made, while its keys come: where its numbers will go.
  __device__ __forceinline__ ClusterJoin(const typename Traits::Args& args, Units& units, const TileHead& work)
      : args_(args), units_(units), work_(work) {
    if (work.parts == 1) return;
    all_ = work.seqlen_q * args.packing().heads * Units::kOfRow;
    each_ = args.extras.splits.count.quotient(all_ + work.parts - 1);
    first_ = work.part * each_;
    count_ = smaller(each_, all_ - first_);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int unit = row(r) * Units::kOfRow;
      block_[r] = unit / each_;
      unit_[r] = unit - block_[r] * each_;
    }
    lane_bits_ = work.parts > 2 * kPartsOfLane ? 2 : work.parts > kPartsOfLane ? 1 : 0;
    lane_ = threadIdx.x & ((1 << lane_bits_) - 1);
    pair_ = threadIdx.x >> lane_bits_ & 3;
    place_ = place(first_unit());
  }

  /// This thread's numbers, each to the block that joins it. `rows` of its two exist.
  __device__ __forceinline__ void send(const float (&o)[Traits::kColumnsO / 2], const RowSoftmax& softmax,
                                       int rows) const {
    arch::cluster_acquire();  // the others have made their barriers
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (r >= rows) return;
      const float sum = softmax.sum_of_row(r);
      if (row(r) * Units::kOfRow >= all_) return;
      const bool empty = softmax.met_nothing(r);  // then o holds anything
      int block = block_[r], unit = unit_[r];
#pragma unroll
      for (int i = 0; i < Units::kOfRow; ++i) {
        const float4 numbers =
            make_float4(empty ? 0.f : o[4 * i + 2 * r], empty ? 0.f : o[4 * i + 2 * r + 1], softmax.row_max[r], sum);
        arch::send(&units_.lane[unit * work_.parts + work_.part][threadIdx.x % 4], numbers, units_.full, block);
        if (++unit == each_) unit = 0, ++block;
      }
    }
  }

  /// This block's units, from all parts. Each is joined in the same order whoever came first.
  __device__ __forceinline__ void join() {
    if (count_ <= 0) return;
    if (threadIdx.x == 0) units_.full.arrive_expecting(count_ * work_.parts * sizeof(units_.lane[0]));
    units_.full.wait(0);
#pragma unroll 1
    for (int unit = first_unit();;) {
      join(unit);
      unit += Traits::kThreads / 4 >> lane_bits_;
      if (arch::uniform(unit) >= count_) return;
      place_ = place(unit);
    }
  }

 private:
  /// Where two columns of output go, and with the first of them the row's lse; and the row's sink.
  struct Place {
    uint32_t* out;  // or null
    float* lse;     // or null
    float sink;
  };

  __device__ __forceinline__ static int row(int r) { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * r; }

  __device__ __forceinline__ int first_unit() const { return threadIdx.x / 4 >> lane_bits_; }

  __device__ __forceinline__ Place place(int unit) const {
    const int index = first_ + unit, row = index / Units::kOfRow;
    const int column = index % Units::kOfRow * 8 + 2 * pair_;
    const int position = args_.packing().position_of(row), head = args_.packing().head_of(row);
    const RowPlaces places = RowPlaces::of<Traits>(args_, work_, 0);
    if (unit >= count_ || lane_ > 0 || !places.exist(position, head)) return {nullptr, nullptr, -INFINITY};
    const int64_t query = places.first_row + position, query_head = places.first_head + head;
    auto* const out = static_cast<uint16_t*>(args_.out) + places.batch * args_.out_stride[0] +
                      query * args_.out_stride[1] + query_head * args_.out_stride[2] + column;
    float* const lse =
        args_.lse + places.batch * args_.lse_stride[0] + query_head * args_.lse_stride[1] + query * args_.lse_stride[2];
    return {column < args_.head_dim_v ? reinterpret_cast<uint32_t*>(out) : nullptr,
            args_.lse && column == 0 ? lse : nullptr, args_.has_sinks() ? args_.extras.sinks[query_head] : -INFINITY};
  }

  /// What the neighbour has, if there is one.
  __device__ __forceinline__ float of_lane(float x, int bit, float none) const {
    x = __shfl_xor_sync(~0u, x, 1 << bit);
    return bit < lane_bits_ ? x : none;
  }

  /// Two columns of a unit.
  __device__ __forceinline__ void join(int unit) const {
    float4 numbers[kPartsOfLane];
    float top = -INFINITY;
#pragma unroll
    for (int n = 0; n < kPartsOfLane; ++n) {
      const int part = (n << lane_bits_) + lane_;
      numbers[n] = unit < count_ && part < work_.parts ? units_.lane[unit * work_.parts + part][pair_]
                                                       : make_float4(0.f, 0.f, -INFINITY, 0.f);
      top = fmaxf(top, numbers[n].z);
    }
#pragma unroll
    for (int bit = 0; bit < 2; ++bit) top = fmaxf(top, of_lane(top, bit, -INFINITY));
    float sum = 0.f, x[2] = {};
#pragma unroll
    for (const float4& part : numbers) {
      const float weight = RowSoftmax::weight(part.z, top);
      sum += weight * part.w;
      x[0] += weight * part.x;
      x[1] += weight * part.y;
    }
#pragma unroll
    for (int bit = 0; bit < 2; ++bit) {
      sum += of_lane(sum, bit, 0.f);
      x[0] += of_lane(x[0], bit, 0.f);
      x[1] += of_lane(x[1], bit, 0.f);
    }
    const auto result = RowSoftmax::result(top, sum, place_.sink);
    const float scale = result.scale < 0 ? 0.f : result.scale;
    if (place_.out) *place_.out = pack_output<Traits>(args_, x[0] * scale, x[1] * scale);
    if (place_.lse) *place_.lse = result.lse;
  }

  const typename Traits::Args& args_;
  Units& units_;
  const TileHead& work_;
  int all_, each_;               // units of the tile, and of each block
  int first_, count_;            // this block's
  int lane_bits_, lane_, pair_;  // 1, 2 or 4 lanes have a pair of a unit's columns, and as many-th a part each
  int block_[2], unit_[2];       // where this thread's two rows begin
  Place place_;                  // of the units that are joined next
};

}  // namespace fa3
