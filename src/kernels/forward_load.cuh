// The loader: a warp that keeps Q, K and V coming by TMA.
#pragma once
#include "arch/bulk.cuh"
#include "arch/l2.cuh"
#include "kernels/forward_args.h"
#include "kernels/forward_keys.cuh"
#include "kernels/forward_traits.cuh"
#include "tile/ring.cuh"

namespace fa3 {

/// What says where keys are, on its way to L2, by a warp.
template <class Traits>
__device__ __forceinline__ void prefetch_lengths(const typename Traits::Args& args) {
  const int first = threadIdx.x % 32 * 32;  // of as many numbers as a line of L2 has
  if (args.keys.seqused && first < args.batch) arch::prefetch_to_l2(args.keys.seqused + first);
  if (args.paged()) {
    // A line each of a sequence's pages: those of as many sequences as there are thread blocks, or a part of each.
    const CacheRows& rows = args.extras.pages.rows;
    const uint32_t part = blockIdx.x / args.batch, sequence = blockIdx.x - part * args.batch;
    const int64_t page = int64_t{part} * (32 * 32) + first;
    if (page < rows.max_pages) arch::prefetch_to_l2(rows.page_table + sequence * rows.page_table_stride + page);
  }
}

/// The loader's warp, before there is anything to load: what memory is asked for next is on its way. Lengths are the
/// scheduler's.
template <class Traits>
__device__ __forceinline__ void prefetch_start(const typename Traits::Args& args) {
  if (arch::leads()) {
    arch::prefetch_map(&args.q.map);
    arch::prefetch_map(&args.k.map);
    arch::prefetch_map(&args.v.map);
  }
  prefetch_lengths<Traits>(args);
}

/// `Keys` brings blocks of keys and values: see forward_keys.cuh. Where there are several loaders, number 0 has
/// all the rest.
template <class Traits, class Keys>
class Loader {
 public:
  __device__ __forceinline__ Loader(const typename Traits::Args& args, ForwardShared<Traits>& shared, int number)
      : args_(args), shared_(shared), is_first_(number == 0), keys_(number) {}

  __device__ __forceinline__ void run() {
    while (true) {
      shared_.tile_full[tiles_.stage()].wait(tiles_.parity());
      const TileHead& work = shared_.tile[tiles_.stage()];
      if (arch::uniform(work.first_query) == TileHead::kNone) return;
      load(work);
      __syncwarp();
      if (arch::leads()) shared_.tile_empty[tiles_.stage()].arrive();
      tiles_.advance();
    }
  }

 private:
  using Source = typename Keys::Source;
  using Place = typename Keys::Place;
  static constexpr int kLead = 2;  // blocks before the last when the scheduler is to find the next piece
  // Scores need them with qv; else their stage is given back first.
  static constexpr bool kValuesFirst = Traits::kHasQv || Traits::kValuesEarly;

  /// Blocks come from the last to the first. K runs one block ahead of V: that is the order in which they are used.
  /// Where a block is, which memory may have to say, is asked once for both, a round before K is.
  __device__ __forceinline__ void load(const TileHead& work) {
    const Source k = Keys::source(args_, args_.k, work), v = Keys::source(args_, args_.v, work);
    const int first_block = arch::uniform(work.first_block), end_block = arch::uniform(work.end_block);
    const int nearly_last = larger(smaller(end_block - 1, first_block + kLead), first_block);
    Place here{}, ahead = Keys::settled(k, Keys::place(k, end_block - 1));
#pragma unroll 1
    for (int n_block = end_block; n_block >= first_block; --n_block) {
      const Place next = Keys::place(k, n_block - 2);
      if (is_first_ && n_block == nearly_last && args_.piece_counter && arch::leads())
        shared_.tile_nearly_loaded.arrive();
      if (kValuesFirst && n_block < end_block) load_v(v, work, n_block, here);
      if (n_block > first_block) load_k(k, n_block - 1, ahead);
      if (!kValuesFirst && n_block < end_block) load_v(v, work, n_block, here);
      if (is_first_ && n_block == end_block) load_q(work);
      here = ahead;
      ahead = Keys::settled(k, next);
    }
    keys_.finish();
  }

  __device__ __forceinline__ void load_q(const TileHead& work) {
    const uint32_t bytes = args_.packing().rows * (Traits::kQueryBytes / Traits::kTileM);
    const Ring<Traits::kQueryStages> ring{tiles_.count};
    const uint32_t stage = ring.stage();
    const int head = arch::uniform(work.first_head), head_kv = arch::uniform(work.head_kv);
    const int batch = arch::uniform(work.batch);
    int row = arch::uniform(work.q_begin + work.first_query);
#pragma unroll 1
    for (int group = 0; group < Traits::kRowGroups; ++group) {
      arch::Barrier& full = shared_.q_full[group][stage];
      shared_.q_empty[group][stage].wait(ring.parity() ^ 1);
      if (arch::elected()) {
        full.arrive_expecting(bytes);
        load_rows<typename Traits::TileQ>(args_.q, head, row, head_kv, batch, shared_.q[group][stage], full);
        if constexpr (Traits::kHasQv)
          load_rows<typename Traits::TileQV>(args_.qv, head, row, head_kv, batch, shared_.qv[group][stage], full);
      }
      row += args_.packing().positions;
    }
  }

