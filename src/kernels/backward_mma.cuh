// The consumer warpgroups: P^T = exp(K Q^T - lse), dV = P^T dO, dS^T = P^T (V dO^T - delta), dK = dS^T Q, dQ = dS K.
#pragma once
#include <type_traits>

#include "arch/barrier.cuh"
#include "arch/convert.cuh"
#include "arch/fragments.cuh"
#include "arch/warpgroup.cuh"
#include "attention/dropout.cuh"
#include "attention/mask.h"
#include "attention/softmax.cuh"
#include "kernels/backward_scores.cuh"
#include "kernels/backward_traits.cuh"
#include "kernels/fragment_rows.cuh"
#include "tile/ring.cuh"

namespace fa3 {

/// A consumer's rows are its 64 keys, and its columns queries: P^T and dS^T are then A operands as they are. Only dQ
/// needs all keys' dS. It is worked on a step late, so that no consumer has to wait for another at once. S and dP are
/// one batch of products; dQ, dV and dK the other. With dropout it is a kernel of its own: ptxas finds no registers for
/// more kinds of step in one.
template <class Traits, bool kDropout>
class BackwardConsumer {
  using Element = typename Traits::Element;
  using Shared = BackwardShared<Traits>;
  using TileQ = typename Traits::TileQ;
  using TileDo = typename Traits::TileDo;
  using TileK = typename Traits::TileK;
  using TileV = typename Traits::TileV;
  using TileDs = typename Traits::TileDs;
  static constexpr int kTileM = Traits::kTileM;
  using Scores = float[kTileM / 2];     // element 4 i + 2 r + e: key r of a thread's two, query 8 i + e from its first
  using Packed = uint32_t[kTileM / 4];  // the same order, packed: already wgmma's A operand
  using QueryGradient = float[Traits::kDqCount];
  using Kept = uint32_t[kTileM / 64];  // see draw_for_keys
  // dP begins as -delta, which dS wants of it, unless dropout scales the rest of it first. Where a consumer has dP
  // alone, it waits for P meanwhile.
  static constexpr bool kFromDelta = !kDropout && !Traits::kPairs;
  // Registers do not hold what dropout keeps beside S and dP of 128 queries.
  static constexpr bool kTogether = !kDropout || kTileM == 64;

 public:
  __device__ __forceinline__ BackwardConsumer(const BackwardArgs& args, Shared& shared)
      : args_(args), shared_(shared) {}

  __device__ __forceinline__ void run() {
#pragma unroll 1
    while (arch::uniform(shared_.works.take(works_).exists())) {
      find_place();
      if constexpr (Traits::kPairs) {
        if (warpgroup_ == 0) {
          clear(dv_);
          take_steps([&](auto plain, const QueryStep& at) { values_step<plain.value>(at); });
          store(args_.dv, dv_, args_.dropout.scale, args_.head_dim_v);
        } else {
          clear(dk_);
          take_steps([&](auto plain, const QueryStep& at) { keys_step<plain.value>(at); });
          store(args_.dk, dk_, args_.softmax_scale, args_.head_dim);
        }
        arch::barrier_sync(own_barrier(), 128);  // rows were staged where the next dQ of other warps' comes
      } else {
        clear(dk_);
        clear(dv_);
        take_steps([&](auto plain, const QueryStep& at) { step<plain.value>(at); });
        store(args_.dk, dk_, args_.softmax_scale, args_.head_dim);
        store(args_.dv, dv_, args_.dropout.scale, args_.head_dim_v);
      }
      shared_.works.give_back(works_);
    }
  }

 private:
  /// For each piece of work anew, or ptxas keeps what follows from it through all of them, in registers that it lacks.
  __device__ __forceinline__ void find_place() {
    const uint32_t thread = arch::thread_anew();
    warpgroup_ = arch::uniform(thread / 128);
    lane_ = thread % 32;
    warp_ = thread / 32 % 4;
    k_address_ = arch::descriptor_address(shared_.k);
    v_address_ = arch::descriptor_address(shared_.v);
    q_address_ = arch::descriptor_address(shared_.q);
    dout_address_ = arch::descriptor_address(shared_.dout);
    ds_address_ = arch::descriptor_address(shared_.ds);
  }

