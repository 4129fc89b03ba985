// Dropout: which elements of a fragment are kept. fa3/_philox.py says which random numbers decide, and why.
#pragma once
#include <cstdint>

#include "arch/halves.cuh"
#include "arch/warpgroup.cuh"
#include "attention/dropout.h"

namespace fa3 {

/// Random words of one head of a sequence.
struct Philox {
  uint32_t key_low, key_high;  // of the seed
  uint32_t head, batch;

  /// Four words that serve two queries times four keys; `pair` and `row` are the first numbers of the counter.
  FA3_HOST_DEVICE void draw(uint32_t pair, uint32_t row, uint32_t (&word)[4]) const {
    uint32_t c[4] = {pair, row, head, batch}, low = key_low, high = key_high;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint64_t first = uint64_t{0xD2511F53} * c[0], second = uint64_t{0xCD9E8D57} * c[2];
      c[0] = static_cast<uint32_t>(second >> 32) ^ c[1] ^ low;
      c[1] = static_cast<uint32_t>(second);
      c[2] = static_cast<uint32_t>(first >> 32) ^ c[3] ^ high;
      c[3] = static_cast<uint32_t>(first);
      low += 0x9E3779B9;
      high += 0xBB67AE85;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) word[i] = c[i];
  }
};

/// A head's words. The seed is made uniform, so that adding up its steps takes no lane's time or registers.
__device__ __forceinline__ Philox philox_of(const Dropout& dropout, int head, int batch) {
  const uint64_t seed = dropout.seed();
  return {static_cast<uint32_t>(arch::uniform(static_cast<int>(seed))),
          static_cast<uint32_t>(arch::uniform(static_cast<int>(seed >> 32))), static_cast<uint32_t>(head),
          static_cast<uint32_t>(batch)};
}

/// Zeros for what dropout takes of packed probabilities whose rows are queries: a lane's part of 16 rows from
/// `first_query` on, and of all columns from `first_key` on, both multiples of 16.
template <int kWords>
__device__ __forceinline__ void drop(uint32_t (&p)[kWords], const Philox& philox, uint32_t threshold, int first_query,
                                     int first_key, int lane) {
  const uint32_t row = first_query / 2 + lane / 4, pair = first_key / 4 + lane % 4;
#pragma unroll
  for (int block = 0; block < kWords / 4; ++block) {
    uint32_t random[4];
    philox.draw(pair + 4 * block, row, random);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const arch::HalvesAtLeast kept(random[i], threshold);
      if (!kept.low) p[4 * block + i] &= 0xffff0000;
      if (!kept.high) p[4 * block + i] &= 0xffff;
    }
  }
}

/// What a lane keeps of 16 kBlocks queries by 16 keys, where rows are keys. Bit 16 e + 4 b + 2 h + r: of block b's
/// queries, 8 h + e from the lane's first; of its keys, row r of two.
///
/// One call's words serve two neighbouring keys, so two lanes: each makes the calls of every other query, keeps what is
/// its key's, and gets the rest from the other. First its own calls; bits from 16 on are of the odd key.
template <int kBlocks>
__device__ __forceinline__ uint32_t draw_for_keys(const Philox& philox, uint32_t threshold, int first_key,
                                                  int first_query, int lane) {
  static_assert(kBlocks <= 4, "a word has the bits of four blocks");
  const uint32_t pair = first_key / 4 + lane / 8, row = first_query / 2 + 2 * (lane % 4) + lane / 4 % 2;
  uint32_t bits = 0;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    uint32_t random[4];
    philox.draw(pair, row + 8 * block, random);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const arch::HalvesAtLeast kept(random[i], threshold);
      const int bit = 4 * block + 2 * (i % 2) + i / 2;
      if (kept.low) bits |= 1u << bit;
      if (kept.high) bits |= 1u << 16 << bit;
    }
  }
  return bits;
}

/// The lane's own calls and those of lane ^ 4 together.
__device__ __forceinline__ uint32_t kept_of_keys(uint32_t own, uint32_t other, int lane) {
  return __byte_perm(own, other, lane / 4 % 2 ? 0x3276 : 0x5410);
}

/// Of such bits, those of a packed fragment's word `i`: bits 0 and 16.
FA3_HOST_DEVICE uint32_t kept_pair(const uint32_t* kept, int i) { return kept[i / 16] >> i % 16 & 0x10001; }

}  // namespace fa3
