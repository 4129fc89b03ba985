#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fa3 {

/// An operand of any strides: element (b, r, h, d) is at b stride[0] + r stride[1] + h stride[2] + d.
struct RowsToCopy {
  const void* data;
  int64_t stride[3];
  int batch, rows, heads, head_dim;
  int element_bytes;  // 2, or 1 where head_dim is a multiple of 16
};

/// Copy it to `packed`, contiguous as (batch, row, head, dim), for operands that TMA cannot address.
cudaError_t copy_rows(const RowsToCopy& source, void* packed, cudaStream_t stream);

}  // namespace fa3
