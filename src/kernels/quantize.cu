// Quantisation to e4m3: one kernel that finds the amax of the rows that share a scale, and then rounds them.
//
// Floor: x read once and a byte an element written, 3 bytes for 16-bit x. So that x is read once, what the first pass
// loads stays in shared memory until amax is known: 27 MB on 132 multiprocessors, or half of that with a rotation,
// whose results are kept in fp32. What does not fit is read again, from L2 where it is still there. Each thread keeps
// to places of its own, so that shared memory needs no barrier; asynchronous copies fill them, a ring of steps ahead.
#include <cuda_pipeline_primitives.h>

#include <type_traits>

#include "arch/convert.cuh"
#include "arch/counter.cuh"
#include "attention/hadamard.h"
#include "kernels/quantize.h"

namespace fa3 {
namespace {

constexpr unsigned kAllLanes = 0xffffffff;
constexpr int kWarps = kQuantizeThreads / 32;
constexpr int kGroup = 8;  // elements that a thread has side by side
constexpr int kShuffles = 5;
static_assert(kMaxArrivals < 1 << arch::Counter::kCountBits, "a group's arrivals must fit its counter");

template <class Element, bool kHadamard_, int kSlots_>
struct Traits {
  using Type = Element;
  static constexpr bool kHadamard = kHadamard_;
  static constexpr int kSlots = kSlots_;
  static constexpr int kDtype = std::is_same_v<Element, Float16>    ? FA3_FLOAT16
                                : std::is_same_v<Element, BFloat16> ? FA3_BFLOAT16
                                                                    : FA3_FLOAT32;
  static constexpr QuantizeKind kKind{kDtype, kHadamard, kSlots};
  static_assert(kKind.max_places() >= kQuantizeRing, "the ring must fit in shared memory");
  static constexpr int kLoadedWords = kGroup * sizeof(Element) / sizeof(uint4);
  static constexpr int kWords = kKind.group_bytes() / sizeof(uint4);
  // amax of 16 bits needs no fp32: a pair is one instruction.
  static constexpr bool kPairs = !kHadamard && sizeof(Element) == 2;
  // Whole steps in code of their own: see Share::whole(). The rotation has no registers left for it.
  static constexpr bool kPlain = !kHadamard && kSlots == 2;
};

/// Which elements of a step's rows are this lane's: a group of 8 in each slot, and how they take part in the rotation.
template <class T>
struct Lane {
  int row;               // of the warp's rows
  bool has[T::kSlots];   // lanes that are left over, and groups past the row's end, have nothing
  int group[T::kSlots];  // of the row
  // Rotation only.
  float sign[T::kSlots][kGroup];
  float norm[T::kSlots];
  int source[T::kSlots][kShuffles];    // the lane with the other element of each pair
  float factor[T::kSlots][kShuffles];  // of this lane's own: sum 1, difference -1, in no pair 0
  int pairs;                           // of the shuffles, those that pair anything
  bool slots_pair;                     // the first two slots are the halves of a block

