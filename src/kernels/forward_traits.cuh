// Everything about a forward kernel that follows from its line in the variant table, and its shared memory.
#pragma once
#include <type_traits>

#include "arch/barrier.cuh"
#include "arch/convert.cuh"
#include "arch/warpgroup.cuh"
#include "attention/block_range.h"
#include "kernels/forward_args.h"
#include "tile/shared_tile.cuh"
#include "tile/staged_rows.cuh"
#include "tile/transpose.h"

namespace fa3 {

/// The chunk width that pads a row least, the widest of equals.
FA3_HOST_DEVICE constexpr int swizzle_for(int bytes) {
  return ceil_div(bytes, 128) * 128 > ceil_div(bytes, 64) * 64 ? 64 : 128;
}

/// kHasQv_: scores add qv v (multi-head latent attention). Values are then wide, so two warpgroups share 64 rows. Each
/// has half of V's columns: it sums up the scores over those, adds what the other has, and multiplies P with them.
/// kTurnedV_: of 8 bits, V is turned in device memory already, once for all tiles that see it: see turn_values.h.
template <class Element_, int kHeadDim_, int kHeadDimV_, int kConsumers_, int kTileN_, bool kHasQv_ = false,
          bool kTurnedV_ = false>
struct ForwardTraits {
  using Element = Element_;
  static constexpr int kElementBytes = sizeof(Element);
  static constexpr bool kEightBits = kElementBytes == 1;
  static constexpr int kStepKeys = 32 / kElementBytes;  // that a product of P and V consumes
  static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_;
  static constexpr bool kHasQv = kHasQv_;
  static constexpr bool kTurnedV = kTurnedV_;
  static constexpr bool kTurnsV = kEightBits && !kTurnedV;  // for itself
  static_assert(!kTurnedV || (kEightBits && !kHasQv), "only V of 8 bits is turned");
  static constexpr bool kTwoParts = kHasQv && kEightBits;  // of scores, q k and qv v: their descales differ
  // A warpgroup that joins the parts of 64 rows would read 64 KB of each through one multiprocessor, for up to 25 us. A
  // kernel of its own has all of them.
  static constexpr bool kJoinsApart = kHasQv;
  static constexpr int kConsumers = kConsumers_;                 // warpgroups
  static constexpr int kRowGroups = kHasQv ? 1 : kConsumers;     // of 64 query rows each
  static constexpr int kColumnGroups = kConsumers / kRowGroups;  // of the output's columns
  static constexpr int kColumnsO = kHeadDimV / kColumnGroups;    // that a warpgroup has
  static constexpr int kTileM = 64 * kRowGroups, kTileN = kTileN_;
  static constexpr int kThreads = 128 * (kConsumers + 1);

  static constexpr int kOperands = kTileN / 2 + kTileN * kElementBytes / 8 + kColumnsO / 2;  // S, P and O

  // One warpgroup leaves its multiprocessor half idle while it waits: such blocks are small enough for two on each, or
  // for three where S, P and O leave 32 of 120 registers.
  static constexpr int kSmallBlocks = kOperands <= 88 ? 3 : 2;
  static constexpr int kBlocksPerSm = kConsumers == 1 ? kSmallBlocks : 1;

  // Products of 16 bits fill the tensor cores only if warpgroups keep out of each other's way. Those of 8 bits wait for
  // exponentials, which warpgroups spread better by themselves. Those that share rows go together.
  static constexpr bool kTakesTurns = !kHasQv && !kEightBits && kConsumers > 1;

  // What such a warpgroup does between its products decides then: a loop of plain blocks alone, which looks beside the
  // exponentials whether the next block is there, takes 3 to 10% less with three of them and 1 to 5% with two. With
  // turns it took 0 to 6% more at head dim 256, and without that loop nor turns 3 to 5%.
  static constexpr bool kRunsFree = !kHasQv && kEightBits && kConsumers > 1;

  // Dropout is for training, whose rows are long: the largest tile of a pair of head dims has a kernel with it. Head
  // dims 48, 112 and 160, which are rare there, go on the next: such kernels take the most time to compile.
  static constexpr bool kHasDropout = !kEightBits && !kHasQv && kHeadDim != 48 && kHeadDim != 112 && kHeadDim != 160 &&
                                      (kHeadDim > 128 ? kConsumers == 2 : kConsumers == 3 && kTileN > 64);

