#pragma once
#include <cuda_runtime.h>

#include "status.h"

namespace fa3 {

/// What a call of CUDA's runtime, or a launch, came to, as a status; `what` says which it was.
inline fa3_status checked(cudaError_t error, const char* what) {
  return check_cuda(error, what, cudaGetErrorString(error));
}

}  // namespace fa3
