// Pure decisions: arguments and device in, plan out.
#include "plan.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "attention/block_range.h"
#include "status.h"
#include "variants.h"

namespace fa3 {
namespace {

// Keys and values that stay in L2 (60 MB) beside what streams through it: measured best, causal, 4,096 and 16,384 keys.
constexpr double kSectionBytes = 32e6;
constexpr int kElementBytes = 2;
// Microseconds from which a tile counter is worth zeroing, which costs about 4 of them before the launch.
constexpr double kLongTime = 60;

/// Rows of a typical sequence: between the mean and the caller's maximum, or the mean where no maximum was given.
int typical_seqlen(const fa3_lengths& lengths, int batch) {
  if (!lengths.cu_seqlens) return lengths.rows;
  const int mean = lengths.rows > 0 && batch > 0 ? (lengths.rows - 1) / batch + 1 : 0;
  if (!lengths.max_seqlen) return mean;
  const int longest = std::min(lengths.max_seqlen, lengths.rows);
  return longest - std::max(longest - mean, 0) / 2;
}

/// What a variant's tile costs an SM, in microseconds: its prologue and epilogue, and each block of keys. The constants
/// fit a sweep on an H200 over head dims 64, 80, 128, lengths 64 to 4,096, full and causal, one to three consumer
/// warpgroups; choosing by them costs 0.8% over choosing by measurement.
struct TileCost {
  double tile, block;
};

TileCost tile_cost(const ForwardVariant& v) {
  const int dim = (v.head_dim + v.head_dim_v) / 2;
  // Of a score: exponentials bound small dims, products large ones.
  const double score = std::max(35 + 0.42 * dim, 0.7 * dim) * 1e-6;
  const double block = score * v.tile_m() * v.tile_n;
  if (v.consumers == 1) return {1.2, std::max(1.15 * block, 0.53)};  // two share an SM: half of what each takes
  if (v.consumers == 2) return {1.8, 1.07 * block};
  return {0.03 * dim, 0.95 * block};
}

/// About how long a call takes with a variant, in microseconds.
double estimated_time(const fa3_forward_params& p, const ForwardVariant& v, int num_sms) {
  const TileCost cost = tile_cost(v);
  const Visibility visibility = visibility_of(p.mask);
  const int seqlen_q = typical_seqlen(p.queries, p.batch), seqlen_k = typical_seqlen(p.keys, p.batch);
  const int last = std::max(seqlen_q - 1, 0), half_tile = v.tile_m() / 2;
  auto tile_around = [&](int row) {
    const KeyInterval first = visibility.keys(std::max(row - half_tile, 0), seqlen_q, seqlen_k);
    const KeyInterval final = visibility.keys(std::min(row + half_tile, last), seqlen_q, seqlen_k);
    return cost.tile + (std::max(final.end - first.begin, 0) / double(v.tile_n) + 0.5) * cost.block;
  };
  const double tiles = double(ceil_div(seqlen_q, v.tile_m())) * p.batch * p.num_heads;
  // Equal tiles come in whole rounds; unequal ones fill each other's gaps, up to a rest.
  const double rounds = visibility.full() ? std::ceil(tiles / num_sms) : std::max(tiles / num_sms + 0.3, 1.0);
  const double alone = v.blocks_per_sm == 2 ? 1.6 : 1.0;  // without a neighbour a block runs faster, but not twice
  return std::max(rounds * tile_around(last / 2), alone * tile_around(last));
}

/// The variant that wastes least on padded head dims, and of those the one that is estimated to be fastest.
int choose_variant(const fa3_forward_params& p, int num_sms) {
  const auto variants = forward_variants();
  auto dims_if_fit = [&](const ForwardVariant& v) {
    const bool fits = v.dtype == p.dtype && v.head_dim >= p.head_dim && v.head_dim_v >= p.head_dim_v;
    return fits ? v.head_dim + v.head_dim_v : INT_MAX;
  };
  int least_dims = INT_MAX;
  for (const ForwardVariant& v : variants) least_dims = std::min(least_dims, dims_if_fit(v));
  if (least_dims == INT_MAX) return -1;

  int best = -1;
  double best_time = INFINITY;
  for (int i = 0; i < static_cast<int>(variants.size()); ++i) {
    const ForwardVariant& v = variants[i];
    if (dims_if_fit(v) != least_dims) continue;
    // The tile decides the order of sums: where bits must not depend on the batch, neither may the choice.
    const double time = p.batch_invariant ? -v.tile_m() : estimated_time(p, v, num_sms);
    if (time >= best_time) continue;
    best = i;
    best_time = time;
  }
  return best;
}

/// Whether TMA can address an operand as it is: a step of 0 bytes is handled by not stepping, the rest must be positive
/// multiples of 16 below 2^40.
bool tma_addressable(const fa3_array& array, const fa3_lengths& lengths, int batch, int heads) {
  auto step_fits = [](int64_t stride, bool may_be_zero) {
    const int64_t bytes = stride * kElementBytes;
    if (bytes == 0) return may_be_zero;
    return bytes > 0 && bytes % kTmaAlignment == 0 && bytes < int64_t{1} << 40;
  };
  if (reinterpret_cast<uintptr_t>(array.data) % kTmaAlignment) return false;
  if (!lengths.cu_seqlens && batch > 1 && !step_fits(array.stride[0], true)) return false;
  if (lengths.rows > 1 && !step_fits(array.stride[1], false)) return false;
  return heads == 1 || step_fits(array.stride[2], true);
}

/// Tiles of all queries: exact for dense batches, an upper bound for ragged ones.
int64_t count_tiles(const fa3_forward_params& p, int tile_m) {
  if (p.queries.cu_seqlens) return (int64_t{p.queries.rows} / tile_m + std::min(p.batch, p.queries.rows)) * p.num_heads;
  return int64_t{ceil_div(p.queries.rows, tile_m)} * p.batch * p.num_heads;
}

void plan_order(const fa3_forward_params& p, fa3_forward_plan& plan) {
  plan.heads_per_section = 1;
  plan.short_m_blocks = 0;
  if (visibility_of(p.mask).full()) return;
  const int ratio = p.num_heads / p.num_heads_kv;
  const double kv_bytes = double(typical_seqlen(p.keys, p.batch)) * (p.head_dim + p.head_dim_v) * kElementBytes;
  const int kv_heads = std::max(static_cast<int>(kSectionBytes / std::max(kv_bytes, 1.0)), p.head_dim > 192 ? 2 : 4);
  const int64_t heads = int64_t{p.num_heads} * (p.queries.cu_seqlens ? 1 : p.batch);
  plan.heads_per_section = static_cast<int>(std::min<int64_t>(int64_t{kv_heads} * ratio, heads));
  plan.short_m_blocks = plan.num_m_blocks / 4;  // 25%: simulated tails of at most 1.5% for most shapes
}

}  // namespace

Visibility visibility_of(const fa3_mask& mask) {
  auto bound = [](int window) {
    return window < 0 ? Visibility::kUnbounded : std::min(window, Visibility::kUnbounded);
  };
  const int right = bound(mask.window_right);
  return {bound(mask.window_left), mask.causal ? std::min(right, 0) : right,
          std::min(mask.attention_chunk, Visibility::kUnbounded)};
}

size_t copy_bytes(const fa3_lengths& lengths, int batch, int heads, int head_dim) {
  const size_t rows = size_t(lengths.rows) * (lengths.cu_seqlens ? 1 : batch);
  const size_t bytes = rows * heads * head_dim * kElementBytes;
  return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}

fa3_status plan_forward(const fa3_forward_params& p, int num_sms, fa3_forward_plan& plan) {
  plan = {};
  const int free_sms = std::max(num_sms - p.sm_margin, 1);
  plan.variant = choose_variant(p, free_sms);
  if (plan.variant < 0)
    return fail(FA3_ERROR_HEAD_DIM, "head_dim: (%d, %d) has no kernel of this dtype in this build", p.head_dim,
                p.head_dim_v);
  const ForwardVariant& variant = forward_variants()[plan.variant];
  plan.tile_m = variant.tile_m();
  plan.tile_n = variant.tile_n;
  plan.num_m_blocks = ceil_div(typical_seqlen(p.queries, p.batch), plan.tile_m);
  plan_order(p, plan);

  const int64_t tiles = count_tiles(p, plan.tile_m);
  plan.grid = static_cast<int>(std::min<int64_t>(tiles, variant.blocks_per_sm * free_sms));
  if (tiles > INT32_MAX - 2 * plan.grid)  // a thread block asks for a tile of up to two rounds after the last
    return fail(FA3_ERROR_SHAPE, "q: %lld tiles of %d rows, but at most 2^31 - 1 are possible",
                static_cast<long long>(tiles), plan.tile_m);
  const bool equal_tiles = visibility_of(p.mask).full() && !p.queries.cu_seqlens && !p.queries.seqused &&
                           !p.keys.cu_seqlens && !p.keys.seqused;
  plan.dynamic = tiles > plan.grid && !equal_tiles && estimated_time(p, variant, free_sms) > kLongTime;

  plan.workspace = plan.dynamic ? kWorkspaceAlignment : 0;
  auto plan_copy = [&](const fa3_array& array, const fa3_lengths& lengths, int heads, int head_dim, int32_t& copy) {
    copy = !tma_addressable(array, lengths, p.batch, heads);
    if (copy) plan.workspace += copy_bytes(lengths, p.batch, heads, head_dim);
  };
  plan_copy(p.q, p.queries, p.num_heads, p.head_dim, plan.copy_q);
  plan_copy(p.k, p.keys, p.num_heads_kv, p.head_dim, plan.copy_k);
  plan_copy(p.v, p.keys, p.num_heads_kv, p.head_dim_v, plan.copy_v);
  return FA3_OK;
}

void log_plan(const fa3_forward_params& p, const fa3_forward_plan& plan) {
  const char* wanted = std::getenv("FA3_LOG");
  if (!wanted || std::strcmp(wanted, "plan")) return;
  std::fprintf(
      stderr,
      "fa3 forward: batch %d, heads %d on %d, head_dim %d and %d, rows %d on %d%s: %s, tile %d x %d, grid %d%s, "
      "sections of %d heads, %d short m_blocks, copies q %d k %d v %d, workspace %zu bytes\n",
      p.batch, p.num_heads, p.num_heads_kv, p.head_dim, p.head_dim_v, p.queries.rows, p.keys.rows,
      p.queries.cu_seqlens ? " (ragged)" : "", forward_variants()[plan.variant].name, plan.tile_m, plan.tile_n,
      plan.grid, plan.dynamic ? " (dynamic)" : "", plan.heads_per_section, plan.short_m_blocks, plan.copy_q,
      plan.copy_k, plan.copy_v, plan.workspace);
}

}  // namespace fa3
