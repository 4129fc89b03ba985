// A warp's 16 rows of output and lse, from registers to memory.
#pragma once
#include "arch/fragments.cuh"
#include "arch/warpgroup.cuh"
#include "attention/softmax.cuh"
#include "kernels/forward_rows.cuh"

namespace fa3 {

/// What a row of output is still to be multiplied with, with the descale of fp8 values. That is read late: it would
/// take a register beside the last product.
template <class Traits>
__device__ __forceinline__ float with_descale(float scale, const TileHead& work) {
  return Traits::kEightBits ? scale * work.value_descale : scale;
}

/// A thread's two rows' factors, without it.
struct RowScales {
  float scale[2];

  __device__ __forceinline__ bool empty(int r) const { return scale[r] < 0; }  // it is 0, whatever the values hold
};

/// The rows' denominators, and their lse to memory.
template <class Traits, class Softmax>
__device__ __forceinline__ RowScales finish_rows(const typename Traits::Args& args, const TileHead& work,
                                                 uint32_t thread, const Softmax& softmax) {
  const RowPlaces places = RowPlaces::of<Traits>(args, work, thread / 128);
  RowScales scales;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = thread % 128 / 32 * 16 + thread % 32 / 4 + 8 * r;
    const int position = args.packing().position_of(row), head = args.packing().head_of(row);
    const bool exists = places.exist(position, head);
    const auto result =
        softmax.finish(r, args.has_sinks() && exists ? args.extras.sinks[places.first_head + head] : -INFINITY);
    scales.scale[r] = result.scale * args.kept_scale();
    if (args.lse && exists && thread % 4 == 0 && Traits::first_column(thread / 128) == 0)
      args.lse[places.batch * args.lse_stride[0] + (places.first_head + head) * args.lse_stride[1] +
               (places.first_row + position) * args.lse_stride[2]] = result.lse;
  }
  return scales;
}

/// Two numbers of output.
template <class Traits>
__device__ __forceinline__ uint32_t pack_output(const typename Traits::Args& args, float low, float high) {
  if constexpr (Traits::kEightBits)
    return args.out_float16 ? arch::pack<Float16>(low, high) : arch::pack<BFloat16>(low, high);
  else
    return arch::pack<typename Traits::Element>(low, high);
}

/// Four of them, to memory that is aligned to no more than one.
__device__ __forceinline__ void store_elements(uint16_t* to, const uint2& x) {
#pragma unroll
  for (int e = 0; e < 4; ++e) to[e] = static_cast<uint16_t>((e < 2 ? x.x : x.y) >> 16 * (e % 2));
}

/// Eight.
__device__ __forceinline__ void store_elements(uint16_t* to, const uint4& x) {
  store_elements(to, make_uint2(x.x, x.y));
  store_elements(to + 4, make_uint2(x.z, x.w));
}

/// Writes a warp's rows. A thread holds parts of two of them, as wgmma left them: rows lane / 4 and 8 below, and of
/// each 8 columns the pair 2 (lane % 4). They go through shared memory, 64 columns at a time (or 32), so that 8 lanes
/// (or 4) write a row in one stretch. A warp stands alone here: nothing waits for the other warps.
template <class Traits>
class RowWriter {
  using Element = std::conditional_t<Traits::kEightBits, uint16_t, typename Traits::Element>;  // of the output
  using Staging = typename Traits::Staging;
  static constexpr int kRowsAtOnce = 32 / Staging::kVectors, kTurns = Staging::kRows / kRowsAtOnce;

 public:
  static constexpr int kPairs = Traits::kColumnsO / 16;  // of 8 columns each

