// Before attention on a cache: new keys and values are put into it, turned by their positions, and queries are turned
// into a packed copy. Each element is read once and written once, in 16 bytes where addresses allow that; cos and sin
// are read once for all heads of a row, as far as caches hold them.
#include "kernels/prepare.h"

#include "arch/convert.cuh"
#include "fa3.h"

namespace fa3 {
namespace {

constexpr int kThreads = kPrepareThreads;
constexpr int kVector = 8;  // elements of 16 bytes; head dims are multiples of it

/// 16 bytes of 16-bit elements; without `vectors` the address is aligned to an element only.
__device__ __forceinline__ uint4 load(const uint16_t* from, bool vectors) {
  if (vectors) return *reinterpret_cast<const uint4*>(from);
  uint32_t words[kVector / 2];
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) words[i] = from[2 * i] | uint32_t{from[2 * i + 1]} << 16;
  return make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ void store(uint16_t* to, bool vectors, const uint4& value) {
  if (vectors) {
    *reinterpret_cast<uint4*>(to) = value;
    return;
  }
  const uint32_t words[kVector / 2] = {value.x, value.y, value.z, value.w};
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    to[2 * i] = static_cast<uint16_t>(words[i]);
    to[2 * i + 1] = static_cast<uint16_t>(words[i] >> 16);
  }
}

/// Eight of cos or of sin from element `first` on, a multiple of 8, as floats.
template <class Element>
__device__ __forceinline__ void load_table(const void* table, const RotaryArgs& rotary, int64_t first,
                                           float (&out)[kVector]) {
  if (rotary.fp32) {
    const float* from = static_cast<const float*>(table) + first;
    if (rotary.vectors) {
#pragma unroll
      for (int i = 0; i < kVector; i += 4) {
        const uint4 four = *reinterpret_cast<const uint4*>(from + i);
        out[i] = __uint_as_float(four.x);
        out[i + 1] = __uint_as_float(four.y);
        out[i + 2] = __uint_as_float(four.z);
        out[i + 3] = __uint_as_float(four.w);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) out[i] = from[i];
    }
  } else {
    const uint4 eight = load(static_cast<const uint16_t*>(table) + first, rotary.vectors);
    const uint32_t words[kVector / 2] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      const float2 two = arch::unpack<Element>(words[i]);
      out[2 * i] = two.x;
      out[2 * i + 1] = two.y;
    }
  }
}

/// Turn the pair (x, y); each product is rounded, as the CPU's are.
__device__ __forceinline__ void turn(float& x, float& y, float cos, float sin) {
  const float turned = __fsub_rn(__fmul_rn(x, cos), __fmul_rn(y, sin));
  y = __fadd_rn(__fmul_rn(y, cos), __fmul_rn(x, sin));
  x = turned;
}

/// Turn the 8 pairs of a unit, within its vectors or across them.
template <class Element>
__device__ __forceinline__ void turn_unit(uint4& a, uint4& b, const RotaryArgs& rotary, int unit, int position) {
  float cos[kVector], sin[kVector];
  const int64_t first = int64_t{position} * (rotary.dim / 2) + unit * kVector;
  load_table<Element>(rotary.cos, rotary, first, cos);
  load_table<Element>(rotary.sin, rotary, first, sin);
  uint32_t words[2][kVector / 2] = {{a.x, a.y, a.z, a.w}, {b.x, b.y, b.z, b.w}};
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    float2 x = arch::unpack<Element>(words[0][i]), y = arch::unpack<Element>(words[1][i]);
    if (rotary.interleaved) {
      turn(x.x, x.y, cos[i], sin[i]);
      turn(y.x, y.y, cos[kVector / 2 + i], sin[kVector / 2 + i]);
    } else {
      turn(x.x, y.x, cos[2 * i], sin[2 * i]);
      turn(x.y, y.y, cos[2 * i + 1], sin[2 * i + 1]);
    }
    words[0][i] = arch::pack<Element>(x.x, x.y);
    words[1][i] = arch::pack<Element>(y.x, y.y);
  }
  a = make_uint4(words[0][0], words[0][1], words[0][2], words[0][3]);
  b = make_uint4(words[1][0], words[1][1], words[1][2], words[1][3]);
}

/// Move a unit of a row, turned as at `position` where it is one of `turning`.
template <class Element>
__device__ __forceinline__ void move_unit(const uint16_t* from, bool from_vectors, uint16_t* to, bool to_vectors,
                                          int unit, int head_dim, const RotaryArgs& rotary, int turning, int position) {
  const bool turns = unit < turning, across = turns && !rotary.interleaved;
  const int first = kVector * (across ? unit : 2 * unit);
  const int second = across ? first + kVector * turning : first + kVector;
  const bool both = second < head_dim;
  uint4 a = load(from + first, from_vectors), b = make_uint4(0, 0, 0, 0);
  if (both) b = load(from + second, from_vectors);
  if (turns) turn_unit<Element>(a, b, rotary, unit, position);
  store(to + first, to_vectors, a);
  if (both) store(to + second, to_vectors, b);
}

