// Pure decisions: arguments and device in, plan out.
#include "plan.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <utility>

#include "alignment.h"
#include "attention/block_range.h"
#include "attention/dropout.h"
#include "attention/packing.h"
#include "attention/splits.h"
#include "attention/tile_scheduler.h"
#include "latent.h"
#include "prepare_plan.h"
#include "status.h"
#include "variants.h"

namespace fa3 {
namespace {

// Keys and values that stay in L2 beside what streams through it: measured best, causal, 1,024 keys, where a quarter of
// the time goes by at memory's rate. Twice as much costs 1 to 3% there, four times as much 16%; from 2,048 keys on the
// differences are within 1%.
constexpr double kSectionBytes = 16 << 20;
// Bytes of keys and values that come from memory in a microsecond, however many multiprocessors ask: measured,
// decoding.
constexpr double kReadRate = 4.4e6;
// Split tiles leave their parts in the workspace, which should stay small beside q, k and v.
constexpr int64_t kMostPartBytes = 256 << 20;
// Keys up to which sums of fp8 products stay in the tensor cores: 22 blocks of 96. Values of mean 1 lose 1% at 1,024
// keys, 2% at 2,048, 5% at 4,096 and 18% at 16,384, and those of mean 0 nothing. Totals every 2,112 keys cost 0 to 2%
// of the time, every 512 keys 4 to 11%. In the workspace they cost 6 to 12%, and are taken for longer rows alone. Where
// a caller wants sums of fewer keys than kLeastKeysInWorkspace, adding each block in fp32 takes 12 to 20%.
constexpr int kMostKeysSummed = 2112, kMostKeysUnpromoted = 4096, kLeastKeysInWorkspace = 1024;
constexpr int kMostCounted = (1 << 24) - 1;  // pieces: see arch/counter.cuh

/// The keys' lengths as choosing sees them: in pages each sequence has room for as many, whatever says how many it has.
fa3_lengths lengths_of_keys(const fa3_forward_params& p) {
  fa3_lengths keys = p.keys;
  if (p.cache.page_table && keys.cu_seqlens) keys.seqused = std::exchange(keys.cu_seqlens, nullptr);
  return keys;
}

/// Whether all sequences are known to have the length that typical_seqlen gives.
bool equal_lengths(const fa3_lengths& lengths, int batch) {
  if (lengths.seqused) return false;
  return !lengths.cu_seqlens || int64_t{lengths.max_seqlen} * batch == lengths.rows;
}

/// What a variant's tile costs an SM, in microseconds: its prologue and epilogue, and each block of keys. The constants
/// fit `python -m bench tiles` on an H200: head dims 64 to 256, lengths 64 to 16,384, full and causal, one to three
/// consumer warpgroups.
struct TileCost {
  double tile, block;
  // Where queries are many and no multiprocessor has two tiles: a small one goes as fast as its latencies allow, and a
  // large one's first keys come later.
  double lone_block, first_keys;
};

TileCost tile_cost(const ForwardVariant& v) {
  const int dim = ((v.has_qv ? v.head_dim + v.head_dim_v : v.head_dim) + v.head_dim_v) / 2;
  // Of a score: exponentials bound small dims, products large ones, which fp8 halves (as is to be measured).
  const double products = dim * element_bytes(v.dtype) / 2.0;
  const double score = std::max(35 + 0.42 * products, 0.7 * products) * 1e-6;
  const double block = score * v.tile_m() * v.tile_n;
  if (v.has_qv) return {2.5, 1.35 * block, 1.35 * block, 0};  // its two warpgroups do everything at the same time
  // Two or three share an SM: half of what each takes.
  if (v.consumers == 1) {
    const double slower = dim > 128 ? 1.15 : 1;  // fitted, as what three warpgroups take in fp8 below
    return {1.2, slower * std::max(1.15 * block, 0.53), slower * std::max(1.84 * block, 0.6), 0};
  }
  const double turned = v.turned_v ? 0.93 : 1;  // 3 to 8% less than to turn V
  if (v.consumers == 2) return {1.8, 1.07 * turned * block, 1.07 * turned * block, 1};
  // Products of 64 keys take all that shared memory gives, but the first ones come sooner.
  const bool narrow = v.tile_n <= 64;
  const double wide = (narrow ? 1.01 : 0.93) * (v.dtype == FA3_FLOAT8_E4M3 ? 0.8 : 1) * turned * block;
  return {(narrow ? 0.023 : 0.038) * dim, wide, wide, 1};
}

/// Tiles of a head, under a causal mask, from which on an estimate counts what the first and the last of them have
/// idle. Where keys are many more than queries, the first has as many as the last.
constexpr int kManyTiles = 3;

/// What splitting adds, in microseconds: to each part, which it leaves in memory and counts, and to the last, whose
/// warpgroups read their `rows` rows' parts back, a thread 8 columns of a row and 8 parts at once.
constexpr double kPartTime = 1.2;
double join_time(int parts, int rows, int head_dim_v) {
  return 0.3 + 0.7 * ceil_div(rows * (head_dim_v / 8), 128) * ceil_div(parts, 8);
}

/// Whether thread blocks in clusters, one for each tile's parts, can join them in shared memory. That pays where all of
/// them run at once. A cluster lies within a group of 16 or 18 multiprocessors, so that some stay idle: where the H200
/// has room for 264 blocks, it has for 240 in clusters of 8, and for 224 in clusters of 16, the largest there are.
constexpr int kLargestCluster = 16;
bool may_join_in_cluster(const ForwardVariant& v, const Splits& splits, double pieces, int slots) {
  const int parts = splits.count.divisor;
  if (!v.joins_in_cluster || splits.whole_tiles > 0 || parts == 1 || parts > kLargestCluster) return false;
  return pieces <= slots * (parts > 8 ? 0.845 : 0.9);
}

/// What splitting adds then, in microseconds: to each part, and to joining them; where large clusters come to share
/// multiprocessors, though others are idle; and how much slower keys and values come. Measured, decoding; what a round
/// of joining takes, and what a block's further warpgroups add to it, at 512 rows of 8 heads.
constexpr double kClusterPartTime = 0.4, kCrowdedTime = 1.8, kClusterReading = 1.12;
/// And beside it to each part of a small tile that is full of one head's rows, and whose plain kernel has no parts.
/// Measured: 2 and 4 heads of 512 to 2,048.
constexpr double kFullPartTime = 0.4;
double cluster_join_time(const ForwardVariant& v, int parts, double pieces, int rows, int num_sms) {
  const bool crowded = parts > 8 && pieces > 0.85 * num_sms;
  const double round = 0.35 * (v.consumers + 1) / 2;
  return 0.2 + round * ceil_div(rows * (v.head_dim_v / 8), 128) + (crowded ? kCrowdedTime : 0);
}
/// The same where another kernel joins them: its launch, its rounds of 8 parts, and their way out and back.
double join_apart_time(int parts, double bytes) { return 4 + 0.6 * ceil_div(parts, 8) + 2 * bytes / 3e6; }

/// Everything about a call's work that choosing looks at, worked out once.
struct Work {
  const fa3_forward_params& params;
  Visibility visibility;
  int seqlen_q, seqlen_k, num_sms;
  bool equal_tiles;  // every tile is known to see as many keys as any other

