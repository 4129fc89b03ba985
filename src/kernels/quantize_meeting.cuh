// How thread blocks that share a scale find the amax of all.
#pragma once
#include "arch/counter.cuh"
#include "kernels/quantize_args.h"
#include "kernels/quantize_lane.cuh"

namespace fa3 {

/// amax of this lane's and the 31 others'.
__device__ __forceinline__ float warp_amax(float amax) {
  return __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(amax)));  // from 0 up: in order as integers
}

/// How the thread blocks of a group tell each other what they have found: each leaves a part, its amax of a unit, and
/// whoever needs the unit's reads all of them. A part is known as this launch's by the ticket and the generation, which
/// the last launch of the same ticket, one of a graph, had another of.
class Meeting {
 public:
  /// All threads come here, in the beginning.
  __device__ __forceinline__ explicit Meeting(const QuantizeArgs& args) : args_(args) {
    if (args.blocks_per_group == 1) return;
    if (threadIdx.x == 0) {
      volatile unsigned* generation = reinterpret_cast<unsigned*>(args.arrivals + 1);
      shared().generation = *generation;
      const arch::Counter arrivals(args.arrivals, args.ticket);
      arrivals.open();
      __threadfence();  // who sees the arrival comes after the read
      const bool all_have_read = arrivals.add() + 1 == args.groups * args.blocks_per_group;
      if (all_have_read) {
        *generation = shared().generation + 1;
        arrivals.close();
      }
    }
    __syncthreads();
  }

  /// What each thread of the block has found in a unit, number `round` of its group.
  __device__ __forceinline__ void leave(int unit, int round, int rank, float amax) {
    float* warps = shared().warps[round % kSlots];
    amax = warp_amax(amax);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = amax;
    if (args_.blocks_per_group == 1) return;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    amax = warp_amax(threadIdx.x < blockDim.x / 32 ? warps[threadIdx.x] : 0.f);
    volatile uint64_t* words = part_of(unit, rank);
    // Two words with a half of the mark each: 64 bits that memory does not hold by chance.
    if (threadIdx.x < 2) words[threadIdx.x] = uint64_t{mark(threadIdx.x)} << 32 | __float_as_uint(amax);
  }

  /// The unit's amax, in all threads, which all come here.
  __device__ __forceinline__ float take(int unit, int round) {
    float* warps = shared().warps[round % kSlots];
    if (args_.blocks_per_group > 1) {
      float amax = 0;
      for (int rank = threadIdx.x; rank < args_.blocks_per_group; rank += blockDim.x)
        amax = fmaxf(amax, read(part_of(unit, rank)));
      warps = shared().groups[round % 2];
      amax = warp_amax(amax);
      if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = amax;
    }
    __syncthreads();
    const unsigned warp = threadIdx.x % 32;
    return warp_amax(warp < blockDim.x / 32 ? warps[warp] : 0.f);
  }

 private:
  /// Units that are between leave() and take(), and one more.
  static constexpr int kSlots = 8;
  static_assert(kSlots > kMaxPlaces);
  struct Shared {
    float warps[kSlots][32], groups[2][32];
    unsigned generation;
  };
  static __device__ __forceinline__ Shared& shared() {
    __shared__ Shared memory;
    return memory;
  }

  __device__ __forceinline__ unsigned mark(int word) const {
    return word ? shared().generation : static_cast<unsigned>(args_.ticket);
  }
  __device__ __forceinline__ volatile uint64_t* part_of(int unit, int rank) const {
    return args_.parts + 2 * (int64_t{unit} * args_.blocks_per_group + rank);
  }
  /// A part, once both words are there. They may be seen in any order, and a replay's first word has the same mark as
  /// that of the replay before: only with equal amax are they of one launch, or as good as that.
  __device__ __forceinline__ float read(const volatile uint64_t* words) const {
    for (;; __nanosleep(20)) {
      const uint64_t first = words[0], second = words[1];
      if (first >> 32 != mark(0) || second >> 32 != mark(1)) continue;
      const auto amax = static_cast<unsigned>(second);
      if (static_cast<unsigned>(first) == amax) return __uint_as_float(amax);
    }
  }

  const QuantizeArgs& args_;
};

}  // namespace fa3
