// What a forward kernel is launched with.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "attention/block_range.h"
#include "attention/seqlen.h"
#include "attention/tile_scheduler.h"

namespace fa3 {

/// An operand that TMA loads: axes (dim, row, head, batch). What lies past an axis' end arrives as zeros.
struct TmaOperand {
  CUtensorMap map;
  int head_step, batch_step;  // 1, or 0 where the axis does not move
};

struct ForwardArgs {
  TmaOperand q, k, v;

  void* out;
  int64_t out_stride[3];  // elements: batch, row, head
  bool out_vectors;       // 16-byte stores fit every address and stride
  float* lse;             // or null
  int64_t lse_stride[3];  // elements: batch, head, row

  Lengths queries, keys;
  Visibility visibility;
  int batch, num_heads, heads_per_kv, head_dim_v;

  float score_scale_log2;  // exponent = score * score_scale_log2 - max
  float hidden;            // what a masked score becomes: minus infinity once scaled
  float softcap_scale;     // softmax_scale / softcap, or 0: no softcap
  const float* sinks;      // (num_heads), or null
  bool exact_max;          // take each row's true maximum in every block (batch_invariant)

  TileOrder order;
  int* tile_counter;  // zero at launch, or null: tiles are dealt out in turn
};

}  // namespace fa3
