// The scheduler warp: which piece of work a thread block takes next.
#pragma once
#include "arch/counter.cuh"
#include "attention/seqlen.h"
#include "kernels/forward_args.h"
#include "kernels/forward_pair.cuh"
#include "kernels/forward_rows.cuh"
#include "kernels/forward_traits.cuh"
#include "tile/ring.cuh"

namespace fa3 {

/// Finds a thread block's pieces of work and describes them to its loader and its consumers, ahead of them. Every lane
/// calls; lane g looks after the block range of row group g, lane 0 after the rest. In a pair both find the same, and
/// each has its own rows of it.
template <class Traits>
class Scheduler {
  static constexpr bool kLooksAhead = Traits::kProducerRegisters > 24;  // where there are registers for it

 public:
  __device__ __forceinline__ Scheduler(const typename Traits::Args& args, ForwardShared<Traits>& shared)
      : args_(args),
        shared_(shared),
        lane_(threadIdx.x % 32),
        heads_(args.heads.divisor),
        tile_m_(args.queries_of_tile.divisor),
        index_(number()),
        stride_(2 * (count() - number()) - 1) {}

  /// The first piece is described while others make the barriers.
  __device__ __forceinline__ void run() {
    if (ragged()) bounds_ = read_bounds(0);
    for (;; take_index()) {
      if (tiles_.count >= kTileSlots) {
        const Ring<kTileSlots> before{tiles_.count - kTileSlots};
        shared_.tile_empty[before.stage()].wait(before.parity());
      }
      look_ahead();
      auto& work = shared_.tile[tiles_.stage()];
      const bool found = describe(work);
      if (tiles_.count == 0)
        meet_at_start();
      else
        __syncwarp();
      if (lane_ == 0) {
        shared_.tile_full[tiles_.stage()].arrive();
        if constexpr (Traits::kTurnedV) {
          if (found) find_descales<Traits>(args_, work);
          shared_.tile_scaled[tiles_.stage()].arrive();
        }
      }
      tiles_.advance();
      if (!found) return;
    }
  }

 private:
  __device__ __forceinline__ void meet_at_start() const {
    shared_.wait_for_made_barriers();
    if (pair().exists) arch::cluster_meet();
  }

  /// V is turned for dense batches alone.
  __device__ __forceinline__ bool ragged() const { return !Traits::kTurnedV && args_.queries.ragged(); }

  /// These are asked for anew: registers are few.
  __device__ __forceinline__ Pair<Traits> pair() const { return Pair<Traits>::of(args_); }
  __device__ __forceinline__ int number() const { return blockIdx.x / pair().blocks(); }  // this one's or its pair's
  __device__ __forceinline__ int count() const { return gridDim.x / pair().blocks(); }    // of such numbers

  struct Tile {
    int m_block, head, batch;  // head counts the tiles side by side of a sequence
  };

  /// Describe the next piece that has queries in `work`, in shared memory; false: there is none.
  __device__ __forceinline__ bool describe(TileWork<Traits::kRowGroups>& work) {
    for (;; take_index()) {
      const Splits::Piece piece = args_.piece(index_);
      Tile tile;
      Span q, k;
      BlockRange all;
      int first = 0, last;
      // What most short calls are. They end soon after they have begun, with caches that are cold: each jump over what
      // they do not need costs 200 cycles until instructions come, and there would be fourteen.
      if (!Traits::kTurnedV && args_.plain_pieces) {
        tile.batch = args_.heads.quotient(piece.tile);
        if (tile.batch >= args_.batch) return nothing_left(work);
        tile.m_block = 0;
        tile.head = piece.tile - tile.batch * heads_;
        q = {0, args_.queries.rows};
        k = {0, args_.keys.rows};
        if (args_.keys.seqused) k.length = clamped(args_.keys.seqused[tile.batch], 0, k.length);
        last = q.length - 1;
        all = every_block<Traits::kTileN>(k.length);
      } else {
        if (!(ragged() ? find_ragged(piece.tile, tile, q, k) : find_dense(piece.tile, tile, q, k)))
          return nothing_left(work);
        first = tile.m_block * tile_m_ - ahead(q.length);
        last = smaller(first + tile_m_, q.length) - 1;
        if (last < first) continue;  // past seqused_q
        all = range(larger(first, 0), last, q, k);
      }
      if (lane_ == 0) {
        work.first_query = first + pair().rank * (tile_m_ / 2);
        work.batch = tile.batch;
        work.batch_kv = Traits::kTurnedV ? tile.batch : args_.keys.entry(tile.batch);
        const int tiles = args_.packing().tiles;
        work.head_kv = tiles == 1 ? tile.head : tile.head / tiles;
        work.first_head = (tile.head - work.head_kv * tiles) * args_.packing().heads;
        work.q_begin = q.begin;
        work.k_begin = k.begin;
        work.seqlen_q = q.length;
        work.seqlen_k = k.length;
        work.place = (piece.tile - args_.extras.splits.whole_tiles) * pair().blocks() + pair().rank;
        work.part = piece.part;
        work.parts = piece.parts;
      }
      int first_block = all.begin, end_block = all.end;
      if (piece.parts > 1) {
        first_block += args_.extras.splits.boundary(all.count(), piece.part);
        end_block = all.begin + args_.extras.splits.boundary(all.count(), piece.part + 1);
      }
      if (lane_ == 0) {
        work.first_block = first_block;
        work.end_block = end_block;
      }
      if constexpr (Traits::kRowGroups == 1) {
        if (lane_ == 0) {
          all.clip(first_block, end_block);
          work.blocks[0] = all;
        }
      } else if (lane_ < Traits::kRowGroups) {
        const int own_first = first + pair().rank * (tile_m_ / 2) + args_.packing().positions * lane_;
        const int own_last = smaller(own_first + args_.packing().positions, q.length) - 1;
        BlockRange own =
            own_first < 0 || own_last < own_first ? no_blocks(first_block) : range(own_first, own_last, q, k);
        own.clip(first_block, end_block);
        work.blocks[lane_] = own;
      }
      return true;
    }
  }

