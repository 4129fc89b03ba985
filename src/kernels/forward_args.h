// What a forward kernel is launched with.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "attention/block_range.h"
#include "attention/cache.h"
#include "attention/divisor.h"
#include "attention/dropout.h"
#include "attention/packing.h"
#include "attention/splits.h"
#include "attention/tile_scheduler.h"
#include "kernels/tma_operand.h"

namespace fa3 {

/// Where the keys of a paged cache are: its pages are what is the batch of k and v else.
struct KeyPages {
  CacheRows rows;
  int box_rows;  // that TMA brings at once: they divide a page and a block of keys; 0: rows are gathered

  FA3_HOST_DEVICE bool used() const { return rows.page_table != nullptr; }
};

/// Factors of an fp8 operand. A null pointer: 1.
struct Descale {
  const float* data;
  int64_t batch_stride, head_stride;
  int group;  // heads in a row that share a factor

#ifdef __CUDACC__
  __device__ __forceinline__ float at(int batch, int head) const {
    return data ? __ldg(data + batch * batch_stride + head / group * head_stride) : 1.f;
  }
#endif
};

/// What PlainArgs fixes when it is compiled.
struct ForwardExtras {
  Packing packing;      // of the query heads of each KV head
  Splits splits;        // along the keys
  KeyPages pages;       // that the keys lie in
  float softcap_scale;  // softmax_scale / softcap, or 0: no softcap
  bool plain_blocks;    // no softcap: a block without a mask takes the short way
  const float* sinks;   // (num_heads), or null
  bool exact_max;       // take each row's true maximum in every block (batch_invariant)
  bool odd_out;         // 16-byte stores do not fit every address and stride of out
  bool paired;  // thread blocks go in pairs, for which queries_of_tile, order and splits are: see forward_pair.cuh
};

/// Kernels ask by functions for what may be known when they are compiled: see PlainArgs.
struct ForwardArgs {
  TmaOperand q, k, v;
  TmaOperand qv;            // as q, for kernels whose scores add qv v
  const uint8_t* turned_v;  // (batch, KV head, block of keys), as a kernel of turned values has a block's
  bool absorbed;            // qv v has the factors of q and k, since v is part of k

  void* out;
  int64_t out_stride[3];  // elements: batch, row, head
  bool out_float16;       // of fp8 operands: out is float16, not bfloat16
  float* lse;             // or null
  int64_t lse_stride[3];  // elements: batch, head, row

  Lengths queries;
  KeyRows keys;
  Visibility visibility;
  int batch, num_heads_kv, head_dim, head_dim_v;
  Divisor heads;  // tiles side by side of a sequence: num_heads_kv * packing.tiles
  Divisor queries_of_tile;

  Descale q_descale, k_descale, v_descale;  // of fp8 operands
  // Of fp8: blocks whose P V tensor cores add up before they move on to fp32. 0: all; 1: each is added to O, for
  // kernels without shared totals or qv; from 2 on there are totals.
  int accumulate_blocks;
  float4* totals;  // (grid, consumer warpgroup, 4 columns of 8, thread): of kernels without shared ones

  float score_scale_log2;  // exponent = score * score_scale_log2 - max
  float hidden;            // what a masked score becomes: minus infinity once scaled
  Dropout dropout;

  int most_tiles;  // of a ragged batch: sequences that overlap would make more, and the workspace has no room for them
  TileOrder order;
  bool plain_pieces;  // every sequence is one tile of each head, and its queries see all keys, from the first row on
  uint64_t ticket;    // this call's, for its counters
  uint64_t* piece_counter;  // of the pieces of work handed out, or null: they are dealt out in turn
  float* parts;             // results of split tiles' parts: see forward_split.cuh, or leave_rows()
  uint64_t* parts_done;     // a counter for each warpgroup of a split tile
  float* parts_lse;         // of leave_rows(): (part, row, head)
  int64_t part_rows;        // of all heads, in each of them

