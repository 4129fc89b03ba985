// Pure decisions: arguments and device in, plan out.
#include "plan.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>

#include "alignment.h"
#include "attention/block_range.h"
#include "attention/dropout.h"
#include "attention/packing.h"
#include "attention/splits.h"
#include "latent.h"
#include "plan_estimate.h"
#include "prepare_plan.h"
#include "status.h"
#include "variants.h"

namespace fa3 {
namespace {

// Keys and values that stay in L2 beside what streams through it: measured best, causal, 1,024 keys, where a quarter of
// the time goes by at memory's rate. Twice as much costs 1 to 3% there, four times as much 16%; from 2,048 keys on the
// differences are within 1%.
constexpr double kSectionBytes = 16 << 20;
// Keys up to which sums of fp8 products stay in the tensor cores: 22 blocks of 96. Values of mean 1 lose 1% at 1,024
// keys, 2% at 2,048, 5% at 4,096 and 18% at 16,384, and those of mean 0 nothing. Totals every 2,048 keys cost up to
// 2% of the time, every 512 keys 4 to 11%. In the workspace every 2,048 keys cost 9%, of rows of 16,384 keys 10%:
// longer rows alone take them. Where a caller wants sums of fewer keys than kLeastKeysInWorkspace, adding each block in
// fp32 costs 12 to 13%, and every 1,024 keys 17%. By `python -m bench accuracy`; the 10% are from bench/NOTES.md.
constexpr int kMostKeysSummed = 2112, kMostKeysUnpromoted = 4096, kLeastKeysInWorkspace = 1024;
constexpr int kMostCounted = (1 << 24) - 1;  // pieces: see arch/counter.cuh

/// After how many blocks of keys sums of fp8 products move on to fp32; 0: never. Totals begin after two blocks at the
/// earliest: one's products are done with the next one's scores. What a sequence may sum must not depend on the batch
/// where bits must not: but that it is never long enough does not change bits.
int accumulate_blocks(const fa3_forward_params& p, const Visibility& visibility, const ForwardVariant& variant,
                      const Splits& splits) {
  if (p.dtype != FA3_FLOAT8_E4M3 || p.fp8_accumulate < 0) return 0;
  const bool wanted = p.fp8_accumulate > 0 || p.batch_invariant;
  const int blocks = std::max((p.fp8_accumulate > 0 ? p.fp8_accumulate : kMostKeysSummed) / variant.tile_n, 2);
  if (variant.total_bytes == 0) return blocks;
  if (p.fp8_accumulate > 0 && p.fp8_accumulate < kLeastKeysInWorkspace && !variant.has_qv) return 1;
  const fa3_lengths keys = lengths_of_keys(p);
  int64_t most = keys.cu_seqlens && keys.max_seqlen ? std::min(keys.max_seqlen, keys.rows) : keys.rows;
  if (visibility.chunk) most = std::min<int64_t>(most, visibility.chunk);
  if (visibility.left != Visibility::kUnbounded && visibility.right != Visibility::kUnbounded)
    most = std::min(most, int64_t{visibility.left} + visibility.right + 1);
  if (splits.whole_tiles == 0) most /= splits.count.divisor;
  return most > (wanted ? blocks * variant.tile_n : kMostKeysUnpromoted) ? blocks : 0;
}

/// Whether no device array says which queries and keys there are.
bool all_dense(const fa3_forward_params& p) {
  for (const fa3_lengths& lengths : {p.queries, p.keys})
    if (lengths.cu_seqlens || lengths.seqused) return false;
  return !p.cache.page_table && !p.cache.cache_leftpad && !p.cache.cache_batch_idx && !appends(p);
}

/// Whether a kernel may have V turned once before it, which takes a launch, and V read and written: some 15 us for 33
/// MB. Measured: at head dim 256 it saves 17% where 32 tiles see each block and 7% where 16 do (causal), at 128 3% with
/// 22 and 5% with 86, at 64 1 to 3% and 8%, at 80 4% with 22, at 192 7% with 128. Other than dense calls stay with the
/// tiles, and those whose bits must not depend on the batch.
bool may_turn_values(const Work& work, const ForwardVariant& variant, const Packing& packing) {
  const int least_tiles = variant.head_dim_v > 192 ? 16 : variant.head_dim_v > 128 ? 48 : 20;  // that see a block
  const fa3_forward_params& p = work.params;
  if (p.keys.rows == 0 || p.batch_invariant || work.visibility.window() || work.visibility.chunk || !all_dense(p) ||
      !tma_addressable(p.v, p.keys, p.batch, p.num_heads_kv, p.dtype))
    return false;
  const int64_t tiles = int64_t{work.seqlen_q / tile_queries(variant, packing)} * packing.tiles;
  return (work.visibility.full() ? tiles : tiles / 2) >= least_tiles;
}

/// Whether thread blocks go in pairs that share keys and values: see kernels/forward_pair.cuh. Both must find the same
/// work, so no device array may say what it is; and the tiles of a head must be even in number. Measured: with 4,096
/// keys and more, causal 2 to 4% faster and full 4 to 8%; with 1,024 keys 3% slower.
bool pairs_up(const Work& work, const ForwardVariant& variant, const Packing& packing, const Splits& splits) {
  constexpr int kLeastKeys = 4096;
  const fa3_forward_params& p = work.params;
  if (!variant.pairs || p.keys.rows < kLeastKeys) return false;
  if (!all_dense(p) || work.visibility.left != Visibility::kUnbounded || work.visibility.chunk) return false;
  const int m_blocks = ceil_div(p.queries.rows, tile_queries(variant, packing));
  return m_blocks % 2 == 0 && work.num_sms % 2 == 0 && splits.whole_tiles > 0 &&
         count_tiles(p, variant, packing) > work.num_sms;
}

bool has_kernels(int dtype) {
  return std::ranges::any_of(forward_variants(), [&](const ForwardVariant& v) { return v.dtype == dtype; });
}

/// The variants that waste least on padded head dims, and of those the way that is estimated to be fastest.
Choice choose(const Work& work) {
  const fa3_forward_params& p = work.params;
  const auto variants = forward_variants();
  auto dims_if_fit = [&](const ForwardVariant& v) {
    const bool fits = v.dtype == p.dtype && v.has_qv == has_qv(p) && v.head_dim >= p.head_dim &&
                      v.head_dim_v >= p.head_dim_v && (p.dropout.p == 0 || v.launch_dropout);
    return fits ? v.head_dim + v.head_dim_v : INT_MAX;
  };
  // Every call looks through the whole table, and does so once: of the best fit so far the first and the last.
  int least_dims = INT_MAX, fewest_consumers = INT_MAX, first = 0, last = -1;
  for (int i = 0; i < static_cast<int>(variants.size()); ++i) {
    const int dims = dims_if_fit(variants[i]);
    if (dims > least_dims || dims == INT_MAX) continue;
    if (dims < least_dims) least_dims = dims, fewest_consumers = INT_MAX, first = i;
    fewest_consumers = std::min(fewest_consumers, variants[i].consumers);
    last = i;
  }
  Choice best;
  if (least_dims == INT_MAX) return best;

  // Dropout's numbers are drawn for 16 queries of one head at a time.
  const bool may_pack =
      p.dropout.p == 0 && p.pack_gqa != 0 && p.num_heads > p.num_heads_kv && (p.pack_gqa > 0 || !p.batch_invariant);
  const bool may_not_pack = p.pack_gqa <= 0 || !may_pack;
  for (int i = first; i <= last; ++i) {
    const ForwardVariant& v = variants[i];
    if (dims_if_fit(v) != least_dims) continue;
    if (p.tile_m && (v.tile_m() != p.tile_m || v.tile_n != p.tile_n)) continue;
    for (const bool packed : {false, true}) {
      if (packed ? !may_pack : !may_not_pack) continue;
      if (v.turned_v && !may_turn_values(work, v, packing_of(p, packed))) continue;
      // Warpgroups without rows help nobody, and their place in shared memory could be a second block's.
      const bool idle = v.consumers > fewest_consumers && work.seqlen_q <= packing_of(p, packed).positions;
      if (idle && !p.tile_m && !p.batch_invariant) continue;
      Choice choice = estimate(work, i, packed);
      // The tile decides the order of sums: where bits must not depend on the batch, neither may the choice.
      if (p.batch_invariant) choice.time = -v.tile_m();
      if (choice.time < best.time) best = choice;
    }
  }
  return best;
}

/// Whether a counter hands out pieces, or they are dealt out in turn. Equal large ones gain from it where they are
/// short, as multiprocessors are not equally fast: 1 to 5% with 512 and 1,024 keys, nothing with 2,048 and more.
bool counts_pieces(const Work& work, const ForwardVariant& variant, double time) {
  constexpr double kLongTime = 60;  // microseconds from which it costs nothing
  constexpr int kFewKeys = 1024;
  return time > kLongTime && (!work.equal_tiles || (variant.consumers > 1 && work.seqlen_k <= kFewKeys));
}

bool capped(const fa3_forward_params& p) { return score_scales(p).capped(); }

/// Whether a call has nothing that its tile's plain kernel leaves out: see kernels/forward_args.h.
bool plain(const fa3_forward_params& p, const ForwardVariant& variant, const fa3_forward_plan& plan) {
  return variant.launch_plain && plan.pack_gqa == 1 && (plan.num_splits == 1 || plain_may_split(variant.consumers)) &&
         !plan.paired && !p.cache.page_table && !capped(p) && !p.sinks && !p.batch_invariant && p.dropout.p == 0 &&
         !odd_out(p);
}

/// Whether the tile's kernel for decoding takes the call: a piece of work for each multiprocessor at most, parts that a
/// cluster joins, and nothing that it leaves out. See kernels/forward_decode.cuh.
bool decodes(const Work& work, const ForwardVariant& variant, const Packing& packing, int64_t pieces,
             const fa3_forward_plan& plan) {
  const fa3_forward_params& p = work.params;
  const int64_t rows = int64_t{p.queries.rows} * packing.heads;
  if (!variant.launch_decode || capped(p) || p.batch_invariant || p.dropout.p > 0 || odd_out(p)) return false;
  if (work.visibility.chunk) return false;
  if (pieces > work.num_sms || p.queries.rows > packing.positions) return false;
  if (p.queries.cu_seqlens || p.keys.cu_seqlens) return false;
  if (plan.num_splits > 1 && (plan.cluster != plan.num_splits || rows > variant.decoded_rows)) return false;
  return !p.cache.page_table || page_box_rows(p, variant) > 0;
}

/// Thread blocks at a time. Two that share a multiprocessor hide each other's waiting; but where memory alone is waited
/// for, 64 KB on their way are as good as more, and one gets through its piece in half the time, so that the last ones
/// end closer together. Measured, decoding 4,096 to 8,192 keys: 320 and 384 pieces 3 to 9% faster, 512 to 1,024 1% at
/// head dims 128 to 192, but 1 to 2% slower at 64 and 96; pieces of 8 blocks up to 12% slower; from pages nothing.
int slots_of(const Work& work, const ForwardVariant& variant, const Packing& packing, const Splits& splits,
             int64_t pieces) {
  constexpr int kLongPiece = 32, kLargeBlock = 32 << 10;  // blocks of keys, bytes of one with its values
  const fa3_forward_params& p = work.params;
  const int slots = variant.blocks_per_sm * work.num_sms;
  const int block_bytes = variant.tile_n * (p.head_dim + p.head_dim_v) * element_bytes(p.dtype);
  const bool reads = variant.blocks_per_sm == 2 && p.dtype != FA3_FLOAT8_E4M3 && !p.cache.page_table &&
                     work.seqlen_q <= tile_queries(variant, packing) && packing.tiles == 1;
  if (!reads || splits.count.divisor > 1 || work.visibility.left != Visibility::kUnbounded || work.visibility.chunk)
    return slots;
  if (pieces <= slots || work.seqlen_k < kLongPiece * variant.tile_n) return slots;
  return block_bytes >= kLargeBlock || pieces < 2 * slots ? work.num_sms : slots;
}

int64_t ceil_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

void plan_order(const Work& work, const Packing& packing, fa3_forward_plan& plan) {
  plan.heads_per_section = 1;
  plan.short_m_blocks = 0;
  if (work.visibility.full()) return;
  const fa3_forward_params& p = work.params;
  const double kv_bytes = double(work.seqlen_k) * (p.head_dim + p.head_dim_v) * element_bytes(p.dtype);
  const int most = std::max(static_cast<int>(kSectionBytes / std::max(kv_bytes, 1.0)), p.head_dim > 192 ? 2 : 4);
  const int64_t kv_heads = int64_t{p.num_heads_kv} * (p.queries.cu_seqlens ? 1 : p.batch);
  // A last section of few heads would end unevenly: by simulation 1 to 2%.
  int64_t section = std::clamp<int64_t>(kv_heads, 1, most);
  while (kv_heads % section && section > most / 2 + 1) --section;
  if (kv_heads % section) section = ceil_of(kv_heads, ceil_of(kv_heads, most));
  plan.heads_per_section = static_cast<int>(section * packing.tiles);
  // By simulation any part from 10 to 25% evens the end out. Keys and values of these come from memory once more: at
  // 1,024 keys 25% cost 1 to 2% more than 17%.
  plan.short_m_blocks = plan.num_m_blocks / (plan.paired ? 2 : 1) / 6;
}

}  // namespace

bool tma_addressable(const fa3_array& array, const fa3_lengths& lengths, int entries, int heads, int dtype) {
  auto step_fits = [&](int64_t stride, bool may_be_zero) {
    const int64_t bytes = stride * element_bytes(dtype);
    if (bytes == 0) return may_be_zero;
    return bytes > 0 && bytes % kTmaAlignment == 0 && bytes < int64_t{1} << 40;
  };
  if (reinterpret_cast<uintptr_t>(array.data) % kTmaAlignment) return false;
  if (!lengths.cu_seqlens && entries > 1 && !step_fits(array.stride[0], true)) return false;
  if (lengths.rows > 1 && !step_fits(array.stride[1], false)) return false;
  return heads == 1 || step_fits(array.stride[2], true);
}

int page_box_rows(const fa3_forward_params& params, const ForwardVariant& variant) {
  const int rows = params.cache.cache_leftpad ? 1 : std::gcd(params.cache.page_size, variant.tile_n);
  // Asking for fewer takes longer than 16 bytes a lane do.
  constexpr int kLeastRows = 8;
  return rows < kLeastRows || rows * std::min(variant.swizzle_q_k, variant.swizzle_v) % kBoxAlignment ? 0 : rows;
}

Visibility visibility_of(const fa3_mask& mask) {
  auto bound = [](int window) {
    return window < 0 ? Visibility::kUnbounded : std::min(window, Visibility::kUnbounded);
  };
  const int right = bound(mask.window_right);
  return {bound(mask.window_left), mask.causal ? std::min(right, 0) : right,
          std::min(mask.attention_chunk, Visibility::kUnbounded)};
}

Visibility visibility_of(const fa3_forward_params& params) {
  Visibility visibility = visibility_of(params.mask);
  if (!params.queries.cu_seqlens && params.queries.rows <= 1) visibility.right = Visibility::kUnbounded;
  return visibility;
}

ScoreScales score_scales(float softmax_scale, float softcap) {
  constexpr float kLog2e = 1.4426950408889634f, kLargest = std::numeric_limits<float>::max();
  const float quotient = softcap > 0 ? std::clamp(softmax_scale / softcap, -kLargest, kLargest) : 0;
  // A quotient that is 0 or denormal has no digits, and tanh(x) is x long before: the scores are as without a cap.
  if (!std::isnormal(quotient) || softcap > kLargest / kLog2e) return {softmax_scale * kLog2e, 0};
  return {softcap * kLog2e, quotient};
}

ScoreScales score_scales(const fa3_forward_params& p) {
  // A zero scale would make minus infinity, the masked score, NaN; this one makes every visible score 0 all the same.
  return score_scales(p.softmax_scale == 0 ? 1e-30f : p.softmax_scale, p.softcap);
}

Dropout dropout_of(const fa3_dropout& given) {
  using SeedType = Dropout::SeedType;
  constexpr SeedType kTypes[] = {SeedType::kInt64, SeedType::kInt32, SeedType::kUint32};  // in fa3_integer's order
  const uint32_t dropped = std::min(static_cast<uint32_t>(std::nearbyint(given.p * 32768)), 32767u);
  const bool inverted = dropped > 16384;
  return {.active = given.p > 0,
          .threshold = (inverted ? 32768 - dropped : dropped) * 0x10001,
          .inverted = inverted ? ~0u : 0u,
          .scale = static_cast<float>(1 / (1 - double{given.p})),
          .number = given.seed,
          .seed_array = given.seed_data,
          .seed_type = kTypes[given.seed_type]};
}

bool odd_out(const fa3_forward_params& p) { return !aligned(p.out, 2, 16); }

Packing packing_of(const fa3_forward_params& params, bool packed) {
  return Packing::of(params.num_heads / params.num_heads_kv, packed);
}

size_t copy_bytes(const fa3_lengths& lengths, int entries, int heads, int head_dim, int dtype) {
  const size_t rows = size_t(lengths.rows) * (lengths.cu_seqlens ? 1 : entries);
  return workspace_aligned(rows * heads * head_dim * element_bytes(dtype));
}

int typical_seqlen(const fa3_lengths& lengths, int batch) {
  if (!lengths.cu_seqlens) return lengths.rows;
  const int mean = lengths.rows > 0 && batch > 0 ? (lengths.rows - 1) / batch + 1 : 0;
  if (!lengths.max_seqlen) return mean;
  const int longest = std::min(lengths.max_seqlen, lengths.rows);
  return longest - std::max(longest - mean, 0) / 2;
}

size_t turned_bytes(const fa3_forward_params& p, const ForwardVariant& variant) {
  const size_t rows = size_t(ceil_div(p.keys.rows, variant.tile_n)) * variant.tile_n;
  return workspace_aligned(rows * p.batch * p.num_heads_kv * variant.head_dim_v);
}

int64_t rows_of_heads(const fa3_forward_params& params) {
  return int64_t{params.queries.rows} * (params.queries.cu_seqlens ? 1 : params.batch) * params.num_heads;
}

int64_t most_tiles(const fa3_forward_params& params, const fa3_forward_plan& plan) {
  return count_tiles(params, forward_variants()[plan.variant], packing_of(params, plan.pack_gqa > 1));
}

WorkspaceSizes workspace_sizes(const fa3_forward_params& params, const fa3_forward_plan& plan) {
  WorkspaceSizes sizes{plan.dynamic ? kWorkspaceAlignment : 0, 0, 0, 0, 0, 0};
  if (plan.accumulate_blocks > 1)
    sizes.totals = workspace_aligned(size_t(plan.grid) * forward_variants()[plan.variant].total_bytes);
  if (appends(params)) sizes.seqlens_k = workspace_aligned(params.batch * sizeof(int32_t));
  if (plan.num_splits > 1) {
    const ForwardVariant& v = forward_variants()[plan.variant];
    const Splits splits = Splits::of(plan.whole_tiles, plan.num_splits);
    const Packing packing = packing_of(params, plan.pack_gqa > 1);
    sizes.parts = workspace_aligned(bytes_of_parts(params, v, packing, splits));
    if (v.joins_apart())
      sizes.parts_lse = workspace_aligned(plan.num_splits * rows_of_heads(params) * sizeof(float));
    else
      sizes.parts_done = workspace_aligned(split_tiles(params, v, packing, splits) * v.consumers * sizeof(uint64_t));
  }
  return sizes;
}

fa3_status plan_forward(const fa3_forward_params& p, int num_sms, fa3_forward_plan& plan) {
  plan = {};
  const int free_sms = std::max(num_sms - p.sm_margin, 1);
  const Work work(p, free_sms);
  const Choice choice = choose(work);
  if (choice.variant < 0 && p.dtype == FA3_FLOAT8_E4M3 && !has_kernels(FA3_FLOAT8_E4M3))
    return fail(FA3_ERROR_NO_FP8, "dtype: FA3_FLOAT8_E4M3, but this build has no kernels of it");
  if (choice.variant < 0)
    return fail(p.dtype == FA3_FLOAT8_E4M3 ? FA3_ERROR_HEAD_DIM_FP8 : FA3_ERROR_HEAD_DIM,
                "head_dim: (%d, %d)%s has no kernel of this dtype%s in this build", p.head_dim, p.head_dim_v,
                has_qv(p) ? " with qv" : "", p.tile_m ? " and tile" : "");
  const ForwardVariant& variant = forward_variants()[choice.variant];
  const Packing packing = packing_of(p, choice.packed);
  plan.variant = choice.variant;
  plan.tile_m = variant.tile_m();
  plan.tile_n = variant.tile_n;
  plan.pack_gqa = packing.heads;
  plan.whole_tiles = choice.splits.whole_tiles;
  plan.num_splits = choice.splits.count.divisor;
  plan.num_m_blocks = ceil_div(work.seqlen_q, tile_queries(variant, packing));
  plan.accumulate_blocks = accumulate_blocks(p, work.visibility, variant, choice.splits);
  plan.paired = pairs_up(work, variant, packing, choice.splits);
  plan_order(work, packing, plan);

  const int64_t tiles = count_tiles(p, variant, packing), pieces = choice.splits.pieces(tiles);
  const int slots = slots_of(work, variant, packing, choice.splits, pieces);
  plan.grid = static_cast<int>(std::min<int64_t>(pieces, slots));
  if (pieces > INT32_MAX - 2 * plan.grid)  // a thread block asks for a piece of up to two rounds after the last
    return fail(FA3_ERROR_SHAPE, "q: %lld tiles of %d rows, but at most 2^31 - 1 are possible",
                static_cast<long long>(pieces), plan.tile_m);
  const bool joins = choice.cluster && may_join_in_cluster(variant, choice.splits, static_cast<double>(pieces), slots);
  plan.cluster = plan.paired ? 2 : joins ? plan.num_splits : 1;
  plan.plain = plain(p, variant, plan);
  plan.decode = decodes(work, variant, packing, pieces, plan);
  plan.dynamic = pieces > plan.grid && pieces <= kMostCounted && counts_pieces(work, variant, choice.time);

  const WorkspaceSizes sizes = workspace_sizes(p, plan);
  plan.workspace = sizes.counter + sizes.parts_done + sizes.parts + sizes.parts_lse + sizes.totals + sizes.seqlens_k;
  // Heads that share a tile need an axis that moves.
  plan.copy_q = !tma_addressable(p.q, p.queries, p.batch, p.num_heads, p.dtype) ||
                (choice.packed && p.q.stride[2] == 0) || rotates(p);
  plan.copy_qv = has_qv(p) && (!tma_addressable(p.qv, p.queries, p.batch, p.num_heads, p.dtype) ||
                               (choice.packed && p.qv.stride[2] == 0));
  const fa3_lengths stored = key_storage(p);
  plan.copy_k = !tma_addressable(p.k, stored, key_entries(p), p.num_heads_kv, p.dtype);
  plan.copy_v = !tma_addressable(p.v, stored, key_entries(p), p.num_heads_kv, p.dtype) ? kPacked
                : variant.turned_v                                                     ? kTurned
                                                                                       : kNoCopy;
  if (plan.copy_q) plan.workspace += copy_bytes(p.queries, p.batch, p.num_heads, p.head_dim, p.dtype);
  if (plan.copy_qv) plan.workspace += copy_bytes(p.queries, p.batch, p.num_heads, p.head_dim_v, p.dtype);
  if (plan.copy_k) plan.workspace += copy_bytes(stored, key_entries(p), p.num_heads_kv, p.head_dim, p.dtype);
  if (plan.copy_v == kTurned) plan.workspace += turned_bytes(p, variant);
  if (plan.copy_v == kPacked)
    plan.workspace += copy_bytes(stored, key_entries(p), p.num_heads_kv, p.head_dim_v, p.dtype);
  const int64_t blocks = appends(p) || rotates(p) ? plan_prepare(p).blocks : 0;
  if (blocks > INT32_MAX)
    return fail(FA3_ERROR_SHAPE, "q, k_new: %lld thread blocks of rows, but at most 2^31 - 1 are possible",
                static_cast<long long>(blocks));
  return FA3_OK;
}

void log_plan(const fa3_forward_params& p, const fa3_forward_plan& plan) {
  const char* wanted = std::getenv("FA3_LOG");
  if (!wanted || std::strcmp(wanted, "plan")) return;
  const char* const kernel = plan.decode ? " (decode)" : plan.plain ? " (plain)" : "";
  std::fprintf(stderr,
               "fa3 forward: batch %d, heads %d on %d, head_dim %d and %d, rows %d on %d%s: %s%s, tile %d x %d, "
               "%d heads a tile, %d splits after %d tiles, grid %d in clusters of %d%s%s, sections of %d heads, "
               "%d short m_blocks, copies q %d k %d v %d qv %d, fp32 after %d blocks, workspace %zu bytes\n",
               p.batch, p.num_heads, p.num_heads_kv, p.head_dim, p.head_dim_v, p.queries.rows, p.keys.rows,
               p.queries.cu_seqlens ? " (ragged)" : "", forward_variants()[plan.variant].name, kernel, plan.tile_m,
               plan.tile_n, plan.pack_gqa, plan.num_splits, plan.num_splits > 1 ? plan.whole_tiles : 0, plan.grid,
               plan.cluster, plan.paired ? " (pairs)" : "", plan.dynamic ? " (dynamic)" : "", plan.heads_per_section,
               plan.short_m_blocks, plan.copy_q, plan.copy_k, plan.copy_v, plan.copy_qv, plan.accumulate_blocks,
               plan.workspace);
}

}  // namespace fa3
