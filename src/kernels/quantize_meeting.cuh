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
/// whoever needs the unit's reads all of them. Memory holds whatever it held, in a graph the parts of the replay
/// before. So each block first takes its own away, and nobody reads any before all have.
class Meeting {
 public:
  /// All threads come here, in the beginning.
  __device__ __forceinline__ Meeting(const QuantizeArgs& args, int group, int rank) : args_(args) {
    if (args.blocks_per_group == 1) return;
    for (int unit = group + threadIdx.x * args.groups; unit < args.units; unit += blockDim.x * args.groups)
      *part_of(unit, rank) = 0;
    __syncthreads();
    if (threadIdx.x == 0) {
      arrivals().open();
      __threadfence();  // who sees the arrival sees the parts gone
      if (arrivals().add() + 1 == blocks()) {
        __threadfence();
        arrivals().close();
      }
    }
    __syncthreads();
  }

  /// What each thread of the block has found in a unit, number `round` of its group.
  __device__ __forceinline__ void leave(int unit, int round, int rank, float amax) {
    keep(shared().warps[round % kSlots], amax);
    if (args_.blocks_per_group == 1) return;
    __syncthreads();
    report(unit, round, rank);
  }

  /// Begin to read a unit's parts, long before take(): those that are there then need not be waited for.
  __device__ __forceinline__ void ask(int unit) {
    if (args_.blocks_per_group == 1) return;
    wait_for_all();
    asked_ = static_cast<int>(threadIdx.x) < args_.blocks_per_group ? *part_of(unit, threadIdx.x) : 0;
  }

  /// The unit's amax, in all threads, which all come here.
  __device__ __forceinline__ float take(int unit, int round) {
    if (args_.blocks_per_group > 1) keep(shared().groups[round % 2], parts_amax(unit));
    __syncthreads();
    return found(round);
  }

  /// leave(), and take() of the round before, whose unit was `before`: with one barrier for both.
  __device__ __forceinline__ float leave_and_take(int unit, int round, int rank, float amax, int before) {
    keep(shared().warps[round % kSlots], amax);
    if (args_.blocks_per_group > 1) keep(shared().groups[(round - 1) % 2], parts_amax(before));
    __syncthreads();
    if (args_.blocks_per_group > 1) report(unit, round, rank);
    return found(round - 1);
  }

 private:
  /// Units that are between leave() and take(), and one more.
  static constexpr int kSlots = 8;
  static_assert(kSlots > kMaxPlaces);
  struct Shared {
    float warps[kSlots][32], groups[2][32];
  };
  static __device__ __forceinline__ Shared& shared() {
    __shared__ Shared memory;
    return memory;
  }

  static constexpr uint64_t kThere = uint64_t{1} << 32;  // in front of a part's amax

  __device__ __forceinline__ int blocks() const { return args_.groups * args_.blocks_per_group; }
  __device__ __forceinline__ arch::Counter arrivals() const { return {args_.arrivals, args_.ticket}; }
  __device__ __forceinline__ volatile uint64_t* part_of(int unit, int rank) const {
    return args_.parts + int64_t{unit} * args_.blocks_per_group + rank;
  }

  /// Each warp's amax, for warps to join after a barrier.
  static __device__ __forceinline__ void keep(float* warps, float amax) {
    amax = warp_amax(amax);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = amax;
  }
  static __device__ __forceinline__ float joined(const float* warps) {
    const unsigned warp = threadIdx.x % 32;
    return warp_amax(warp < blockDim.x / 32 ? warps[warp] : 0.f);
  }

  /// The first warp makes the block's part known.
  __device__ __forceinline__ void report(int unit, int round, int rank) const {
    if (threadIdx.x >= 32) return;
    const float amax = joined(shared().warps[round % kSlots]);
    if (threadIdx.x == 0) *part_of(unit, rank) = kThere | __float_as_uint(amax);
  }

  /// amax of the parts that are this thread's to read.
  __device__ __forceinline__ float parts_amax(int unit) {
    wait_for_all();
    float amax = 0;
    for (int rank = threadIdx.x; rank < args_.blocks_per_group; rank += blockDim.x) {
      amax = fmaxf(amax, read(part_of(unit, rank), asked_));
      asked_ = 0;
    }
    return amax;
  }

  __device__ __forceinline__ float found(int round) const {
    return joined(args_.blocks_per_group > 1 ? shared().groups[round % 2] : shared().warps[round % kSlots]);
  }

  /// For all blocks to have begun, which most often they have long since.
  __device__ __forceinline__ void wait_for_all() {
    if (all_begun_) return;
    while (!arrivals().reached(blocks())) __nanosleep(64);
    __threadfence();
    all_begun_ = true;
  }

  /// A part, once it is there; `word` is what was there before.
  __device__ __forceinline__ static float read(const volatile uint64_t* part, uint64_t word) {
    if (!(word & kThere)) word = *part;
    for (; !(word & kThere); word = *part) __nanosleep(20);
    return __uint_as_float(static_cast<unsigned>(word));
  }

  const QuantizeArgs& args_;
  bool all_begun_ = false;
  uint64_t asked_ = 0;  // what ask() has found
};

}  // namespace fa3
