// How kernels are launched that ask for nothing but threads.
#pragma once
#include <cuda_runtime.h>

namespace fa3 {

template <class... Parameters, class... Args>
cudaError_t launch_plainly(void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream,
                           const Args&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = static_cast<unsigned>(threads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace fa3
