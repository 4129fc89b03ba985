// The consumer warpgroups: S = Q K^T, P = softmax(S), O = P V.
#pragma once
#include "arch/barrier.cuh"
#include "arch/fragments.cuh"
#include "arch/warpgroup.cuh"
#include "attention/dropout.cuh"
#include "attention/mask.h"
#include "attention/softmax.cuh"
#include "kernels/forward_exchange.cuh"
#include "kernels/forward_rows.cuh"
#include "kernels/forward_totals.cuh"
#include "tile/ring.cuh"

namespace fa3 {

/// Warpgroups take turns at issuing products, so that one's softmax runs beside the others' products. Barrier 1 + w is
/// warpgroup w's turn: its 128 threads wait there, and the 128 of the one before it arrive. Every warpgroup takes the
/// same number of turns a tile: one less than the blocks that are loaded. Where they are not `kTaken` nobody waits.
template <int kConsumers, bool kTaken>
struct Turns {
  int mine, next;
  bool leads;  // warpgroup 0, the first to go

  __device__ __forceinline__ explicit Turns(int warpgroup)
      : mine(1 + warpgroup), next(1 + (warpgroup + 1) % kConsumers), leads(warpgroup == 0) {
    if (warpgroup == kConsumers - 1) pass();
  }
  __device__ __forceinline__ void take() const {
    if (kTaken) arch::barrier_sync(mine, 256);
  }
  __device__ __forceinline__ void pass() const {
    if (kTaken) arch::barrier_arrive(next, 256);
  }
  /// The last warpgroup's last arrival is still under way.
  __device__ __forceinline__ void finish() const {
    if (leads) take();
  }
};

/// With dropout it is a kernel of its own: code that stands beside a step slows short calls down.
template <class Traits, bool kDropout>
class Consumer {
  using Element = typename Traits::Element;
  using Shared = ForwardShared<Traits>;
  using Work = TileWork<Traits::kRowGroups>;
  using TileQ = typename Traits::TileQ;
  using TileQV = typename Traits::TileQV;
  using TileK = typename Traits::TileK;
  using TileV = typename Traits::TileV;
  static constexpr int kTileN = Traits::kTileN;
  static constexpr int kValueSteps = Traits::kColumnsO * Traits::kElementBytes / 32;  // along this warpgroup's columns
  using Scores = float[kTileN / 2];
  using RowSoftmax = Softmax<Element, kTileN>;
  using Probabilities = typename RowSoftmax::Probabilities;
  static constexpr int kNoBlock = -1;

 public:
  using Output = float[Traits::kColumnsO / 2];

  __device__ __forceinline__ Consumer(const typename Traits::Args& args, Shared& shared, int warpgroup)
      : args_(args),
        shared_(shared),
        warpgroup_(warpgroup),
        lane_(threadIdx.x % 32),
        warp_(threadIdx.x / 32 % 4),
        turns_(warpgroup),
        q_address_(arch::descriptor_address(shared.q[Traits::row_group(warpgroup)])),
        k_address_(arch::descriptor_address(shared.k)),
        v_address_(arch::descriptor_address(shared.v)),
        exchange_(shared),
        totals_(args, shared) {
    if constexpr (!Traits::kEightBits) softmax_.scale_log2[0] = args.score_scale_log2;
    if (args.packing().rows < 64) clear_idle_queries();
  }

  /// The next piece of work, or null. It stays in shared memory, where it costs no registers, until done().
  __device__ __forceinline__ const Work* next() const {
    shared_.tile_full[tiles_.stage()].wait(tiles_.parity());
    const Work* work = &shared_.tile[tiles_.stage()];
    return arch::uniform(work->first_query) == Work::kNone ? nullptr : work;
  }

  /// Give the piece of work back.
  __device__ __forceinline__ void done() {
    release(shared_.tile_empty[tiles_.stage()]);
    tiles_.advance();
  }

