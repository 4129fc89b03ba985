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
  float* stats;         // (head, query tile, 2, tile_m): lse in base 2, infinite where nothing is seen; delta
  float* dq;            // (head, query tile, tile_m * head dim of the variant), in the order of wgmma's accumulators
  uint32_t* dq_turns;   // (head, query tile, consumer): key blocks added so far, or null: they add in any order
  float* sink_parts;    // (head, query tile), or null
  int64_t query_tiles;  // of a head: all sequences'
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
};

/// What surrounds the main kernel: delta and the zeros that dq starts from before it, dq itself behind it.
struct PrepareBackwardArgs : BackwardProblem {
  RowArray out, dout;
  const float *lse, *dlse;                // dlse may be null
  int64_t lse_stride[3], dlse_stride[3];  // elements: batch, head, row
  const float* sinks;                     // (num_heads), or null
  int num_heads, head_dim_v;
  int tile_m, dq_floats;  // of a query tile
};

struct ConvertArgs : BackwardProblem {
  RowArray dq;
  int num_heads, head_dim;
  float softmax_scale;
};

}  // namespace fa3
