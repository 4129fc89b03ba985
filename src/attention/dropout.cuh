// Dropout: which elements of a fragment are kept. fa3/_philox.py says which random numbers decide, and why.
#pragma once
#include <cstdint>

#include "arch/integers.cuh"
#include "arch/warpgroup.cuh"
#include "attention/dropout.h"

namespace fa3 {

/// Random words of one head of a sequence.
class Philox {
 public:
  __device__ __forceinline__ Philox(uint64_t seed, int head, int batch) : seed_(seed), head_(head), batch_(batch) {}

  /// Four words that serve two queries times eight keys; `pair` and `row` are numbers of the counter. Calls that differ
  /// in one of them alone have four of the first three rounds' six products in common, which the compiler sees.
  __device__ __forceinline__ void draw(uint32_t pair, uint32_t row, uint32_t (&word)[4]) const {
    uint32_t c[4] = {head_, pair, batch_, row};
    uint32_t low = static_cast<uint32_t>(seed_), high = static_cast<uint32_t>(seed_ >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint64_t first = arch::wide_product(c[0], 0xD2511F53), second = arch::wide_product(c[2], 0xCD9E8D57);
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

 private:
  const uint64_t seed_;
  const uint32_t head_, batch_;
};

/// A call's word for the first 16 of its keys and for the others, or another word: bytes that __byte_perm is to choose.
constexpr uint32_t kAsItIs = 0x3210, kTurned = 0x0321, kNext = 0x7654;

/// Zeros for what dropout takes of packed probabilities whose rows are queries: a lane's part of 16 rows from
/// `first_query` on, a multiple of 16, and of all columns from `first_key` on, a multiple of their number.
template <int kWords>
__device__ __forceinline__ void drop(uint32_t (&p)[kWords], const Dropout& dropout, const Philox& philox,
                                     int first_query, int first_key, int lane) {
  constexpr int kBlocks = kWords / 4, kCalls = (kBlocks + 1) / 2;  // a call serves two blocks of 16 columns
  const uint32_t row = first_query / 2 + lane / 4, pair = first_key / 32 * 4 + lane % 4;
  uint32_t random[kCalls][4];
#pragma unroll
  for (int call = 0; call < kCalls; ++call) philox.draw(pair + 4 * call, row, random[call]);
  // Of an odd number of blocks, the first may be the second one of its call.
  const bool late = kBlocks % 2 && first_key / 16 % 2;
  const uint32_t even = late ? kTurned : kAsItIs, odd = late ? kNext : kTurned;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t bits = random[block / 2][i];
      if (kBlocks % 2)
        bits = __byte_perm(bits, random[block / 2 + block % 2][i], block % 2 ? odd : even);
      else if (block % 2)
        bits = __byte_perm(bits, bits, kTurned);
      p[4 * block + i] &= arch::halves_at_least(bits, dropout.threshold) ^ dropout.inverted;
    }
  }
}

/// What a lane keeps of 16 kBlocks queries by 16 keys, where rows are keys. Bit 16 e + 4 b + 2 h + r: of block b's
/// queries, 8 h + e from the lane's first; of its keys, row r of two.
///
/// One call's words serve two neighbouring keys, so two lanes: each makes the calls of every other query, keeps what is
/// its key's, and gets the rest from the other. First its own calls; bits from 16 on are of the odd key.
template <int kBlocks>
__device__ __forceinline__ uint32_t draw_for_keys(const Dropout& dropout, const Philox& philox, int first_key,
                                                  int first_query, int lane) {
  static_assert(kBlocks <= 4, "a word has the bits of four blocks");
  const uint32_t pair = first_key / 32 * 4 + lane / 8, row = first_query / 2 + 2 * (lane % 4) + lane / 4 % 2;
  const uint32_t chosen = first_key / 16 % 2 ? kTurned : kAsItIs;
  uint32_t bits = 0;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    uint32_t random[4];
    philox.draw(pair, row + 8 * block, random);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      bits |= arch::halves_at_least(__byte_perm(random[i], 0, chosen), dropout.threshold) &
              0x10001u << (4 * block + 2 * (i % 2) + i / 2);
  }
  return bits ^ dropout.inverted;
}

/// The lane's own calls and those of lane ^ 4 together.
__device__ __forceinline__ uint32_t kept_of_keys(uint32_t own, uint32_t other, int lane) {
  return __byte_perm(own, other, lane / 4 % 2 ? 0x3276 : 0x5410);
}

/// Of such bits, that of element i of a fragment.
__device__ __forceinline__ bool is_kept(const uint32_t* kept, int i) {
  return kept[i / 32] >> (i / 2 % 16 + 16 * (i % 2)) & 1;
}

/// Ones in those halves of a packed fragment's word `i` that are kept.
__device__ __forceinline__ uint32_t kept_halves(const uint32_t* kept, int i) {
  return arch::halves_of_top_bits(kept[i / 16] << (15 - i % 16));
}

}  // namespace fa3