  /// Rows of a sequence's first tile without a query, so that its last one has none idle.
  __device__ __forceinline__ int ahead(int queries) const {
    if (Traits::kRowGroups == 1 || args_.visibility.right == Visibility::kUnbounded) return 0;
    if (queries <= tile_m_ || pair().exists) return 0;
    return rows_ahead(queries, args_.queries_of_tile.quotient(queries - 1) + 1, tile_m_, args_.packing().positions);
  }

  __device__ __forceinline__ bool nothing_left(TileWork<Traits::kRowGroups>& work) const {
    finish();
    if (lane_ == 0) work.first_query = TileHead::kNone;
    return false;
  }

  __device__ __forceinline__ BlockRange range(int first, int last, const Span& q, const Span& k) const {
    if (args_.visibility.full()) return every_block<Traits::kTileN>(k.length);
    return block_range<Traits::kTileN>(args_.visibility, first, last, q.length, k.length);
  }

  /// The index of this thread block's next piece; its first is its own number. Without a counter they are dealt out to
  /// and fro: who got the longest of one round gets the shortest of the next. From a counter a block takes its next
  /// piece as late as it can, so that whoever is free first gets it: when the loader has little left to ask for.
  __device__ __forceinline__ void take_index() {
    if (args_.piece_counter) {
      if (tiles_.count > 0) shared_.tile_nearly_loaded.wait((tiles_.count - 1) % 2);
      if (pair().rank == 0) count_on();
      if constexpr (Traits::kPairs)
        if (pair().exists) agree();
    } else {
      index_ += stride_;
      stride_ = 2 * count() - stride_;
    }
  }

  __device__ __forceinline__ void count_on() {
    if (lane_ == 0) {
      if (index_ == number()) counter().open();
      index_ = count() + counter().add();
    }
    index_ = __shfl_sync(~0u, index_, 0);
  }

  /// What the first thread block of a pair has taken the second is told, one index at a time. Each is a piece of work:
  /// only lengths that the host knows, where none is left out, go in pairs.
  __device__ __forceinline__ void agree() {
    const Ring<1> told{tiles_.count - 1};
    if (pair().rank == 0) {
      shared_.pair.known.wait(told.parity() ^ 1);
      if (lane_ == 0) arch::send(&shared_.pair.piece, index_, shared_.pair.told, 1);
    } else {
      if (lane_ == 0) shared_.pair.told.arrive_expecting(sizeof(int));
      shared_.pair.told.wait(told.parity());
      index_ = shared_.pair.piece;
      __syncwarp();
      if (lane_ == 0) shared_.pair.known.arrive_at(0);
    }
  }

  /// A thread block asks no more once it was told that nothing is left, so as many numbers are given out as there are
  /// pieces: the last of them closes the counter.
  __device__ __forceinline__ void finish() const {
    if (!args_.piece_counter || index_ == number() || pair().rank != 0) return;
    const int64_t tiles = ragged() ? group_first_ : int64_t{heads_} * args_.batch * m_blocks();
    if (lane_ == 0 && index_ + 1 == count() + args_.extras.splits.pieces(tiles)) counter().close();
  }

  __device__ __forceinline__ arch::Counter counter() const { return {args_.piece_counter, args_.ticket}; }
  __device__ __forceinline__ int m_blocks() const {
    return args_.queries.rows <= tile_m_ ? 1 : ceil_div(args_.queries.rows, tile_m_);
  }

