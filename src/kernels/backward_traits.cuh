// Everything about a backward kernel that follows from its line in the variant table, its shared memory, and its work.
#pragma once
#include "arch/barrier.cuh"
#include "arch/warpgroup.cuh"
#include "kernels/backward_args.h"
#include "tile/shared_tile.cuh"
#include "tile/staged_rows.cuh"

namespace fa3 {

/// The widest chunks of which both halves of a row are a whole number.
FA3_HOST_DEVICE constexpr int swizzle_for_halves(int columns) {
  return columns % 128 == 0 ? 128 : columns % 64 == 0 ? 64 : 32;
}

/// A block of 128 keys: consumers share them out, 64 each, for S^T, dP^T, dK and dV; for dQ they share out its queries
/// where a tile has 64 for each, else its columns. A block of 64, for head dims of which registers hold only one of dK
/// and dV: the first consumer has S^T and dV, the second dP^T and dK, and each half of dQ's columns.
template <class Element_, int kHeadDim_, int kHeadDimV_, int kTileM_, int kTileN_>
struct BackwardTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_;
  static constexpr int kConsumers = 2;
  static constexpr int kTileM = kTileM_, kTileN = kTileN_;
  static_assert(kTileN == 64 || kTileN == 64 * kConsumers, "consumers have 64 keys each, or the same");
  static constexpr bool kApart = kTileN == 64;      // dK and dV are different consumers'
  static constexpr int kOwnKeys = kApart ? 0 : 64;  // between the first keys of two consumers
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;  // of 168 each: see ForwardTraits

  static_assert(kTileM == 64 || (kTileM == 64 * kConsumers && !kApart), "dQ's products have 64 rows");
  static constexpr bool kShareQueries = kTileM > 64;
  static constexpr int kDqColumns = kShareQueries ? kHeadDim : kHeadDim / kConsumers;  // of each consumer
  static constexpr int kDqCount = kDqColumns / 2;                                      // floats of a thread
  static constexpr int kDqFloats = 128 * kDqCount;                                     // of a consumer
  static constexpr int kDqParts = kDqCount > 48 ? 2 : 1;  // in which they are handed over: shared memory is full

  /// A consumer that makes dQ of a step's dS only in the next step: one that does not make dS alone.
  FA3_HOST_DEVICE static constexpr bool lags(int consumer) { return !kApart || consumer == 0; }

  static constexpr int kSwizzleQK = kShareQueries ? (kHeadDim % 64 == 0   ? 128
                                                     : kHeadDim % 32 == 0 ? 64
                                                                          : 32)
                                                  : swizzle_for_halves(kHeadDim);
  static constexpr int kSwizzleV = kHeadDimV % 64 == 0 ? 128 : kHeadDimV % 32 == 0 ? 64 : 32;
  using TileQ = SharedTile<kTileM, kHeadDim, kSwizzleQK>;
  using TileDo = SharedTile<kTileM, kHeadDimV, kSwizzleV>;
  using TileK = SharedTile<kTileN, kHeadDim, kSwizzleQK>;
  using TileV = SharedTile<kTileN, kHeadDimV, kSwizzleV>;
  using TileDs = SharedTile<kTileN, kTileM, 128>;                         // as keys' rows of queries: transposed
  static constexpr int kStages = 2;                                       // of Q
  static constexpr int kDoutStages = TileDo::kBytes > 24 * 1024 ? 1 : 2;  // there is no room for two of head dim 256
  static_assert(kDqColumns % TileK::kChunkColumns == 0, "a consumer's columns of dQ are whole chunks of K");
};

/// What the consumers of 64 keys have instead of a place of its own to stage rows in: dQ's, when all is added.
template <class Traits, bool = Traits::kApart>
struct ConsumerExchange {
  uint4 p[Traits::kTileM / 16]
         [128];                   // P, thread by thread: thread t of the second consumer needs what t of the first has
  uint32_t kept[128];             // its elements that dropout keeps
  arch::Barrier p_full, p_empty;  // the 4 warps of the first consumer arrive, those of the second

  __device__ void init_barriers() {
    p_full.init(4);
    p_empty.init(4);
  }
};

template <class Traits>
struct ConsumerExchange<Traits, false> {
  StagedRows staging[4 * Traits::kConsumers];  // each consumer warp's own

  __device__ void init_barriers() {}
};

template <class Traits>
struct BackwardShared : ConsumerExchange<Traits> {
  static constexpr int kStages = Traits::kStages, kDoutStages = Traits::kDoutStages;

  alignas(1024) uint8_t k[Traits::TileK::kBytes];
  alignas(1024) uint8_t v[Traits::TileV::kBytes];
  alignas(1024) uint8_t q[kStages][Traits::TileQ::kBytes];
  alignas(1024) uint8_t dout[kDoutStages][Traits::TileDo::kBytes];
  alignas(1024) uint8_t ds[2][Traits::TileDs::kBytes];
  // Part of a consumer's accumulators, thread by thread.
  alignas(128) float4 dq[Traits::kConsumers][Traits::kDqCount / Traits::kDqParts / 4][128];
  alignas(128) float lse[kStages][Traits::kTileM], delta[kDoutStages][Traits::kTileM];

