// Dropout of fragments, all lanes of a warp one after the other, for tests/test_dropout_fragments.py.
#include "attention/dropout.cuh"

using namespace fa3;

namespace {

Dropout dropout_of(const void* seed_array, int seed_type) {
  return {true, 0, 1.f, 0, seed_array, static_cast<Dropout::SeedType>(seed_type)};
}

constexpr int kBlocks = 4;  // of 16 columns

}  // namespace

extern "C" {

/// words (32, 16): each lane's of 16 queries and 64 keys.
void drop_queries(const uint64_t* seed, uint32_t threshold, int head, int batch, int first_query, int first_key,
                  uint32_t (*words)[4 * kBlocks]) {
  const Philox philox = philox_of(dropout_of(seed, 0), head, batch);
  for (int lane = 0; lane < 32; ++lane) drop(words[lane], philox, threshold, first_query, first_key, lane);
}

/// pairs (32, 16): each lane's of 16 keys and 64 queries; bit 0 of a word for its low half, bit 16 for its high one.
void keep_keys(const uint64_t* seed, uint32_t threshold, int head, int batch, int first_key, int first_query,
               uint32_t* pairs) {
  const Philox philox = philox_of(dropout_of(seed, 0), head, batch);
  uint32_t own[32];
  for (int lane = 0; lane < 32; ++lane)
    own[lane] = draw_for_keys<kBlocks>(philox, threshold, first_key, first_query, lane);
  for (int lane = 0; lane < 32; ++lane) {
    const uint32_t kept = kept_of_keys(own[lane], own[lane ^ 4], lane);
    for (int i = 0; i < 4 * kBlocks; ++i) pairs[4 * kBlocks * lane + i] = kept_pair(&kept, i);
  }
}

uint64_t seed_in(const void* array, int type) { return dropout_of(array, type).seed(); }

}  // extern "C"
