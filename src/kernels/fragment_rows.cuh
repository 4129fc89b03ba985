// Accumulators of a warp's 16 rows, from registers to a 16-bit array in device memory.
#pragma once
#include "arch/convert.cuh"
#include "arch/fragments.cuh"
#include "kernels/backward_args.h"
#include "tile/staged_rows.cuh"

namespace fa3 {

/// 16 rows of an array, of which `rows` exist, as do `columns` of each; both may be more.
struct RowTarget {
  uint16_t* first;
  int64_t stride;  // elements between rows
  int rows, columns;
  bool vectors;
};

/// Write the accumulators of a product with N columns, kCount = N / 2, times `scale`. They go through shared memory, 64
/// columns at a time, so that 8 lanes write a row in one stretch. A warp stands alone here.
template <class Element, int kCount>
__device__ __forceinline__ void store_fragment(StagedRows& staging, const float (&x)[kCount], float scale,
                                               const RowTarget& to, int lane) {
  constexpr int kPairs = kCount / 8;  // of 16 columns each
  constexpr int kRowsAtOnce = 32 / StagedRows::kVectors;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    auto pack = [&](int at) { return arch::pack<Element>(x[8 * i + at] * scale, x[8 * i + at + 1] * scale); };
    arch::store_matrices(staging.at(lane % 16, 2 * (i % StagedRows::kPairs) + lane / 16), pack(0), pack(2), pack(4),
                         pack(6));
    if (i % StagedRows::kPairs < StagedRows::kPairs - 1 && i < kPairs - 1) continue;
    __syncwarp();
    const int column = 16 * (i / StagedRows::kPairs * StagedRows::kPairs) + 8 * (lane % StagedRows::kVectors);
#pragma unroll
    for (int turn = 0; turn < StagedRows::kRows / kRowsAtOnce; ++turn) {
      const int row = kRowsAtOnce * turn + lane / StagedRows::kVectors;
      if (row >= to.rows || column >= to.columns || column >= 2 * kCount) continue;
      const uint4 vector = *staging.at(row, lane % StagedRows::kVectors);
      uint16_t* const target = to.first + row * to.stride + column;
      if (to.vectors) {
        *reinterpret_cast<uint4*>(target) = vector;
      } else {
        const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
        for (int e = 0; e < 8; ++e) target[e] = static_cast<uint16_t>(words[e / 2] >> 16 * (e % 2));
      }
    }
    __syncwarp();
  }
}

}  // namespace fa3
