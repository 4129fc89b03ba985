// The forward kernel for few queries on many keys, a piece of work to a thread block: one warpgroup does everything.
// Such calls are short. What one warp would have to tell another takes longer than what it could do meanwhile, and so
// does each instruction that comes from memory first: there are few, and most stand where keys are waited for anyway.
#pragma once
#include "arch/barrier.cuh"
#include "arch/cluster.cuh"
#include "arch/warpgroup.cuh"
#include "attention/mask.h"
#include "attention/softmax.cuh"
#include "kernels/forward_epilogue.cuh"
#include "kernels/forward_join.cuh"
#include "kernels/forward_keys.cuh"
#include "kernels/forward_load.cuh"

namespace fa3 {

/// A tile of 64 rows of 16-bit elements.
template <class Base>
struct DecodeTraits : Base {
  static_assert(Base::kConsumers == 1 && !Base::kHasQv && !Base::kEightBits, "tiles that a warpgroup can do alone");
  using Args = DecodeArgs;
  static constexpr int kThreads = 128, kBlocksPerSm = 2;  // two, since clusters want neighbours that have room
  // Two blocks on their way are as fast as more: memory serves all of them at the same time, so the first one comes
  // later.
  static constexpr int kValueStages = 2, kKeyStages = kValueStages + 1;
  // What is left of shared memory is for parts that a cluster sends: so many rows of them.
  static constexpr int kBarrierBytes = (kKeyStages + kValueStages + 1) * static_cast<int>(sizeof(arch::Barrier));
  static constexpr int kRoom = 228 * 1024 / kBlocksPerSm - 1024 - kBarrierBytes - kKeyStages * Base::TileK::kBytes -
                               kValueStages * Base::TileV::kBytes;
  static constexpr int kMostJoinedRows = smaller(SentUnits<Base::kHeadDimV, 0>::rows_in(kRoom) / 8 * 8, 64);
  static_assert(kMostJoinedRows >= 16, "eight heads of two queries");
};

/// Where shared memory begins is a multiple of 1,024, and so are a block's bytes.
template <class Traits>
struct DecodeShared {
  static_assert(Traits::TileK::kBytes % 1024 == 0 && Traits::TileV::kBytes % 1024 == 0,
                "the swizzle goes by addresses");
  uint8_t k[Traits::kKeyStages][Traits::TileK::kBytes];
  uint8_t v[Traits::kValueStages][Traits::TileV::kBytes];
  SentUnits<Traits::kHeadDimV, Traits::kMostJoinedRows> sent;
  arch::Barrier k_full[Traits::kKeyStages], v_full[Traits::kValueStages];

  __device__ __forceinline__ void make_barriers() {
#pragma unroll
    for (arch::Barrier& full : k_full) full.init(1);
#pragma unroll
    for (arch::Barrier& full : v_full) full.init(1);
    sent.full.init(1);
    arch::publish_barriers();
  }

  /// Rows of output on their way to memory lie where keys were.
  __device__ __forceinline__ typename Traits::Staging* staging() {
    static_assert(4 * sizeof(typename Traits::Staging) <= sizeof(k));
    return reinterpret_cast<typename Traits::Staging*>(k);
  }
};

template <class Traits>
class Decoder {
  using Args = typename Traits::Args;
  using Shared = DecodeShared<Traits>;
  using Element = typename Traits::Element;
  using TileQ = typename Traits::TileQ;
  using TileK = typename Traits::TileK;
  using TileV = typename Traits::TileV;
  static_assert(std::is_same_v<TileK, TileV>, "keys and values are loaded by the same instructions");
  using Contiguous = ContiguousKeys<Traits>;
  using Boxed = BoxedKeys<Traits>;
  using RowSoftmax = Softmax<Element, Traits::kTileN>;
  using Queries = uint32_t[TileQ::kColumnSteps][4];  // of a warp's rows, as products read them
  static constexpr int kTileN = Traits::kTileN;
  // The last warp asks for keys and values: where rows are few, it has none of them.
  static constexpr int kMaker = 1, kPrefetcher = 2, kLoader = 3;

