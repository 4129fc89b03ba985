// A thread's part of the steps of a quantisation: load, look for amax, round.
#pragma once
#include <cuda_pipeline_primitives.h>

#include "arch/convert.cuh"
#include "kernels/quantize_lane.cuh"

namespace fa3 {

/// The scale of a unit, and what each of a thread's columns is multiplied with: its inverse, or of a rotation's sums
/// the norm over it.
template <class T>
struct Scale {
  float descale;
  float factor[T::kHadamard ? T::kColumns : 1];

  __device__ __forceinline__ Scale(const Lane<T>& lane, float descale) : descale(descale) {
    if constexpr (T::kHadamard) {
#pragma unroll
      for (int column = 0; column < T::kColumns; ++column) factor[column] = __fdiv_rn(lane.norm[column], descale);
    } else {
      factor[0] = __frcp_rn(descale);
    }
  }
  __device__ __forceinline__ float of(int column) const { return factor[T::kHadamard ? column : 0]; }
};

/// The rows that share a scale. All of it is the same for all threads.
template <class T>
struct Unit {
  const typename T::Type* x;
  uint8_t* out;
  uint32_t begin, end;
  int whole;  // steps with no rows but these

  /// All units are as large as this where there are no cu_seqlens.
  __device__ __forceinline__ explicit Unit(const QuantizeArgs& args) { cut(args, 0, args.unit_rows); }

  __device__ __forceinline__ Unit(const QuantizeArgs& args, int unit) {
    const int batch = unit / args.unit_heads, head = unit % args.unit_heads;
    move(args, batch, head);
    uint32_t first = 0, last = args.unit_rows;
    if (args.cu_seqlens) {  // whatever it says, no row outside the array is touched
      first = min(static_cast<uint32_t>(max(args.cu_seqlens[batch], 0)), args.unit_rows);
      last = max(min(static_cast<uint32_t>(max(args.cu_seqlens[batch + 1], 0)), args.unit_rows), first);
    }
    cut(args, first, last);
  }

  __device__ __forceinline__ void move(const QuantizeArgs& args, int batch, int head) {
    x = static_cast<const typename T::Type*>(args.x) + batch * args.x_unit[0] + head * args.x_unit[1];
    out = args.out + batch * args.out_unit[0] + head * args.out_unit[1];
  }
  __device__ __forceinline__ void cut(const QuantizeArgs& args, uint32_t first, uint32_t last) {
    begin = first, end = last;
    whole = T::kPlain && args.plain ? static_cast<int>((end - begin) / static_cast<uint32_t>(args.step_rows)) : 0;
  }
  __device__ __forceinline__ int steps(const QuantizeArgs& args) const {
    return static_cast<int>((end - begin + args.step_rows - 1) / static_cast<uint32_t>(args.step_rows));
  }
};

/// What a thread does with its part of a step, from load to codes.
template <class T>
class Share {
 public:
  using Element = typename T::Type;

  __device__ __forceinline__ Share(const QuantizeArgs& args, const Lane<T>& lane, uint4* memory)
      : args_(args), lane_(lane), memory_(memory + (kShared ? 2 : 1) * threadIdx.x) {
    row_ = threadIdx.x / 32 * args.warp_rows + lane.row;
    x_offset_ = row_ * args.rows.x[0] + lane.group[0] * kGroup;
    out_offset_ = row_ * args.rows.out[0] + lane.group[0] * kGroup;
  }

  __device__ __forceinline__ const Lane<T>& lane() const { return lane_; }

  /// Whole steps, of which each lane has a row in vectors, are code of their own: tests and addresses of others are
  /// half of the instructions, and 3 to 5% of the time.
  __device__ __forceinline__ void load(const Unit<T>& unit, int step, int place) const {
    if constexpr (kShared) __syncwarp();  // whoever's words these were has done with them
    step < unit.whole ? load<true>(unit, step, place) : load<false>(unit, step, place);
  }
  __device__ __forceinline__ float scan(const Unit<T>& unit, int step, int place) {
    if constexpr (kShared) __syncwarp();
    return step < unit.whole ? scan<true>(unit, step, place) : scan<false>(unit, step, place);
  }
  __device__ __forceinline__ void write(const Unit<T>& unit, int step, int place, bool again,
                                        const Scale<T>& scale) const {
    if constexpr (kShared) __syncwarp();
    step < unit.whole ? write<true>(unit, step, place, again, scale) : write<false>(unit, step, place, again, scale);
  }

 private:
  /// Of whole steps of large units a warp loads its words in order, and not each lane its own two: asynchronous copies
  /// that do not keep the order in a line of 128 bytes take one for each 16 of them.
  static constexpr bool kShared = T::kLoadedWords == 2 && T::kKind.rows > 1;

