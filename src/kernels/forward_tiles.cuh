// Which tile a thread block works on next: the producer warp's part of the scheduler.
#pragma once
#include "attention/seqlen.h"
#include "kernels/forward_args.h"
#include "kernels/forward_traits.cuh"

namespace fa3 {

/// Walks a thread block's tiles. Every lane of the producer warp calls next() and gets the same tile.
template <class Traits>
class TileWalk {
 public:
  __device__ __forceinline__ TileWalk(const ForwardArgs& args, int lane)
      : args_(args), lane_(lane), upcoming_(blockIdx.x), stride_(2 * (gridDim.x - blockIdx.x) - 1) {}

  __device__ __forceinline__ TileWork next() {
    while (true) {
      TileWork work;
      const int index = take_index();
      if (!(args_.queries.ragged() ? find_ragged(index, work) : find_dense(index, work))) {
        work.m_block = TileWork::kNone;
        return work;
      }
      const Span q = args_.queries.span(work.batch), k = args_.keys.span(work.batch);
      const int first = work.m_block * Traits::kTileM, last = smaller(first + Traits::kTileM, q.length) - 1;
      if (last < first) continue;  // past seqused_q
      const BlockRange blocks = block_range<Traits::kTileN>(args_.visibility, first, last, q.length, k.length);
      work.q_begin = q.begin;
      work.seqlen_q = q.length;
      work.seqlen_k = k.length;
      work.first_block = blocks.begin;
      work.end_block = blocks.end;
      return work;
    }
  }

 private:
  /// The index of this thread block's next tile. Without a counter tiles are dealt out to and fro: who got the longest
  /// of one round gets the shortest of the next. With one, the tile after this is asked for together with this one:
  /// the answer waits here, one round trip to L2, while the consumers still work on the tile before.
  __device__ __forceinline__ int take_index() {
    const int index = upcoming_;
    if (args_.tile_counter) {
      int handed_out = 0;
      if (lane_ == 0) handed_out = atomicAdd(args_.tile_counter, 1);
      upcoming_ = gridDim.x + __shfl_sync(~0u, handed_out, 0);
    } else {
      upcoming_ += stride_;
      stride_ = 2 * gridDim.x - stride_;
    }
    return index;
  }

  __device__ __forceinline__ bool find_dense(int index, TileWork& work) const {
    const int heads = args_.num_heads * args_.batch, m_blocks = ceil_div(args_.queries.rows, Traits::kTileM);
    if (index >= heads * m_blocks) return false;
    const TileOrder::Tile tile = args_.order.at(index, heads, m_blocks);
    work.m_block = tile.m_block;
    work.batch = tile.head / args_.num_heads;
    work.head = tile.head - work.batch * args_.num_heads;
    return true;
  }

  /// Ragged batches: the lanes count the m_blocks of 32 sequences at a time. Indices only grow, so the search goes on
  /// from where the last one ended.
  __device__ __forceinline__ bool find_ragged(int index, TileWork& work) {
    for (; group_ < args_.batch; group_ += 32) {
      int m_blocks = 0;
      if (group_ + lane_ < args_.batch) m_blocks = ceil_div(args_.queries.span(group_ + lane_).length, Traits::kTileM);
      int before = m_blocks;  // becomes the m_blocks of all sequences of the group up to this lane's
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int below = __shfl_up_sync(~0u, before, step);
        if (lane_ >= step) before += below;
      }
      before -= m_blocks;
      const int64_t local = index - group_first_;
      const unsigned reached = __ballot_sync(~0u, local < int64_t{before + m_blocks} * args_.num_heads);
      if (reached) {
        const int owner = __ffs(reached) - 1;
        const int rest = static_cast<int>(local - int64_t{__shfl_sync(~0u, before, owner)} * args_.num_heads);
        const TileOrder::Tile tile = args_.order.at(rest, args_.num_heads, __shfl_sync(~0u, m_blocks, owner));
        work.m_block = tile.m_block;
        work.head = tile.head;
        work.batch = group_ + owner;
        return true;
      }
      group_first_ += int64_t{__shfl_sync(~0u, before + m_blocks, 31)} * args_.num_heads;
    }
    return false;
  }

  const ForwardArgs& args_;
  const int lane_;
  int upcoming_;
  int stride_;               // to the next index dealt out
  int group_ = 0;            // first sequence of the group searched
  int64_t group_first_ = 0;  // index of its first tile
};

}  // namespace fa3
