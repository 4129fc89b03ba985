// What src/arch/integers.cuh says, on the CPU, and what else a lane of src/attention/dropout.cuh takes from CUDA.
#pragma once
#include <cstdint>

#define __device__
#define __forceinline__ inline

namespace fa3::arch {

inline uint32_t halves_at_least(uint32_t word, uint32_t bound) {
  return ((word & 0x7fff) >= (bound & 0xffff) ? 0xffff : 0) | ((word >> 16 & 0x7fff) >= bound >> 16 ? 0xffff0000 : 0);
}

inline uint32_t halves_of_top_bits(uint32_t word) {
  return (word >> 15 & 1 ? 0xffff : 0) | (word >> 31 ? 0xffff0000 : 0);
}

inline uint64_t wide_product(uint32_t a, uint32_t b) { return uint64_t{a} * b; }

}  // namespace fa3::arch

/// Bytes of two words, the first's counting from 0, chosen by the selector's digits.
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = a | static_cast<uint64_t>(b) << 32;
  uint32_t chosen = 0;
  for (int i = 0; i < 4; ++i) chosen |= (both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return chosen;
}