  /// Every step, plain or not, and the last one's dQ.
  template <class Step>
  __device__ __forceinline__ void take_steps(const Step& step) {
    shared_.k_full.wait(works_.count % 2);
    shared_.v_full.wait(works_.count % 2);
    clear_keys();
    QueryWalk walked;  // what the loop needs of it; the rest is read where it is needed
    walked.blocks = {arch::uniform(work().blocks.begin), arch::uniform(work().blocks.end), 0, 0};
    walked.start = arch::uniform(work().start);
    walked.backwards = args_.scratch.in_order;
    const int own_first = first_key(), keys = work().k.length;
    const QueryBlockRange own = query_block_range<kTileM>(args_.visibility, smaller(own_first, keys - 1),
                                                          own_first + 63, work().q.length, keys);
    const bool all_plain = args_.softcap_scale == 0 && own_first + 63 < keys;
    const int plain_begin = arch::uniform(all_plain ? own.plain_begin : walked.blocks.end);
    const int whole_end = ends_inside() ? work().q.length / kTileM : own.plain_end;
    const int plain_end = arch::uniform(smaller(own.plain_end, whole_end));
    begin_ = ring_.count;
    const uint32_t end = begin_ + walked.steps(args_.group);
    QueryStep at(walked);
#pragma unroll 1
    for (; ring_.count != end; at.advance(walked, args_.group)) {
      if (at.m_block >= plain_begin && at.m_block < plain_end)
        step(std::true_type(), at);
      else
        step(std::false_type(), at);
    }
    release(shared_.v_empty);
    QueryGradient dq;  // without any step, of nothing
    wait_for_last_ds();
    wait_for_adder();
    arch::wgmma_fence();
    multiply_ds(dq);
    arch::wgmma_wait<0>();
    arch::wgmma_wrote(dq);
    release(shared_.k_empty);
    release_last_ds();
    hand_over(dq);
  }

  /// A plain one has neither mask nor softcap, and its queries are all the sequence's.
  template <bool kPlain>
  __device__ __forceinline__ void step(const QueryStep& at) {
    Scores s, dp;
    Packed p, ds;
    QueryGradient dq;
    Kept kept;
    const uint32_t stage = ring_.stage();
    wait_for_queries<kPlain>(at.m_block);
    shared_.dout_full[stage].wait(ring_.parity());
    if constexpr (kFromDelta) begin_values(dp);
    arch::wgmma_fence();
    multiply_keys(s);
    if constexpr (kTogether) multiply_values(dp);
    if constexpr (kDropout) draw(kept, at);
    arch::wgmma_wait<kTogether ? 1 : 0>();
    arch::wgmma_wrote(s);
    make_p<kPlain>(s, at.m_block);
    pack<Element>(s, p);
    arch::wgmma_reads(p);
    // Its branch also keeps ptxas from waiting for dP in the middle of the exponentials.
    wait_for_ds_place();
    if constexpr (!kTogether) {
      arch::wgmma_fence();
      multiply_values(dp);
    }
    arch::wgmma_wait<0>();
    arch::wgmma_wrote(dp);
    if constexpr (kDropout) keep(dp, kept);
    make_ds<kPlain>(p, dp, ds, at.m_block);
    drop<kDropout>(p, kept, p);
    put_ds(ds);

    wait_for_last_ds();
    wait_for_adder();
    arch::wgmma_reads(p);
    arch::wgmma_reads(ds);
    arch::wgmma_fence();
    multiply_ds(dq);
    add_dv(p);
    add_dk(ds);
    arch::wgmma_wait<2>();
    arch::wgmma_wrote(dq);
    release_last_ds();
    hand_over(dq);
    arch::wgmma_wait<0>();
    arch::wgmma_wrote(dv_);
    arch::wgmma_wrote(dk_);
    release(shared_.q_empty[stage]);
    release(shared_.dout_empty[stage]);
    ring_.advance();
  }

