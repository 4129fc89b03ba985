// The producer warp: finds tiles, tells the consumers, and keeps Q, K and V coming by TMA.
#pragma once
#include "kernels/forward_tiles.cuh"
#include "tile/ring.cuh"

namespace fa3 {

template <class Traits>
class Producer {
 public:
  __device__ __forceinline__ Producer(const ForwardArgs& args, ForwardShared<Traits>& shared)
      : args_(args), shared_(shared) {}

  __device__ __forceinline__ void run(int lane) {
    TileWalk<Traits> tiles(args_, lane);
    while (true) {
      const TileWork work = tiles.next();
      if (lane == 0) announce(work);
      if (work.m_block == TileWork::kNone) return;
      if (lane == 0 && work.first_block < work.end_block) load(work);
      __syncwarp();
    }
  }

 private:
  __device__ __forceinline__ void announce(const TileWork& work) {
    shared_.tile_empty[tiles_.stage].wait(tiles_.parity ^ 1);
    shared_.tile[tiles_.stage] = work;
    shared_.tile_full[tiles_.stage].arrive();
    tiles_.advance();
  }

  /// Blocks come from the last to the first. K runs one block ahead of V: that is the order in which they are used.
  __device__ __forceinline__ void load(const TileWork& work) {
    const int head_kv = work.head / args_.heads_per_kv;
    const int k = args_.keys.span(work.batch).begin;
    int n_block = work.end_block - 1;
    load_block<typename Traits::TileK>(args_.k, k, n_block, head_kv, work.batch, shared_.k, shared_.k_full,
                                       shared_.k_empty, k_ring_);
    load_q(work);
    for (; n_block > work.first_block; --n_block) {
      load_block<typename Traits::TileK>(args_.k, k, n_block - 1, head_kv, work.batch, shared_.k, shared_.k_full,
                                         shared_.k_empty, k_ring_);
      load_block<typename Traits::TileV>(args_.v, k, n_block, head_kv, work.batch, shared_.v, shared_.v_full,
                                         shared_.v_empty, v_ring_);
    }
    load_block<typename Traits::TileV>(args_.v, k, n_block, head_kv, work.batch, shared_.v, shared_.v_full,
                                       shared_.v_empty, v_ring_);
  }

  __device__ __forceinline__ void load_q(const TileWork& work) {
    using Tile = typename Traits::TileQ;
    const int first_row = work.q_begin + work.m_block * Traits::kTileM;
#pragma unroll 1
    for (int warpgroup = 0; warpgroup < Traits::kConsumers; ++warpgroup) {
      shared_.q_empty[warpgroup].wait(q_parity_ ^ 1);
      shared_.q_full[warpgroup].arrive_expecting(Tile::kBytes);
      load_rows<Tile>(args_.q, first_row + 64 * warpgroup, work.head, work.batch, shared_.q[warpgroup],
                      shared_.q_full[warpgroup]);
    }
    q_parity_ ^= 1;
  }

  template <class Tile>
  __device__ __forceinline__ void load_block(const TmaOperand& operand, int first_row, int n_block, int head, int batch,
                                             uint8_t (&stages)[Traits::kStages][Tile::kBytes], arch::Barrier* full,
                                             arch::Barrier* empty, Ring<Traits::kStages>& ring) {
    empty[ring.stage].wait(ring.parity ^ 1);
    full[ring.stage].arrive_expecting(Tile::kBytes);
    load_rows<Tile>(operand, first_row + n_block * Traits::kTileN, head, batch, stages[ring.stage], full[ring.stage]);
    ring.advance();
  }

  template <class Tile>
  __device__ __forceinline__ void load_rows(const TmaOperand& operand, int row, int head, int batch, uint8_t* shared,
                                            arch::Barrier& full) {
    const int h = head * operand.head_step, b = batch * operand.batch_step;
#pragma unroll
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk)
      arch::load_box(shared + chunk * Tile::kChunkBytes, &operand.map, {chunk * Tile::kChunkColumns, row, h, b}, full);
  }

  const ForwardArgs& args_;
  ForwardShared<Traits>& shared_;
  Ring<Traits::kStages> k_ring_, v_ring_;
  Ring<ForwardShared<Traits>::kTileSlots> tiles_;
  uint32_t q_parity_ = 0;
};

}  // namespace fa3