  /// Loads are on their way after this; `place` is of step `step`.
  template <bool kWhole>
  __device__ __forceinline__ void load(const Unit<T>& unit, int step, int place) const {
    const Element* whole = unit.x + first_row(unit, step) * args_.rows.x[0];
    if constexpr (kWhole && kShared) return load_in_order(whole, place);
    whole += x_offset_;
#pragma unroll
    for (int slot = 0; slot < T::kSlots; ++slot) {
      if (!kWhole && !has(unit, step, slot)) continue;
      const Element* group =
          kWhole ? whole + slot_rows(slot) * args_.rows.x[0] + slot % T::kColumns * column_step()
                 : unit.x + args_.rows.of(row_of(unit, step, slot)).x + lane_.group[slot % T::kColumns] * kGroup;
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

  __device__ __forceinline__ void load_in_order(const Element* whole, int place) const {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int owner = 16 * half + lane / 2, row = owner / args_.row_lanes;
      const Element* from = whole +
                            (thread / 32 * args_.warp_rows + (row < args_.warp_rows ? row : 0)) * args_.rows.x[0] +
                            owner % args_.row_lanes * kGroup + lane % 2 * (kGroup / 2);
#pragma unroll
      for (int slot = 0; slot < T::kSlots; ++slot)
        __pipeline_memcpy_async(word_of(owner - lane, place, slot, lane % 2),
                                from + slot_rows(slot) * args_.rows.x[0] + slot % T::kColumns * column_step(),
                                sizeof(uint4));
    }
  }

  /// amax of a step that has been loaded; keeps what it is rotated to.
  template <bool kWhole>
  __device__ __forceinline__ float scan(const Unit<T>& unit, int step, int place) {
    Values<T> v;
    float largest = 0;
    bool wild = false;  // the rare second look, for warps with a NaN or what counts as infinite
#pragma unroll 1        // the code of a rotation is long
    for (;; wild = true) {
      if (!T::kPairs || wild) unpack<kWhole>(v, unit, step, place);
      if constexpr (T::kHadamard) {
        if (wild) clip(v);
        rotate<T>(v, lane_);
      }
      if (wild) {
        largest = largest_finite<kWhole>(v, unit, step);
        break;
      }
      if constexpr (T::kPairs)
        largest = largest_of_pairs<kWhole>(unit, step, place);
      else
        largest = largest_of<kWhole>(v, unit, step);
      if (!__any_sync(kAllLanes, !(largest <= args_.limit))) break;
    }
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
  __device__ __forceinline__ void write(const Unit<T>& unit, int step, int place, bool again,
                                        const Scale<T>& scale) const {
    Values<T> v;
    if (T::kHadamard && !again) {
#pragma unroll
      for (int slot = 0; slot < T::kSlots; ++slot) {
        from_word(v[slot], *word(place, slot, 0));
        from_word(v[slot] + 4, *word(place, slot, T::kWords - 1));
      }
    } else {
      unpack<kWhole>(v, unit, step, place);
      if constexpr (T::kHadamard) {
        if (wild_) clip(v);
        rotate<T>(v, lane_);
      }
    }
    uint8_t* whole = unit.out + first_row(unit, step) * args_.rows.out[0] + out_offset_;
#pragma unroll
    for (int slot = 0; slot < T::kSlots; ++slot) {
      if (!kWhole && !has(unit, step, slot)) continue;
      uint32_t codes[kGroup / 4];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) v[slot][i] *= scale.of(slot % T::kColumns);
#pragma unroll
      for (int i = 0; i < kGroup; i += 4)
        codes[i / 4] = arch::pack_e4m3(v[slot][i], v[slot][i + 1], v[slot][i + 2], v[slot][i + 3]);
      uint8_t* group =
          kWhole ? whole + slot_rows(slot) * args_.rows.out[0] + slot % T::kColumns * column_step()
                 : unit.out + args_.rows.of(row_of(unit, step, slot)).out + lane_.group[slot % T::kColumns] * kGroup;
      if (kWhole || args_.out_vectors) {  // past L2's keeping, which is for x
        __stcs(reinterpret_cast<uint2*>(group), make_uint2(codes[0], codes[1]));
      } else {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) group[i] = static_cast<uint8_t>(codes[i / 4] >> i % 4 * 8);
      }
    }
  }