  /// The first of two consumers of the same keys: P, for both, and dV.
  template <bool kPlain>
  __device__ __forceinline__ void values_step(const QueryStep& at) {
    Scores s;
    Packed p, left;
    QueryGradient dq;
    Kept kept;
    const uint32_t stage = ring_.stage();
    wait_for_queries<kPlain>(at.m_block);
    arch::wgmma_fence();
    multiply_keys(s);
    if constexpr (kDropout) draw(kept, at);
    arch::wgmma_wait<0>();
    arch::wgmma_wrote(s);
    make_p<kPlain>(s, at.m_block);
    release(shared_.q_empty[stage]);
    pack<Element>(s, p);
    give_p(p, kept);
    drop<kDropout>(p, kept, left);

    wait_for_last_ds();
    wait_for_adder();
    shared_.dout_full[dout_ring().stage()].wait(dout_ring().parity());
    arch::wgmma_fence();
    multiply_ds(dq);
    add_dv(left);
    arch::wgmma_wait<1>();
    arch::wgmma_wrote(dq);
    release_last_ds();
    hand_over(dq);
    arch::wgmma_wait<0>();
    arch::wgmma_wrote(dv_);
    release(shared_.dout_empty[dout_ring().stage()]);
    ring_.advance();
  }

  /// The second: dS, for both, and dK.
  template <bool kPlain>
  __device__ __forceinline__ void keys_step(const QueryStep& at) {
    Scores dp;
    Packed p, ds;
    QueryGradient dq;
    Kept kept;
    const uint32_t stage = ring_.stage();
    wait_for_queries<kPlain>(at.m_block);
    shared_.dout_full[dout_ring().stage()].wait(dout_ring().parity());
    arch::wgmma_fence();
    multiply_values(dp);
    arch::wgmma_wait<0>();
    arch::wgmma_wrote(dp);
    take_p(p, kept);
    if constexpr (kDropout) keep(dp, kept);
    make_ds<kPlain>(p, dp, ds, at.m_block);
    release(shared_.dout_empty[dout_ring().stage()]);
    wait_for_ds_place();
    put_ds(ds);

    wait_for_last_ds();
    wait_for_adder();
    arch::wgmma_fence();
    multiply_ds(dq);
    add_dk(ds);
    arch::wgmma_wait<1>();
    arch::wgmma_wrote(dq);
    release_last_ds();
    hand_over(dq);
    arch::wgmma_wait<0>();
    arch::wgmma_wrote(dk_);
    release(shared_.q_empty[stage]);
    ring_.advance();
  }

  /// Read anew where it is needed: registers do not hold it beside the products.
  __device__ __forceinline__ const KeyTile& work() const { return shared_.works.place[works_.stage()]; }
  /// Whether there was a step before, of the same work.
  __device__ __forceinline__ bool begun() const { return ring_.count != begin_; }
  __device__ __forceinline__ Ring<Traits::kDoutStages> dout_ring() const { return {ring_.count}; }
  /// This consumer's first row of a block of keys.
  __device__ __forceinline__ int first_row() const { return Traits::kOwnKeys * warpgroup_; }
  __device__ __forceinline__ int first_key() const { return work().n_block * Traits::kTileN + first_row(); }
  __device__ __forceinline__ int own_barrier() const { return 1 + warpgroup_; }  // of this warpgroup's 128 threads

  // ---- products ---------------------------------------------------------------------------------------

  __device__ __forceinline__ void multiply_keys(Scores& s) const {
    const uint32_t k = k_address_ + first_row() * (Traits::kSwizzleQK >> 4);
    const uint32_t q = q_address_ + ring_.stage() * (TileQ::kBytes >> 4);
#pragma unroll
    for (int step = 0; step < Traits::kHeadDim / 16; ++step)
      arch::WgmmaSS<Element, kTileM>::mma(s, arch::descriptor(TileK::kMajorColumns, k + TileK::column_step(step)),
                                          arch::descriptor(TileQ::kMajorColumns, q + TileQ::column_step(step)),
                                          step > 0);
    arch::wgmma_commit();
  }

