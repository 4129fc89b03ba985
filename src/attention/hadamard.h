// The random-sign Hadamard rotation of a head dim: blocks of the powers of two that it is the sum of, largest first.
#pragma once
#include <cstdint>

#include "arch/host_device.h"

namespace fa3 {

/// Whether the rotation turns the sign of this dim before all else: a hash of the dim, the same on every device.
FA3_HOST_DEVICE constexpr bool hadamard_negates(int dim) {
  // The seed is the one of the first 20,000 whose signs, seen as a row, the rotation itself spreads best.
  uint32_t mixed = static_cast<uint32_t>(dim + 738) * 0x9E3779B1u;
  mixed ^= mixed >> 16;
  return (mixed * 0x85EBCA6Bu) >> 31;
}

/// Dims of the block that this dim is rotated within: 64 for the first 64 of 80, 16 for the rest.
FA3_HOST_DEVICE constexpr int hadamard_block(int dim, int head_dim) {
  int first = 0;
  for (int size = 1 << 30; size > 0; size >>= 1) {
    if (!(head_dim & size)) continue;
    if (dim < first + size) return size;
    first += size;
  }
  return 1;  // past the last: a block of its own, which a rotation leaves alone
}

/// 1 / sqrt(block), correctly rounded: a power of two, or one times 1 / sqrt(2).
FA3_HOST_DEVICE constexpr float hadamard_norm(int block) {
  float norm = 1;
  for (; block >= 4; block /= 4) norm /= 2;
  return block == 2 ? norm * 0.70710678118654752f : norm;
}

}  // namespace fa3
