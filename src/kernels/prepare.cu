// Before attention on a cache: new keys and values are put into it, turned by their positions, and queries are turned
// into a packed copy. Each element is read once and written once, 8 at a time where addresses allow that; cos and sin
// are read once for all heads of a row, as far as caches hold them.
#include "kernels/prepare.h"

#include <type_traits>

#include "arch/convert.cuh"
#include "fa3.h"
#include "kernels/launch.h"

namespace fa3 {
namespace {

constexpr int kThreads = kPrepareThreads;
constexpr int kVector = 8;  // elements that are moved at once; head dims are multiples of it

/// How an Element moves: as bits.
template <class Element>
using BitsOf = std::conditional_t<sizeof(Element) == 1, uint8_t, uint16_t>;

template <class Bits>
struct Vector {
  static constexpr int kPerWord = 4 / sizeof(Bits), kWords = kVector / kPerWord;
  using Whole = std::conditional_t<sizeof(Bits) == 1, uint2, uint4>;
  alignas(Whole) uint32_t word[kWords];
};

/// Eight elements; without `vectors` the address is aligned to an element only.
template <class Bits>
__device__ __forceinline__ Vector<Bits> load(const Bits* from, bool vectors) {
  using Whole = typename Vector<Bits>::Whole;
  constexpr int kPerWord = Vector<Bits>::kPerWord;
  Vector<Bits> value{};
  if (vectors) {
    *reinterpret_cast<Whole*>(value.word) = *reinterpret_cast<const Whole*>(from);
    return value;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) value.word[i / kPerWord] |= uint32_t{from[i]} << i % kPerWord * 8 * sizeof(Bits);
  return value;
}

template <class Bits>
__device__ __forceinline__ void store(Bits* to, bool vectors, const Vector<Bits>& value) {
  using Whole = typename Vector<Bits>::Whole;
  constexpr int kPerWord = Vector<Bits>::kPerWord;
  if (vectors) {
    *reinterpret_cast<Whole*>(to) = *reinterpret_cast<const Whole*>(value.word);
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    to[i] = static_cast<Bits>(value.word[i / kPerWord] >> i % kPerWord * 8 * sizeof(Bits));
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
    const auto eight = load(static_cast<const uint16_t*>(table) + first, rotary.vectors);
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      const float2 two = arch::unpack<Element>(eight.word[i]);
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
__device__ __forceinline__ void turn_unit(Vector<uint16_t>& a, Vector<uint16_t>& b, const RotaryArgs& rotary, int unit,
                                          int position) {
  float cos[kVector], sin[kVector];
  const int64_t first = int64_t{position} * (rotary.dim / 2) + unit * kVector;
  load_table<Element>(rotary.cos, rotary, first, cos);
  load_table<Element>(rotary.sin, rotary, first, sin);
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    float2 x = arch::unpack<Element>(a.word[i]), y = arch::unpack<Element>(b.word[i]);
    if (rotary.interleaved) {
      turn(x.x, x.y, cos[i], sin[i]);
      turn(y.x, y.y, cos[kVector / 2 + i], sin[kVector / 2 + i]);
    } else {
      turn(x.x, y.x, cos[2 * i], sin[2 * i]);
      turn(x.y, y.y, cos[2 * i + 1], sin[2 * i + 1]);
    }
    a.word[i] = arch::pack<Element>(x.x, x.y);
    b.word[i] = arch::pack<Element>(y.x, y.y);
  }
}

/// Move a unit of a row, turned as at `position` where it is one of `turning`. Rows of 8 bits do not turn.
template <class Element, class Bits = BitsOf<Element>>
__device__ __forceinline__ void move_unit(const Bits* from, bool from_vectors, Bits* to, bool to_vectors, int unit,
                                          int head_dim, const RotaryArgs& rotary, int turning, int position) {
  const bool turns = unit < turning, across = turns && !rotary.interleaved;
  const int first = kVector * (across ? unit : 2 * unit);
  const int second = across ? first + kVector * turning : first + kVector;
  const bool both = second < head_dim;
  Vector<Bits> a = load(from + first, from_vectors), b{};
  if (both) b = load(from + second, from_vectors);
  if constexpr (sizeof(Element) == 2) {
    if (turns) turn_unit<Element>(a, b, rotary, unit, position);
  }
  store(to + first, to_vectors, a);
  if (both) store(to + second, to_vectors, b);
}

/// Zeros for a unit of a row that no sequence uses: a tile has it beside others' rows, and how these are computed must
/// not depend on what memory held before.
__device__ __forceinline__ void clear_unit(uint16_t* to, int unit, int head_dim) {
  const int first = 2 * kVector * unit;
  store(to + first, true, Vector<uint16_t>{});
  if (first + kVector < head_dim) store(to + first + kVector, true, Vector<uint16_t>{});
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
    using Bits = BitsOf<Element>;
    const Bits* from = static_cast<const Bits*>(source.data) + source.offset(entry, row, head);
    Bits* to = static_cast<Bits*>(target.data) + target.offset(place.entry, place.row, head);
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
    const int rest = i - local * row_units, head = rest / units, unit = rest - head * units;
    uint16_t* to = args.rotated_q + (index * args.num_heads + head) * args.head_dim;
    if (!owner.used) {
      clear_unit(to, unit, args.head_dim);
      continue;
    }
    const int64_t entry = args.queries.ragged() ? 0 : owner.batch, row = args.queries.ragged() ? index : owner.row;
    const uint16_t* from = static_cast<const uint16_t*>(args.q.data) + args.q.offset(entry, row, head);
    const int position = position_of(args, owner.batch, args.rotary.each_query ? owner.row : 0);
    move_unit<Element>(from, args.q.vectors, to, true, unit, args.head_dim, args.rotary, args.rotary.dim / kPrepareUnit,
                       position);
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
  } else if constexpr (sizeof(Element) == 2) {
    rotate_queries<Element>(args, block - args.new_blocks);
  }
}

template <class Element>
cudaError_t launch(const PrepareArgs& args, cudaStream_t stream) {
  return launch_plainly(prepare_kernel<Element>, static_cast<unsigned>(args.blocks), kThreads, stream, args);
}

}  // namespace

cudaError_t launch_prepare(const PrepareArgs& args, int dtype, cudaStream_t stream) {
  switch (dtype) {
    case FA3_FLOAT16:
      return launch<Float16>(args, stream);
    case FA3_BFLOAT16:
      return launch<BFloat16>(args, stream);
    default:
      return launch<Float8E4M3>(args, stream);
  }
}

}  // namespace fa3