  __device__ __forceinline__ void multiply_values(Scores& dp) const {
    const uint32_t v = v_address_ + first_row() * (Traits::kSwizzleV >> 4);
    const uint32_t dout = dout_address_ + dout_ring().stage() * (TileDo::kBytes >> 4);
#pragma unroll
    for (int step = 0; step < Traits::kHeadDimV / 16; ++step)
      arch::WgmmaSS<Element, kTileM>::mma(dp, arch::descriptor(TileV::kMajorColumns, v + TileV::column_step(step)),
                                          arch::descriptor(TileDo::kMajorColumns, dout + TileDo::column_step(step)),
                                          kFromDelta || step > 0);
    arch::wgmma_commit();
  }

  /// dQ of the step before, of this consumer's queries or columns.
  __device__ __forceinline__ void multiply_ds(QueryGradient& dq) const {
    constexpr int kShare = Traits::kDqColumns / TileK::kChunkColumns * TileK::kChunkBytes;
    const uint32_t ds = ds_address_ + (ring_.count - 1) % 2 * (TileDs::kBytes >> 4) +
                        (Traits::kShareQueries ? warpgroup_ * (TileDs::kChunkBytes >> 4) : 0);
    const int share = Traits::kConsumers * pair_rank<Traits>() + warpgroup_;
    const uint32_t k = k_address_ + (Traits::kShareQueries ? 0 : share * (kShare >> 4));
    add_ds<false>(dq, ds, k);
    if constexpr (Traits::kPairs)  // and of the other thread block's keys
      add_ds<true>(dq, arch::descriptor_address(shared_.other_ds),
                   arch::descriptor_address(shared_.other_k) + warpgroup_ * (kShare >> 4));
    arch::wgmma_commit();
  }

  /// The products of a block of keys with its dS, to what `dq` holds or in its place.
  template <bool kAdds>
  __device__ __forceinline__ static void add_ds(QueryGradient& dq, uint32_t ds, uint32_t k) {
#pragma unroll
    for (int step = 0; step < Traits::kTileN / 16; ++step)
      arch::WgmmaTT<Element, Traits::kDqColumns>::mma(
          dq, arch::descriptor(TileDs::kMajorRows, ds + TileDs::row_step(step)),
          arch::descriptor(TileK::kMajorRows, k + TileK::row_step(step)), kAdds || step > 0);
  }

  __device__ __forceinline__ void add_dv(const Packed& p) {
    const uint32_t dout = dout_address_ + dout_ring().stage() * (TileDo::kBytes >> 4);
#pragma unroll
    for (int step = 0; step < kTileM / 16; ++step)
      arch::WgmmaRS<Element, Traits::kHeadDimV>::mma(
          dv_, p + 4 * step, arch::descriptor(TileDo::kMajorRows, dout + TileDo::row_step(step)), true);
    arch::wgmma_commit();
  }

  __device__ __forceinline__ void add_dk(const Packed& ds) {
    const uint32_t q = q_address_ + ring_.stage() * (TileQ::kBytes >> 4);
#pragma unroll
    for (int step = 0; step < kTileM / 16; ++step)
      arch::WgmmaRS<Element, Traits::kHeadDim>::mma(
          dk_, ds + 4 * step, arch::descriptor(TileQ::kMajorRows, q + TileQ::row_step(step)), true);
    arch::wgmma_commit();
  }

  // ---- what lies between them -------------------------------------------------------------------------

  /// A row's value for each of this thread's queries 8 i and 8 i + 1, counted from its first.
  __device__ __forceinline__ static float2 pair(const float (&rows)[kTileM], int i, int lane) {
    return *reinterpret_cast<const float2*>(&rows[8 * i + 2 * (lane % 4)]);
  }

  __device__ __forceinline__ void exponentiate(Scores& s) const {
    const float scale = args_.score_scale_log2;
#pragma unroll
    for (int i = 0; i < kTileM / 8; ++i) {
      const float2 lse = pair(shared_.lse[ring_.stage()], i, lane_);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float* const at = s + 4 * i + 2 * r;
        at[0] = arch::exp2_fast(fmaf(at[0], scale, -lse.x));
        at[1] = arch::exp2_fast(fmaf(at[1], scale, -lse.y));
      }
    }
  }

