// The host-callable maths of src/attention, as C functions over arrays, for tests/test_host_math.py.
#include "attention/block_range.h"
#include "attention/cache.h"
#include "attention/mask.h"
#include "attention/seqlen.h"
#include "attention/tile_scheduler.h"

using namespace fa3;

namespace {

template <int kTileN>
void ranges(const Visibility& visibility, int seqlen_q, int seqlen_k, int count, const int* first, const int* last,
            BlockRange* out) {
  for (int i = 0; i < count; ++i) out[i] = block_range<kTileN>(visibility, first[i], last[i], seqlen_q, seqlen_k);
}

template <int kCount>
void hide(float* scores, int row, int begin, int end, float hidden) {
  hide_columns(*reinterpret_cast<float (*)[kCount]>(scores), row, begin, end, hidden);
}

}  // namespace

/// The compiled tiles, one call each.
#define FOR_TILE_N(tile_n, call) \
  switch (tile_n) {              \
    case 48:                     \
      return call(48);           \
    case 64:                     \
      return call(64);           \
    case 80:                     \
      return call(80);           \
    case 96:                     \
      return call(96);           \
    case 112:                    \
      return call(112);          \
    case 128:                    \
      return call(128);          \
  }

extern "C" {

int unbounded() { return Visibility::kUnbounded; }

void key_intervals(const Visibility* visibility, int seqlen_q, int seqlen_k, int first_row, int count,
                   KeyInterval* out) {
  for (int i = 0; i < count; ++i) out[i] = visibility->keys(first_row + i, seqlen_q, seqlen_k);
}

void block_ranges(int tile_n, const Visibility* visibility, int seqlen_q, int seqlen_k, int count, const int* first,
                  const int* last, BlockRange* out) {
#define CALL(n) ranges<n>(*visibility, seqlen_q, seqlen_k, count, first, last, out)
  FOR_TILE_N(tile_n, CALL)
#undef CALL
}

void all_blocks(int tile_n, int seqlen_k, BlockRange* out) {
#define CALL(n) (void)(*out = every_block<n>(seqlen_k))
  FOR_TILE_N(tile_n, CALL)
#undef CALL
}

int needs_mask(const BlockRange* range, int block) { return range->needs_mask(block); }

void no_blocks_at(int block, BlockRange* out) { *out = no_blocks(block); }

void clip(BlockRange* range, int first, int last) { range->clip(first, last); }

void hide_scores(int tile_n, float* scores, int row, int begin, int end, float hidden) {
#define CALL(n) hide<n / 2>(scores, row, begin, end, hidden)
  FOR_TILE_N(tile_n, CALL)
#undef CALL
}

void tile_order(const TileOrder* order, int heads, int num_m_blocks, TileOrder::Tile* out) {
  for (int i = 0; i < heads * num_m_blocks; ++i) out[i] = order->at(i, heads, num_m_blocks);
}

void spans(const Lengths* lengths, int batch, Span* out) {
  for (int b = 0; b < batch; ++b) out[b] = lengths->span(b);
}

void key_spans(const KeyRows* keys, int batch, Span* out) {
  for (int b = 0; b < batch; ++b) out[b] = keys->span(b);
}

void owners(const Lengths* lengths, int batch, int64_t count, RowOwner* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = lengths->owner(i, batch);
}

}  // extern "C"