  Work(const fa3_forward_params& p, int sms)
      : params(p),
        visibility(visibility_of(p)),
        seqlen_q(typical_seqlen(p.queries, p.batch)),
        seqlen_k(typical_seqlen(lengths_of_keys(p), p.batch)),
        num_sms(sms),
        equal_tiles(visibility.full() && equal_lengths(p.queries, p.batch) &&
                    equal_lengths(lengths_of_keys(p), p.batch) && !p.cache.cache_leftpad && !appends(p)) {}
};

/// One way to do it.
struct Choice {
  int variant = -1;
  bool packed = false;
  Splits splits = kNoSplits;
  bool cluster = false;    // the parts of a tile are joined in shared memory
  double time = INFINITY;  // microseconds, estimated
};

int tile_queries(const ForwardVariant& v, const Packing& packing) { return v.row_groups * packing.positions; }

/// Tiles of all queries: exact for dense batches, an upper bound for ragged ones.
int64_t count_tiles(const fa3_forward_params& p, const ForwardVariant& v, const Packing& packing) {
  const int queries = tile_queries(v, packing), heads = p.num_heads_kv * packing.tiles;
  if (p.queries.cu_seqlens) return (int64_t{p.queries.rows} / queries + std::min(p.batch, p.queries.rows)) * heads;
  return int64_t{ceil_div(p.queries.rows, queries)} * p.batch * heads;
}

/// Workspace for the parts of split tiles: all of them, where how many there will be is not known.
int64_t split_tiles(const fa3_forward_params& p, const ForwardVariant& v, const Packing& packing,
                    const Splits& splits) {
  return std::max<int64_t>(count_tiles(p, v, packing) - splits.whole_tiles, 0);
}

int64_t bytes_of_parts(const fa3_forward_params& p, const ForwardVariant& v, const Packing& packing,
                       const Splits& splits) {
  if (v.joins_apart()) return splits.count.divisor * rows_of_heads(p) * p.head_dim_v * int64_t{sizeof(float)};
  return split_tiles(p, v, packing, splits) * splits.count.divisor * v.part_bytes;
}

/// Blocks of keys that a tile sees through a window, counted for four tiles in the middle: a window begins anywhere in
/// a block. A warpgroup leaves out blocks that only others see, of which half is won, and masks cost 0.7 of a block:
/// both fit windows of 512 and 1,024 keys at head dims 80 and 128.
double blocks_of_window(const Work& work, const ForwardVariant& v, const Packing& packing) {
  constexpr int kCounted = 4;
  const int queries = tile_queries(v, packing), seqlen_q = std::max(work.seqlen_q, 1);
  const int tiles = ceil_div(seqlen_q, queries);
  auto blocks_of = [&](int first, int rows) {
    const int last = std::min(first + rows, seqlen_q) - 1;
    const KeyInterval top = work.visibility.keys(first, work.seqlen_q, work.seqlen_k),
                      bottom = work.visibility.keys(last, work.seqlen_q, work.seqlen_k);
    return std::max(ceil_div(std::max(bottom.end, 0), v.tile_n) - top.begin / v.tile_n, 0);
  };
  int blocks = 0;
  for (int i = 0; i < kCounted; ++i) {
    const int first = clamped(tiles / 2 - kCounted / 2 + i, 0, tiles - 1) * queries;
    blocks += blocks_of(first, queries) + blocks_of(first, packing.positions);
  }
  return blocks / (2.0 * kCounted) + 0.7;
}

/// How much longer pages take to come, where a multiprocessor has one thread block, whose loader looks them up and asks
/// for each: measured, decoding from pages of 16, 64 and 256 rows, of 4,096 to 32,768 keys. Where it has two, nothing.
double page_delay(const fa3_forward_params& p, const ForwardVariant& v) {
  if (!p.cache.page_table) return 0;
  const int rows = page_box_rows(p, v);
  return 1.2 / (rows == v.tile_n ? p.cache.page_size : std::max(rows, 1));
}

/// The estimate for a variant, packed or not, split where that seems to pay (or as the caller says).
Choice estimate(const Work& work, int index, bool packed) {
  const fa3_forward_params& p = work.params;
  const ForwardVariant& v = forward_variants()[index];
  const Packing packing = packing_of(p, packed);
  const TileCost cost = tile_cost(v);
  const int last = std::max(work.seqlen_q - 1, 0), half_tile = tile_queries(v, packing) / 2;
  auto blocks_around = [&](int query) {
    const KeyInterval first = work.visibility.keys(std::max(query - half_tile, 0), work.seqlen_q, work.seqlen_k);
    const KeyInterval final = work.visibility.keys(std::min(query + half_tile, last), work.seqlen_q, work.seqlen_k);
    return std::max(final.end - first.begin, 0) / double(v.tile_n) + (work.equal_tiles ? 0.0 : 0.5);
  };
  const double longest = std::ceil(blocks_around(last));
  const int queries = tile_queries(v, packing), m_blocks = ceil_div(std::max(work.seqlen_q, 1), queries);
  const double tiles = double(m_blocks) * p.batch * p.num_heads_kv * packing.tiles;
  double mean = std::ceil(blocks_around(last / 2));
  double busy = 1;  // of a head's tiles
  if (work.visibility.window()) {
    mean = blocks_of_window(work, v, packing);
  } else if (work.visibility.right != Visibility::kUnbounded && m_blocks >= kManyTiles &&
             2 * work.seqlen_q >= work.seqlen_k) {
    // The first warpgroup of a tile leaves these blocks out, all of them half as many, and of that half is won.
    mean -= 0.25 * ((queries - packing.positions) / v.tile_n);
    // The first tile, whose keys are fewest, has the rows that the last one would have idle.
    busy -= rows_ahead(work.seqlen_q, m_blocks, queries, packing.positions) / (double(m_blocks) * queries);
  }
  // Keys and values come from memory at least once; each tile has its share of that.
  const double read_time = mean * v.tile_n * (p.head_dim + p.head_dim_v) * element_bytes(p.dtype) * p.num_heads_kv *
                           p.batch / kReadRate / std::max(tiles, 1.0);
  const double lone_reading = 1 + page_delay(p, v);
  const int rows = std::min(work.seqlen_q, packing.positions) * packing.heads;

  const double alone = v.blocks_per_sm > 1 ? 1.6 : 1.0;  // without neighbours a block runs faster, but not twice
  const bool lone = tiles <= work.num_sms && work.seqlen_q >= v.tile_m();
  auto time_of = [&](double pieces, int parts, bool cluster) {
    const double around = cost.tile + (parts == 1 ? 0.0 : cluster ? kClusterPartTime : kPartTime);
    auto piece = [&](double blocks) { return around + (parts == 1 ? blocks : std::ceil(blocks / parts)) * cost.block; };
    const double longest_piece =
        lone && parts == 1 ? alone * around + longest * cost.lone_block : alone * piece(longest);
    const double slowest = longest_piece + (lone ? cost.first_keys : 0);
    // Equal pieces come in whole rounds; unequal ones fill each other's gaps, up to a rest.
    const double rounds =
        work.equal_tiles ? std::ceil(pieces / work.num_sms) : std::max(pieces * busy / work.num_sms + 0.3, 1.0);
    const double reading =
        pieces / parts * read_time * (cluster ? kClusterReading : 1.0) * (pieces <= work.num_sms ? lone_reading : 1.0);
    const double joining = parts == 1 ? 0.0
                           : cluster  ? cluster_join_time(v, parts, pieces, rows, work.num_sms)
                           : v.joins_apart()
                               ? join_apart_time(parts, double(bytes_of_parts(p, v, packing, Splits::of(0, parts))))
                               : join_time(parts, rows, v.head_dim_v);
    return std::max({rounds * piece(mean), slowest, around + reading}) + joining;
  };

  const int slots = work.num_sms * v.blocks_per_sm;
  Choice choice{index, packed, kNoSplits, false, time_of(tiles, 1, false)};
  auto choose_join = [&](const Splits& splits) {
    const int parts = splits.count.divisor;
    const double split = tiles - splits.whole_tiles,
                 whole = splits.whole_tiles ? time_of(splits.whole_tiles, 1, false) : 0;
    Choice found{index, packed, splits, false, whole + time_of(split * parts, parts, false)};
    if (may_join_in_cluster(v, splits, tiles * parts, slots)) {
      const double time = time_of(tiles * parts, parts, true);
      if (time < found.time) found.cluster = true, found.time = time;
    }
    const bool was_plain = v.launch_plain && !plain_may_split(v.consumers) && packing.heads == 1;
    if (was_plain && work.seqlen_q >= v.tile_m()) found.time += kFullPartTime * parts;
    return found;
  };
  auto consider = [&](int whole_tiles, int parts) {
    const Choice found = choose_join(Splits::of(whole_tiles, parts));
    if (found.time < choice.time && bytes_of_parts(p, v, packing, found.splits) <= kMostPartBytes) choice = found;
  };
  const int key_blocks = std::max(ceil_div(p.keys.rows, v.tile_n), 1);  // a part without one has nothing to do
  if (p.num_splits > 0 || p.batch_invariant) {
    const int parts = p.batch_invariant ? 1 : std::min({p.num_splits, key_blocks, Splits::kMost});
    return parts > 1 ? choose_join(Splits::of(0, parts)) : choice;
  }
  const int most = static_cast<int>(std::min({longest, double(key_blocks), v.joins_apart() ? 256.0 : 64.0}));
  if (tiles < slots) {
    const int parts = std::min(static_cast<int>(slots / std::max(tiles, 1.0)), most);
    for (int fewer = parts; fewer > 1; fewer = fewer / 2) consider(0, fewer);
    for (int fewer = std::min(parts, kLargestCluster); fewer > 1; fewer = fewer / 2) consider(0, fewer);
  } else if (work.equal_tiles && !v.joins_apart()) {
    // The last round, if it is not full, is split for all to share. What is joined apart has parts of every row.
    const double whole = std::floor(tiles / slots) * slots, rest = tiles - whole;
    if (rest > 0) {
      const int parts = std::min(static_cast<int>(slots / rest), most);
      if (parts > 1) consider(static_cast<int>(whole), parts);
    }
  }
  return choice;
}

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
  const int tiles = work.seqlen_q / tile_queries(variant, packing) * packing.tiles;
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

/// Whether a call has nothing that its tile's plain kernel leaves out: see kernels/forward_args.h.
bool plain(const fa3_forward_params& p, const ForwardVariant& variant, const fa3_forward_plan& plan) {
  return variant.launch_plain && plan.pack_gqa == 1 && (plan.num_splits == 1 || plain_may_split(variant.consumers)) &&
         !plan.paired && !p.cache.page_table && p.softcap == 0 && !p.sinks && !p.batch_invariant && p.dropout.p == 0 &&
         !odd_out(p);
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

  const int slots = variant.blocks_per_sm * free_sms;
  const int64_t tiles = count_tiles(p, variant, packing), pieces = choice.splits.pieces(tiles);
  plan.grid = static_cast<int>(std::min<int64_t>(pieces, slots));
  if (pieces > INT32_MAX - 2 * plan.grid)  // a thread block asks for a piece of up to two rounds after the last
    return fail(FA3_ERROR_SHAPE, "q: %lld tiles of %d rows, but at most 2^31 - 1 are possible",
                static_cast<long long>(pieces), plan.tile_m);
  const bool joins = choice.cluster && may_join_in_cluster(variant, choice.splits, static_cast<double>(pieces), slots);
  plan.cluster = plan.paired ? 2 : joins ? plan.num_splits : 1;
  plan.plain = plain(p, variant, plan);
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
  std::fprintf(stderr,
               "fa3 forward: batch %d, heads %d on %d, head_dim %d and %d, rows %d on %d%s: %s%s, tile %d x %d, "
               "%d heads a tile, %d splits after %d tiles, grid %d in clusters of %d%s%s, sections of %d heads, "
               "%d short m_blocks, copies q %d k %d v %d qv %d, fp32 after %d blocks, workspace %zu bytes\n",
               p.batch, p.num_heads, p.num_heads_kv, p.head_dim, p.head_dim_v, p.queries.rows, p.keys.rows,
               p.queries.cu_seqlens ? " (ragged)" : "", forward_variants()[plan.variant].name,
               plan.plain ? " (plain)" : "", plan.tile_m, plan.tile_n, plan.pack_gqa, plan.num_splits,
               plan.num_splits > 1 ? plan.whole_tiles : 0, plan.grid, plan.cluster, plan.paired ? " (pairs)" : "",
               plan.dynamic ? " (dynamic)" : "", plan.heads_per_section, plan.short_m_blocks, plan.copy_q, plan.copy_k,
               plan.copy_v, plan.copy_qv, plan.accumulate_blocks, plan.workspace);
}

}  // namespace fa3
