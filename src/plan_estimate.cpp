// Estimates of time, by constants that were measured.
#include "plan_estimate.h"

#include <algorithm>
#include <utility>

#include "attention/tile_scheduler.h"
#include "plan.h"
#include "prepare_plan.h"

namespace fa3 {
namespace {

// Bytes of keys and values that come from memory in a microsecond, however many multiprocessors ask: measured,
// decoding.
constexpr double kReadRate = 4.4e6;
// Split tiles leave their parts in the workspace, which should stay small beside q, k and v.
constexpr int64_t kMostPartBytes = 256 << 20;

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
  if (rows == 0) return 0;  // that is gather_time()
  return 1.2 / (rows == v.tile_n ? p.cache.page_size : rows);
}

/// Microseconds that a block of gathered rows takes at least: the loaders' instructions, by bytes. Measured, decoding 1
/// to 16 sequences of 4,096 to 65,536 keys from pages of one row, in 1 to 32 parts. With qv it is not.
double gather_time(const fa3_forward_params& p, const ForwardVariant& v) {
  if (!p.cache.page_table || v.has_qv || page_box_rows(p, v) > 0) return 0;
  constexpr double kGatherRate = 32 << 10;  // bytes of keys and values
  return v.tile_n * (p.head_dim + p.head_dim_v) * element_bytes(p.dtype) / kGatherRate;
}

}  // namespace

fa3_lengths lengths_of_keys(const fa3_forward_params& p) {
  fa3_lengths keys = p.keys;
  if (p.cache.page_table && keys.cu_seqlens) keys.seqused = std::exchange(keys.cu_seqlens, nullptr);
  return keys;
}

Work::Work(const fa3_forward_params& p, int sms)
    : params(p),
      visibility(visibility_of(p)),
      seqlen_q(typical_seqlen(p.queries, p.batch)),
      seqlen_k(typical_seqlen(lengths_of_keys(p), p.batch)),
      num_sms(sms),
      equal_tiles(visibility.full() && equal_lengths(p.queries, p.batch) &&
                  equal_lengths(lengths_of_keys(p), p.batch) && !p.cache.cache_leftpad && !appends(p)) {}

int tile_queries(const ForwardVariant& v, const Packing& packing) { return v.row_groups * packing.positions; }

int64_t count_tiles(const fa3_forward_params& p, const ForwardVariant& v, const Packing& packing) {
  const int queries = tile_queries(v, packing), heads = p.num_heads_kv * packing.tiles;
  if (p.queries.cu_seqlens) return (int64_t{p.queries.rows} / queries + std::min(p.batch, p.queries.rows)) * heads;
  return int64_t{ceil_div(p.queries.rows, queries)} * p.batch * heads;
}

int64_t split_tiles(const fa3_forward_params& p, const ForwardVariant& v, const Packing& packing,
                    const Splits& splits) {
  return std::max<int64_t>(count_tiles(p, v, packing) - splits.whole_tiles, 0);
}

int64_t bytes_of_parts(const fa3_forward_params& p, const ForwardVariant& v, const Packing& packing,
                       const Splits& splits) {
  if (v.joins_apart()) return splits.count.divisor * rows_of_heads(p) * p.head_dim_v * int64_t{sizeof(float)};
  return split_tiles(p, v, packing, splits) * splits.count.divisor * v.part_bytes;
}

// Joining in clusters pays where all of them run at once. A cluster lies within a group of 16 or 18 multiprocessors, so
// that some stay idle: where the H200 has room for 264 blocks, it has for 240 in clusters of 8, and for 224 in clusters
// of 16, the largest there are.
bool may_join_in_cluster(const ForwardVariant& v, const Splits& splits, double pieces, int slots) {
  const int parts = splits.count.divisor;
  if (!v.joins_in_cluster || splits.whole_tiles > 0 || parts == 1 || parts > kMostCluster) return false;
  return pieces <= slots * (parts > 8 ? 0.845 : 0.9);
}

Choice estimate(const Work& work, int index, bool packed) {
  const fa3_forward_params& p = work.params;
  const ForwardVariant& v = forward_variants()[index];
  const Packing packing = packing_of(p, packed);
  TileCost cost = tile_cost(v);
  cost.block = std::max(cost.block, gather_time(p, v));
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
             work.seqlen_k - work.seqlen_q <= work.seqlen_q) {
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
    for (int fewer = std::min(parts, kMostCluster); fewer > 1; fewer = fewer / 2) consider(0, fewer);
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

}  // namespace fa3
