// Of src/arch/wgmma.cuh what the emulated kernels need: products of what descriptors say, each thread its own part.
#pragma once
#include "emulated.h"

namespace fa3::arch {

inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int kPending>
void wgmma_wait() {}
template <int kCount>
void wgmma_wrote(float (&)[kCount]) {}

/// From the beginning of the block's dynamic shared memory, which lies at a multiple of 1,024 bytes.
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - emulated::dynamic_shared());
}
inline uint32_t descriptor_address(const void* pointer) { return shared_address(pointer) >> 4; }

constexpr uint64_t descriptor_layout(int swizzle, int leading_offset, int stride_offset) {
  const uint64_t mode = swizzle == 128 ? 1 : swizzle == 64 ? 2 : 3;
  return uint64_t(leading_offset >> 4) << 16 | uint64_t(stride_offset >> 4) << 32 | mode << 62;
}
inline uint64_t descriptor(uint64_t layout, uint32_t address) { return layout + address; }

/// Of an operand that a descriptor describes, along whose rows the contraction runs: its element at (row, k).
template <class Element>
float operand(uint64_t descriptor, int row, int k) {
  const uint32_t begin = (descriptor & 0x3fff) << 4, eight_rows = (descriptor >> 32 & 0x3fff) << 4;
  const uint32_t mode = descriptor >> 62, swizzle = mode == 1 ? 128 : mode == 2 ? 64 : 32;
  const uint32_t at = begin + row / 8 * eight_rows + row % 8 * swizzle + 2 * k;
  Element element;
  std::memcpy(&element, emulated::dynamic_shared() + (at ^ (at >> 3 & (swizzle - 1) & 0x70)), 2);
  if constexpr (std::is_same_v<Element, BFloat16>)
    return __uint_as_float(uint32_t{element.bits} << 16);
  else
    return half_to_float(element);
}

template <class Element, int kN>
struct WgmmaSS {
  static void mma(float (&d)[kN / 2], uint64_t a, uint64_t b, int accumulate) {
    const int thread = static_cast<int>(threadIdx.x) % 128, first_row = thread / 32 * 16 + thread % 32 / 4;
    float rows[2][16];
    for (int i = 0; i < 32; ++i) rows[i / 16][i % 16] = operand<Element>(a, first_row + i / 16 * 8, i % 16);
    for (int pair = 0; pair < kN / 8; ++pair)
      for (int second = 0; second < 2; ++second) {
        float* sums[] = {&d[4 * pair + second], &d[4 * pair + 2 + second]};
        if (!accumulate) *sums[0] = *sums[1] = 0;
        for (int k = 0; k < 16; ++k) {
          const float factor = operand<Element>(b, 8 * pair + thread % 4 * 2 + second, k);
          *sums[0] += rows[0][k] * factor;
          *sums[1] += rows[1][k] * factor;
        }
      }
  }
};

}  // namespace fa3::arch
