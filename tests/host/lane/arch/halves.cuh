// What src/arch/halves.cuh says, on the CPU, and what else a lane of src/attention/dropout.cuh takes from CUDA.
#pragma once
#include <cstdint>

#define __device__
#define __forceinline__ inline

namespace fa3::arch {

struct HalvesAtLeast {
  bool low, high;

  HalvesAtLeast(uint32_t word, uint32_t bound)
      : low((word & 0xffff) >= (bound & 0xffff)), high(word >> 16 >= bound >> 16) {}
};

}  // namespace fa3::arch

/// Bytes of two words, the first's counting from 0, chosen by the selector's digits.
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = a | static_cast<uint64_t>(b) << 32;
  uint32_t chosen = 0;
  for (int i = 0; i < 4; ++i) chosen |= (both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return chosen;
}