  __device__ __forceinline__ bool find_dense(int index, Tile& tile, Span& q, Span& k) const {
    const int heads = heads_ * args_.batch;
    if (index >= heads * m_blocks()) return false;
    const TileOrder::Tile found = args_.order.at(index, heads, m_blocks());
    tile.m_block = found.m_block;
    tile.batch = args_.batch == 1 ? 0 : args_.heads.quotient(found.head);
    tile.head = found.head - tile.batch * heads_;
    q = Traits::kTurnedV ? Span{0, args_.queries.rows} : args_.queries.span(tile.batch);
    k = Traits::kTurnedV ? Span{0, args_.keys.rows} : args_.keys.span(tile.batch);
    return true;
  }

  /// Ragged batches: the lanes count the m_blocks of 32 sequences at a time. Indices only grow, so the search goes on
  /// from where the last one ended.
  __device__ __forceinline__ bool find_ragged(int index, Tile& tile, Span& q, Span& k) {
    for (; group_ < args_.batch; next_group()) {
      const int own = sequence_of_lane(group_);
      q = args_.queries.between(bounds_.q_first, bounds_.q_end, own);
      k = args_.keys.cu_seqlens ? args_.keys.between(bounds_.k_first, bounds_.k_end, own) : args_.keys.span(own);
      const bool has_tiles = group_ + lane_ < args_.batch && q.length > 0;
      const int m_blocks = has_tiles ? args_.queries_of_tile.quotient(q.length - 1) + 1 : 0;
      int before = m_blocks;  // becomes the m_blocks of all sequences of the group up to this lane's
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int below = __shfl_up_sync(~0u, before, step);
        if (lane_ >= step) before += below;
      }
      before -= m_blocks;
      const int64_t local = index - group_first_;
      const unsigned reached = __ballot_sync(~0u, local < int64_t{before + m_blocks} * heads_);
      if (reached) {
        if (index >= args_.most_tiles) return end_at(args_.most_tiles);
        const int owner = __ffs(reached) - 1;
        const int rest = static_cast<int>(local - int64_t{__shfl_sync(~0u, before, owner)} * heads_);
        const TileOrder::Tile found = args_.order.at(rest, heads_, __shfl_sync(~0u, m_blocks, owner));
        tile = {found.m_block, found.head, group_ + owner};
        q = of_lane(q, owner);
        k = of_lane(k, owner);
        return true;
      }
      group_first_ += int64_t{__shfl_sync(~0u, before + m_blocks, 31)} * heads_;
    }
    return end_at(group_first_ < args_.most_tiles ? group_first_ : args_.most_tiles);
  }

  /// A lane's sequence's bounds in cu_seqlens, as memory has them. A group's are asked for together, and a group ahead:
  /// behind the loads of a piece they come thousands of cycles later.
  struct Bounds {
    int q_first, q_end, k_first, k_end;
  };

  __device__ __forceinline__ int sequence_of_lane(int group) const { return smaller(group + lane_, args_.batch - 1); }

  __device__ __forceinline__ Bounds read_bounds(int group) const {
    const int own = sequence_of_lane(group);
    const int* const q = args_.queries.cu_seqlens + own;
    const int* const k = args_.keys.cu_seqlens ? args_.keys.cu_seqlens + own : q;
    return {q[0], q[1], k[0], k[1]};
  }

  __device__ __forceinline__ void next_group() {
    group_ += 32;
    bounds_ = kLooksAhead && group_ == next_group_ ? next_bounds_ : read_bounds(group_);
  }

  __device__ __forceinline__ void look_ahead() {
    if (!kLooksAhead || !ragged() || next_group_ > group_) return;
    next_group_ = group_ + 32;
    next_bounds_ = read_bounds(next_group_);
  }

  __device__ __forceinline__ static Span of_lane(const Span& span, int lane) {
    return {__shfl_sync(~0u, span.begin, lane), __shfl_sync(~0u, span.length, lane)};
  }

  /// No further tile is found: there are so many, which every thread block must agree on.
  __device__ __forceinline__ bool end_at(int64_t tiles) {
    group_first_ = tiles;
    return false;
  }

  const typename Traits::Args& args_;
  ForwardShared<Traits>& shared_;
  const int lane_;
  const int heads_;   // tiles side by side of a sequence
  const int tile_m_;  // queries of a tile
  int index_;
  int stride_;               // to the next index dealt out
  int group_ = 0;            // first sequence of the group searched
  int64_t group_first_ = 0;  // index of its first tile
  int next_group_ = 0;
  Bounds bounds_, next_bounds_;
  Ring<kTileSlots> tiles_;
};

}  // namespace fa3