  // Calls without extras have a kernel of their own where that is faster: above head dim 128 it is not. Head dims 32
  // and 112 are rare: not worth the time to compile.
  using Args = ForwardArgs;
  static constexpr bool kHasPlain = !kHasQv && !kTurnedV && kHeadDim > 32 && kHeadDim <= 128 && kHeadDim != 112;
  static constexpr bool kHasDecode = kHasPlain && kConsumers == 1 && !kEightBits;  // see forward_decode.cuh

  // A thread block starts with kThreads times the registers that kThreads of them can have each; setmaxnreg deals that
  // pool out anew, and waits forever for more than there is.
  static constexpr int kPoolRegisters = 65536 / (kThreads * kBlocksPerSm) / 8 * 8;
  // Turning V takes more than loading it, and P of 8 bits less than of 16; with qv the scores' two parts make up for
  // it. Where S, P and O take more than 200 the producers get 24, and the scheduler spills: see resources.csv.
  static constexpr int kMostRegisters = kConsumers == 1 ? 216 : kConsumers == 2 ? (kOperands > 200 ? 240 : 232) : 160;
  static constexpr int kConsumerRegisters = kBlocksPerSm == 3 ? 120 : kMostRegisters - (kTurnsV && !kHasQv ? 8 : 0);
  static constexpr int kProducerRegisters = (kConsumers + 1) * kPoolRegisters - kConsumers * kConsumerRegisters;
  static_assert(kConsumers >= 1 && kConsumers <= 3, "registers are split for one to three consumer warpgroups");
  static constexpr int kMostOperands = kConsumers == 3 ? (kEightBits ? 124 : 128) : kConsumerRegisters - 24;
  static_assert(kOperands <= kMostOperands, "S, P and O must fit in a consumer's registers, or ptxas serialises wgmma");
  static_assert(!kHasQv || kConsumers == 2, "two warpgroups exchange their scores");

  // A product of 64 columns with Q in shared memory takes all that shared memory gives, one of 8 bits and 96 columns
  // five sixths. Where registers are left, they hold the first of Q's columns, 32 bytes a step.
  static constexpr int kRegistersLeft = kConsumers == 2                 ? kConsumerRegisters - 40 - kOperands
                                        : kConsumers == 3 && kEightBits ? kMostOperands - kOperands
                                                                        : 0;
  static constexpr int kColumnSteps = ceil_div(kElementBytes * kHeadDim, 32);
  static constexpr int kOwnColumnSteps = kColumnSteps / kColumnGroups;  // that a warpgroup multiplies
  static constexpr int kQuerySteps = smaller(larger(kRegistersLeft / 4, 0), kOwnColumnSteps);

  static constexpr int kSwizzleQK = swizzle_for(kElementBytes * kHeadDim);
  static constexpr int kSwizzleV = swizzle_for(kElementBytes * kHeadDimV);
  using TileQ = SharedTile<64, kHeadDim, kSwizzleQK, kElementBytes>;  // one warpgroup's rows
  using TileQV = SharedTile<64, kHeadDimV, kSwizzleV, kElementBytes>;
  using TileK = SharedTile<kTileN, kHeadDim, kSwizzleQK, kElementBytes>;
  // V as TMA brings it, and as products read it: the same, or turned by the Transposer.
  using TileLoadedV = SharedTile<kTileN, kHeadDimV, kSwizzleV, kElementBytes>;
  using TileV = std::conditional_t<kEightBits, TurnedTile<kTileN, kHeadDimV>, TileLoadedV>;
  static constexpr uint64_t kLayoutV = [] {
    if constexpr (kEightBits)
      return arch::descriptor_layout(TileV::kSwizzle, 16, TileV::kStrideOffset);
    else
      return TileV::kMajorRows;
  }();
  // Warps of the producers without another role: they turn V, or help to load where rows are gathered.
  static constexpr int kTransposers = kTurnsV ? 2 : 0, kGatherers = kTurnsV ? 1 : 3;
  // Two thread blocks that share what they read save the power for it: see forward_pair.cuh. In 16 bits that gained
  // less than V given back while the block's scores are still made, and asked for before K: 0 to 3% at head dim 256.
  static constexpr bool kPairs = kTurnedV && kHeadDimV >= 128;
  static constexpr bool kValuesEarly = kTakesTurns && kConsumers == 2 && kHeadDim >= 160;