  __device__ __forceinline__ Lane(int head_dim, int per_row) {
    const int lane = threadIdx.x % 32, groups = head_dim / kGroup;
    row = lane / per_row;
#pragma unroll
    for (int slot = 0; slot < T::kSlots; ++slot) {
      group[slot] = lane % per_row + per_row * slot;
      has[slot] = row < 32 / per_row && group[slot] < groups;
      if constexpr (T::kHadamard) {
        const int block = has[slot] ? hadamard_block(group[slot] * kGroup, head_dim) : 1;
        norm[slot] = hadamard_norm(block);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) sign[slot][i] = hadamard_negates(group[slot] * kGroup + i) ? -1.f : 1.f;
#pragma unroll
        for (int bit = 0; bit < kShuffles; ++bit) {
          const int step = 1 << bit;  // in groups, and in lanes: a block begins at a multiple of its size
          const bool paired = step * kGroup < block, second = group[slot] & step;
          source[slot][bit] = !paired ? lane : second ? lane - step : lane + step;
          factor[slot][bit] = !paired ? 0.f : second ? -1.f : 1.f;
        }
      }
    }
    if constexpr (T::kHadamard) {
      const int largest = hadamard_block(0, head_dim) / kGroup;
      pairs = 31 - __clz(min(largest, per_row));
      slots_pair = largest >= 2 * per_row;
    }
  }
};

template <class T>
using Values = float[T::kSlots][kGroup];

/// Sylvester's butterflies, from neighbours up: the same sums in the same order as the CPU's. Norms are for the scale.
template <class T>
__device__ __forceinline__ void rotate(Values<T>& v, const Lane<T>& lane) {
#pragma unroll
  for (int slot = 0; slot < T::kSlots; ++slot) {
#pragma unroll
    for (int i = 0; i < kGroup; i += 2) {  // a product with a sign is exact, and so no rounding is added
      const float a = v[slot][i], b = lane.sign[slot][i + 1] * v[slot][i + 1];
      v[slot][i] = fmaf(lane.sign[slot][i], a, b);
      v[slot][i + 1] = fmaf(lane.sign[slot][i], a, -b);
    }
#pragma unroll
    for (int step = 2; step < kGroup; step *= 2) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (i & step) continue;
        const float a = v[slot][i], b = v[slot][i + step];
        v[slot][i] = a + b;
        v[slot][i + step] = a - b;
      }
    }
#pragma unroll
    for (int bit = 0; bit < kShuffles; ++bit) {
      if (bit >= lane.pairs) break;  // the same for all lanes
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const float other = __shfl_sync(kAllLanes, v[slot][i], lane.source[slot][bit]);
        v[slot][i] = fmaf(lane.factor[slot][bit], v[slot][i], other);
      }
    }
  }
  if constexpr (T::kSlots > 1) {
    if (lane.slots_pair) {  // the same for all lanes
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const float a = v[0][i], b = v[1][i];
        v[0][i] = a + b;
        v[1][i] = a - b;
      }
    }
  }
}

/// A thread block's part of a unit's rows, from load to codes.
template <class T>
class Share {
 public:
  using Element = typename T::Type;

  __device__ __forceinline__ Share(const QuantizeArgs& args, const Lane<T>& lane, uint4* memory, int unit, int rank)
      : args_(args), lane_(lane), memory_(memory + threadIdx.x) {
    const int batch = unit / args.unit_heads, head = unit % args.unit_heads;
    uint32_t begin = 0, end = args.unit_rows;
    if (args.cu_seqlens) {  // whatever it says, no row outside the array is touched
      begin = min(static_cast<uint32_t>(max(args.cu_seqlens[batch], 0)), args.unit_rows);
      end = max(min(static_cast<uint32_t>(max(args.cu_seqlens[batch + 1], 0)), args.unit_rows), begin);
    }
    x_ = static_cast<const Element*>(args.x) + batch * args.x_unit[0] + head * args.x_unit[1];
    out_ = args.out + batch * args.out_unit[0] + head * args.out_unit[1];
    const int step_rows = args.step_rows;
    const int all = static_cast<int>((end - begin + step_rows - 1) / step_rows);
    const int each = (all + args.blocks_per_group - 1) / args.blocks_per_group;
    steps = max(min(each, all - rank * each), 0);
    end_ = end;
    first_ =
        begin + static_cast<uint32_t>(rank * each) * step_rows + threadIdx.x / 32 * (step_rows / kWarps) + lane.row;
    if (!T::kPlain || !args.plain) return;
    whole_ = min(static_cast<int>((end - begin) / step_rows) - rank * each, steps);
    plain_x_ = x_ + first_ * args.rows.x[0] + lane.group[0] * kGroup;
    plain_out_ = out_ + first_ * args.rows.out[0] + lane.group[0] * kGroup;
  }

  int steps;
  bool wild = false;  // of this warp's values some are infinite, or count as that

