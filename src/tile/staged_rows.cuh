// Rows of 16-bit elements in shared memory, between registers and device memory.
#pragma once
#include <cstdint>

namespace fa3 {

/// A warp's 16 rows of output on their way to memory, 64 columns of them: 8 vectors of 16 bytes a row, swizzled, so
/// that 8 rows' equal vectors and a row's 8 vectors each meet all banks.
struct alignas(128) StagedRows {
  static constexpr int kRows = 16, kVectors = 8, kPairs = kVectors / 2;
  uint4 vector[kRows][kVectors];

  __device__ __forceinline__ uint4* at(uint32_t row, uint32_t column) { return &vector[row][column ^ row % kVectors]; }
};

}  // namespace fa3