  /// This warpgroup's 64 rows against every block of keys that they see, last block first. The softmax is done before
  /// the last product is: `meanwhile` runs beside it.
  template <class Meanwhile>
  __device__ __forceinline__ void attend(const Work& work, Output& o, const Meanwhile& meanwhile) {
    softmax_.reset();
#pragma unroll
    for (float& x : o) x = 0.f;
    const BlockRange blocks = uniform(work.blocks[row_group()]);
    k_ring_.count = v_ring_.count = arch::uniform(v_ring_.count);
    if constexpr (Traits::kEightBits) take_descales(work);
    skip_blocks(work.end_block - blocks.end, blocks.count() == 0);
    shared_.q_full[row_group()][q_ring().stage()].wait(q_ring().parity());
    if (blocks.count() > 0) {
      Scores s;
      Probabilities p;
      load_queries();
      if constexpr (Traits::kHasQv) exchange_.open();
      // Of dropout, which comes to tiles of one head alone.
      const Philox philox(shared_.seed, work.head_kv * args_.packing().ratio + work.first_head, work.batch);
      const int first_query = query_of<Traits>(args_, work, warpgroup_, 16 * warp_);

      bool here = false;  // the next block, as was seen when there was time to look
      // A plain block has no mask and no softcap. Its code stands apart: jumping over them cost 4% at head dim 256.
      // False: its softmax is to be done again.
      auto step = [&](int n_block, bool plain, bool promoted) {
        if constexpr (Traits::kHasQv) {
          finish_values(o, s, p, work);  // lest the next block find no room while this one waits
          if constexpr (!Traits::kTwoParts) wait_for_keys();
          wait_for_value_part();
        } else if constexpr (Traits::kKeysFirst) {
          wait_for_keys();
        } else {
          if (!Traits::kRunsFree || !here) {
            wait_for_keys();
            shared_.v_full[v_ring_.stage()].wait(v_ring_.parity());
          }
          if (promoted) promote_values(o, s, p);  // tensor cores idle meanwhile, if nobody else has them
        }
        turns_.take();
        arch::wgmma_fence();
        if (!promoted && !Traits::kHasQv && !Traits::kKeysFirst) add_values(o, p);
        multiply_keys(s);
        turns_.pass();
        if constexpr (Traits::kValuesEarly) {  // V is asked for while the scores are still made
          arch::wgmma_wait<1>();
          release_v();
        }
        arch::wgmma_wait<0>();
        arch::wgmma_wrote(o);
        arch::wgmma_wrote(s);
        release_k();
        if constexpr (Traits::kKeysFirst)
          finish_values(o, s, p, work);
        else if constexpr (!Traits::kHasQv && !Traits::kValuesEarly)
          release_v();
        if constexpr (Traits::kRunsFree) {
          const bool k_here = shared_.k_full[k_ring_.stage()].is_over(k_ring_.parity());
          const bool v_here = shared_.v_full[v_ring_.stage()].is_over(v_ring_.parity());
          here = k_here && v_here;
        }
        if constexpr (Traits::kHasQv) exchange_.add_others(s);
        if (!plain) shape_scores(s, work, n_block, n_block >= blocks.settled || n_block < blocks.plain_begin);
        const bool exact = args_.exact_max() || (!plain && softmax_.met_no_key());
        if constexpr (Traits::kRunsFree) return softmax_.attempt(s, p, exact);
        softmax_.update(s, p, exact, o);
        take_dropped(p, philox, first_query, n_block);
        return true;
      };

      int n_block = blocks.end - 1;
      wait_for_keys();
      if constexpr (Traits::kTwoParts) {
        arch::wgmma_fence();
        add_keys(s);
        finish_key_part(s, work);
      }
      wait_for_value_part();
      arch::wgmma_fence();
      multiply_keys(s);
      arch::wgmma_wait<0>();
      arch::wgmma_wrote(s);
      release_k();
      if constexpr (Traits::kHasQv) exchange_.add_others(s);
      shape_scores(s, work, n_block, blocks.needs_mask(n_block));
      softmax_.first(s, p, args_.exact_max());
      take_dropped(p, philox, first_query, n_block);
      if constexpr (!Traits::kEightBits) clear_values_past(work.seqlen_k - n_block * kTileN);  // else when turned

      // Of e4m3 products tensor cores keep 13 bits below the largest of what they add. So every few blocks sums move on
      // to totals in fp32, or each block's are added in fp32. A move shortly before the end is not worth its time.
      auto move_after = [&](int n_block) {
        const int next = n_block - args_.accumulate_blocks;
        return args_.accumulate_blocks > 1 && next > blocks.begin + args_.accumulate_blocks / 8 ? next : kNoBlock;
      };
      int next_move = move_after(blocks.end);
      auto go_on = [&](bool promoted) {
#pragma unroll 1
        while (--n_block >= blocks.begin) {
          if constexpr (Traits::kRunsFree) {
            bool safe;
            if (n_block < blocks.settled && n_block >= blocks.plain_begin && args_.plain_blocks()) {
              // Plain blocks, down to one that needs more: a loop with no jump but its own.
              const int last = larger(larger(blocks.plain_begin, blocks.begin), next_move);
              ++n_block;
#pragma unroll 1
              do {
                --n_block;
                safe = step(n_block, true, promoted);
              } while (safe && n_block > last);
            } else {
              safe = step(n_block, false, promoted);
            }
            if (!safe) softmax_.redo(s, p, o);
          } else if (n_block < blocks.settled && n_block >= blocks.plain_begin && args_.plain_blocks()) {
            step(n_block, true, promoted);
          } else {
            step(n_block, false, promoted);
          }
          if constexpr (Traits::kEightBits) {
            if (!promoted && n_block == next_move) {
              totals_.move(o, softmax_.row_max, next_move < move_after(blocks.end));
              next_move = move_after(next_move);
            }
          }
        }
        if constexpr (Traits::kHasQv) exchange_.close();
        release_q();

        shared_.v_full[v_ring_.stage()].wait(v_ring_.parity());
        if (promoted) {
          promote_values(o, s, p);
          meanwhile();
        } else {
          arch::wgmma_fence();
          add_values(o, p);
          meanwhile();
          arch::wgmma_wait<0>();
          arch::wgmma_wrote(o);
        }
        release_v();
      };
      if (Traits::kPromotes && args_.accumulate_blocks == 1)
        go_on(true);
      else
        go_on(false);
      if constexpr (Traits::kEightBits) {
        if (move_after(blocks.end) != kNoBlock) totals_.add(o, softmax_.row_max);
      }
    } else {
      meanwhile();
      release_q();
    }
    skip_blocks(blocks.begin - work.first_block, false);
  }