  /// Whether a step may be taken as `kWhole`: each lane has a row of it, in vectors, at a multiple of a step's stride.
  /// Tests and addresses of other steps are half of their instructions, and 3 to 5% of the time.
  __device__ __forceinline__ bool whole(int step) const { return T::kPlain && step < whole_; }

  /// Loads are on their way after this; `place` is of step `step`.
  template <bool kWhole>
  __device__ __forceinline__ void load(int step, int place) {
    const uint32_t row = row_of(step);
    if (!kWhole && row >= end_) return;
    const Element* from = kWhole ? plain_x_ + step * step_rows() * args_.rows.x[0] : x_ + args_.rows.of(row).x;
#pragma unroll
    for (int slot = 0; slot < T::kSlots; ++slot) {
      if (!kWhole && !lane_.has[slot]) continue;
      const Element* group = from + (kWhole ? slot * slot_columns() : lane_.group[slot] * kGroup);
      if (kWhole || args_.x_vectors) {
#pragma unroll
        for (int w = 0; w < T::kLoadedWords; ++w)
          __pipeline_memcpy_async(word(place, slot, w), reinterpret_cast<const uint4*>(group) + w, sizeof(uint4));
      } else {  // an address that is aligned to an element only
        alignas(sizeof(uint4)) Element elements[kGroup];
#pragma unroll
        for (int i = 0; i < kGroup; ++i) elements[i] = group[i];
#pragma unroll
        for (int w = 0; w < T::kLoadedWords; ++w) *word(place, slot, w) = reinterpret_cast<const uint4*>(elements)[w];
      }
    }
  }

  /// amax of a step that has been loaded; keeps what it is rotated to.
  template <bool kWhole>
  __device__ __forceinline__ float scan(int step, int place) {
    const bool valid = kWhole || row_of(step) < end_;
    Values<T> v;
    float largest = 0;
    if constexpr (T::kPairs) {
      largest = largest_of_pairs<kWhole>(place, valid);
    } else {
      unpack<kWhole>(v, place, valid);
      if constexpr (T::kHadamard) rotate<T>(v, lane_);
#pragma unroll
      for (int slot = 0; slot < T::kSlots; ++slot) {
        float of_slot = 0;
#pragma unroll
        for (int i = 0; i < kGroup; ++i) of_slot = arch::max_or_nan(of_slot, fabsf(v[slot][i]));
        largest = arch::max_or_nan(largest, T::kHadamard ? of_slot * lane_.norm[slot] : of_slot);
      }
    }
    if (__any_sync(kAllLanes, !(largest <= args_.limit))) largest = scan_wild(v, place, valid);
    if constexpr (T::kHadamard) {
#pragma unroll
      for (int slot = 0; slot < T::kSlots; ++slot) {
        *word(place, slot, 0) = as_word(v[slot]);
        *word(place, slot, 1) = as_word(v[slot] + 4);
      }
    }
    return largest;
  }

