// The maths of the backward that a host can run, as C functions over arrays, for tests/test_backward_math.py.
#include "attention/block_range.h"
#include "attention/query_steps.h"
#include "attention/query_tiles.h"
#include "attention/sections.h"

using namespace fa3;

namespace {

template <int kTileM>
void ranges(const Visibility& visibility, int seqlen_q, int seqlen_k, int keys, int count, QueryBlockRange* out) {
  for (int i = 0; i < count; ++i)
    out[i] = query_block_range<kTileM>(visibility, i * keys, (i + 1) * keys - 1, seqlen_q, seqlen_k);
}

}  // namespace

extern "C" {

int unbounded() { return Visibility::kUnbounded; }

void query_intervals(const Visibility* visibility, int seqlen_q, int seqlen_k, int first_key, int count,
                     QueryInterval* out) {
  for (int i = 0; i < count; ++i) out[i] = visibility->queries(first_key + i, seqlen_q, seqlen_k);
}

/// Of `count` groups of `keys` keys, one after the other.
void query_block_ranges(int tile_m, const Visibility* visibility, int seqlen_q, int seqlen_k, int keys, int count,
                        QueryBlockRange* out) {
  if (tile_m == 64)
    ranges<64>(*visibility, seqlen_q, seqlen_k, keys, count, out);
  else
    ranges<128>(*visibility, seqlen_q, seqlen_k, keys, count, out);
}

void first_key_blocks(int tile_m, int tile_n, const Visibility* visibility, int seqlen_q, int seqlen_k, int count,
                      int* out) {
  for (int i = 0; i < count; ++i)
    out[i] = tile_n == 64 ? first_key_block<64>(*visibility, i * tile_m, seqlen_q, seqlen_k)
                          : first_key_block<128>(*visibility, i * tile_m, seqlen_q, seqlen_k);
}

/// (head, block of queries) of each step, one after the other; how many.
int query_steps(int begin, int end, int start, bool backwards, int group, int* out) {
  const QueryWalk walk{{begin, end, 0, 0}, start, backwards};
  QueryStep at(walk);
  for (int step = 0; step < walk.steps(group); ++step, at.advance(walk, group)) {
    out[2 * step] = at.head;
    out[2 * step + 1] = at.m_block;
  }
  return walk.steps(group);
}

int side_by_side(const Visibility* visibility, int rows_q, int rows_k, int tile_m, int tile_n, int group, int heads) {
  return heads_in_turn(*visibility, rows_q, rows_k, tile_m, tile_n, group, heads);
}

int side_by_side_under_mask(int fitting, int rows, int tile_n, int heads) {
  return heads_under_mask(fitting, rows, tile_n, heads);
}

int first_tiles(const Lengths* lengths, int tile_m, int batch, int* out) {
  const QueryTiles tiles{*lengths, tile_m};
  for (int b = 0; b < batch; ++b) out[b] = tiles.first(b);
  return static_cast<int>(tiles.count(batch));
}

int sequence_of(const Lengths* lengths, int tile_m, int batch, int tile) {
  return QueryTiles{*lengths, tile_m}.sequence(tile, batch);
}

}  // extern "C"