  using Staging = StagedColumns<kHasQv ? 32 : 64>;  // beside two blocks of 512 columns there is no room for more
  static constexpr int kSharedLimit = 228 * 1024 / kBlocksPerSm - 1024;
  // What two warpgroups tell each other goes where Q was, if that is large enough: see Exchange.
  static constexpr int kLetterBytes = kTwoParts ? 8192 : 0;
  static constexpr int kSharedRest = (kEightBits ? 2048 : 1024) + kLetterBytes;  // barriers and gaps
  static constexpr int kStagingBytes = 4 * kConsumers * static_cast<int>(sizeof(Staging));
  static constexpr int kQueryBytes = kRowGroups * (TileQ::kBytes + (kHasQv ? TileQV::kBytes : 0));
  static constexpr int kStageBytes = TileK::kBytes + TileV::kBytes + (kTurnsV ? TileLoadedV::kBytes : 0);
  // Of K and of V. A third of both never helped, but with qv a block is held until its last product is done.
  static constexpr int kMostStages = (kSharedLimit - kSharedRest - kStagingBytes - kQueryBytes) / kStageBytes;
  static constexpr int kStages = kHasQv ? kMostStages : 2;
  static constexpr int kLeastBytes = kStages * kStageBytes + kStagingBytes + kSharedRest + kQueryBytes;
  // Sums of fp8 products that grow too long move on to totals: O in fp32, here or, where there is no room, in the
  // workspace.
  static constexpr int kTotalBytes = kEightBits ? kConsumers * 64 * kColumnsO * static_cast<int>(sizeof(float)) : 0;
  static constexpr bool kSharedTotals = kEightBits && kLeastBytes + kTotalBytes <= kSharedLimit;
  static constexpr int kRoom = kSharedLimit - kLeastBytes - (kSharedTotals ? kTotalBytes : 0);
  // A third stage of K alone, for two warpgroups that run free: keys are asked for when both are done with those of two
  // blocks before. The one ahead waited for them, until it was ahead no more, and both wanted the same at once.
  static constexpr bool kThirdKeys = kRunsFree && kConsumers == 2 && TileK::kBytes <= kRoom;
  static constexpr int kKeyStages = kStages + kThirdKeys;
  // With a second place for Q, the next tile's arrives while this one is worked on. With qv registers are too few.
  static constexpr int kQueryStages = !kHasQv && (kThirdKeys ? TileK::kBytes : 0) + kQueryBytes <= kRoom ? 2 : 1;
  // Totals in the workspace are far, so for sums of few keys each block's products are added in fp32 instead; with qv
  // there are no registers for another kind of step. Bytes behind V that Consumer::promote_values then reads, whose
  // products have a block's keys of columns each:
  static constexpr bool kPromotes = kEightBits && !kSharedTotals && !kHasQv;
  static constexpr int kPastV = (ceil_div(kHeadDimV, kTileN) * kTileN - kHeadDimV) * kStepKeys;

  // Where one warpgroup is all, memory is what it waits for: keys are given back when their scores are made, not when
  // the values of the block before have come and are done too. So more bytes are under way. See bench/NOTES.md.
  static constexpr bool kKeysFirst = !kHasQv && kConsumers == 1 && kBlocksPerSm == 2 && !kPromotes;