  /// Round a step; `again`: it has been loaded anew since scan().
  template <bool kWhole>
  __device__ __forceinline__ void write(int step, int place, bool again, float descale, float inverse) {
    const uint32_t row = row_of(step);
    const bool valid = kWhole || row < end_;
    Values<T> v;
    if (T::kHadamard && !again) {
#pragma unroll
      for (int slot = 0; slot < T::kSlots; ++slot) {
        from_word(v[slot], *word(place, slot, 0));
        from_word(v[slot] + 4, *word(place, slot, T::kWords - 1));
      }
    } else {
      unpack<kWhole>(v, place, valid);
      if constexpr (T::kHadamard) {
        if (wild) clip(v, kHuge, kHuge);
        rotate<T>(v, lane_);
      }
    }
    if (!valid) return;
    // In the rotation's product infinity saturates by itself; in the quotient's remainder it would be NaN.
    if (!T::kHadamard && wild) clip(v, args_.limit, kMaxE4m3 * descale);
    uint8_t* to = kWhole ? plain_out_ + step * step_rows() * args_.rows.out[0] : out_ + args_.rows.of(row).out;
#pragma unroll
    for (int slot = 0; slot < T::kSlots; ++slot) {
      if (!kWhole && !lane_.has[slot]) continue;
      uint32_t codes[kGroup / 4];
      const float factor = T::kHadamard ? __fdiv_rn(lane_.norm[slot], descale) : 0.f;
#pragma unroll
      for (int i = 0; i < kGroup; ++i)
        v[slot][i] = T::kHadamard ? v[slot][i] * factor : quotient(v[slot][i], descale, inverse);
#pragma unroll
      for (int i = 0; i < kGroup; i += 4)
        codes[i / 4] = arch::pack_e4m3(v[slot][i], v[slot][i + 1]) | arch::pack_e4m3(v[slot][i + 2], v[slot][i + 3])
                                                                         << 16;
      uint8_t* group = to + (kWhole ? slot * slot_columns() : lane_.group[slot] * kGroup);
      if (kWhole || args_.out_vectors) {  // past L2's keeping, which is for x
        __stcs(reinterpret_cast<uint2*>(group), make_uint2(codes[0], codes[1]));
      } else {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) group[i] = static_cast<uint8_t>(codes[i / 4] >> i % 4 * 8);
      }
    }
  }

 private:
  __device__ __forceinline__ uint32_t row_of(int step) const {
    return first_ + static_cast<uint32_t>(step) * args_.step_rows;
  }
  __device__ __forceinline__ int64_t step_rows() const { return args_.step_rows; }
  /// From a whole lane's group to that in the next slot.
  __device__ __forceinline__ int slot_columns() const { return args_.row_lanes * kGroup; }

  /// A warp's words lie side by side: no two lanes share a bank.
  __device__ __forceinline__ uint4* word(int place, int slot, int w) const {
    return memory_ + ((place * T::kSlots + slot) * T::kWords + w) * kQuantizeThreads;
  }

  static __device__ __forceinline__ uint4 as_word(const float* v) {
    return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
  }
  static __device__ __forceinline__ void from_word(float* v, uint4 word) {
    v[0] = __uint_as_float(word.x), v[1] = __uint_as_float(word.y);
    v[2] = __uint_as_float(word.z), v[3] = __uint_as_float(word.w);
  }

  /// amax of a step's 16-bit elements as they were loaded.
  template <bool kWhole>
  __device__ __forceinline__ float largest_of_pairs(int place, bool valid) const {
    uint32_t largest = 0;
#pragma unroll
    for (int slot = 0; slot < T::kSlots; ++slot) {
      if (!kWhole && (!valid || !lane_.has[slot])) continue;
      const uint4 loaded = *word(place, slot, 0);
#pragma unroll
      for (uint32_t pair : {loaded.x, loaded.y, loaded.z, loaded.w})
        largest = arch::max_pair_or_nan<Element>(largest, pair & 0x7fff7fff);
    }
    const float2 two = arch::unpack<Element>(largest);
    return arch::max_or_nan(two.x, two.y);
  }

  /// What was loaded, or zeros where this lane has nothing.
  template <bool kWhole>
  __device__ __forceinline__ void unpack(Values<T>& v, int place, bool valid) const {
#pragma unroll
    for (int slot = 0; slot < T::kSlots; ++slot) {
      uint4 loaded[T::kLoadedWords];
#pragma unroll
      for (int w = 0; w < T::kLoadedWords; ++w)
        loaded[w] = kWhole || (valid && lane_.has[slot]) ? *word(place, slot, w) : make_uint4(0, 0, 0, 0);
      if constexpr (std::is_same_v<Element, float>) {
        from_word(v[slot], loaded[0]);
        from_word(v[slot] + 4, loaded[1]);
      } else {
        const uint32_t pairs[] = {loaded[0].x, loaded[0].y, loaded[0].z, loaded[0].w};
#pragma unroll
        for (int i = 0; i < kGroup; i += 2) {
          const float2 two = arch::unpack<Element>(pairs[i / 2]);
          v[slot][i] = two.x;
          v[slot][i + 1] = two.y;
        }
      }
    }
  }

  /// What is above `limit` becomes `bound`, of the same sign; NaN stays.
  static __device__ __forceinline__ void clip(Values<T>& v, float limit, float bound) {
#pragma unroll
    for (int slot = 0; slot < T::kSlots; ++slot)
#pragma unroll
      for (int i = 0; i < kGroup; ++i)
        if (fabsf(v[slot][i]) > limit) v[slot][i] = copysignf(bound, v[slot][i]);
  }

  /// The rare part of scan(), for warps with a NaN or what counts as infinite.
  __device__ __forceinline__ float scan_wild(Values<T>& v, int place, bool valid) {
    unpack<false>(v, place, valid);
    if constexpr (T::kHadamard) {
      clip(v, kHuge, kHuge);
      rotate<T>(v, lane_);
    }
    float largest = 0;
    bool infinite = false;
#pragma unroll
    for (int slot = 0; slot < T::kSlots; ++slot)
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const float size = fabsf(v[slot][i]) * (T::kHadamard ? lane_.norm[slot] : 1.f);
        if (size <= args_.limit) largest = fmaxf(largest, size);
        infinite |= size > args_.limit;
      }
    wild |= __any_sync(kAllLanes, infinite);
    return largest;
  }

  /// value / descale, correctly rounded: a product with the inverse, and a step of Newton's. Zeros keep their sign.
  static __device__ __forceinline__ float quotient(float value, float descale, float inverse) {
    const float estimate = value * inverse;
    return fmaf(-fmaf(estimate, descale, -value), inverse, estimate);
  }

  const QuantizeArgs& args_;
  const Lane<T>& lane_;
  uint4* memory_;
  const Element* x_;
  uint8_t* out_;
  uint32_t first_, end_;
  int whole_ = 0;                     // steps, from the first on
  const Element* plain_x_ = nullptr;  // this lane's first group of the first step
  uint8_t* plain_out_ = nullptr;
};

