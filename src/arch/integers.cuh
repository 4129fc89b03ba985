// Integers: both halves of a word compared at once, and the whole of a product.
#pragma once
#include <cstdint>

namespace fa3::arch {

/// Ones in each half of a word whose low 15 bits are at least those of `bound`, whose halves are 0x7c00 at most. As
/// numbers of 16 bits without their sign they are ordered as integers are, and what is no number lies above the rest.
__device__ __forceinline__ uint32_t halves_at_least(uint32_t word, uint32_t bound) {
  uint32_t ones;
  asm("{.reg .b32 positive;\n"
      "abs.f16x2 positive, %1;\n"
      "set.geu.u32.f16x2 %0, positive, %2;}"
      : "=r"(ones)
      : "r"(word), "r"(bound));
  return ones;
}

/// Ones in each half whose top bit is set.
__device__ __forceinline__ uint32_t halves_of_top_bits(uint32_t word) {
  uint32_t ones;
  asm("prmt.b32 %0, %1, %1, 0xbb99;" : "=r"(ones) : "r"(word));
  return ones;
}

/// All 64 bits of a product. Of one in C++ the compiler adds up zeros beside it.
__device__ __forceinline__ uint64_t wide_product(uint32_t a, uint32_t b) {
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
}

}  // namespace fa3::arch
