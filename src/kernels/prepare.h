#pragma once
#include <cuda_runtime.h>

#include "kernels/prepare_args.h"

namespace fa3 {

/// Enqueue what a call with a cache needs before its attention: new keys and values into the cache, turned queries,
/// and the lengths that the cache then has. `dtype` is an fa3_dtype of 16 bits.
cudaError_t launch_prepare(const PrepareArgs& args, int dtype, cudaStream_t stream);

}  // namespace fa3