 public:
  __device__ __forceinline__ Decoder(const Args& args, Shared& shared)
      : args_(args), shared_(shared), lane_(threadIdx.x % 32), warp_(arch::uniform(threadIdx.x / 32)) {}

  __device__ __forceinline__ void run() {
    if (warp_ == kPrefetcher) prefetch();
    if (warp_ == kMaker && arch::elected()) shared_.make_barriers();
    find_piece();
    const bool at_once = starts_at_once();
    int used = args_.keys.rows_used(work_.batch);
    __syncthreads();  // barriers are made
    if (at_once && warp_ == kLoader)
      load_contiguous(args_.k, args_.k_head_step, args_.k_batch_step, 0, shared_.k[0], shared_.k_full[0]);
    asm volatile("" : "+r"(used));  // who waits for it does so here
    describe(used);
    if (at_once && blocks_.count() <= 0) shared_.k_full[0].wait(0);  // what was asked for must find its place
    if (work_.seqlen_q <= 0) return;                                 // and so do the others of a cluster

    const int rows = clamped(ceil_div(this->rows() - 16 * warp_, 8), 0, 2);  // of a thread's two, that exist
    Queries q = {};
    if (warp_ == kLoader) begin_to_load(at_once);
    if (rows > 0) load_queries(q);
    __syncwarp();
    if (work_.parts > 1) arch::cluster_arrive();  // this thread block's barriers are made
    attend(rows, q);
  }

 private:
  /// Chunks are left to the other kernel: their divisions would be jumped over.
  __device__ __forceinline__ Visibility visibility() const {
    return {args_.visibility.left, args_.visibility.right, 0};
  }

  /// Of the tile; queries of a head stand side by side with those of the others that share it.
  __device__ __forceinline__ int rows() const { return work_.seqlen_q * args_.packing().heads; }

  /// What memory is asked for next is on its way.
  __device__ __forceinline__ void prefetch() const {
    if (arch::elected()) {
      arch::prefetch_map(&args_.k.map);
      arch::prefetch_map(&args_.v.map);
    }
    prefetch_lengths<Traits>(args_);
  }

  /// This thread block's piece of work, as far as no memory has to say it. Every sequence is one tile of each group of
  /// heads.
  __device__ __forceinline__ void find_piece() {
    const Splits::Piece piece = args_.piece(blockIdx.x);
    work_.batch = args_.heads.quotient(piece.tile);
    const int head = piece.tile - work_.batch * args_.heads.divisor;
    work_.head_kv = args_.tiles.quotient(head);
    work_.first_head = (head - work_.head_kv * args_.tiles.divisor) * args_.packing().heads;
    work_.first_query = 0;
    work_.part = piece.part;
    work_.parts = piece.parts;
    work_.batch_kv = work_.batch;  // until describe() knows
    work_.k_begin = 0;
  }

  /// Whether its sequence's first keys are asked for before memory has said whether there are any.
  __device__ __forceinline__ bool starts_at_once() const {
    const KeyRows& keys = args_.keys;
    return work_.parts == 1 && visibility().full() && keys.rows > 0 && !keys.paged && !keys.leftpad && !keys.entries;
  }

  /// The rest of the piece, from what memory has said of its keys' rows.
  __device__ __forceinline__ void describe(int used) {
    const Span q = args_.queries.dense_span(work_.batch), k = args_.keys.dense_span_of(used, work_.batch);
    work_.batch_kv = arch::uniform(args_.keys.entry(work_.batch));
    work_.q_begin = q.begin;
    work_.k_begin = arch::uniform(k.begin);
    work_.seqlen_q = arch::uniform(q.length);
    work_.seqlen_k = work_.seqlen_q > 0 ? arch::uniform(k.length) : 0;
    blocks_ = visibility().full()
                  ? every_block<kTileN>(work_.seqlen_k)
                  : block_range<kTileN>(visibility(), 0, work_.seqlen_q - 1, work_.seqlen_q, work_.seqlen_k);
    if (work_.parts > 1) {
      const Splits& splits = args_.extras.splits;
      const int count = blocks_.count(), begin = blocks_.begin;
      blocks_.clip(begin + splits.boundary(count, work_.part), begin + splits.boundary(count, work_.part + 1));
    }
  }