  __device__ __forceinline__ void finish() const { turns_.finish(); }

  __device__ __forceinline__ RowSoftmax& softmax() { return softmax_; }

 private:
  /// The factor of row r's scores. Rows that stand idle have that of a head that exists.
  __device__ __forceinline__ float descale(const Work& work, int r) const {
    if (args_.packing().heads == 1) return work.score_descale;
    const int head = smaller(work.first_head + args_.packing().head_of(row(r)), args_.packing().ratio - 1);
    return score_descale<Traits>(args_, work, head);
  }

  /// A tile's rows: their descales become part of what the scores are multiplied with, before softcap or after it.
  __device__ __forceinline__ void take_descales(const Work& work) {
    shared_.tile_scaled[tiles_.stage()].wait(tiles_.parity());
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float scale = args_.score_scale_log2 * (args_.has_softcap() ? 1.f : descale(work, r));
      softmax_.scale_log2[r] = scale == 0 ? 1e-30f : scale;  // see fill() in api.cpp
    }
  }

  __device__ __forceinline__ Ring<Traits::kQueryStages> q_ring() const { return {tiles_.count}; }

  __device__ __forceinline__ int row_group() const { return Traits::row_group(warpgroup_); }
  __device__ __forceinline__ int column_group() const { return Traits::column_group(warpgroup_); }

  /// The row of the warpgroup's 64 that this thread's row r of two is.
  __device__ __forceinline__ int row(int r) const { return 16 * warp_ + lane_ / 4 + 8 * r; }

