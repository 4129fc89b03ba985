// Everything about a forward kernel that follows from its line in the variant table, and its shared memory.
#pragma once
#include "arch/barrier.cuh"
#include "arch/convert.cuh"
#include "attention/block_range.h"
#include "tile/shared_tile.cuh"

namespace fa3 {

/// The chunk width that pads a row least, the widest of equals.
FA3_HOST_DEVICE constexpr int swizzle_for(int columns) {
  const int bytes = 2 * columns;
  return ceil_div(bytes, 128) * 128 > ceil_div(bytes, 64) * 64 ? 64 : 128;
}

/// A warp's 16 rows of output on their way to memory, 64 columns of them: 8 vectors of 16 bytes a row, swizzled, so
/// that 8 rows' equal vectors and a row's 8 vectors each meet all banks.
struct alignas(128) StagedRows {
  static constexpr int kRows = 16, kVectors = 8, kPairs = kVectors / 2;
  uint4 vector[kRows][kVectors];

  __device__ __forceinline__ uint4* at(uint32_t row, uint32_t column) { return &vector[row][column ^ row % kVectors]; }
};

template <class Element_, int kHeadDim_, int kHeadDimV_, int kConsumers_, int kTileN_>
struct ForwardTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_;
  static constexpr int kConsumers = kConsumers_;  // warpgroups, 64 query rows each
  static constexpr int kTileM = 64 * kConsumers, kTileN = kTileN_;
  static constexpr int kStages = 2;  // of K and of V: a third never helped
  static constexpr int kThreads = 128 * (kConsumers + 1);

  // One warpgroup leaves its multiprocessor half idle while it waits: such blocks are small enough for two on each.
  static constexpr int kBlocksPerSm = kConsumers == 1 ? 2 : 1;

  // A thread block starts with kThreads times the registers that kThreads of them can have each; setmaxnreg deals that
  // pool out anew, and waits forever for more than there is. 168 and 128 are 65,536 / (kThreads * kBlocksPerSm),
  // rounded down to 8.
  static constexpr int kPoolRegisters = kConsumers == 2 ? 168 : 128;
  static constexpr int kConsumerRegisters = kConsumers == 1 ? 216 : kConsumers == 2 ? 232 : 160;
  static constexpr int kProducerRegisters = (kConsumers + 1) * kPoolRegisters - kConsumers * kConsumerRegisters;
  static_assert(kConsumers >= 1 && kConsumers <= 3, "registers are split for one to three consumer warpgroups");
  static_assert(kTileN / 2 + kTileN / 4 + kHeadDimV / 2 <= (kConsumers == 3 ? 128 : kConsumerRegisters - 24),
                "S, P and O must fit in a consumer's registers, or ptxas serialises wgmma");

  static constexpr int kSwizzleQK = swizzle_for(kHeadDim), kSwizzleV = swizzle_for(kHeadDimV);
  using TileQ = SharedTile<64, kHeadDim, kSwizzleQK>;  // one warpgroup's rows
  using TileK = SharedTile<kTileN, kHeadDim, kSwizzleQK>;
  using TileV = SharedTile<kTileN, kHeadDimV, kSwizzleV>;

  static constexpr int kKeyBytes = kStages * (TileK::kBytes + TileV::kBytes);
  // With a second place for Q, the next tile's arrives while this one is worked on.
  static constexpr int kSharedLimit = 228 * 1024 / kBlocksPerSm - 1024, kSharedRest = 1024;
  static constexpr int kStagingBytes = 4 * kConsumers * static_cast<int>(sizeof(StagedRows));
  static constexpr int kQueryStages =
      kKeyBytes + 2 * kConsumers * TileQ::kBytes + kStagingBytes + kSharedRest <= kSharedLimit ? 2 : 1;
};

/// A piece of work: a tile, or its part along the keys.
struct TileHead {
  int m_block;                   // kNone: there is no more
  int batch, batch_kv, head_kv;  // batch entries: of q and out, of k and v
  int first_head;                // of those that share the tile, counted from the first query head of head_kv
  int q_begin, k_begin;          // the sequence's first rows along the row axes
  int seqlen_q, seqlen_k;
  int first_block, end_block;  // blocks of keys that are loaded for this piece
  int place, part, parts;      // of a split tile; whole ones have parts = 1
  static constexpr int kNone = -1;
};

/// The same as the scheduler hands it to the consumers.
template <int kConsumers>
struct alignas(16) TileWork : TileHead {
  BlockRange blocks[kConsumers];  // what each warpgroup needs of the blocks loaded
};

template <class Traits>
struct ForwardShared {
  static constexpr int kTileSlots = 4;

  using Work = TileWork<Traits::kConsumers>;

  alignas(1024) uint8_t q[Traits::kConsumers][Traits::kQueryStages][Traits::TileQ::kBytes];
  alignas(1024) uint8_t k[Traits::kStages][Traits::TileK::kBytes];
  alignas(1024) uint8_t v[Traits::kStages][Traits::TileV::kBytes];
  StagedRows staging[4 * Traits::kConsumers];  // each consumer warp's own

  // full: the loader announces bytes, the copy engine delivers them. empty: each consumer warp arrives once.
  arch::Barrier q_full[Traits::kConsumers][Traits::kQueryStages];  // q's are a warpgroup's own: 4 warps arrive
  arch::Barrier q_empty[Traits::kConsumers][Traits::kQueryStages];
  arch::Barrier k_full[Traits::kStages], k_empty[Traits::kStages];
  arch::Barrier v_full[Traits::kStages], v_empty[Traits::kStages];
  arch::Barrier tile_full[kTileSlots], tile_empty[kTileSlots];  // full: the scheduler arrives. empty: also the loader
  arch::Barrier tile_nearly_loaded;                             // the loader arrives, once a piece; the scheduler waits

  Work tile[kTileSlots];

  __device__ void init_barriers() {
    constexpr int kWarps = 4 * Traits::kConsumers;
    for (int w = 0; w < Traits::kConsumers; ++w) {
      for (int stage = 0; stage < Traits::kQueryStages; ++stage) {
        q_full[w][stage].init(1);
        q_empty[w][stage].init(4);
      }
    }
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      k_full[stage].init(1);
      v_full[stage].init(1);
      k_empty[stage].init(kWarps);
      v_empty[stage].init(kWarps);
    }
    tile_nearly_loaded.init(1);
    for (int slot = 0; slot < kTileSlots; ++slot) {
      tile_full[slot].init(1);
      tile_empty[slot].init(kWarps + 1);
    }
  }
};

}  // namespace fa3
