// How work is cut up (packing.h, splits.h, tile_scheduler.h), as C functions over arrays, for tests/test_pieces.py.
#include "attention/packing.h"
#include "attention/splits.h"
#include "attention/tile_scheduler.h"

using namespace fa3;

extern "C" {

void packing_of(int ratio, int packed, Packing* out) { *out = Packing::of(ratio, packed); }

/// Of each row of a warpgroup's 64.
void rows_of(const Packing* packing, int* positions, int* heads) {
  for (int row = 0; row < 64; ++row) {
    positions[row] = packing->position_of(row);
    heads[row] = packing->head_of(row);
  }
}

int unsplit() { return kNoSplits.whole_tiles; }

int most_parts() { return Splits::kMost; }

void quotients(int divisor, const int* n, int count, int* out) {
  const Divisor by = Divisor::of(divisor);
  for (int i = 0; i < count; ++i) out[i] = by.quotient(n[i]);
}

void splits_of(int whole_tiles, int count, Splits* out) { *out = Splits::of(whole_tiles, count); }

int64_t count_pieces(const Splits* splits, int64_t tiles) { return splits->pieces(tiles); }

void pieces(const Splits* splits, int first, int count, Splits::Piece* out) {
  for (int i = 0; i < count; ++i) out[i] = splits->at(first + i);
}

void boundaries(int blocks, int parts, int* out) {
  const Splits splits = Splits::of(0, parts);
  for (int part = 0; part <= parts; ++part) out[part] = splits.boundary(blocks, part);
}

void tile_at(const TileOrder* order, int index, int heads, int num_m_blocks, TileOrder::Tile* out) {
  *out = order->at(index, heads, num_m_blocks);
}

int ahead(int queries, int tile_m, int group) { return rows_ahead(queries, ceil_div(queries, tile_m), tile_m, group); }

}  // extern "C"
