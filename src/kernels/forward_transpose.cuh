// The transposer: turns e4m3 V between the loader and the consumers, as tile/transpose.h says.
#pragma once
#include "arch/fragments.cuh"
#include "arch/warpgroup.cuh"
#include "kernels/forward_args.h"
#include "kernels/forward_rows.cuh"
#include "kernels/forward_traits.cuh"
#include "tile/ring.cuh"
#include "tile/turn.cuh"

namespace fa3 {

/// One of the warps that turn V; they share each block by its columns, and none waits for the other.
template <class Traits>
class Transposer {
  using From = typename Traits::TileLoadedV;
  using To = typename Traits::TileV;

 public:
  __device__ __forceinline__ Transposer(const typename Traits::Args& args, ForwardShared<Traits>& shared, int warp)
      : args_(args), shared_(shared), warp_(warp), lane_(threadIdx.x % 32, Traits::kSwizzleV) {}

  __device__ __forceinline__ void run() {
    while (true) {
      shared_.tile_full[tiles_.stage()].wait(tiles_.parity());
      TileHead& work = shared_.tile[tiles_.stage()];
      if (work.first_query == TileHead::kNone) return;
      // Memory is far, and the scheduler would describe the next piece only then.
      if (warp_ == 0 && arch::leads()) {
        find_descales<Traits>(args_, work);
        shared_.tile_scaled[tiles_.stage()].arrive();
      }
      const int seqlen_k = work.seqlen_k, first_block = work.first_block;
      int n_block = work.end_block - 1;
      __syncwarp();
      if (arch::leads()) shared_.tile_empty[tiles_.stage()].arrive();
      tiles_.advance();
      for (; n_block >= first_block; --n_block) turn(seqlen_k - n_block * Traits::kTileN);
    }
  }

 private:
  /// The next block, of which the first `keys` are the sequence's. What follows, another sequence or unused rows,
  /// becomes 0: its probabilities are 0, but 0 times NaN is NaN.
  __device__ __forceinline__ void turn(int keys) {
    const uint32_t stage = ring_.stage();
    shared_.loaded_v_full[stage].wait(ring_.parity());
    shared_.v_empty[stage].wait(ring_.parity() ^ 1);
    const uint32_t from = arch::shared_address(shared_.loaded_v[stage]) + lane_.source;
    const uint32_t to = arch::shared_address(shared_.v[stage]);
    if (keys < Traits::kTileN) clear(shared_.loaded_v[stage], keys);
    // A step of the next group is asked for as soon as this one's is stored, and comes while the other steps are.
    uint32_t x[To::kSteps][4];
#pragma unroll
    for (int step = 0; step < To::kSteps; ++step) load(x[step], from, warp_, step);
#pragma unroll 1
    for (int group = warp_; group < To::kGroups; group += Traits::kTransposers) {
      const int next = group + Traits::kTransposers;
#pragma unroll
      for (int step = 0; step < To::kSteps; ++step) {
        store_turned(to + step * To::kStepBytes + group * To::kGroupBytes, x[step], lane_);
        if (next < To::kGroups) load(x[step], from, next, step);
      }
    }
    arch::fence_async_proxy();
    __syncwarp();
    if (arch::leads()) {
      shared_.v_full[stage].arrive();
      shared_.loaded_v_empty[stage].arrive();
    }
    ring_.advance();
  }

  /// 32 keys of 16 dims.
  __device__ __forceinline__ static void load(uint32_t (&x)[4], uint32_t from, int group, int step) {
    const uint32_t column = group * To::kGroupDims, chunk = column / Traits::kSwizzleV;
    // A chunk begins at a multiple of 1,024 bytes, so the offset inside it meets the swizzle's bits by xor.
    const uint32_t source = (from + chunk * From::kChunkBytes) ^ (column % Traits::kSwizzleV);
    arch::load_matrices_transposed(source + step * To::kStepKeys * Traits::kSwizzleV, x);
  }

  /// Zeros for the keys of a loaded block from `first` on, in this warp's columns. With qv, scores are made of the
  /// block meanwhile; those of keys past the end are masked, whatever they are.
  __device__ __forceinline__ void clear(uint8_t* loaded, int first) const {
    for (int group = warp_; group < To::kGroups; group += Traits::kTransposers)
      for (int key = first + threadIdx.x % 32; key < Traits::kTileN; key += 32)
        *reinterpret_cast<uint4*>(loaded + From::offset(key, group * To::kGroupDims)) = make_uint4(0, 0, 0, 0);
    __syncwarp();
  }

  const typename Traits::Args& args_;
  ForwardShared<Traits>& shared_;
  const int warp_;
  const TurningLane lane_;
  Ring<Traits::kStages> ring_;
  Ring<kTileSlots> tiles_;
};

}  // namespace fa3
