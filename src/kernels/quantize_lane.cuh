// What of a row a thread of the quantisation kernel has, and the rotation, in which it meets other threads of its warp.
#pragma once

#include <type_traits>

#include "arch/elements.h"
#include "arch/l2.cuh"
#include "attention/hadamard.h"
#include "kernels/quantize_kind.h"

namespace fa3 {

inline constexpr unsigned kAllLanes = 0xffffffff;
inline constexpr int kGroup = 8;  // elements that a thread has side by side
inline constexpr int kShuffles = 5;

/// The scale of what has this amax.
__device__ __forceinline__ float descale_of(float amax) {
  return amax > 0 ? fmaxf(__fdiv_rn(amax, kMaxE4m3), kMinDescale) : 1.f;
}

/// A unit's scale, for the caller; one thread comes here.
__device__ __forceinline__ void keep_descale(const QuantizeArgs& args, int batch, int head, float descale) {
  args.descale[batch * args.descale_stride[0] + head * args.descale_stride[1]] = descale;
}

/// The first so many steps of a stream begin to come to L2, a row a thread: a microsecond before the kernel's own code
/// has come, and knows what to load.
__device__ __forceinline__ void prefetch_steps(const QuantizeArgs& args, int element_bytes, int group, int rank,
                                               int steps) {
  const int nth = static_cast<int>(threadIdx.x) / args.step_rows;
  int unit = group, step = rank + nth * args.blocks_per_group;
  for (; step >= args.unit_steps; step -= args.unit_steps) unit += args.groups;
  const uint32_t row = step * args.step_rows + threadIdx.x % args.step_rows;
  if (nth >= steps || unit >= args.units || row >= args.unit_rows || args.rows.count > 1) return;
  const int64_t first = unit / args.unit_heads * args.x_unit[0] + unit % args.unit_heads * args.x_unit[1];
  const char* at = static_cast<const char*>(args.x) + (first + row * args.rows.x[0]) * element_bytes;
  for (int byte = 0; byte < args.head_dim * element_bytes; byte += 128) arch::prefetch_to_l2(at + byte);
}

template <class Element, bool kHadamard_, int kColumns_, int kRows>
struct QuantizeTraits {
  using Type = Element;
  static constexpr bool kHadamard = kHadamard_;
  static constexpr int kDtype = std::is_same_v<Element, Float16>    ? FA3_FLOAT16
                                : std::is_same_v<Element, BFloat16> ? FA3_BFLOAT16
                                                                    : FA3_FLOAT32;
  static constexpr QuantizeKind kKind{kDtype, kHadamard, kColumns_, kRows};
  static constexpr int kColumns = kKind.columns, kSlots = kKind.slots();
  static constexpr int kRing = kKind.ring(), kThreads = kKind.threads();
  static constexpr bool kStreams = kKind.streams();
  static constexpr int kLoadedWords = kGroup * sizeof(Element) / sizeof(uint4);
  static constexpr int kWords = kKind.group_bytes() / sizeof(uint4);
  // amax of 16 bits needs no fp32: a pair is one instruction.
  static constexpr bool kPairs = !kHadamard && sizeof(Element) == 2;
  // In blocks of a power of two, all columns of a lane are paired with those of the same other lanes.
  static constexpr int kPairings = kColumns == 3 ? 3 : 1;
  // Whole steps are code of their own: see Share::load(). A small unit has few, and a rotation of it no registers left.
  static constexpr bool kPlain = kRows > 1 || (!kHadamard && kColumns == 2);
};

/// Which elements of a row are this lane's, a group of 8 in each column, and how they take part in the rotation. Lanes
/// that are left over have nothing, or where a step is whole the same as the warp's first ones.
template <class T>
struct Lane {
  int row;                 // of the warp's
  bool has[T::kColumns];   // and no group past the row's end
  int group[T::kColumns];  // of the row
  // Rotation only.
  uint32_t signs[T::kColumns][T::kLoadedWords * 4];  // of each word as it is loaded, the bits that are turned
  float norm[T::kColumns];
  int source[T::kPairings][kShuffles];    // the lane with the other element of each pair
  float factor[T::kPairings][kShuffles];  // of this lane's own: sum 1, difference -1, in no pair 0
  int pairs;                              // of the shuffles, those that pair anything
  bool columns_pair;                      // the first two columns are the halves of a block

