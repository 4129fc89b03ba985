// Everything about a backward kernel that follows from its line in the variant table, and its shared memory.
#pragma once
#include "arch/barrier.cuh"
#include "kernels/backward_args.h"
#include "kernels/backward_pair.cuh"
#include "kernels/backward_work.cuh"
#include "tile/shared_tile.cuh"
#include "tile/staged_rows.cuh"

namespace fa3 {

/// Bytes of the widest chunks of which so many columns are a whole number.
FA3_HOST_DEVICE constexpr int swizzle_of_whole(int columns) {
  return columns % 64 == 0 ? 128 : columns % 32 == 0 ? 64 : 32;
}

/// A block of 128 keys: consumers share them out, 64 each, for S^T, dP^T, dK and dV; for dQ they share out its queries
/// where a tile has 64 for each, else its columns. A block of 64, for head dims of which registers hold only one of dK
/// and dV: the first consumer has S^T and dV, the second dP^T and dK, and the columns of dQ are shared out among those
/// of two thread blocks.
template <class Element_, int kHeadDim_, int kHeadDimV_, int kTileM_, int kTileN_>
struct BackwardTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_;
  static constexpr int kConsumers = 2;
  static constexpr int kTileM = kTileM_, kTileN = kTileN_;
  static_assert(kTileN == 64 || kTileN == 64 * kConsumers, "consumers have 64 keys each, or the same");
  static constexpr bool kPairs = kTileN == 64;      // dK and dV are different consumers': see backward_pair.cuh
  static constexpr int kBlocks = kPairs ? 2 : 1;    // thread blocks that make dQ together
  static constexpr int kOwnKeys = kPairs ? 0 : 64;  // between the first keys of two consumers
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;  // of 168 each: see ForwardTraits

  static_assert(kTileM == 64 || (kTileM == 64 * kConsumers && !kPairs), "dQ's products have 64 rows");
  static constexpr bool kShareQueries = kTileM > 64;
  static constexpr int kDqShares = kConsumers * kBlocks;                              // of a query tile
  static constexpr int kDqColumns = kShareQueries ? kHeadDim : kHeadDim / kDqShares;  // of each consumer
  static constexpr int kDqCount = kDqColumns / 2;                                     // floats of a thread
  static constexpr int kDqFloats = 128 * kDqCount;                                    // of a consumer
  static constexpr int kDqParts = kHeadDim > 192 ? 2 : 1;  // in which they are handed over: shared memory is full

  static constexpr int kSwizzleQK = swizzle_of_whole(kDqColumns), kSwizzleV = swizzle_of_whole(kHeadDimV);
  using TileQ = SharedTile<kTileM, kHeadDim, kSwizzleQK>;
  using TileDo = SharedTile<kTileM, kHeadDimV, kSwizzleV>;
  using TileK = SharedTile<kTileN, kHeadDim, kSwizzleQK>;
  using TileV = SharedTile<kTileN, kHeadDimV, kSwizzleV>;
  using TileOtherK = SharedTile<kTileN, kPairs ? kHeadDim / 2 : kHeadDim, kSwizzleQK>;  // a pair's
  using TileDs = SharedTile<kTileN, kTileM, 128>;                         // as keys' rows of queries: transposed
  static constexpr int kStages = 2;                                       // of Q
  static constexpr int kDoutStages = TileDo::kBytes > 24 * 1024 ? 1 : 2;  // there is no room for two of head dim 256
  static_assert(kDqColumns % TileK::kChunkColumns == 0, "a consumer's columns of dQ are whole chunks of K");
  // dQ is rounded as soon as multiprocessors run out of work, which takes a count at the end of each piece of work.
  // Tiles of 128 queries have short pieces: they lost more by that than they gained.
  static constexpr bool kRoundsEarly = !kShareQueries;
};

