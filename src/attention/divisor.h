// Division by a number that is known before the launch.
#pragma once
#include <cstdint>

#include "arch/host_device.h"

namespace fa3 {

/// Divides by `divisor` with one product. A lone warp waits some 250 cycles for a division by a number that only the
/// launch knows, and a thread block cannot load anything before it knows its first piece of work.
struct Divisor {
  int divisor;
  uint32_t multiplier;  // 2^shift / divisor, rounded up: below 2^32
  int shift;

  /// divisor > 0
  FA3_HOST_DEVICE static constexpr Divisor of(int divisor) {
    int bits = 0;
    while (uint32_t{1} << bits < static_cast<uint32_t>(divisor)) ++bits;
    const int shift = 31 + bits;
    return {divisor, static_cast<uint32_t>(((uint64_t{1} << shift) + divisor - 1) / divisor), shift};
  }

  /// n / divisor, for n >= 0. What rounding up adds to n * multiplier stays below the next quotient's 2^shift.
  FA3_HOST_DEVICE constexpr int quotient(int n) const {
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * multiplier >> shift);
  }
};

}  // namespace fa3