/// amax of the thread block. `parts` has a float for each warp, and is not written again before all have passed the
/// next barrier of the block after this one.
__device__ __forceinline__ float block_amax(float amax, float* parts) {
  const unsigned bits =
      __reduce_max_sync(kAllLanes, __float_as_uint(amax));  // of floats from 0 up: in order as integers
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = __uint_as_float(bits);
  __syncthreads();
  float largest = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) largest = fmaxf(largest, parts[warp]);
  return largest;
}

/// amax of the group's blocks, which are all resident (a cooperative launch) and all come here once for each unit.
__device__ __forceinline__ float group_amax(const QuantizeArgs& args, int group, int rank, int round, int rounds,
                                            float amax, float* warp_parts) {
  const int blocks = args.blocks_per_group;
  // Alternating: a block writes over its part of two units ago, which all have read before they arrived for the last.
  float* parts = args.parts + (int64_t{group} * 2 + round % 2) * blocks;
  if (threadIdx.x == 0) {
    const arch::Counter arrivals(args.arrivals + group, args.ticket);
    if (round == 0) arrivals.open();
    parts[rank] = amax;
    __threadfence();  // the part is seen by whoever sees the arrival
    if (arrivals.add() + 1 == rounds * blocks) arrivals.close();
    while (!arrivals.reached((round + 1) * blocks)) __nanosleep(64);
    __threadfence();
  }
  __syncthreads();
  amax = 0;
  for (int i = threadIdx.x; i < blocks; i += kQuantizeThreads) amax = fmaxf(amax, __ldcg(parts + i));
  return block_amax(amax, warp_parts);
}