  __device__ __forceinline__ uint32_t first_row(const Unit<T>& unit, int step) const {
    return unit.begin + static_cast<uint32_t>(step) * args_.step_rows;
  }
  /// From the first slot's row to this one's.
  __device__ __forceinline__ int64_t slot_rows(int slot) const { return slot / T::kColumns * args_.slot_rows; }
  /// From a column of a lane to its next.
  __device__ __forceinline__ int column_step() const { return args_.row_lanes * kGroup; }
  __device__ __forceinline__ uint32_t row_of(const Unit<T>& unit, int step, int slot) const {
    return first_row(unit, step) + row_ + slot / T::kColumns * args_.slot_rows;
  }
  __device__ __forceinline__ bool has(const Unit<T>& unit, int step, int slot) const {
    return lane_.has[slot % T::kColumns] && row_of(unit, step, slot) < unit.end;
  }

  /// A warp's words lie side by side: no two of eight lanes share a bank.
  __device__ __forceinline__ uint4* word(int place, int slot, int w) const {
    if constexpr (kShared) return word_of(0, place, slot, w);
    return memory_ + ((place * T::kSlots + slot) * T::kWords + w) * T::kThreads;
  }
  /// Of the thread so many after this one. Its two words are in order, but for every other four threads.
  __device__ __forceinline__ uint4* word_of(int after, int place, int slot, int w) const {
    const int thread = static_cast<int>(threadIdx.x) + after;
    return memory_ + 2 * ((place * T::kSlots + slot) * T::kThreads + after) + (w ^ (thread / 4 % 2));
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
  __device__ __forceinline__ float largest_of_pairs(const Unit<T>& unit, int step, int place) const {
    uint32_t largest = 0;
#pragma unroll
    for (int slot = 0; slot < T::kSlots; ++slot) {
      if (!kWhole && !has(unit, step, slot)) continue;
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
  __device__ __forceinline__ void unpack(Values<T>& v, const Unit<T>& unit, int step, int place) const {
#pragma unroll
    for (int slot = 0; slot < T::kSlots; ++slot) {
      uint4 loaded[T::kLoadedWords];
#pragma unroll
      for (int w = 0; w < T::kLoadedWords; ++w)
        loaded[w] = kWhole || has(unit, step, slot) ? *word(place, slot, w) : make_uint4(0, 0, 0, 0);
      if constexpr (T::kHadamard) {  // turned before they are floats: two at a time
        const auto& signs = lane_.signs[slot % T::kColumns];
#pragma unroll
        for (int w = 0; w < T::kLoadedWords; ++w) {
          loaded[w].x ^= signs[4 * w], loaded[w].y ^= signs[4 * w + 1];
          loaded[w].z ^= signs[4 * w + 2], loaded[w].w ^= signs[4 * w + 3];
        }
      }
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

  /// NaN stays.
  static __device__ __forceinline__ void clip(Values<T>& v) {
#pragma unroll
    for (int slot = 0; slot < T::kSlots; ++slot)
#pragma unroll
      for (int i = 0; i < kGroup; ++i)
        if (fabsf(v[slot][i]) > kHuge) v[slot][i] = copysignf(kHuge, v[slot][i]);
  }

  /// amax; NaN where an element is. What a lane without elements has got from others is none of a row's.
  template <bool kWhole>
  __device__ __forceinline__ float largest_of(const Values<T>& v, const Unit<T>& unit, int step) const {
    float largest = 0;
#pragma unroll
    for (int slot = 0; slot < T::kSlots; ++slot) {
      if (!kWhole && !has(unit, step, slot)) continue;
      float of_slot = 0;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) of_slot = arch::max_or_nan(of_slot, fabsf(v[slot][i]));
      largest = arch::max_or_nan(largest, T::kHadamard ? of_slot * lane_.norm[slot % T::kColumns] : of_slot);
    }
    return largest;
  }

  /// amax of what is neither NaN nor infinite.
  template <bool kWhole>
  __device__ __forceinline__ float largest_finite(const Values<T>& v, const Unit<T>& unit, int step) {
    float largest = 0;
    bool infinite = false;
#pragma unroll
    for (int slot = 0; slot < T::kSlots; ++slot) {
      if (!kWhole && !has(unit, step, slot)) continue;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const float size = fabsf(v[slot][i]) * (T::kHadamard ? lane_.norm[slot % T::kColumns] : 1.f);
        if (size <= args_.limit) largest = fmaxf(largest, size);
        infinite |= size > args_.limit;
      }
    }
    wild_ |= __any_sync(kAllLanes, infinite);
    return largest;
  }

  const QuantizeArgs& args_;
  const Lane<T>& lane_;
  uint4* memory_;
  uint32_t row_;                   // of a step's
  int64_t x_offset_, out_offset_;  // of this lane's first group, where rows lie along one axis
  bool wild_ = false;              // of what this warp has seen some is infinite, or counts as that
};

}  // namespace fa3
