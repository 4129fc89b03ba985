// What lies at multiples of so many bytes.
#pragma once
#include <cstdint>

#include "fa3.h"

namespace fa3 {

inline bool aligned(const void* address, int64_t bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

/// Whether an array's address and its steps between batch entries, rows and heads are multiples of `bytes`.
inline bool aligned(const fa3_array& array, int64_t itemsize, int64_t bytes) {
  bool all = aligned(array.data, bytes);
  for (int axis = 0; axis < 3; ++axis) all &= array.stride[axis] * itemsize % bytes == 0;
  return all;
}

}  // namespace fa3
