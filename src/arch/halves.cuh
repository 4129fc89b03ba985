// Comparing the two halves of a word at once.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fa3::arch {

/// Which halves of a word are at least those of `bound`: one instruction for both.
struct HalvesAtLeast {
  bool low, high;

  __device__ __forceinline__ HalvesAtLeast(uint32_t word, uint32_t bound) { __vibmax_u16x2(word, bound, &high, &low); }
};

}  // namespace fa3::arch