  /// Scores become P.
  template <bool kPlain>
  __device__ __forceinline__ void make_p(Scores& s, int m_block) const {
    if (!kPlain && args_.softcap_scale != 0) squash(s, {args_.softcap_scale});
    exponentiate(s);
    if (!kPlain) hide(s, m_block);
  }

  __device__ __forceinline__ void begin_values(Scores& dp) const {
#pragma unroll
    for (int i = 0; i < kTileM / 8; ++i) {
      const float2 delta = pair(shared_.delta[dout_ring().stage()], i, lane_);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        dp[4 * i + 2 * r] = -delta.x;
        dp[4 * i + 2 * r + 1] = -delta.y;
      }
    }
    arch::wgmma_wrote(dp);
  }

  /// dS of dP, with P as it was rounded for dV: registers would not hold it in fp32 beside dP.
  template <bool kPlain>
  __device__ __forceinline__ void make_ds(const Packed& p, Scores& dp, Packed& ds, int m_block) const {
    if constexpr (!kFromDelta) {
#pragma unroll
      for (int i = 0; i < kTileM / 8; ++i) {
        const float2 delta = pair(shared_.delta[dout_ring().stage()], i, lane_);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float* const at = dp + 4 * i + 2 * r;
          at[0] = kDropout ? fmaf(at[0], args_.dropout.scale, -delta.x) : at[0] - delta.x;
          at[1] = kDropout ? fmaf(at[1], args_.dropout.scale, -delta.y) : at[1] - delta.y;
        }
      }
    }
    if (!kPlain) {
      if (args_.softcap_scale != 0) unsquash(p, dp);
      hide(dp, m_block);
    }