  /// Which of the groups of rows and of columns a warpgroup has, and its first column of the output.
  FA3_HOST_DEVICE static constexpr int row_group(int warpgroup) { return kHasQv ? 0 : warpgroup; }
  FA3_HOST_DEVICE static constexpr int column_group(int warpgroup) { return kHasQv ? warpgroup : 0; }
  FA3_HOST_DEVICE static constexpr int first_column(int warpgroup) { return column_group(warpgroup) * kColumnsO; }
};

/// The same kernel for calls without extras.
template <class Traits>
struct PlainTraits : Traits {
  using Args = PlainArgs<plain_may_split(Traits::kConsumers)>;
};

/// A piece of work: a tile, or its part along the keys.
struct TileHead {
  int first_query;               // of its rows; below 0 they are nobody's. kNone: there is no more
  int batch, batch_kv, head_kv;  // batch entries: of q and out, of k and v
  int first_head;                // of those that share the tile, counted from the first query head of head_kv
  int q_begin, k_begin;          // the sequence's first rows along the row axes
  int seqlen_q, seqlen_k;
  int first_block, end_block;  // blocks of keys that are loaded for this piece
  int place, part, parts;      // of a split tile; whole ones have parts = 1
  // Of fp8: what the tile's first head's scores and outputs are multiplied with. Read ahead, as global memory is far.
  float score_descale, value_descale;
  float key_part_scale;  // with qv: what q k is multiplied with before qv v is added
  static constexpr int kNone = -(1 << 30);
};

/// The same as the scheduler hands it to the consumers.
template <int kRowGroups>
struct alignas(16) TileWork : TileHead {
  BlockRange blocks[kRowGroups];  // what each group of rows needs of the blocks loaded
};

/// Pieces of work that are described at a time.
inline constexpr int kTileSlots = 4;

/// V before it is turned, where it has to be.
template <class Traits, bool = Traits::kTurnsV>
struct LoadedValues {
  __device__ void init_barriers(int) {}
};

template <class Traits>
struct LoadedValues<Traits, true> {
  alignas(1024) uint8_t loaded_v[Traits::kStages][Traits::TileLoadedV::kBytes];
  arch::Barrier loaded_v_full[Traits::kStages];   // as k_full
  arch::Barrier loaded_v_empty[Traits::kStages];  // each transposing warp arrives once, and with qv each consumer warp

  __device__ void init_barriers(int arrivals) {
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      loaded_v_full[stage].init(arrivals);
      loaded_v_empty[stage].init(Traits::kTransposers + (Traits::kHasQv ? 4 * Traits::kConsumers : 0));
    }
  }
};

/// A piece's descales, which only its consumers wait for: they are in memory, at a place that the piece's own says.
template <class Traits, bool = Traits::kEightBits>
struct TileScales {
  __device__ void init_barriers() {}
};

template <class Traits>
struct TileScales<Traits, true> {
  arch::Barrier tile_scaled[kTileSlots];  // a transposing warp arrives, or where there is none the scheduler

  __device__ void init_barriers() {
    for (arch::Barrier& scaled : tile_scaled) scaled.init(1);
  }
};

/// What the thread blocks of a pair tell each other.
template <class Traits, bool = Traits::kPairs>
struct PairBarriers {
  __device__ void init_barriers() {}
};

template <class Traits>
struct PairBarriers<Traits, true> {
  // The other's loader arrives when its stage is empty too.
  arch::Barrier both_k_empty[Traits::kKeyStages], both_v_empty[Traits::kStages];
  int piece;            // that the first one took from the counter, on its way to the second
  arch::Barrier told;   // of the second: its scheduler announces what the first's sends
  arch::Barrier known;  // of the first: the second's scheduler arrives

  __device__ void init_barriers() {
    for (arch::Barrier& empty : both_k_empty) empty.init(1);
    for (arch::Barrier& empty : both_v_empty) empty.init(1);
    told.init(1);
    known.init(1);
  }
};

/// Sums of O in fp32, where there is room.
template <class Traits, bool = Traits::kSharedTotals>
struct SharedTotals {};

template <class Traits>
struct SharedTotals<Traits, true> {
  float4 totals[Traits::kTotalBytes / sizeof(float4)];
};

/// What scores multiply values with, where they do. It comes and goes with Q.
template <class Traits, bool = Traits::kHasQv>
struct ValueQueries {};

template <class Traits>
struct ValueQueries<Traits, true> {
  alignas(1024) uint8_t qv[Traits::kRowGroups][Traits::kQueryStages][Traits::TileQV::kBytes];
};

