// The loader: one thread that keeps Q, K and V coming by TMA; with pages, its whole warp.
#pragma once
#include "kernels/forward_args.h"
#include "kernels/forward_keys.cuh"
#include "kernels/forward_traits.cuh"
#include "tile/ring.cuh"

namespace fa3 {

/// `Keys` brings blocks of keys and values: ContiguousKeys to one lane, PagedKeys to all of a warp.
template <class Traits, class Keys>
class Loader {
 public:
  __device__ __forceinline__ Loader(const ForwardArgs& args, ForwardShared<Traits>& shared)
      : args_(args), shared_(shared) {}

  __device__ __forceinline__ void run() {
    while (true) {
      shared_.tile_full[tiles_.stage()].wait(tiles_.parity());
      const TileHead& work = shared_.tile[tiles_.stage()];
      if (work.m_block == TileHead::kNone) return;
      load(work);
      Keys::join();
      if (Keys::leads()) shared_.tile_empty[tiles_.stage()].arrive();
      tiles_.advance();
    }
  }

 private:
  using Source = typename Keys::Source;
  using Place = typename Keys::Place;
  static constexpr int kLead = 2;  // blocks before the last when the scheduler is to find the next piece

  /// Blocks come from the last to the first. K runs one block ahead of V: that is the order in which they are used.
  /// Where a block is, which memory may have to say, is asked once for both, before the wait for K's stage.
  __device__ __forceinline__ void load(const TileHead& work) {
    const Source k = Keys::source(args_, args_.k, work), v = Keys::source(args_, args_.v, work);
    Place here{}, ahead = Keys::place(k, work.end_block - 1);
#pragma unroll 1
    for (int n_block = work.end_block; n_block >= work.first_block; --n_block) {
      if (n_block == nearly_last(work) && Keys::leads()) shared_.tile_nearly_loaded.arrive();
      if (Traits::kHasQv && n_block < work.end_block) load_v(v, n_block, here);  // scores need it
      if (n_block > work.first_block) load_k(k, n_block - 1, ahead);
      if (!Traits::kHasQv && n_block < work.end_block) load_v(v, n_block, here);
      if (n_block == work.end_block && Keys::leads()) load_q(work);
      here = ahead;
      ahead = Keys::place(k, n_block - 2);
    }
  }

  /// Where the scheduler is told to find the next piece.
  __device__ __forceinline__ static int nearly_last(const TileHead& work) {
    return larger(smaller(work.end_block - 1, work.first_block + kLead), work.first_block);
  }

  __device__ __forceinline__ void load_q(const TileHead& work) {
    const uint32_t bytes = args_.packing.rows * (Traits::kQueryBytes / Traits::kTileM);
    const Ring<Traits::kQueryStages> ring{tiles_.count};
    const uint32_t stage = ring.stage();
    int row = work.q_begin + work.m_block * Traits::kRowGroups * args_.packing.positions;
#pragma unroll 1
    for (int group = 0; group < Traits::kRowGroups; ++group) {
      arch::Barrier& full = shared_.q_full[group][stage];
      shared_.q_empty[group][stage].wait(ring.parity() ^ 1);
      full.arrive_expecting(bytes);
      load_rows<typename Traits::TileQ>(args_.q, work, row, shared_.q[group][stage], full);
      if constexpr (Traits::kHasQv)
        load_rows<typename Traits::TileQV>(args_.qv, work, row, shared_.qv[group][stage], full);
      row += args_.packing.positions;
    }
  }

  template <class Tile>
  __device__ __forceinline__ static void load_rows(const TmaOperand& from, const TileHead& work, int row, uint8_t* to,
                                                   arch::Barrier& full) {
    const int head = work.first_head * from.head_step, head_kv = work.head_kv * from.head_step;
    const int batch = work.batch * from.batch_step;
#pragma unroll
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk)
      arch::load_box(to + chunk * Tile::kChunkBytes, &from.map,
                     {chunk * Tile::kChunkColumns, head, row, head_kv, batch}, full);
  }

  __device__ __forceinline__ void load_k(const Source& k, int n_block, Place place) {
    load_block<typename Traits::TileK>(k, args_.head_dim, n_block, place, shared_.k, shared_.k_full, shared_.k_empty,
                                       k_ring_);
  }
  __device__ __forceinline__ void load_v(const Source& v, int n_block, Place place) {
    if constexpr (Traits::kEightBits)
      load_block<typename Traits::TileLoadedV>(v, args_.head_dim_v, n_block, place, shared_.loaded_v,
                                               shared_.loaded_v_full, shared_.loaded_v_empty, v_ring_);
    else
      load_block<typename Traits::TileV>(v, args_.head_dim_v, n_block, place, shared_.v, shared_.v_full,
                                         shared_.v_empty, v_ring_);
  }

  template <class Tile>
  __device__ __forceinline__ void load_block(const Source& from, int columns, int n_block, Place place,
                                             uint8_t (&stages)[Traits::kStages][Tile::kBytes], arch::Barrier* full,
                                             arch::Barrier* empty, Ring<Traits::kStages>& ring) {
    const uint32_t stage = ring.stage();
    empty[stage].wait(ring.parity() ^ 1);
    Keys::template load<Tile>(from, columns, n_block, place, stages[stage], full[stage]);
    ring.advance();
  }

  const ForwardArgs& args_;
  ForwardShared<Traits>& shared_;
  Ring<Traits::kStages> k_ring_, v_ring_;
  Ring<ForwardShared<Traits>::kTileSlots> tiles_;  // every piece has its queries, so it counts them too
};

}  // namespace fa3