  __device__ __forceinline__ RowWriter(const typename Traits::Args& args, const TileHead& work, uint32_t thread,
                                       const RowScales& scales, Staging* staging)
      : args_(args),
        places_(RowPlaces::of<Traits>(args, work, thread / 128)),
        lane_(thread % 32),
        first_row_(16 * (thread / 32 % 4)),
        first_column_(Traits::first_column(thread / 128)),
        staging_(staging[thread / 32]),
        scale_{scales.empty(0) ? 0.f : with_descale<Traits>(scales.scale[0], work),
               scales.empty(1) ? 0.f : with_descale<Traits>(scales.scale[1], work)} {
    auto* first = static_cast<Element*>(args_.out) + places_.batch * args_.out_stride[0] +
                  places_.first_row * args_.out_stride[1] + places_.first_head * args_.out_stride[2] + first_column_ +
                  8 * (lane_ % Staging::kVectors);
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int row = first_row_ + kRowsAtOnce * turn + lane_ / Staging::kVectors;
      const int position = args_.packing().position_of(row), head = args_.packing().head_of(row);
      exists_[turn] = places_.exist(position, head);
      to_[turn] = first + position * args_.out_stride[1] + head * args_.out_stride[2];
    }
  }

  /// Columns 16 i to 16 i + 15: `a` and `b` have the two rows' pairs of each 8. To be called with i = 0, 1, ...
  __device__ __forceinline__ void put(int i, const float4& a, const float4& b) const {
    auto pack = [this](int r, float low, float high) {
      return pack_output<Traits>(args_, low * scale_[r], high * scale_[r]);
    };
    const int row = lane_ % 16, vector = 2 * (i % Staging::kPairs) + lane_ / 16;
    arch::store_matrices(staging_.at(row, vector), pack(0, a.x, a.y), pack(1, a.z, a.w), pack(0, b.x, b.y),
                         pack(1, b.z, b.w));
    if (i % Staging::kPairs == Staging::kPairs - 1 || i == kPairs - 1) write(i / Staging::kPairs);
  }

 private:
  /// The columns that are staged.
  __device__ __forceinline__ void write(int group) const {
    __syncwarp();
    const int offset = 8 * Staging::kVectors * group;
    const bool exists = first_column_ + offset + 8 * static_cast<int>(lane_ % Staging::kVectors) < args_.head_dim_v;
    if (!args_.odd_out()) {
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn)
        if (exists && exists_[turn]) *reinterpret_cast<uint4*>(to_[turn] + offset) = *staged(turn);
    } else {
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn)
        if (exists && exists_[turn]) store_elements(reinterpret_cast<uint16_t*>(to_[turn] + offset), *staged(turn));
    }
    __syncwarp();
  }

  __device__ __forceinline__ const uint4* staged(int turn) const {
    return staging_.at(kRowsAtOnce * turn + lane_ / Staging::kVectors, lane_ % Staging::kVectors);
  }

  const typename Traits::Args& args_;
  const RowPlaces places_;
  const uint32_t lane_, first_row_;
  const int first_column_;
  Staging& staging_;
  const float scale_[2];
  Element* to_[kTurns];  // this lane's part of the rows that it writes
  bool exists_[kTurns];
};

/// The rows of a tile that is not split.
template <class Traits>
__device__ __forceinline__ void store_rows(const RowWriter<Traits>& writer, const RowScales& scales,
                                           float (&o)[Traits::kColumnsO / 2]) {
  if (__any_sync(~0u, scales.empty(0) || scales.empty(1))) {  // products of zero probabilities may be NaN
#pragma unroll
    for (int i = 0; i < Traits::kColumnsO / 2; ++i)
      if (scales.empty(i / 2 % 2)) o[i] = 0.f;
  }
#pragma unroll
  for (int i = 0; i < writer.kPairs; ++i)
    writer.put(i, make_float4(o[8 * i], o[8 * i + 1], o[8 * i + 2], o[8 * i + 3]),
               make_float4(o[8 * i + 4], o[8 * i + 5], o[8 * i + 6], o[8 * i + 7]));
}

/// The rows of a part for another kernel to join: in fp32 (part, row, head, column), as if there were no other keys. A
/// sink belongs to the first part.
template <class Traits, class Softmax>
__device__ __forceinline__ void leave_rows(const typename Traits::Args& args, const TileHead& work, uint32_t thread,
                                           const float (&o)[Traits::kColumnsO / 2], const Softmax& softmax) {
  const RowPlaces places = RowPlaces::of<Traits>(args, work, thread / 128);
  const int first_column = Traits::first_column(thread / 128) + 2 * (thread % 4);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = thread % 128 / 32 * 16 + thread % 32 / 4 + 8 * r;
    const int position = args.packing().position_of(row), head = args.packing().head_of(row);
    const bool exists = places.exist(position, head), has_sink = args.has_sinks() && work.part == 0 && exists;
    const auto result = softmax.finish(r, has_sink ? args.extras.sinks[places.first_head + head] : -INFINITY);
    if (!exists) continue;
    const int64_t query = places.batch * args.queries.rows + places.first_row + position;
    const int64_t index =
        work.part * args.part_rows + query * args.num_heads_kv * args.packing().ratio + places.first_head + head;
    if (first_column == 0) args.parts_lse[index] = result.lse;
    float* const to = args.parts + index * args.head_dim_v + first_column;
    const bool empty = result.scale < 0;  // then o holds anything
    const float scale = with_descale<Traits>(result.scale, work);
#pragma unroll
    for (int i = 0; i < Traits::kColumnsO / 8; ++i)
      if (first_column + 8 * i < args.head_dim_v)
        *reinterpret_cast<float2*>(to + 8 * i) =
            empty ? make_float2(0.f, 0.f) : make_float2(o[4 * i + 2 * r] * scale, o[4 * i + 2 * r + 1] * scale);
  }
}

}  // namespace fa3
