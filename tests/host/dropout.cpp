// Dropout of fragments, all lanes of a warp one after the other, for tests/test_dropout_fragments.py.
#include "attention/dropout.cuh"

using namespace fa3;

namespace {

Dropout dropout_of(const void* seed_array, int seed_type) {
  return {true, 0, 0, 1.f, 0, seed_array, static_cast<Dropout::SeedType>(seed_type)};
}

Dropout dropout_of(uint32_t threshold, uint32_t inverted) {
  return {true, threshold, inverted, 1.f, 0, nullptr, Dropout::SeedType::kInt64};
}

constexpr int kBlocks = 4;  // of 16 queries

template <int kWords>
void drop_queries(uint64_t seed, const Dropout& dropout, int head, int batch, int first_query, int first_key,
                  uint32_t (*words)[kWords]) {
  const Philox philox(seed, head, batch);
  for (int lane = 0; lane < 32; ++lane) drop(words[lane], dropout, philox, first_query, first_key, lane);
}

}  // namespace

extern "C" {

/// words (32, 4 blocks): each lane's of 16 queries and 16 `blocks` keys, 4 or 5.
void drop_queries(uint64_t seed, uint32_t threshold, uint32_t inverted, int head, int batch, int first_query,
                  int first_key, int blocks, uint32_t* words) {
  const Dropout dropout = dropout_of(threshold, inverted);
  if (blocks == 4)
    drop_queries(seed, dropout, head, batch, first_query, first_key, reinterpret_cast<uint32_t (*)[16]>(words));
  else
    drop_queries(seed, dropout, head, batch, first_query, first_key, reinterpret_cast<uint32_t (*)[20]>(words));
}

/// Each lane's of 16 keys and 64 queries. halves (32, 16): ones for what is kept; elements (32, 32): one by one.
void keep_keys(uint64_t seed, uint32_t threshold, uint32_t inverted, int head, int batch, int first_key,
               int first_query, uint32_t* halves, bool* elements) {
  const Philox philox(seed, head, batch);
  const Dropout dropout = dropout_of(threshold, inverted);
  uint32_t own[32];
  for (int lane = 0; lane < 32; ++lane)
    own[lane] = draw_for_keys<kBlocks>(dropout, philox, first_key, first_query, lane);
  for (int lane = 0; lane < 32; ++lane) {
    const uint32_t kept = kept_of_keys(own[lane], own[lane ^ 4], lane);
    for (int i = 0; i < 4 * kBlocks; ++i) halves[4 * kBlocks * lane + i] = kept_halves(&kept, i);
    for (int i = 0; i < 8 * kBlocks; ++i) elements[8 * kBlocks * lane + i] = is_kept(&kept, i);
  }
}

uint64_t seed_in(const void* array, int type) { return dropout_of(array, type).seed(); }

}  // extern "C"
