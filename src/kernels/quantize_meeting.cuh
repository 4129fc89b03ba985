// How thread blocks that share a scale find the amax of all, unit by unit.
#pragma once
#include "arch/warpgroup.cuh"
#include "kernels/quantize_parts.cuh"

namespace fa3 {

/// Each thread block of a group leaves a part, its amax of a unit, and whoever needs the unit's reads all of them.
class Meeting {
 public:
  __device__ __forceinline__ Meeting(const QuantizeArgs& args, int group, int rank)
      : parts_(args, group, rank), blocks_(args.blocks_per_group) {}

  /// All threads, when the first loads are on their way.
  __device__ __forceinline__ void begin() const {
    if (departs()) parts_.prepare_to_depart();
  }

  /// What each thread of the block has found in a unit, number `round` of its group.
  __device__ __forceinline__ void leave(int unit, int round, float amax) const {
    keep_amax(shared().warps[round % 2], amax);
    if (alone()) return;
    __syncthreads();
    report(unit, round);
  }

  /// The unit's amax, in all threads, which all come here.
  __device__ __forceinline__ float take(int unit, int round) const {
    if (!alone()) keep_amax(shared().groups[round % 2], parts_amax(unit));
    __syncthreads();
    return found(round);
  }

  /// All threads, after the last take().
  __device__ __forceinline__ void depart() const {
    if (departs()) parts_.depart();
  }

 private:
  struct Shared {  // by turns: slow warps still read what the round before has left
    float warps[2][32], groups[2][32];
  };
  static __device__ __forceinline__ Shared& shared() {
    __shared__ Shared memory;
    return memory;
  }

  __device__ __forceinline__ bool alone() const { return blocks_ == 1; }
  /// The same for all lanes, which the compiler must know: or it takes warps for parted from there on, and has each
  /// shuffle of a rotation twice.
  __device__ __forceinline__ bool departs() const {
    return !alone() && arch::uniform(threadIdx.x / 32) + 1 == static_cast<int>(blockDim.x / 32);
  }
  static __device__ __forceinline__ float joined(const float* warps) { return joined_amax(warps, blockDim.x / 32); }

  /// The first warp makes the block's part known.
  __device__ __forceinline__ void report(int unit, int round) const {
    if (threadIdx.x >= 32) return;
    const float amax = joined(shared().warps[round % 2]);
    if (threadIdx.x == 0) parts_.leave(unit, amax);
  }

  /// amax of the parts that are this thread's to read.
  __device__ __forceinline__ float parts_amax(int unit) const {
    float amax = 0;
    for (int rank = static_cast<int>(threadIdx.x); rank < blocks_; rank += blockDim.x) {
      Part part = parts_.look(unit, rank);
      for (; !parts_.is_there(part); part = parts_.look(unit, rank)) __nanosleep(20);
      amax = fmaxf(amax, part.amax());
    }
    return amax;
  }

  __device__ __forceinline__ float found(int round) const {
    return joined(alone() ? shared().warps[round % 2] : shared().groups[round % 2]);
  }

  Parts parts_;
  int blocks_;
};

}  // namespace fa3