  /// The piece's rows against its blocks of keys, first block first.
  __device__ __forceinline__ void attend(int rows, const Queries& q) {
    RowSoftmax softmax;
    softmax.scale_log2[0] = args_.score_scale_log2;
    softmax.reset();
    float o[Traits::kColumnsO / 2];
#pragma unroll
    for (float& x : o) x = 0.f;
    ClusterJoin<Traits> parts(args_, shared_.sent, work_);
    typename RowSoftmax::Probabilities p = {};
    Ring<Traits::kKeyStages> keys;
    Ring<Traits::kValueStages> values;
#pragma unroll 1
    for (int n_block = blocks_.begin; n_block < blocks_.end; ++n_block) {
      float s[kTileN / 2];
      shared_.k_full[keys.stage()].wait(keys.parity());
      arch::wgmma_fence();
      multiply_keys(s, q, keys.stage());
      arch::wgmma_wait<0>();
      arch::wgmma_wrote(s);
      if (warp_ == kLoader && keys.count > 0) load_next(false);  // in place of the block before
      if (rows > 0) {
        if (blocks_.needs_mask(n_block)) hide_unseen(s, n_block);
        softmax.take(s, p, rows, o);
      }
      shared_.v_full[values.stage()].wait(values.parity());
      clear_values_past(work_.seqlen_k - n_block * kTileN, values.stage());
      arch::wgmma_fence();
      weigh_values(o, p, values.stage());
      arch::wgmma_wait<0>();
      arch::wgmma_wrote(o);
      __syncthreads();  // all have read the block
      if (warp_ == kLoader) load_next(true);
      keys.advance();
      values.advance();
    }
    if (work_.parts > 1) {
      parts.send(o, softmax, rows);
      parts.join();
    } else {
      const RowScales scales = finish_rows<Traits>(args_, work_, threadIdx.x, softmax);
      store_rows(RowWriter<Traits>(args_, work_, threadIdx.x, scales, shared_.staging()), scales, o);
    }
  }

