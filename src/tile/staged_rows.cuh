// Rows of 16-bit elements in shared memory, between registers and device memory.
#pragma once
#include <cstdint>

namespace fa3 {

/// A warp's 16 rows of output on their way to memory, 64 or 32 columns of them: 8 or 4 vectors of 16 bytes a row,
/// swizzled, so that 8 rows' equal vectors and the vectors of 128 bytes' rows each meet all banks.
template <int kColumns>
struct alignas(128) StagedColumns {
  static constexpr int kRows = 16, kVectors = kColumns / 8, kPairs = kVectors / 2;
  uint4 vector[kRows][kVectors];

  __device__ __forceinline__ uint4* at(uint32_t row, uint32_t column) {
    return &vector[row][column ^ row / (8 / kVectors) % kVectors];
  }
};
using StagedRows = StagedColumns<64>;

}  // namespace fa3
