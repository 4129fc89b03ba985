// Of the driver's header what emulated kernels need: a map of TMA as what it says.
#pragma once
#include <cstdint>

struct CUtensorMap {
  const uint8_t* data;
  int64_t extents[4];  // elements of 16 bits, and the other axes
  int64_t strides[4];  // bytes
  int columns, rows;   // of a box
  int swizzle;         // bytes
};
