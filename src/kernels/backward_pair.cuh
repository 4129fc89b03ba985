// Two thread blocks of a cluster with neighbouring blocks of keys: they make dQ together, half of its columns each.
#pragma once
#include "arch/cluster.cuh"
#include "kernels/backward_work.cuh"

namespace fa3 {

/// Adding dQ to memory is what limits tiles of 64 keys: each adds 64 KB a step at head dim 256, at 2.5 TB/s in all. A
/// pair adds half as much. Both thread blocks go through the same queries. Each has the other's keys too, of its own
/// half of the columns, and gets a copy of the other's dS in each step. The first one's loader finds the work of both.
template <bool kPairs>
struct PairMail {
  KeyTile told_work;                    // from the first thread block to the second
  arch::Barrier work_told, work_known;  // in the second, with the bytes sent; in the first
  arch::Barrier other_ds_full;          // with the bytes that the other one's sender announces

  __device__ void init_barriers() {
    work_told.init(1);
    work_known.init(1);
    other_ds_full.init(1);
  }
};

template <>
struct PairMail<false> {
  __device__ void init_barriers() {}
};

template <class Traits, bool = Traits::kPairs>
struct PairBuffers {
  alignas(1024) uint8_t other_k[Traits::TileOtherK::kBytes];
  alignas(1024) uint8_t other_ds[Traits::TileDs::kBytes];
};

template <class Traits>
struct PairBuffers<Traits, false> {};

/// This thread block's place in its pair.
template <class Traits>
__device__ __forceinline__ int pair_rank() {
  return Traits::kPairs ? blockIdx.x % 2 : 0;
}

/// A warp: copies the dS of each step to the other thread block, as soon as it is there and all have read the last one.
template <class Traits, class Shared>
class DsSender {
 public:
  __device__ __forceinline__ DsSender(int group, Shared& shared) : group_(group), shared_(shared) {}

  __device__ __forceinline__ void run() {
    Ring<WorkRing::kPlaces> at;
    Ring<2> step;
    while (true) {
      const KeyTile& work = shared_.works.take(at);
      const bool exists = arch::uniform(work.exists());
      const uint32_t end = step.count + arch::uniform(work.steps(group_));
      shared_.works.give_back(at);
      if (!exists) break;
#pragma unroll 1
      for (; step.count != end; step.advance()) send(step);
    }
  }

 private:
  __device__ __forceinline__ void send(const Ring<2>& step) {
    shared_.ds_full[step.stage()].wait(step.parity());
    if (step.count > 0) {
      const Ring<2> last{step.count - 1};
      shared_.ds_empty[last.stage()].wait(last.parity());
    }
    if (arch::leads())
      arch::copy_to(shared_.other_ds, shared_.ds[step.stage()], Traits::TileDs::kBytes, shared_.other_ds_full,
                    pair_rank<Traits>() ^ 1);
  }

  const int group_;
  Shared& shared_;
};

}  // namespace fa3
