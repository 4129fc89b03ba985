#pragma once
#include <cuda_runtime.h>

#include "kernels/backward_args.h"

namespace fa3 {

/// Before the main kernel: each query's lse and delta = sum(dO * O) - dlse, zeros for dQ's turns and for all
/// counts, and each query tile's part of the sinks' gradient.
cudaError_t prepare_backward(const PrepareBackwardArgs& args, int dtype, cudaStream_t stream);

/// The sinks' gradients (num_heads) from their parts, in one order.
cudaError_t sum_sinks(const BackwardScratch& scratch, int num_heads, float* dsinks, cudaStream_t stream);

/// Zeros in the rows of a gradient that no sequence has in use.
cudaError_t clear_unused_rows(const RowArray& array, const Lengths& lengths, int batch, int heads, int head_dim,
                              cudaStream_t stream);

}  // namespace fa3