/// What warpgroups that share rows tell each other, where it has a place of its own.
template <class Traits, bool = (Traits::kLetterBytes > 0)>
struct Letters {};

template <class Traits>
struct Letters<Traits, true> {
  alignas(16) uint8_t letters[Traits::kLetterBytes];
};

template <class Traits>
struct ForwardShared : LoadedValues<Traits>,
                       SharedTotals<Traits>,
                       ValueQueries<Traits>,
                       Letters<Traits>,
                       TileScales<Traits> {
  using Work = TileWork<Traits::kRowGroups>;

  alignas(1024) uint8_t q[Traits::kRowGroups][Traits::kQueryStages][Traits::TileQ::kBytes];
  alignas(1024) uint8_t k[Traits::kKeyStages][Traits::TileK::kBytes];
  alignas(1024) uint8_t v[Traits::kStages][Traits::TileV::kBytes];
  // Products that fp32 adds up may read past V's last column: there is something.
  static_assert(!Traits::kPromotes || Traits::kPastV <= Traits::kStagingBytes);
  typename Traits::Staging staging[4 * Traits::kConsumers];  // each consumer warp's own

  // full: the loader announces bytes, the copy engine delivers them; of gathered rows, each lane of the loaders arrives
  // once, and of a turned V each transposing warp.
  // empty: each consumer warp arrives once.
  arch::Barrier q_full[Traits::kRowGroups][Traits::kQueryStages];
  arch::Barrier q_empty[Traits::kRowGroups][Traits::kQueryStages];  // the warps arrive that have these rows
  arch::Barrier k_full[Traits::kKeyStages], k_empty[Traits::kKeyStages];
  arch::Barrier v_full[Traits::kStages], v_empty[Traits::kStages];
  arch::Barrier tile_full[kTileSlots];   // the scheduler arrives
  arch::Barrier tile_empty[kTileSlots];  // also each loader and each transposing warp
  arch::Barrier tile_nearly_loaded;      // where a counter has the pieces: the loader arrives, the scheduler waits

  Work tile[kTileSlots];
  uint64_t seed;  // of dropout
  [[no_unique_address]] PairBarriers<Traits> pair;

  __device__ void init_barriers(bool gathers) {
    constexpr int kWarps = 4 * Traits::kConsumers;
    const int loaders = gathers ? Traits::kGatherers : 1, arrivals = gathers ? 32 * loaders : 1;
    LoadedValues<Traits>::init_barriers(arrivals);
    TileScales<Traits>::init_barriers();
    pair.init_barriers();
    for (int group = 0; group < Traits::kRowGroups; ++group) {
      for (int stage = 0; stage < Traits::kQueryStages; ++stage) {
        q_full[group][stage].init(1);
        q_empty[group][stage].init(4 * Traits::kColumnGroups);
      }
    }
    for (int stage = 0; stage < Traits::kKeyStages; ++stage) {
      k_full[stage].init(arrivals);
      k_empty[stage].init(kWarps);
    }
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      v_full[stage].init(Traits::kTransposers ? Traits::kTransposers : arrivals);
      v_empty[stage].init(kWarps);
    }
    tile_nearly_loaded.init(1);
    for (int slot = 0; slot < kTileSlots; ++slot) {
      tile_full[slot].init(1);
      tile_empty[slot].init(kWarps + loaders + Traits::kTransposers);
    }
  }

  /// A warp of consumers makes the barriers. The scheduler waits for that when it has the first piece, all others at
  /// once.
  __device__ __forceinline__ void make_barriers(bool gathers) {
    if (arch::leads()) {
      init_barriers(gathers);
      arch::publish_barriers();
    }
    __syncwarp();
    arch::barrier_arrive(kMadeBarrier, 2 * 32);
  }
  __device__ __forceinline__ void wait_for_made_barriers() const { arch::barrier_sync(kMadeBarrier, 2 * 32); }
  __device__ __forceinline__ void wait_for_barriers() const {
    arch::barrier_sync(kStartBarrier, Traits::kThreads - 32);
  }

 private:
  static constexpr int kMadeBarrier = 14, kStartBarrier = 15;
};

}  // namespace fa3