  /// What a whole warp agrees on belongs into uniform registers, where products want their descriptors. The compiler
  /// sees that of a shuffle's result, but not through shared memory or loops that read their ends there.
  __device__ __forceinline__ static BlockRange uniform(const BlockRange& blocks) {
    return {arch::uniform(blocks.begin), arch::uniform(blocks.end), arch::uniform(blocks.plain_begin),
            arch::uniform(blocks.plain_end), arch::uniform(blocks.settled)};
  }

  /// The named barrier of this warpgroup's 128 threads alone.
  __device__ __forceinline__ int own_barrier() const { return 1 + Traits::kConsumers + warpgroup_; }

  /// Rows that no query is ever loaded to are zeros: the softmax of a warp must not depend on what memory held before.
  __device__ __forceinline__ void clear_idle_queries() const {
    if constexpr (Traits::kHasQv)  // those of Q are left out by load_queries()
      clear_rows<TileQV, Traits::kQueryStages>(shared_.qv[row_group()][0], args_.packing().rows);
    else
      clear_rows<TileQ, Traits::kQueryStages>(shared_.q[row_group()][0], args_.packing().rows);
    arch::fence_async_proxy();
    arch::barrier_sync(own_barrier(), 128);
  }

  /// Blocks that other warpgroups need and this one does not: let them pass in order, with their turns.
  __device__ __forceinline__ void skip_blocks(int count, bool last_has_no_turn) {
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      wait_for_keys();
      release_k();
      shared_.v_full[v_ring_.stage()].wait(v_ring_.parity());
      release_v();
      if (last_has_no_turn && i == count - 1) break;
      turns_.take();  // never held while waiting for a skipped block: the others may need it to free that block's stage
      turns_.pass();
    }
  }

  /// Those columns of Q that stay in registers.
  __device__ __forceinline__ void load_queries() {
    const uint8_t* rows = shared_.q[row_group()][q_ring().stage()];
    const int first_byte = 32 * Traits::kOwnColumnSteps * column_group() + lane_ / 16 * 16;
#pragma unroll
    for (int step = 0; step < Traits::kQuerySteps; ++step) {
      arch::load_matrices(queries_[step], rows + TileQ::offset(16 * warp_ + lane_ % 16,
                                                               (32 * step + first_byte) / Traits::kElementBytes));
      if constexpr (Traits::kHasQv) {  // rows that stand idle hold what was exchanged
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (row(i % 2) >= args_.packing().rows) queries_[step][i] = 0;
      }
    }
  }

  /// Scores; where they have two parts, what is left of them.
  __device__ __forceinline__ void multiply_keys(Scores& s) const {
    if constexpr (!Traits::kTwoParts) add_keys(s);
    if constexpr (Traits::kHasQv) add_value_part(s);
    arch::wgmma_commit();
  }

  __device__ __forceinline__ void add_keys(Scores& s) const {
    const uint32_t q = q_address_ + q_ring().stage() * (TileQ::kBytes >> 4);
    const uint32_t k = k_address_ + k_ring_.stage() * (TileK::kBytes >> 4) +
                       column_group() * TileK::column_step(Traits::kOwnColumnSteps);
#pragma unroll
    for (int step = 0; step < Traits::kOwnColumnSteps; ++step) {
      const uint64_t keys = arch::descriptor(TileK::kMajorColumns, k + TileK::column_step(step));
      if (step < Traits::kQuerySteps)
        arch::WgmmaRK<Element, kTileN>::mma(s, queries_[step], keys, step > 0);
      else
        arch::WgmmaSS<Element, kTileN>::mma(s, arch::descriptor(TileQ::kMajorColumns, q + TileQ::column_step(step)),
                                            keys, step > 0);
    }
  }

  /// Wait for q k, and bring it to the scale of qv v, which comes on top of it.
  __device__ __forceinline__ void finish_key_part(Scores& s, const Work& work) const {
    arch::wgmma_commit();
    arch::wgmma_wait<0>();
    arch::wgmma_wrote(s);
#pragma unroll
    for (float& x : s) x *= work.key_part_scale;
    arch::wgmma_wrote(s);
  }

  __device__ __forceinline__ void wait_for_keys() const { shared_.k_full[k_ring_.stage()].wait(k_ring_.parity()); }

  /// With qv, of the same block: values as they were loaded.
  __device__ __forceinline__ void wait_for_value_part() const {
    if constexpr (Traits::kTwoParts)
      shared_.loaded_v_full[k_ring_.stage()].wait(k_ring_.parity());
    else if constexpr (Traits::kHasQv)
      shared_.v_full[v_ring_.stage()].wait(v_ring_.parity());
  }

  /// Add qv v, of this warpgroup's columns of the same block's values.
  __device__ __forceinline__ void add_value_part(Scores& s) const {
    using Values = typename Traits::TileLoadedV;
    // Read anew: descriptors of all columns, held through the loop, would not fit in registers.
    const uint32_t qv = arch::uniform(arch::descriptor_address(shared_.qv[row_group()][q_ring().stage()]) +
                                      column_group() * TileQV::column_step(kValueSteps));
    uint32_t v;
    if constexpr (Traits::kTwoParts)
      v = arch::uniform(arch::descriptor_address(shared_.loaded_v) + k_ring_.stage() * (Values::kBytes >> 4) +
                        column_group() * Values::column_step(kValueSteps));
    else
      v = v_address_ + v_ring_.stage() * (Values::kBytes >> 4) + column_group() * Values::column_step(kValueSteps);
#pragma unroll
    for (int step = 0; step < kValueSteps; ++step)
      arch::WgmmaSS<Element, kTileN>::mma(s, arch::descriptor(TileQV::kMajorColumns, qv + TileQV::column_step(step)),
                                          arch::descriptor(Values::kMajorColumns, v + Values::column_step(step)), true);
  }

  /// Where this warpgroup's columns of V begin, in units of 16 bytes.
  __device__ __forceinline__ uint32_t own_columns() const {
    if constexpr (!Traits::kHasQv)
      return 0;
    else if constexpr (Traits::kEightBits)
      return column_group() * TileV::column(Traits::kColumnsO);
    else
      return column_group() * TileV::column_step(kValueSteps);
  }

  __device__ __forceinline__ void add_values(Output& o, const Probabilities& p) const {
    weigh_values<Traits::kColumnsO>(o, p, own_columns(), true);
  }

  /// The same where nothing else is multiplied meanwhile but q k of the next block, if it stands alone.
  __device__ __forceinline__ void finish_values(Output& o, Scores& s, const Probabilities& p, const Work& work) {
    if constexpr (Traits::kTwoParts) {
      shared_.v_full[v_ring_.stage()].wait(v_ring_.parity());  // turned
      wait_for_keys();
      arch::wgmma_fence();
      add_values(o, p);
      add_keys(s);
      finish_key_part(s, work);
    } else {
      if constexpr (!Traits::kHasQv) shared_.v_full[v_ring_.stage()].wait(v_ring_.parity());  // else scores had them
      arch::wgmma_fence();
      add_values(o, p);
      arch::wgmma_wait<0>();
    }
    arch::wgmma_wrote(o);
    release_v();
  }

  /// Columns of the next block of V, as many as the product has: from `offset` on, in units of 16 bytes.
  template <int kColumns>
  __device__ __forceinline__ void weigh_values(float (&product)[kColumns / 2], const Probabilities& p, uint32_t offset,
                                               bool accumulate) const {
    const uint32_t v = v_address_ + v_ring_.stage() * (TileV::kBytes >> 4) + offset;
#pragma unroll
    for (int step = 0; step < kTileN / Traits::kStepKeys; ++step)
      arch::WgmmaRS<Element, kColumns>::mma(
          product, p + 4 * step, arch::descriptor(Traits::kLayoutV, v + TileV::row_step(step)), step > 0 || accumulate);
    arch::wgmma_commit();
  }

  /// Add P V to o in fp32. P is made, so the registers of S are free: they take the product, as many columns at a time
  /// as a block has keys. Products that want other registers than all of S's together would make ptxas spill. So the
  /// last one may have columns that V lacks: of whatever lies behind it, and for nobody.
  __device__ __forceinline__ void promote_values(Output& o, Scores& s, const Probabilities& p) const {
    if constexpr (Traits::kPromotes) {
#pragma unroll
      for (int first = 0; first < Traits::kHeadDimV; first += kTileN) {
        arch::wgmma_fence();
        weigh_values<kTileN>(s, p, TileV::column(first), false);
        arch::wgmma_wait<0>();
        arch::wgmma_wrote(s);
#pragma unroll
        for (int i = 0; i < kTileN / 2; ++i)
          if (first / 2 + i < Traits::kHeadDimV / 2) o[first / 2 + i] += s[i];
      }
    }
  }

  /// The next block of V holds `rows` of the sequence's keys. Their probabilities past the end are 0, but 0 times NaN
  /// is NaN: what follows, another sequence or unused rows, becomes 0 too. TMA does that at the array's own end. Every
  /// warpgroup clears the whole rest for itself, which spares them waiting for each other.
  __device__ __forceinline__ void clear_values_past(int rows) const {
    if (rows >= kTileN || !(args_.keys.cu_seqlens || args_.keys.seqused || args_.paged())) return;
    shared_.v_full[v_ring_.stage()].wait(v_ring_.parity());
    clear_rows<TileV, 1>(shared_.v[v_ring_.stage()], rows);
    arch::fence_async_proxy();
    arch::barrier_sync(own_barrier(), 128);
  }

  /// Softcap and mask.
  __device__ __forceinline__ void shape_scores(Scores& s, const Work& work, int n_block, bool masked) const {
    if (args_.has_softcap()) {
      float scale[RowSoftmax::kScales] = {args_.extras.softcap_scale};
      if constexpr (Traits::kEightBits) {
        scale[1] = scale[0] * descale(work, 1);
        scale[0] *= descale(work, 0);
      }
      squash(s, scale);
    }
    if (!masked) return;
    const int first_column = n_block * kTileN + 2 * (lane_ % 4);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = query_of<Traits>(args_, work, warpgroup_, row(r));
      const KeyInterval seen = args_.visibility.keys(query, work.seqlen_q, work.seqlen_k);
      float hidden = args_.hidden;
      if constexpr (Traits::kEightBits) hidden = copysignf(INFINITY, -softmax_.scale(r));  // descales have signs
      hide_columns(s, r, seen.begin - first_column, seen.end - first_column, hidden);
    }
  }

  /// Zeros for the probabilities that dropout takes; the softmax has counted them.
  __device__ __forceinline__ void take_dropped(Probabilities& p, const Philox& philox, int first_query,
                                               int n_block) const {
    if constexpr (kDropout) drop(p, args_.dropout, philox, first_query, n_block * kTileN, lane_);
  }

  /// Each warp gives back what it has finished reading.
  __device__ __forceinline__ void release(arch::Barrier& empty) const {
    __syncwarp();
    if (lane_ == 0) empty.arrive();
  }
  /// The row group is found anew, or ptxas keeps an address through all of a tile, in a register that it lacks.
  __device__ __forceinline__ void release_q() const {
    const int group = Traits::row_group(arch::uniform(arch::thread_anew() / 128));
    release(shared_.q_empty[group][q_ring().stage()]);
  }
  __device__ __forceinline__ void release_k() {
    if constexpr (Traits::kTwoParts) release(shared_.loaded_v_empty[k_ring_.stage()]);
    release(shared_.k_empty[k_ring_.stage()]);
    k_ring_.advance();
  }
  __device__ __forceinline__ void release_v() {
    release(shared_.v_empty[v_ring_.stage()]);
    v_ring_.advance();
  }

  const typename Traits::Args& args_;
  Shared& shared_;
  const int warpgroup_, lane_, warp_;
  const Turns<Traits::kConsumers, Traits::kTakesTurns> turns_;
  const uint32_t q_address_, k_address_, v_address_;  // in units of 16 bytes
  const Exchange<Traits> exchange_;
  uint32_t queries_[larger(Traits::kQuerySteps, 1)][4];
  RowSoftmax softmax_;
  Totals<Traits> totals_;
  Ring<Traits::kKeyStages> k_ring_;
  Ring<Traits::kStages> v_ring_;
  Ring<kTileSlots> tiles_;  // every piece has its queries, so it counts them too
};

}  // namespace fa3
