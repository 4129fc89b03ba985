#pragma once
#include "attention/tile_scheduler.h"
#include "fa3.h"

namespace fa3 {

/// What a backward call will do.
struct BackwardPlan {
  int variant;          // of backward_variants()
  int64_t query_tiles;  // of a head: see QueryTiles
  int key_tiles;        // pieces of the main kernel's work, one for each block of keys of a KV head, or pair of them
  TileOrder order;
  bool copy_q, copy_k, copy_v, copy_dout;                 // to the workspace first, because TMA cannot address it
  int64_t counts;                                         // words: see BackwardScratch
  size_t stats, dq, turns, sink_parts, counters, copies;  // bytes of the workspace's parts, in this order

  size_t workspace() const { return stats + dq + turns + sink_parts + counters + copies; }
};

/// Every choice that a backward call makes, from its (validated) arguments alone. Calls no CUDA.
fa3_status plan_backward(const fa3_backward_params& params, BackwardPlan& plan);

}  // namespace fa3
