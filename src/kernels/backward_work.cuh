// What thread blocks of the backward work on, and how their warps get to know it.
#pragma once
#include "arch/barrier.cuh"
#include "arch/warpgroup.cuh"
#include "attention/query_steps.h"
#include "kernels/backward_args.h"
#include "tile/ring.cuh"

namespace fa3 {

/// A piece of work: a block of keys of one KV head, against all queries of its group's heads that see it.
struct KeyTile : QueryWalk {
  int n_block, batch, head_kv;
  Span q, k;
  int first_tile;  // the sequence's first query tile
  bool last;       // most often nobody who works on it gets another

  __device__ __forceinline__ bool exists() const { return n_block >= 0; }

  /// The same, in a form that the compiler knows to be uniform.
  __device__ __forceinline__ KeyTile uniform() const {
    return {{{arch::uniform(blocks.begin), arch::uniform(blocks.end), arch::uniform(blocks.plain_begin),
              arch::uniform(blocks.plain_end)},
             arch::uniform(start),
             arch::uniform(backwards) != 0},
            arch::uniform(n_block),
            arch::uniform(batch),
            arch::uniform(head_kv),
            {arch::uniform(q.begin), arch::uniform(q.length)},
            {arch::uniform(k.begin), arch::uniform(k.length)},
            arch::uniform(first_tile),
            arch::uniform(last) != 0};
  }
};

/// Blocks of queries that blocks of keys begin with, where all see all: of a long sequence not so many that L2 lacks
/// some.
constexpr int kStarts = 16;

/// The piece with this number, of a pair's first thread block, for a whole warp; all of it is uniform. False: there is
/// none.
template <class Traits>
__device__ __forceinline__ bool find_work(const BackwardArgs& args, int index, KeyTile& work) {
  constexpr int kKeys = Traits::kTileN * Traits::kBlocks;
  int n_blocks;  // of these
  TileOrder::Tile found;
  if (!args.keys.ragged()) {
    n_blocks = ceil_div(args.keys.rows, kKeys);
    found = args.order.at(index, args.num_heads_kv * args.batch, n_blocks);
    work.batch = found.head / args.num_heads_kv;
    work.head_kv = found.head - work.batch * args.num_heads_kv;
  } else {
    // The lanes count the blocks of 32 sequences at a time.
    const int lane = threadIdx.x % 32;
    unsigned reached = 0;
    for (work.batch = 0; !reached; work.batch += 32) {
      if (work.batch >= args.batch) return false;
      int blocks = 0;
      if (work.batch + lane < args.batch)
        blocks = args.num_heads_kv * ceil_div(args.keys.span(work.batch + lane).length, kKeys);
      int until = blocks;  // becomes the blocks of this lane's sequence and those of the group before it
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int below = __shfl_up_sync(~0u, until, step);
        if (lane >= step) until += below;
      }
      reached = __ballot_sync(~0u, index < until);
      const int owner = reached ? __ffs(reached) - 1 : 31;
      index -= __shfl_sync(~0u, reached ? until - blocks : until, owner);
      if (reached) work.batch += owner - 32;
    }
    n_blocks = ceil_div(arch::uniform(args.keys.span(work.batch).length), kKeys);
    found = args.order.at(index, args.num_heads_kv, n_blocks);
    work.head_kv = found.head;
  }
  // Under a causal mask the first keys are seen by most.
  work.n_block = (n_blocks - 1 - found.m_block) * Traits::kBlocks;
  const Span q = args.queries.span(work.batch), k = args.keys.span(work.batch);
  work.q = {arch::uniform(q.begin), arch::uniform(q.length)};
  work.k = {arch::uniform(k.begin), arch::uniform(k.length)};
  const int first = work.n_block * Traits::kTileN;
  if (first >= work.k.length) return false;  // past seqused_k
  work.blocks =
      query_block_range<Traits::kTileM>(args.visibility, first, first + kKeys - 1, work.q.length, work.k.length);
  if (work.q.length == 0) work.blocks = {};
  // Where blocks of keys take turns, all begin with the queries that all see under a causal mask, each a step behind
  // the one before it. Begun with its first queries, a block would wait there for blocks that have to come all the way.
  // In any order, blocks that see all queries do not all begin with the same ones: they would meet at each of them.
  work.backwards = args.scratch.in_order;
  work.start = work.backwards ? work.blocks.end - 1 : work.blocks.begin;
  if (!work.backwards && args.visibility.full() && work.blocks.count() > 0)
    work.start = first / Traits::kTileM % smaller(work.blocks.count(), kStarts);
  work.first_tile = arch::uniform(QueryTiles{args.queries, Traits::kTileM}.first(work.batch));
  return true;
}

/// Pieces of work on their way from the loader's warp to the others, two of them: the loader is one ahead.
struct WorkRing {
  static constexpr int kPlaces = 2;
  KeyTile place[kPlaces];
  arch::Barrier full[kPlaces], empty[kPlaces];  // the loader arrives; each warp that reads them

  __device__ void init_barriers(int readers) {
    for (int i = 0; i < kPlaces; ++i) {
      full[i].init(1);
      empty[i].init(readers);
    }
  }

  /// By the loader's warp.
  __device__ __forceinline__ void put(const KeyTile& work, Ring<kPlaces>& at) {
    empty[at.stage()].wait(at.parity() ^ 1);
    if (threadIdx.x % 32 == 0) {
      place[at.stage()] = work;
      full[at.stage()].arrive();
    }
    at.advance();
  }

  /// By a whole warp: the next piece, which stays until it is given back. One that does not exist: there is no more.
  __device__ __forceinline__ const KeyTile& take(const Ring<kPlaces>& at) {
    full[at.stage()].wait(at.parity());
    return place[at.stage()];
  }
  __device__ __forceinline__ void give_back(Ring<kPlaces>& at) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) empty[at.stage()].arrive();
    at.advance();
  }
};

}  // namespace fa3
