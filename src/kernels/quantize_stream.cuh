// Units that a group of thread blocks can hold, as one stream of steps.
#pragma once
#include "arch/barrier.cuh"
#include "arch/warpgroup.cuh"
#include "kernels/quantize_parts.cuh"
#include "kernels/quantize_share.cuh"

namespace fa3 {

/// A thread block's way through the steps of its group's units, of which each block of the group has every nth. A unit
/// has at least as many as the group has blocks.
template <class T>
struct Cursor {
  const QuantizeArgs& args;
  Unit<T> rows;
  int batch = 0, head, round = 0, step, place = 0;

  __device__ __forceinline__ Cursor(const QuantizeArgs& args, int group, int rank)
      : args(args), rows(args), head(group), step(rank) {
    settle();
  }
  __device__ __forceinline__ void advance() {
    step += args.blocks_per_group;
    if (++place == args.places) place = 0;
    if (step < args.unit_steps) return;
    step -= args.unit_steps;
    ++round;
    head += args.groups;
    settle();
  }
  __device__ __forceinline__ bool first() const { return step < args.blocks_per_group; }  // of this block in the unit
  __device__ __forceinline__ bool last() const { return step + args.blocks_per_group >= args.unit_steps; }
  __device__ __forceinline__ int unit() const { return batch * args.unit_heads + head; }

 private:
  __device__ __forceinline__ void settle() {
    for (; head >= args.unit_heads; head -= args.unit_heads) ++batch;
    rows.move(args, batch, head);
  }
};

/// How a block's scales come together while its warps work: one warp more does nothing but gather parts, in the order
/// of the units. The others meet once a unit, or some would run ahead, and the loads of the last would come later.
template <class T>
class Gathering {
 public:
  __device__ __forceinline__ Gathering(const QuantizeArgs& args, int group, int rank)
      : args_(args), parts_(args, group, rank), group_(group), rank_(rank) {}

  /// All threads, the gathering ones too, in the beginning.
  __device__ __forceinline__ void begin() const {
    if (threadIdx.x < kSlots) {
      shared().left[threadIdx.x].init(1);
      shared().known[threadIdx.x].init(1);
    }
    __syncthreads();
  }

  /// What each thread has found in a unit, number `round` of the group.
  __device__ __forceinline__ void leave(int unit, int round, float amax) const {
    float* warps = shared().warps[round % kSlots];
    keep_amax(warps, amax);
    arch::barrier_sync(1, T::kThreads);
    if (threadIdx.x >= 32) return;
    amax = joined_amax(warps, T::kThreads / 32);
    if (threadIdx.x > 0) return;
    parts_.leave(unit, amax);
    shared().left[round % kSlots].arrive();
  }

  /// A unit's descale, once it is known.
  __device__ __forceinline__ float take(int round) const {
    shared().known[round % kSlots].wait(round / kSlots % 2);
    return shared().descales[round % kSlots];
  }

  /// The gathering warp.
  __device__ __forceinline__ void gather() const {
    const int lane = threadIdx.x % 32;
    parts_.prepare_to_depart();
    int batch = 0, head = group_;
    for (int unit = group_, round = 0; unit < args_.units; unit += args_.groups, ++round, head += args_.groups) {
      for (; head >= args_.unit_heads; head -= args_.unit_heads) ++batch;
      shared().left[round % kSlots].wait(round / kSlots % 2);  // none is complete without this block's part
      const float descale = descale_of(parts_.gather(unit));
      if (lane > 0) continue;
      shared().descales[round % kSlots] = descale;
      shared().known[round % kSlots].arrive();
      if (rank_ == 0) keep_descale(args_, batch, head, descale);
    }
    parts_.depart();
  }

 private:
  /// Units that are between leave() and take(), and one more.
  static constexpr int kSlots = 8;
  static_assert(kSlots > kMaxPlaces);
  struct Shared {
    float warps[kSlots][32], descales[kSlots];
    arch::Barrier left[kSlots], known[kSlots];
  };
  static __device__ __forceinline__ Shared& shared() {
    __shared__ Shared memory;
    return memory;
  }

  const QuantizeArgs& args_;
  Parts parts_;
  int group_, rank_;
};

/// Steps are written as late as their places are needed for others, so that a unit's amax has time to come together:
/// reading, writing and waiting go on beside each other.
template <class T>
__device__ __forceinline__ void stream(const QuantizeArgs& args, Share<T>& share, int group, int rank) {
  constexpr int kRing = T::kRing;
  const Gathering<T> gathering(args, group, rank);
  const bool gathers = arch::uniform(threadIdx.x / 32) == T::kThreads / 32;
  const int all = rounds_of(args, group) * args.unit_steps;
  const int steps = max((all - rank + args.blocks_per_group - 1) / args.blocks_per_group, 0);
  const int lag = args.places - kRing;
  Cursor<T> loads(args, group, rank), scans(args, group, rank), writes(args, group, rank);
  const auto load = [&](int step) {
    if (step < steps) share.load(loads.rows, loads.step, loads.place), loads.advance();
    __pipeline_commit();  // empty or not: the waits count commits
  };
  if (!gathers)
    for (int step = 0; step < kRing; ++step) load(step);
  gathering.begin();
  if (gathers) return gathering.gather();
  float amax = 0;
  Scale<T> scale(share.lane(), 1);
  for (int step = 0; step < steps + lag; ++step) {
    if (step >= lag && step - lag < steps) {
      if (writes.first()) scale = Scale<T>(share.lane(), gathering.take(writes.round));
      share.write(writes.rows, writes.step, writes.place, false, scale);
      writes.advance();
    }
    load(step + kRing);
    if (step < steps) {
      __pipeline_wait_prior(kRing);
      amax = fmaxf(amax, share.scan(scans.rows, scans.step, scans.place));
      if (scans.last()) {
        gathering.leave(scans.unit(), scans.round, amax);
        amax = 0;
      }
      scans.advance();
    }
  }
}

}  // namespace fa3
