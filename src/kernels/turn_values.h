#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fa3 {

/// e4m3 values of any strides that are multiples of 16, as their address is: element (b, r, h, d) is at b stride[0] + r
/// stride[1] + h stride[2] + d.
struct ValuesToTurn {
  const void* data;
  int64_t stride[3];
  int batch, rows, heads, head_dim;
};

/// Turn them as tile/transpose.h says, `dims` columns wide, of which those past head_dim are zeros: (batch, head, step
/// of 32 keys, dim, place), with as many steps as make whole blocks of `block_keys`. Keys past the last row are zeros.
cudaError_t turn_values(const ValuesToTurn& values, int dims, int block_keys, void* turned, cudaStream_t stream);

}  // namespace fa3
