// What thread blocks that share a scale leave for each other in device memory.
#pragma once
#include "arch/counter.cuh"
#include "arch/l2.cuh"
#include "kernels/quantize_lane.cuh"

namespace fa3 {

/// Units that a group of thread blocks has.
__device__ __forceinline__ int rounds_of(const QuantizeArgs& args, int group) {
  return (args.units - group + args.groups - 1) / args.groups;
}

/// amax of this lane's and the 31 others'.
__device__ __forceinline__ float warp_amax(float amax) {
  return __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(amax)));  // from 0 up: in order as integers
}

/// Each warp's amax, for a warp to join after a barrier.
__device__ __forceinline__ void keep_amax(float* warps, float amax) {
  amax = warp_amax(amax);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = amax;
}
__device__ __forceinline__ float joined_amax(const float* warps, unsigned count) {
  const unsigned warp = threadIdx.x % 32;
  return warp_amax(warp < count ? warps[warp] : 0.f);
}

/// A block's amax of a unit, beside whose it is, in both words. Nobody has cleared the memory, and whatever it held is
/// not taken for a part, as tickets never come twice; but a graph's replays have the same one. So who is the last to
/// need the parts of a group takes them away. Nothing is waited for at the start, or while memory is busy.
struct Part {
  uint64_t first = 0, second = 0;

  __device__ __forceinline__ bool is_of(uint64_t ticket) const {
    return !((first ^ mark(ticket)) >> 32) && !((second ^ mark(ticket) << 32) >> 32) &&
           static_cast<uint32_t>(first) == static_cast<uint32_t>(second);
  }
  __device__ __forceinline__ float amax() const { return __uint_as_float(static_cast<uint32_t>(first)); }

  __device__ __forceinline__ void load(uint64_t* from) { arch::load_pair_from_l2(from, first, second); }
  static __device__ __forceinline__ void store(uint64_t* to, uint64_t ticket, float amax) {
    const uint64_t whose = mark(ticket), bits = __float_as_uint(amax);
    arch::store_pair_to_l2(to, whose >> 32 << 32 | bits, whose << 32 | bits);
  }

 private:
  /// 64 bits of which neither half of zeros is.
  static __device__ __forceinline__ uint64_t mark(uint64_t ticket) { return ticket << 24 | 1; }
};

/// The parts of a group's units.
class Parts {
 public:
  __device__ __forceinline__ Parts(const QuantizeArgs& args, int group, int rank)
      : args_(args), group_(group), rank_(rank) {}

  /// One thread makes known what its block has found in a unit.
  __device__ __forceinline__ void leave(int unit, float amax) const {
    Part::store(part_of(unit, rank_), args_.ticket, amax);
  }

  /// Block `rank`'s part, if it is there.
  __device__ __forceinline__ Part look(int unit, int rank) const {
    Part part;
    part.load(part_of(unit, rank));
    return part;
  }
  __device__ __forceinline__ bool is_there(const Part& part) const { return part.is_of(args_.ticket); }

  /// The amax of all blocks' parts, in all lanes of the one warp that comes here and waits for them, several of a
  /// lane's at a time.
  __device__ __forceinline__ float gather(int unit) const {
    constexpr int kAtOnce = 5;
    const int lane = threadIdx.x % 32, blocks = args_.blocks_per_group;
    float amax = 0;
    for (int first = 0; first < blocks; first += 32 * kAtOnce) {
      Part parts[kAtOnce];
      bool all = false;
      while (!all) {
        all = true;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int rank = first + 32 * i + lane;
          if (rank < blocks && !is_there(parts[i])) parts[i] = look(unit, rank);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) all &= first + 32 * i + lane >= blocks || is_there(parts[i]);
        all = !__any_sync(kAllLanes, !all);
        if (!all) __nanosleep(20);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) amax = fmaxf(amax, parts[i].amax());
    }
    return warp_amax(amax);
  }

  /// The warp that will depart(), once it has something to wait for anyway.
  __device__ __forceinline__ void prepare_to_depart() const {
    if (threadIdx.x % 32 == 0) departures().open();
  }

  /// One warp comes here when its block has read all parts that it needs. That comes before the count without a fence,
  /// since who has not got the parts is not here.
  __device__ __forceinline__ void depart() const {
    const int lane = threadIdx.x % 32;
    const bool last = lane == 0 && departures().add() + 1 == args_.blocks_per_group;
    if (!__any_sync(kAllLanes, last)) return;
    for (int unit = group_; unit < args_.units; unit += args_.groups)
      for (int rank = lane; rank < args_.blocks_per_group; rank += 32)
        arch::store_pair_to_l2(part_of(unit, rank), 0, 0);
    if (lane == 0) departures().close();
  }

 private:
  __device__ __forceinline__ uint64_t* part_of(int unit, int rank) const {
    return args_.parts + (int64_t{unit} * args_.blocks_per_group + rank) * kPartWords;
  }

  __device__ __forceinline__ arch::Counter departures() const { return {args_.departures + group_, args_.ticket}; }

  const QuantizeArgs& args_;
  int group_, rank_;
};

}  // namespace fa3