/// The first position of a sequence, and one of its rows'; whatever the device arrays say, cos and sin have it.
__device__ __forceinline__ int position_of(const PrepareArgs& args, int batch, int row) {
  const int first = args.rotary.seqlens ? args.rotary.seqlens[batch] : args.cached.at(batch);
  return smaller(clamped(first, 0, args.rotary.rows) + row, args.rotary.rows - 1);
}

template <class Element>
__device__ __forceinline__ void append(const PrepareArgs& args, int64_t block) {
  const int units_k = PrepareArgs::units(args.head_dim), units_v = PrepareArgs::units(args.head_dim_v);
  const int row_units = args.units_of_new_row(), units_of_keys = args.num_heads_kv * units_k;
  for (int i = threadIdx.x; i < args.new_rows_per_block * row_units; i += kThreads) {
    const int local = i / row_units;
    const int64_t index = block * args.new_rows_per_block + local;
    if (index >= args.new_rows) return;
    const RowOwner owner = args.new_keys.owner(index, args.batch);
    if (!owner.used) continue;
    // Room of 2^30 rows and as many new ones: their sum fits.
    const CacheRow place = args.cache.at(owner.batch, args.cached.at(owner.batch) + owner.row);
    if (!place.exists()) continue;

    int unit = i - local * row_units;
    const bool is_key = unit < units_of_keys;
    if (!is_key) unit -= units_of_keys;
    const int units = is_key ? units_k : units_v, head = unit / units;
    const StridedRows& source = is_key ? args.k_new : args.v_new;
    const StridedRows& target = is_key ? args.k : args.v;
    const int turning = is_key ? args.rotary.dim / kPrepareUnit : 0;
    const int64_t entry = args.new_keys.ragged() ? 0 : owner.batch, row = args.new_keys.ragged() ? index : owner.row;
    const uint16_t* from = source.data + entry * source.stride[0] + row * source.stride[1] + head * source.stride[2];
    uint16_t* to =
        target.data + place.entry * target.stride[0] + place.row * target.stride[1] + head * target.stride[2];
    move_unit<Element>(from, source.vectors, to, target.vectors, unit - head * units,
                       is_key ? args.head_dim : args.head_dim_v, args.rotary, turning,
                       turning ? position_of(args, owner.batch, owner.row) : 0);
  }
}

template <class Element>
__device__ __forceinline__ void rotate_queries(const PrepareArgs& args, int64_t block) {
  const int units = PrepareArgs::units(args.head_dim), row_units = args.units_of_query();
  for (int i = threadIdx.x; i < args.query_rows_per_block * row_units; i += kThreads) {
    const int local = i / row_units;
    const int64_t index = block * args.query_rows_per_block + local;
    if (index >= args.query_rows) return;
    const RowOwner owner = args.queries.owner(index, args.batch);
    if (!owner.used) continue;
    const int rest = i - local * row_units, head = rest / units;
    const int64_t entry = args.queries.ragged() ? 0 : owner.batch, row = args.queries.ragged() ? index : owner.row;
    const uint16_t* from = args.q.data + entry * args.q.stride[0] + row * args.q.stride[1] + head * args.q.stride[2];
    uint16_t* to = args.rotated_q + (index * args.num_heads + head) * args.head_dim;
    const int position = position_of(args, owner.batch, args.rotary.each_query ? owner.row : 0);
    move_unit<Element>(from, args.q.vectors, to, true, rest - head * units, args.head_dim, args.rotary,
                       args.rotary.dim / kPrepareUnit, position);
  }
}

template <class Element>
__global__ void __launch_bounds__(kThreads) prepare_kernel(const __grid_constant__ PrepareArgs args) {
  const int64_t block = blockIdx.x, thread = block * kThreads + threadIdx.x;
  if (args.seqlens_k && thread < args.batch) {
    const int batch = static_cast<int>(thread);
    args.seqlens_k[batch] = args.cached.with(args.new_keys.span(batch).length, batch);
  }
  if (block < args.new_blocks) {
    append<Element>(args, block);
  } else {
    rotate_queries<Element>(args, block - args.new_blocks);
  }
}

template <class Element>
cudaError_t launch(const PrepareArgs& args, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(args.blocks);
  config.blockDim = kThreads;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, prepare_kernel<Element>, args);
}

}  // namespace

cudaError_t launch_prepare(const PrepareArgs& args, int dtype, cudaStream_t stream) {
  return dtype == FA3_FLOAT16 ? launch<__half>(args, stream) : launch<__nv_bfloat16>(args, stream);
}

}  // namespace fa3
