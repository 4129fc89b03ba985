// Dropout, as a call gives it to its kernels.
#pragma once
#include <cstdint>

#include "arch/host_device.h"

namespace fa3 {

/// A call's dropout.
struct Dropout {
  enum class SeedType { kInt64, kInt32, kUint32 };

  bool active;
  // In both halves of the first: an element is kept if its 15 bits are at least this. Or, where the second has ones and
  // not zeros, if they are below it.
  uint32_t threshold, inverted;
  float scale;             // of what is kept; 1 without dropout
  uint64_t number;         // the seed, where no array holds it
  const void* seed_array;  // one integer in device memory, or null
  SeedType seed_type;

  /// Read each time: a graph that is replayed may have another one in its array.
  FA3_HOST_DEVICE uint64_t seed() const {
    if (!seed_array) return number;
    if (seed_type == SeedType::kInt32) return static_cast<uint64_t>(int64_t{*static_cast<const int32_t*>(seed_array)});
    if (seed_type == SeedType::kUint32) return *static_cast<const uint32_t*>(seed_array);
    return *static_cast<const uint64_t*>(seed_array);
  }
};

}  // namespace fa3