  template <class Tile>
  __device__ __forceinline__ static void load_rows(const TmaOperand& from, int head, int row, int head_kv, int batch,
                                                   uint8_t* to, arch::Barrier& full) {
#pragma unroll
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk)
      arch::load_box(
          to + chunk * Tile::kChunkBytes, &from.map,
          {chunk * Tile::kChunkColumns, head * from.head_step, row, head_kv * from.head_step, batch * from.batch_step},
          full);
  }

  __device__ __forceinline__ void load_k(const Source& k, int n_block, Place place) {
    wait_until_empty(shared_.k_empty, k_ring_);
    if constexpr (Traits::kPairs) wait_for_other(shared_.pair.both_k_empty, k_ring_);
    load_block<typename Traits::TileK>(k, args_.head_dim, n_block, place, shared_.k, shared_.k_full, k_ring_);
  }
  __device__ __forceinline__ void load_v(const Source& v, const TileHead& work, int n_block, Place place) {
    if constexpr (Traits::kTurnsV)
      wait_until_empty(shared_.loaded_v_empty, v_ring_);
    else
      wait_until_empty(shared_.v_empty, v_ring_);
    if constexpr (Traits::kPairs) wait_for_other(shared_.pair.both_v_empty, v_ring_);
    if constexpr (Traits::kTurnedV)
      load_turned_v(work, n_block);
    else if constexpr (Traits::kTurnsV)
      load_block<typename Traits::TileLoadedV>(v, args_.head_dim_v, n_block, place, shared_.loaded_v,
                                               shared_.loaded_v_full, v_ring_);
    else
      load_block<typename Traits::TileV>(v, args_.head_dim_v, n_block, place, shared_.v, shared_.v_full, v_ring_);
  }

  template <int kCount>
  __device__ __forceinline__ static void wait_until_empty(arch::Barrier* empty, const Ring<kCount>& ring) {
    empty[ring.stage()].wait(ring.parity() ^ 1);
  }

  /// In a pair: this block's stage is empty, and the other's is to be.
  template <int kCount>
  __device__ __forceinline__ void wait_for_other(arch::Barrier* empty, const Ring<kCount>& ring) const {
    const auto pair = Pair<Traits>::of(args_);
    if (!pair.exists) return;
    if (arch::elected()) empty[ring.stage()].arrive_at(pair.rank ^ 1);
    empty[ring.stage()].wait(ring.parity());
  }

  /// A block of V that is turned already.
  __device__ __forceinline__ void load_turned_v(const TileHead& work, int n_block) {
    const uint32_t stage = v_ring_.stage();
    const int64_t head = int64_t{arch::uniform(work.batch_kv)} * args_.num_heads_kv + arch::uniform(work.head_kv);
    const uint8_t* const from =
        args_.turned_v + (head * ceil_div(args_.keys.rows, Traits::kTileN) + n_block) * Traits::TileV::kBytes;
    if (arch::elected()) {
      shared_.v_full[stage].arrive_expecting(Traits::TileV::kBytes);
      const auto pair = Pair<Traits>::of(args_);
      if (pair.exists) {
        constexpr uint32_t kHalf = Traits::TileV::kBytes / 2;
        const uint32_t own = pair.rank * kHalf;
        arch::load_bytes_for_both(shared_.v[stage] + own, from + own, kHalf, shared_.v_full[stage]);
      } else {
        arch::load_bytes(shared_.v[stage], from, Traits::TileV::kBytes, shared_.v_full[stage]);
      }
    }
    v_ring_.advance();
  }

  template <class Tile, int kCount>
  __device__ __forceinline__ void load_block(const Source& from, int columns, int n_block, Place place,
                                             uint8_t (&stages)[kCount][Tile::kBytes], arch::Barrier* full,
                                             Ring<kCount>& ring) {
    const uint32_t stage = ring.stage();
    keys_.template load<Tile>(from, columns, n_block, place, stages[stage], full[stage]);
    ring.advance();
  }

  const typename Traits::Args& args_;
  ForwardShared<Traits>& shared_;
  const bool is_first_;
  Keys keys_;
  Ring<Traits::kKeyStages> k_ring_;
  Ring<Traits::kStages> v_ring_;
  Ring<kTileSlots> tiles_;  // every piece has its queries, so it counts them too
};

}  // namespace fa3