  ForwardExtras extras;
  FA3_HOST_DEVICE const Packing& packing() const { return extras.packing; }
  static constexpr bool kMaySplit = true;
  FA3_HOST_DEVICE Splits::Piece piece(int index) const { return extras.splits.at(index); }
  FA3_HOST_DEVICE bool paged() const { return extras.pages.used(); }
  FA3_HOST_DEVICE bool gathers() const { return extras.pages.used() && extras.pages.box_rows == 0; }
  FA3_HOST_DEVICE bool has_softcap() const { return extras.softcap_scale != 0; }
  FA3_HOST_DEVICE bool plain_blocks() const { return extras.plain_blocks; }
  FA3_HOST_DEVICE bool has_sinks() const { return extras.sinks != nullptr; }
  FA3_HOST_DEVICE bool exact_max() const { return extras.exact_max; }
  FA3_HOST_DEVICE bool odd_out() const { return extras.odd_out; }
  FA3_HOST_DEVICE bool paired() const { return extras.paired; }
  FA3_HOST_DEVICE float kept_scale() const { return dropout.scale; }
};

/// Thread blocks of a cluster, at most.
inline constexpr int kMostCluster = 16;

/// Large tiles of the last round may be split all the same.
constexpr bool plain_may_split(int consumers) { return consumers > 1; }

/// A call without extras, and without dropout. Its kernel has half as many instructions: what is jumped over costs time
/// too, 1 to 12% of rows up to 4,096 keys.
template <bool kMaySplit_>
struct PlainArgs : ForwardArgs {
  static constexpr bool kMaySplit = kMaySplit_;
  FA3_HOST_DEVICE Splits::Piece piece(int index) const {
    return kMaySplit ? extras.splits.at(index) : Splits::Piece{index, 0, 1};
  }
  FA3_HOST_DEVICE Packing packing() const { return Packing::of(extras.packing.ratio, false); }
  FA3_HOST_DEVICE static constexpr bool paged() { return false; }
  FA3_HOST_DEVICE static constexpr bool gathers() { return false; }
  FA3_HOST_DEVICE static constexpr bool has_softcap() { return false; }
  FA3_HOST_DEVICE static constexpr bool plain_blocks() { return true; }
  FA3_HOST_DEVICE static constexpr bool has_sinks() { return false; }
  FA3_HOST_DEVICE static constexpr bool exact_max() { return false; }
  FA3_HOST_DEVICE static constexpr bool odd_out() { return false; }
  FA3_HOST_DEVICE static constexpr bool paired() { return false; }
  FA3_HOST_DEVICE static constexpr float kept_scale() { return 1; }
};

/// What the kernel for decoding is launched with: less, and what says where keys are comes first. Each line of it is
/// waited for in turn, since nothing is in a cache yet.
struct DecodeArgs {
  struct Extras {
    Splits splits;
    Packing packing;
    KeyPages pages;
    const float* sinks;
  };
  struct Rows {
    const uint8_t* data;
    int64_t row_bytes, head_bytes, batch_bytes;  // 0 where an axis does not move
  };

  Divisor heads, tiles;  // of a sequence side by side, of a KV head
  int batch, head_dim, head_dim_v;
  Visibility visibility;
  Lengths queries;
  KeyRows keys;
  Extras extras;
  int k_head_step, k_batch_step, v_head_step, v_batch_step;  // as the operands'
  Rows q;
  float score_scale_log2, hidden;
  void* out;
  int64_t out_stride[3];
  float* lse;
  int64_t lse_stride[3];
  TmaOperand k, v;

  explicit DecodeArgs(const ForwardArgs& a)
      : heads(a.heads),
        tiles(Divisor::of(a.extras.packing.tiles)),
        batch(a.batch),
        head_dim(a.head_dim),
        head_dim_v(a.head_dim_v),
        visibility(a.visibility),
        queries(a.queries),
        keys(a.keys),
        extras{a.extras.splits, a.extras.packing, a.extras.pages, a.extras.sinks},
        k_head_step(a.k.head_step),
        k_batch_step(a.k.batch_step),
        v_head_step(a.v.head_step),
        v_batch_step(a.v.batch_step),
        q{a.q.data, a.q.row_bytes, a.q.head_step * a.q.head_bytes, a.q.batch_step * a.q.batch_bytes},
        score_scale_log2(a.score_scale_log2),
        hidden(a.hidden),
        out(a.out),
        out_stride{a.out_stride[0], a.out_stride[1], a.out_stride[2]},
        lse(a.lse),
        lse_stride{a.lse_stride[0], a.lse_stride[1], a.lse_stride[2]},
        k(a.k),
        v(a.v) {}

  FA3_HOST_DEVICE const Packing& packing() const { return extras.packing; }
  FA3_HOST_DEVICE Splits::Piece piece(int index) const { return extras.splits.at(index); }
  FA3_HOST_DEVICE bool paged() const { return extras.pages.used(); }
  FA3_HOST_DEVICE bool has_sinks() const { return extras.sinks != nullptr; }
  FA3_HOST_DEVICE static constexpr bool odd_out() { return false; }
  FA3_HOST_DEVICE static constexpr float kept_scale() { return 1; }
};

}  // namespace fa3
