// How long each way to do a call would take: what plan.cpp chooses by.
#pragma once
#include <cmath>

#include "attention/block_range.h"
#include "attention/packing.h"
#include "attention/splits.h"
#include "fa3.h"
#include "variants.h"

namespace fa3 {

/// Everything about a call's work that choosing looks at, worked out once.
struct Work {
  const fa3_forward_params& params;
  Visibility visibility;
  int seqlen_q, seqlen_k, num_sms;
  bool equal_tiles;  // every tile is known to see as many keys as any other

  Work(const fa3_forward_params& p, int sms);
};

/// One way to do it.
struct Choice {
  int variant = -1;
  bool packed = false;
  Splits splits = kNoSplits;
  bool cluster = false;    // the parts of a tile are joined in shared memory
  double time = INFINITY;  // microseconds, estimated
};

/// The estimate for a variant, packed or not, split where that seems to pay (or as the caller says).
Choice estimate(const Work& work, int variant, bool packed);

/// Whether thread blocks in clusters, one for each tile's parts, can join them in shared memory.
bool may_join_in_cluster(const ForwardVariant& v, const Splits& splits, double pieces, int slots);

/// The keys' lengths as choosing sees them: in pages each sequence has room for as many, whatever says how many it has.
fa3_lengths lengths_of_keys(const fa3_forward_params& params);

/// Queries of a tile.
int tile_queries(const ForwardVariant& v, const Packing& packing);

/// Tiles of all queries: exact for dense batches, an upper bound for ragged ones.
int64_t count_tiles(const fa3_forward_params& params, const ForwardVariant& v, const Packing& packing);

/// Tiles whose parts the workspace is to hold: all that are split, or as many as there may be where that is not known.
int64_t split_tiles(const fa3_forward_params& params, const ForwardVariant& v, const Packing& packing,
                    const Splits& splits);

/// Bytes of these parts.
int64_t bytes_of_parts(const fa3_forward_params& params, const ForwardVariant& v, const Packing& packing,
                       const Splits& splits);

}  // namespace fa3