  /// This warp's rows, from memory to where products read them; those that nobody has are zeros.
  __device__ __forceinline__ void load_queries(Queries& q) const {
    const DecodeArgs::Rows& from = args_.q;
    const RowPlaces places = RowPlaces::of<Traits>(args_, work_, 0);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = 16 * warp_ + lane_ / 4 + 8 * r;
      const int position = args_.packing().position_of(row), head = args_.packing().head_of(row);
      if (!places.exist(position, head)) continue;
      const uint8_t* const data = from.data + work_.batch * from.batch_bytes +
                                  (places.first_row + position) * from.row_bytes +
                                  (places.first_head + head) * from.head_bytes;
#pragma unroll
      for (int step = 0; step < TileQ::kColumnSteps; ++step) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int column = 16 * step + 8 * half + 2 * (lane_ % 4);
          if (column < args_.head_dim)
            q[step][r + 2 * half] = __ldg(reinterpret_cast<const uint32_t*>(data) + column / 2);
        }
      }
    }
  }

  /// The loader's warp: as many blocks as there are places for. If it began at once, the first keys are on their way.
  __device__ __forceinline__ void begin_to_load(bool at_once) {
    next_ = blocks_.begin + at_once;
    loaded_keys_.count = at_once;
    if (args_.paged()) ahead_ = Boxed::place(Boxed::source(args_, args_.k, work_), next_);
#pragma unroll 1
    for (int i = at_once; i < Traits::kKeyStages + Traits::kValueStages; ++i) load_next(i % 2);
  }

  /// The next block's keys, or the values of the block whose keys were asked for last. Where a block is in pages is
  /// looked up a block ahead.
  __device__ __forceinline__ void load_next(bool values) {
    const int n_block = next_ - values;
    const uint32_t stage = values ? loaded_values_.stage() : loaded_keys_.stage();
    if (n_block < blocks_.end) {
      uint8_t* const to = values ? shared_.v[stage] : shared_.k[stage];
      arch::Barrier& full = values ? shared_.v_full[stage] : shared_.k_full[stage];
      const TmaOperand& from = values ? args_.v : args_.k;
      if (args_.paged()) {
        const auto source = Boxed::source(args_, from, work_);
        if (!values) {
          here_ = Boxed::settled(source, ahead_);
          ahead_ = Boxed::place(source, n_block + 1);
        }
        Boxed::template load<TileK>(source, 0, n_block, here_, to, full);
      } else {
        load_contiguous(from, values ? args_.v_head_step : args_.k_head_step,
                        values ? args_.v_batch_step : args_.k_batch_step, n_block, to, full);
      }
    }
    if (values) {
      loaded_values_.advance();
    } else {
      loaded_keys_.advance();
      ++next_;
    }
  }

  __device__ __forceinline__ void load_contiguous(const TmaOperand& from, int head_step, int batch_step, int n_block,
                                                  uint8_t* to, arch::Barrier& full) const {
    const typename Contiguous::Source source{
        &from.map, work_.k_begin, work_.head_kv * head_step, work_.batch_kv * batch_step, {}};
    Contiguous::template load<TileK>(source, 0, n_block, Contiguous::place(source, n_block), to, full);
  }

  __device__ __forceinline__ void multiply_keys(float (&s)[kTileN / 2], const Queries& q, int stage) const {
    const uint32_t k = arch::descriptor_address(shared_.k) + stage * (TileK::kBytes >> 4);
#pragma unroll
    for (int step = 0; step < TileK::kColumnSteps; ++step)
      arch::WgmmaRK<Element, kTileN>::mma(
          s, q[step], arch::descriptor(TileK::kMajorColumns, k + TileK::column_step(step)), step > 0);
    arch::wgmma_commit();
  }

  __device__ __forceinline__ void weigh_values(float (&o)[Traits::kColumnsO / 2],
                                               const typename RowSoftmax::Probabilities& p, int stage) const {
    const uint32_t v = arch::descriptor_address(shared_.v) + stage * (TileV::kBytes >> 4);
#pragma unroll
    for (int step = 0; step < kTileN / Traits::kStepKeys; ++step)
      arch::WgmmaRS<Element, Traits::kColumnsO>::mma(
          o, p + 4 * step, arch::descriptor(Traits::kLayoutV, v + TileV::row_step(step)), true);
    arch::wgmma_commit();
  }

  __device__ __forceinline__ void hide_unseen(float (&s)[kTileN / 2], int n_block) const {
    const int first_column = n_block * kTileN + 2 * (lane_ % 4);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = query_of<Traits>(args_, work_, 0, 16 * warp_ + lane_ / 4 + 8 * r);
      const KeyInterval seen = visibility().keys(query, work_.seqlen_q, work_.seqlen_k);
      hide_columns(s, r, seen.begin - first_column, seen.end - first_column, args_.hidden);
    }
  }

  /// What follows the sequence's last key becomes 0: 0 times NaN is NaN. TMA does that at the array's own end.
  __device__ __forceinline__ void clear_values_past(int rows, int stage) const {
    if (rows >= kTileN || !(args_.keys.seqused || args_.paged())) return;
    clear_rows<TileV, 1>(shared_.v[stage], rows);
    arch::fence_async_proxy();
    __syncthreads();
  }

  const Args& args_;
  Shared& shared_;
  const int lane_, warp_;
  TileHead work_;
  BlockRange blocks_;
  // The loader's:
  int next_;                            // block whose keys are to be asked for
  typename Boxed::Place here_, ahead_;  // in pages: of the block before, and of that one
  Ring<Traits::kKeyStages> loaded_keys_;
  Ring<Traits::kValueStages> loaded_values_;
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    decode_kernel(const __grid_constant__ typename Traits::Args args) {
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  Decoder<Traits>(args, *reinterpret_cast<DecodeShared<Traits>*>(dynamic_shared)).run();
}

}  // namespace fa3
