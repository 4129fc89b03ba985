#pragma once
#include <cuda_runtime.h>

#include "fa3.h"

namespace fa3 {

/// With FA3_CHECK=1 in the environment: read the lengths back, which waits for the stream, and check them. Else
/// nothing.
fa3_status slow_checks(const fa3_forward_params& params, cudaStream_t stream);
fa3_status slow_checks(const fa3_backward_params& params, cudaStream_t stream);
fa3_status slow_checks(const fa3_quantize_params& params, cudaStream_t stream);

}  // namespace fa3