template <class T>
__global__ void __launch_bounds__(kQuantizeThreads, T::kKind.blocks_per_sm())
    quantize_kernel(const __grid_constant__ QuantizeArgs args) {
  extern __shared__ uint4 memory[];
  __shared__ float warp_parts[3][kWarps];  // two that alternate, and one for the group's
  const Lane<T> lane(args.head_dim, args.row_lanes);
  const int group = blockIdx.x % args.groups, rank = blockIdx.x / args.groups;
  const int rounds = (args.units - group + args.groups - 1) / args.groups;

  for (int round = 0; round < rounds; ++round) {
    const int unit = group + round * args.groups;
    Share<T> share(args, lane, memory, unit, rank);
    const Places places(args.places, share.steps);

    const auto load = [&](int step) {
      if (share.whole(step))
        share.template load<true>(step, places.of(step));
      else
        share.template load<false>(step, places.of(step));
    };

    float amax = 0;
    for (int step = 0; step < kQuantizeRing; ++step) {
      if (step < share.steps) load(step);
      __pipeline_commit();
    }
    for (int step = 0; step < share.steps; ++step) {
      __pipeline_wait_prior(kQuantizeRing - 1);
      const float largest = share.whole(step) ? share.template scan<true>(step, places.of(step))
                                              : share.template scan<false>(step, places.of(step));
      amax = fmaxf(amax, largest);
      if (step + kQuantizeRing < share.steps) load(step + kQuantizeRing);
      __pipeline_commit();  // empty or not: the waits count commits
    }

    amax = block_amax(amax, warp_parts[round % 2]);
    if (args.blocks_per_group > 1) amax = group_amax(args, group, rank, round, rounds, amax, warp_parts[2]);
    const float descale = amax > 0 ? fmaxf(__fdiv_rn(amax, kMaxE4m3), kMinDescale) : 1.f;
    const float inverse = __frcp_rn(descale);
    if (rank == 0 && threadIdx.x == 0)
      args.descale[unit / args.unit_heads * args.descale_stride[0] + unit % args.unit_heads * args.descale_stride[1]] =
          descale;

    for (int step = share.steps - 1; step >= 0; --step) {
      __pipeline_wait_prior(kQuantizeRing - 1);
      if (share.whole(step))
        share.template write<true>(step, places.of(step), places.lost(step), descale, inverse);
      else
        share.template write<false>(step, places.of(step), places.lost(step), descale, inverse);
      const int next = step - kQuantizeRing;
      if (next >= 0 && places.lost(next)) load(next);
      __pipeline_commit();
    }
  }
}

template <class T>
cudaError_t launch(const QuantizePlan& plan, cudaStream_t stream) {
  const QuantizeArgs& args = plan.args;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(args.groups) * args.blocks_per_group;
  config.blockDim = kQuantizeThreads;
  config.dynamicSmemBytes = static_cast<size_t>(args.places) * T::kKind.place_bytes();
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributePreferredSharedMemoryCarveout;
  attributes[0].val.sharedMemCarveout = cudaSharedmemCarveoutMaxShared;  // or too few blocks are resident
  attributes[1].id = cudaLaunchAttributeCooperative;  // blocks wait for each other: all must be resident
  attributes[1].val.cooperative = 1;
  config.attrs = attributes;
  config.numAttrs = args.blocks_per_group > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, quantize_kernel<T>, args);
}

template <class Element, bool kHadamard>
cudaError_t launch_slots(const QuantizePlan& plan, cudaStream_t stream) {
  switch (plan.kind.slots) {
    case 1:
      return launch<Traits<Element, kHadamard, 1>>(plan, stream);
    case 2:
      return launch<Traits<Element, kHadamard, 2>>(plan, stream);
    default:
      return launch<Traits<Element, kHadamard, 3>>(plan, stream);
  }
}

template <class Element>
cudaError_t launch_element(const QuantizePlan& plan, cudaStream_t stream) {
  return plan.kind.hadamard ? launch_slots<Element, true>(plan, stream) : launch_slots<Element, false>(plan, stream);
}

}  // namespace

cudaError_t launch_quantize(const QuantizePlan& plan, cudaStream_t stream) {
  switch (plan.kind.dtype) {
    case FA3_FLOAT16:
      return launch_element<Float16>(plan, stream);
    case FA3_BFLOAT16:
      return launch_element<BFloat16>(plan, stream);
    default:
      return launch_element<float>(plan, stream);
  }
}

}  // namespace fa3
