// What the backward kernels are launched with.
#pragma once
#include "attention/dropout.h"
#include "attention/query_tiles.h"
#include "kernels/forward_args.h"

namespace fa3 {

/// A gradient, or another 16-bit array of rows: element (b, r, h, d) is at b stride[0] + r stride[1] + h stride[2] + d.
struct RowArray {
  void* data;
  int64_t stride[3];
  bool vectors;  // 16-byte accesses fit every address and stride
};

/// Device memory that the backward's kernels hand to one another. A query tile is tile_m queries of one head.
struct BackwardScratch {
  float* stats;  // (head, query tile, 2, tile_m): lse in base 2, infinite where nothing is seen; delta
  float* dq;     // (head, query tile, tile_m * head dim of the variant), in the order of wgmma's accumulators
  // (head, query tile, share of its dq): 0 where no key block has come yet. In one order how many have; else kClaimed,
  // and kBegun when what the first one stores is there to be added to.
  uint32_t* dq_turns;
  static constexpr uint32_t kClaimed = 1, kBegun = 2;
  float* sink_parts;    // (head, query tile), or null
  int64_t query_tiles;  // of a head: all sequences'
  bool in_order;        // key blocks add to dq one after the other
  // Counts, null without keys: pieces of the main kernel's work taken, beyond each thread block's first; and (batch, KV
  // head) how many consumers of its blocks of keys have added all their dq.
  uint32_t *taken, *added;
  int64_t counts;  // of both together, from `taken` on
};

/// What all of them need.
struct BackwardProblem {
  BackwardScratch scratch;
  Lengths queries, keys;
  Visibility visibility;
  int batch;
};

struct BackwardArgs : BackwardProblem {
  TmaOperand q, k, v, dout;
  RowArray dk, dv;
  int num_heads_kv, group;  // group: query heads of each KV head
  int head_dim, head_dim_v;
  float score_scale_log2;  // P = 2^(score * score_scale_log2 - lse)
  float softcap_scale;     // softmax_scale / softcap, or 0: no softcap
  float softmax_scale;
  Dropout dropout;
  TileOrder order;
  uint32_t key_tiles;  // pieces of work: blocks of keys of all KV heads, or more
};

/// What surrounds the main kernel: delta before it, dq itself behind it.
struct PrepareBackwardArgs : BackwardProblem {
  RowArray out, dout;
  const float *lse, *dlse;                // dlse may be null
  int64_t lse_stride[3], dlse_stride[3];  // elements: batch, head, row
  const float* sinks;                     // (num_heads), or null
  int num_heads, head_dim_v;
  int tile_m, dq_shares;  // of a query tile
};

struct ConvertArgs : BackwardProblem {
  RowArray dq;
  int num_heads, num_heads_kv, head_dim;
  float softmax_scale;
};

}  // namespace fa3
