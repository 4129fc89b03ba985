// Where P and V of 8 bits lie, for tests/test_fp8_layout.py.
#include "attention/softmax.cuh"
#include "tile/transpose.h"

using namespace fa3;

namespace {

struct Byte {
  char bits;
};

template <int kTileN>
int probabilities(const float* scores, uint32_t* words) {
  Softmax<Byte, kTileN> softmax{{1.f, 1.f}, {0.f, 0.f}, {0.f, 0.f}};
  typename Softmax<Byte, kTileN>::Scores s;
  typename Softmax<Byte, kTileN>::Probabilities p;
  for (int i = 0; i < kTileN / 2; ++i) s[i] = scores[i];
  float o[4] = {};
  softmax.update(s, p, false, o);
  for (int i = 0; i < kTileN / 8; ++i) words[i] = p[i];
  return softmax.row_max[0] == 0 && softmax.row_max[1] == 0;  // no maximum was taken
}

}  // namespace

extern "C" {

/// A lane's words of P, from scores that are the logarithms of base 2 of what P is to be.
int pack_probabilities(int tile_n, const float* scores, uint32_t* words) {
  return tile_n == 64    ? probabilities<64>(scores, words)
         : tile_n == 96  ? probabilities<96>(scores, words)
         : tile_n == 128 ? probabilities<128>(scores, words)
                         : -1;
}

/// source, target, selectors for the even and the odd matrices.
void turning_lane(int lane, int chunk_bytes, uint32_t* out) {
  const TurningLane turning(lane, chunk_bytes);
  out[0] = turning.source;
  out[1] = turning.target;
  out[2] = turning.evens;
  out[3] = turning.odds();
}

int key_at_place(int place) { return key_at(place); }

/// kStepBytes, kGroupBytes, kBytes, row_step(1).
void turned_tile(int* out) {
  using Tile = TurnedTile<96, 80>;
  out[0] = Tile::kStepBytes;
  out[1] = Tile::kGroupBytes;
  out[2] = Tile::kBytes;
  out[3] = Tile::row_step(1);
}

}  // extern "C"