  __device__ __forceinline__ Lane(int head_dim, int per_row) {
    const int lane = threadIdx.x % 32, groups = head_dim / kGroup;
    row = lane / per_row;
#pragma unroll
    for (int column = 0; column < T::kColumns; ++column) {
      group[column] = lane % per_row + per_row * column;
      has[column] = row < 32 / per_row && group[column] < groups;
    }
    if (row == 32 / per_row) row = 0;
    if constexpr (T::kHadamard) {
#pragma unroll
      for (int column = 0; column < T::kColumns; ++column) {
        const int block = group[column] < groups ? hadamard_block(group[column] * kGroup, head_dim) : 1;
        norm[column] = hadamard_norm(block);
        constexpr int kPerWord = kGroup / (T::kLoadedWords * 4), kBits = 32 / kPerWord;
#pragma unroll
        for (int word = 0; word < T::kLoadedWords * 4; ++word) {
          signs[column][word] = 0;
#pragma unroll
          for (int i = 0; i < kPerWord; ++i)
            if (hadamard_negates(group[column] * kGroup + word * kPerWord + i))
              signs[column][word] |= uint32_t{1} << (kBits * (i + 1) - 1);
        }
        if (column >= T::kPairings) continue;
#pragma unroll
        for (int bit = 0; bit < kShuffles; ++bit) {
          const int step = 1 << bit;  // in groups, and in lanes: a block begins at a multiple of its size
          const bool paired = step * kGroup < block, second = group[column] & step;
          const int self = row * per_row + lane % per_row;  // or who has the same
          source[column][bit] = !paired ? lane : second ? self - step : self + step;
          factor[column][bit] = !paired ? 0.f : second ? -1.f : 1.f;
        }
      }
      const int largest = hadamard_block(0, head_dim) / kGroup;
      pairs = 31 - __clz(min(largest, per_row));
      columns_pair = largest >= 2 * per_row;
    }
  }
};

/// A thread's elements of a step, by slot: its columns of a row, and then those of other rows.
template <class T>
using Values = float[T::kSlots][kGroup];

/// Sylvester's butterflies, from neighbours up: the same sums in the same order as the CPU's. Norms are for the scale.
template <class T>
__device__ __forceinline__ void rotate(Values<T>& v, const Lane<T>& lane) {
#pragma unroll
  for (int slot = 0; slot < T::kSlots; ++slot) {
#pragma unroll
    for (int step = 1; step < kGroup; step *= 2) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (i & step) continue;
        const float a = v[slot][i], b = v[slot][i + step];
        v[slot][i] = a + b;
        v[slot][i + step] = a - b;
      }
    }
  }
#pragma unroll
  for (int bit = 0; bit < kShuffles; ++bit) {
    if (bit >= lane.pairs) break;  // the same for all lanes
#pragma unroll
    for (int slot = 0; slot < T::kSlots; ++slot) {
      const int pairing = slot % T::kPairings;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const float other = __shfl_sync(kAllLanes, v[slot][i], lane.source[pairing][bit]);
        v[slot][i] = fmaf(lane.factor[pairing][bit], v[slot][i], other);
      }
    }
  }
  if constexpr (T::kColumns > 1) {
    if (!lane.columns_pair) return;  // the same for all lanes
#pragma unroll
    for (int first = 0; first < T::kSlots; first += T::kColumns) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const float a = v[first][i], b = v[first + 1][i];
        v[first][i] = a + b;
        v[first + 1][i] = a - b;
      }
    }
  }
}

}  // namespace fa3
