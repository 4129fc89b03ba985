// Pure decisions of the backward: arguments in, plan out.
#include "backward_plan.h"

#include <algorithm>
#include <climits>

#include "attention/block_range.h"
#include "attention/query_tiles.h"
#include "attention/sections.h"
#include "plan.h"
#include "status.h"
#include "variants.h"

namespace fa3 {
namespace {

// 24 MB of Q, dO and sums of dQ, beside what streams through L2. Not tuned.
constexpr double kSectionBytes = 24e6;

/// The smallest compiled head dims that hold the call's.
int find_variant(const fa3_backward_params& p) {
  const auto variants = backward_variants();
  int best = -1;
  for (int i = 0; i < static_cast<int>(variants.size()); ++i) {
    const BackwardVariant& v = variants[i];
    if (v.dtype != p.dtype || v.head_dim < p.head_dim || v.head_dim_v < p.head_dim_v) continue;
    if (best < 0 || v.head_dim + v.head_dim_v < variants[best].head_dim + variants[best].head_dim_v) best = i;
  }
  return best;
}

/// Under a causal mask the first keys are seen by most queries, and come first within a section of heads; without
/// bounds all are alike, and a head after the other keeps Q and dO in L2.
TileOrder plan_order(const fa3_backward_params& p, const BackwardVariant& variant) {
  const int rows_q = typical_seqlen(p.queries, p.batch), rows_k = typical_seqlen(p.keys, p.batch);
  const int heads = p.num_heads_kv * (p.keys.cu_seqlens ? 1 : p.batch);  // whose pieces are numbered together
  const int group = p.num_heads / p.num_heads_kv;
  const Visibility visibility = visibility_of(p.mask);
  if (p.deterministic)
    return {heads_in_turn(visibility, rows_q, rows_k, variant.tile_m, variant.tile_n, group, heads), 0};
  if (visibility.full()) return {1, 0};
  const double row_bytes = 2.0 * (p.head_dim + p.head_dim_v) + 4.0 * p.head_dim;
  const double fitting = kSectionBytes / std::max(row_bytes * rows_q * group, 1.0);
  return {heads_under_mask(static_cast<int>(std::min<double>(fitting, p.num_heads_kv)), rows_k, variant.tile_n, heads),
          0};
}

}  // namespace

fa3_status plan_backward(const fa3_backward_params& p, BackwardPlan& plan) {
  plan = {};
  plan.variant = find_variant(p);
  if (plan.variant < 0)
    return fail(FA3_ERROR_NO_BACKWARD,
                "q, v: the backward has no kernel of this dtype for head_dim %d and %d in this build", p.head_dim,
                p.head_dim_v);
  const BackwardVariant& variant = backward_variants()[plan.variant];
  const Lengths queries{p.queries.rows, p.queries.cu_seqlens, p.queries.seqused};
  if (p.batch == 0) return FA3_OK;  // no tile: what there is of gradients is cleared
  plan.query_tiles = p.queries.rows > 0 ? QueryTiles{queries, variant.tile_m}.count(p.batch) : 0;
  const int64_t most = ceil_div(p.keys.rows, variant.tile_n * variant.blocks);
  const int64_t key_tiles = (p.keys.cu_seqlens ? most + p.batch : most * p.batch) * p.num_heads_kv;
  const int64_t shares = plan.query_tiles * p.num_heads * variant.dq_shares;  // a thread block each, which rounds it
  if (shares > INT_MAX || key_tiles > INT_MAX)
    return fail(FA3_ERROR_SHAPE, "q, k: %lld and %lld tiles, but at most 2^31 - 1 are possible",
                static_cast<long long>(shares), static_cast<long long>(key_tiles));
  plan.key_tiles = p.keys.rows > 0 ? static_cast<int>(key_tiles) : 0;
  if (plan.key_tiles) plan.order = plan_order(p, variant);

  const size_t tiles = plan.query_tiles * p.num_heads;
  plan.stats = workspace_aligned(tiles * 2 * variant.tile_m * sizeof(float));
  plan.dq = workspace_aligned(tiles * variant.dq_floats * sizeof(float));
  plan.turns = workspace_aligned(tiles * variant.dq_shares * sizeof(uint32_t));
  if (p.sinks) plan.sink_parts = workspace_aligned(tiles * sizeof(float));
  if (plan.key_tiles) plan.counts = 1 + int64_t{p.batch} * p.num_heads_kv;
  plan.counters = workspace_aligned(plan.counts * sizeof(uint32_t));
  auto plan_copy = [&](const fa3_array& array, const fa3_lengths& lengths, int heads, int head_dim) {
    const bool copy = !tma_addressable(array, lengths, p.batch, heads, p.dtype);
    if (copy) plan.copies += copy_bytes(lengths, p.batch, heads, head_dim, p.dtype);
    return copy;
  };
  plan.copy_q = plan_copy(p.q, p.queries, p.num_heads, p.head_dim);
  plan.copy_k = plan_copy(p.k, p.keys, p.num_heads_kv, p.head_dim);
  plan.copy_v = plan_copy(p.v, p.keys, p.num_heads_kv, p.head_dim_v);
  plan.copy_dout = plan_copy(p.dout, p.queries, p.num_heads, p.head_dim_v);
  return FA3_OK;
}

}  // namespace fa3