  // full: the loader announces bytes, the copy engine delivers them. empty: each consumer warp arrives once.
  arch::Barrier k_full, v_full;
  arch::Barrier q_full[kStages], q_empty[kStages];                // with lse
  arch::Barrier dout_full[kDoutStages], dout_empty[kDoutStages];  // with delta
  // Each warp that makes dS arrives once, and each that has read it. Where one consumer makes it alone, it knows by P,
  // which comes after that, that the other has read.
  arch::Barrier ds_full[2], ds_empty[2];
  arch::Barrier dq_full[Traits::kConsumers];   // the consumer's 4 warps arrive, its adder waits
  arch::Barrier dq_empty[Traits::kConsumers];  // the adder arrives, the consumer's 128 threads wait

  uint64_t seed;  // of dropout

  /// Where a consumer's warp stages its rows.
  __device__ __forceinline__ StagedRows& staged(int consumer, int warp) {
    if constexpr (Traits::kApart) {
      static_assert(sizeof(dq[0]) >= 4 * sizeof(StagedRows), "a consumer's dQ has room for what its warps stage");
      return reinterpret_cast<StagedRows*>(dq[consumer])[warp];
    } else {
      return this->staging[4 * consumer + warp];
    }
  }

  __device__ void init_barriers() {
    constexpr int kWarps = 4 * Traits::kConsumers;
    ConsumerExchange<Traits>::init_barriers();
    k_full.init(1);
    v_full.init(1);
    for (int stage = 0; stage < kStages; ++stage) {
      q_full[stage].init(1);
      q_empty[stage].init(kWarps);
    }
    for (int stage = 0; stage < kDoutStages; ++stage) {
      dout_full[stage].init(1);
      dout_empty[stage].init(kWarps);
    }
    for (int buffer = 0; buffer < 2; ++buffer) {
      ds_full[buffer].init(Traits::kApart ? 4 : kWarps);
      ds_empty[buffer].init(kWarps);
    }
    for (int w = 0; w < Traits::kConsumers; ++w) {
      dq_full[w].init(4);
      dq_empty[w].init(1);
    }
  }
};

/// A thread block's work: a block of keys of one KV head, against all queries of its group's heads that see it.
struct KeyTile {
  int n_block, batch, head_kv;
  Span q, k;
  QueryBlockRange blocks;  // of queries, for each head of the group
  int first_tile;          // the sequence's first query tile
  bool last_first;         // the last block of queries comes first

  __device__ __forceinline__ int steps(int group) const { return group * blocks.count(); }
};

/// The queries that a step works on.
struct QueryStep {
  int m_block, head;  // head of the group

  __device__ __forceinline__ explicit QueryStep(const KeyTile& work)
      : m_block(work.last_first ? work.blocks.end - 1 : work.blocks.begin), head(0) {}

  __device__ __forceinline__ void advance(const KeyTile& work) {
    const QueryBlockRange& blocks = work.blocks;
    m_block += work.last_first ? -1 : 1;
    if (m_block == (work.last_first ? blocks.begin - 1 : blocks.end)) {
      m_block = work.last_first ? blocks.end - 1 : blocks.begin;
      ++head;
    }
  }
};

/// Every warp finds the work for itself; all of it is uniform. False: there is none for this thread block.
template <class Traits>
__device__ __forceinline__ bool find_work(const BackwardArgs& args, KeyTile& work) {
  int index = blockIdx.x, n_blocks;
  TileOrder::Tile found;
  if (!args.keys.ragged()) {
    n_blocks = ceil_div(args.keys.rows, Traits::kTileN);
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
        blocks = args.num_heads_kv * ceil_div(args.keys.span(work.batch + lane).length, Traits::kTileN);
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
    n_blocks = ceil_div(arch::uniform(args.keys.span(work.batch).length), Traits::kTileN);
    found = args.order.at(index, args.num_heads_kv, n_blocks);
    work.head_kv = found.head;
  }
  work.n_block = n_blocks - 1 - found.m_block;  // under a causal mask the first keys are seen by most
  const Span q = args.queries.span(work.batch), k = args.keys.span(work.batch);
  work.q = {arch::uniform(q.begin), arch::uniform(q.length)};
  work.k = {arch::uniform(k.begin), arch::uniform(k.length)};
  const int first = work.n_block * Traits::kTileN;
  if (first >= work.k.length) return false;  // past seqused_k
  work.blocks = query_block_range<Traits::kTileM>(args.visibility, first, first + Traits::kTileN - 1, work.q.length,
                                                  work.k.length);
  if (work.q.length == 0) work.blocks = {};
  // Where blocks of keys take turns, all begin with the queries that all see under a causal mask, each a step behind
  // the one before it. Begun with its first queries, a block would wait there for blocks that have to come all the way.
  work.last_first = args.scratch.dq_turns != nullptr;
  work.first_tile = arch::uniform(QueryTiles{args.queries, Traits::kTileM}.first(work.batch));
  return true;
}

}  // namespace fa3