/// Zeros for the rows [begin, end) of a tile, by 128 threads: 0 times what another sequence has there might be NaN.
template <class Tile>
__device__ __forceinline__ void clear_rows(uint8_t* tile, int begin, int end) {
  constexpr int kVectors = Tile::kRowBytes / 16;  // of a row's chunk
#pragma unroll 1
  for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
    auto* vectors = reinterpret_cast<uint4*>(tile + chunk * Tile::kChunkBytes);
#pragma unroll 1
    for (int i = begin * kVectors + threadIdx.x % 128; i < end * kVectors; i += 128)
      vectors[i] = make_uint4(0, 0, 0, 0);
  }
}

/// What the consumers of 64 keys have instead of a place of its own to stage rows in: dQ's, when all is added.
template <class Traits, bool = Traits::kPairs>
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
struct BackwardShared : ConsumerExchange<Traits>, PairMail<Traits::kPairs>, PairBuffers<Traits> {
  static constexpr int kStages = Traits::kStages, kDoutStages = Traits::kDoutStages;

  alignas(1024) uint8_t k[Traits::TileK::kBytes];
  alignas(1024) uint8_t v[Traits::TileV::kBytes];
  alignas(1024) uint8_t q[kStages][Traits::TileQ::kBytes];
  alignas(1024) uint8_t dout[kDoutStages][Traits::TileDo::kBytes];
  alignas(1024) uint8_t ds[2][Traits::TileDs::kBytes];
  // Part of a consumer's accumulators, thread by thread.
  alignas(128) float4 dq[Traits::kConsumers][Traits::kDqCount / Traits::kDqParts / 4][128];
  alignas(128) float lse[kStages][Traits::kTileM], delta[kDoutStages][Traits::kTileM];

  WorkRing works;
  // full: the loader announces bytes, the copy engine delivers them. empty: each consumer warp arrives once.
  arch::Barrier k_full, v_full, k_empty, v_empty;
  arch::Barrier q_full[kStages], q_empty[kStages];                // with lse
  arch::Barrier dout_full[kDoutStages], dout_empty[kDoutStages];  // with delta
  // Each warp that makes dS arrives once, and each that has read it, of a pair's other thread block too.
  arch::Barrier ds_full[2], ds_empty[2];
  arch::Barrier dq_full[Traits::kConsumers];   // the consumer's 4 warps arrive, its adder waits
  arch::Barrier dq_empty[Traits::kConsumers];  // the adder arrives, the consumer's 128 threads wait

  uint64_t seed;  // of dropout

  /// Where a consumer's warp stages its rows.
  __device__ __forceinline__ StagedRows& staged(int consumer, int warp) {
    if constexpr (Traits::kPairs) {
      static_assert(sizeof(dq[0]) >= 4 * sizeof(StagedRows), "a consumer's dQ has room for what its warps stage");
      return reinterpret_cast<StagedRows*>(dq[consumer])[warp];
    } else {
      return this->staging[4 * consumer + warp];
    }
  }

  __device__ void init_barriers() {
    constexpr int kWarps = 4 * Traits::kConsumers;
    ConsumerExchange<Traits>::init_barriers();
    PairMail<Traits::kPairs>::init_barriers();
    works.init_barriers(kWarps + Traits::kConsumers + (Traits::kPairs ? 1 : 0));
    k_full.init(1);
    v_full.init(1);
    k_empty.init(kWarps);
    v_empty.init(kWarps);
    for (int stage = 0; stage < kStages; ++stage) {
      q_full[stage].init(1);
      q_empty[stage].init(kWarps);
    }
    for (int stage = 0; stage < kDoutStages; ++stage) {
      dout_full[stage].init(1);
      dout_empty[stage].init(kWarps);
    }
    for (int buffer = 0; buffer < 2; ++buffer) {
      ds_full[buffer].init(Traits::kPairs ? 4 : kWarps);
      ds_empty[buffer].init(kWarps * Traits::kBlocks);
    }
    for (int w = 0; w < Traits::kConsumers; ++w) {
      dq_full[w].init(4);
      dq_empty[w].init(1);
    }
  }
};

}  // namespace fa3