#pragma unroll
    for (int i = 0; i < kTileM / 4; ++i) {
      const float2 both = arch::unpack<Element>(p[i]);
      ds[i] = arch::pack<Element>(both.x * dp[2 * i], both.y * dp[2 * i + 1]);
    }
  }

  /// The softcap's derivative, 1 - tanh^2. P and lse give the tanh back, which spares the registers to keep it in.
  __device__ __forceinline__ void unsquash(const Packed& p, Scores& dp) const {
    const float to_tanh = __fdividef(1.f, args_.score_scale_log2);
#pragma unroll
    for (int i = 0; i < kTileM / 8; ++i) {
      const float2 lse = pair(shared_.lse[ring_.stage()], i, lane_);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float* const at = dp + 4 * i + 2 * r;
        const float2 both = arch::unpack<Element>(p[2 * i + r]);
        at[0] *= slope((__log2f(both.x) + lse.x) * to_tanh);
        at[1] *= slope((__log2f(both.y) + lse.y) * to_tanh);
      }
    }
  }

  // ---- dropout ----------------------------------------------------------------------------------------

  __device__ __forceinline__ void draw(Kept& kept, const QueryStep& at) const {
    const Philox philox(shared_.seed, work().head_kv * args_.group + at.head, work().batch);
#pragma unroll
    for (int i = 0; i < kTileM / 64; ++i) {
      const uint32_t own =
          draw_for_keys<4>(args_.dropout, philox, first_key() + 16 * warp_, at.m_block * kTileM + 64 * i, lane_);
      kept[i] = kept_of_keys(own, __shfl_xor_sync(~0u, own, 4), lane_);
    }
  }

  // ---- masks ------------------------------------------------------------------------------------------

  /// 0 where a key is hidden from a query, whatever was there: an lse or a dP that is NaN too.
  __device__ __forceinline__ void hide(Scores& x, int m_block) const {
    const int first_query = m_block * kTileM + 2 * (lane_ % 4);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int key = first_key() + 16 * warp_ + lane_ / 4 + 8 * r;
      const QueryInterval seeing = args_.visibility.queries(key, work().q.length, work().k.length);
      hide_columns(x, r, seeing.begin - first_query, seeing.end - first_query, 0.f);
    }
  }

  // ---- shared memory ----------------------------------------------------------------------------------

  /// Each warp gives back what it has finished reading.
  __device__ __forceinline__ void release(arch::Barrier& empty) const {
    __syncwarp();
    if (lane_ == 0) empty.arrive();
  }

  /// dS of this consumer's keys, for all consumers' products.
  __device__ __forceinline__ void put_ds(const Packed& ds) const {
    const uint32_t buffer = ring_.count % 2;
    const int row = first_row() + 16 * warp_ + lane_ % 16;
#pragma unroll
    for (int step = 0; step < kTileM / 16; ++step) {
      const int vector = 2 * step + lane_ / 16;  // of 8 queries
      arch::store_matrices(
          shared_.ds[buffer] + vector / 8 * TileDs::kChunkBytes + row * 128 + (vector % 8 ^ row % 8) * 16, ds[4 * step],
          ds[4 * step + 1], ds[4 * step + 2], ds[4 * step + 3]);
    }
    arch::fence_async_proxy();
    release(shared_.ds_full[buffer]);
  }

  /// Q and lse of this step.
  template <bool kPlain>
  __device__ __forceinline__ void wait_for_queries(int m_block) const {
    shared_.q_full[ring_.stage()].wait(ring_.parity());
    if (!kPlain) clear_queries(m_block);
  }

  /// Everyone has read what was made two steps before.
  __device__ __forceinline__ void wait_for_ds_place() const {
    shared_.ds_empty[ring_.count % 2].wait(ring_.count / 2 % 2 ^ 1);
  }

  /// The whole dS of the step before. In the first step there is none, and dQ of nothing costs less than a branch
  /// around it.
  __device__ __forceinline__ void wait_for_last_ds() const {
    if (!begun()) return;
    const Ring<2> last{ring_.count - 1};
    shared_.ds_full[last.stage()].wait(last.parity());
    if constexpr (Traits::kPairs) shared_.other_ds_full.wait(last.count % 2);
  }

  /// To whoever made it, of a pair both.
  __device__ __forceinline__ void release_last_ds() const {
    if (!begun()) return;
    arch::Barrier& empty = shared_.ds_empty[(ring_.count - 1) % 2];
    release(empty);
    if (Traits::kPairs && lane_ == 0) empty.arrive_at(pair_rank<Traits>() ^ 1);
  }

  /// What was handed over before: once for each step, and once more for each piece of work.
  __device__ __forceinline__ void wait_for_adder(int part = 0) const {
    const uint32_t handed = ring_.count + works_.count;
    shared_.dq_empty[warpgroup_].wait((handed * Traits::kDqParts + part) % 2 ^ 1);
  }

  /// dQ to the adder, who has been waited for. It knows which first one is of nothing.
  __device__ __forceinline__ void hand_over(const QueryGradient& dq) const {
    constexpr int kVectors = Traits::kDqCount / Traits::kDqParts / 4;
#pragma unroll
    for (int part = 0; part < Traits::kDqParts; ++part) {
      if (part > 0) wait_for_adder(part);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const float* const x = dq + 4 * (kVectors * part + i);
        shared_.dq[warpgroup_][i][threadIdx.x % 128] = make_float4(x[0], x[1], x[2], x[3]);
      }
      arch::fence_async_proxy();
      release(shared_.dq_full[warpgroup_]);
    }
  }

  /// P from the first of two consumers of the same keys to the second, and what dropout keeps of it.
  __device__ __forceinline__ void give_p(const Packed& p, const Kept& kept) const {
    shared_.p_empty.wait(ring_.count % 2 ^ 1);
#pragma unroll
    for (int i = 0; i < kTileM / 16; ++i)
      shared_.p[i][threadIdx.x % 128] = make_uint4(p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3]);
    if constexpr (kDropout) shared_.kept[threadIdx.x % 128] = kept[0];
    release(shared_.p_full);
  }

  __device__ __forceinline__ void take_p(Packed& p, Kept& kept) const {
    shared_.p_full.wait(ring_.count % 2);
#pragma unroll
    for (int i = 0; i < kTileM / 16; ++i) {
      const uint4 words = shared_.p[i][threadIdx.x % 128];
      p[4 * i] = words.x;
      p[4 * i + 1] = words.y;
      p[4 * i + 2] = words.z;
      p[4 * i + 3] = words.w;
    }
    if constexpr (kDropout) kept[0] = shared_.kept[threadIdx.x % 128];
    release(shared_.p_empty);
  }

  /// Keys past the sequence's end, of this consumer's. TMA does that at the array's own end.
  __device__ __forceinline__ void clear_keys() const {
    if (!(args_.keys.cu_seqlens || args_.keys.seqused)) return;
    const int begin = larger(work().k.length - first_key(), 0);
    // Of a pair's second thread block there are fewer than of the first: what this one needs of the other's.
    const int other_begin = Traits::kPairs ? larger(work().k.length - (work().n_block ^ 1) * 64, 0) : 64;
    if (begin >= 64 && other_begin >= 64) return;
    clear_rows<TileK>(shared_.k, first_row() + begin, first_row() + 64);
    clear_rows<TileV>(shared_.v, first_row() + begin, first_row() + 64);
    if constexpr (Traits::kPairs) clear_rows<typename Traits::TileOtherK>(shared_.other_k, other_begin, 64);
    arch::fence_async_proxy();
    arch::barrier_sync(own_barrier(), 128);
  }

  /// Whether an array may have more queries behind a sequence's end.
  __device__ __forceinline__ bool ends_inside() const { return args_.queries.cu_seqlens || args_.queries.seqused; }

  /// Queries past the sequence's end, and those before the first that sees a key. Every consumer clears the whole rest
  /// for itself, which spares them waiting for each other.
  __device__ __forceinline__ void clear_queries(int m_block) const {
    const int first = args_.visibility.queries(0, work().q.length, work().k.length).begin - m_block * kTileM;
    const int end = work().q.length - m_block * kTileM;
    if (first <= 0 && (end >= kTileM || !ends_inside())) return;
    shared_.dout_full[dout_ring().stage()].wait(dout_ring().parity());
    uint8_t* const q = shared_.q[ring_.stage()];
    uint8_t* const dout = shared_.dout[dout_ring().stage()];
    clear_rows<TileQ>(q, 0, smaller(first, kTileM));
    clear_rows<TileDo>(dout, 0, smaller(first, kTileM));
    clear_rows<TileQ>(q, smaller(end, kTileM), kTileM);
    clear_rows<TileDo>(dout, smaller(end, kTileM), kTileM);
    arch::fence_async_proxy();
    arch::barrier_sync(own_barrier(), 128);
  }

  // ---- results ----------------------------------------------------------------------------------------

  template <int kCount>
  __device__ __forceinline__ void store(const RowArray& array, const float (&x)[kCount], float scale,
                                        int columns) const {
    const int first = first_key() + 16 * warp_;
    auto* const data = static_cast<uint16_t*>(array.data) + (args_.keys.ragged() ? 0 : work().batch * array.stride[0]) +
                       (int64_t{work().k.begin} + first) * array.stride[1] + work().head_kv * array.stride[2];
    if (Traits::kPairs) wait_for_adder(Traits::kDqParts);  // rows are staged where the last dQ was
    store_fragment<Element>(shared_.staged(warpgroup_, warp_), x, scale,
                            {data, array.stride[1], work().k.length - first, columns, array.vectors}, lane_);
  }

  const BackwardArgs& args_;
  Shared& shared_;
  int warpgroup_, lane_, warp_;
  uint32_t k_address_, v_address_, q_address_, dout_address_, ds_address_;  // in units of 16 bytes
  float dk_[Traits::kHeadDim / 2], dv_[Traits::kHeadDimV / 2];
  Ring<Traits::kStages> ring_;  // steps: of Q, of dO and of both buffers of dS
  uint32_t begin_;              // of this work's steps
  Ring<WorkRing::kPlaces> works_;
};

}  // namespace fa3
