// How both kernels of quantisation are launched.
#pragma once
#include <cuda_runtime.h>

#include "kernels/quantize_args.h"

namespace fa3 {

/// Enqueue `kKernel` on `device`, the current one, with so much dynamic shared memory, of at most `kMostBytes`.
template <void (*kKernel)(QuantizeArgs), int kMostBytes>
cudaError_t launch_quantize_kernel(const QuantizeArgs& args, int threads, size_t bytes, int device,
                                   cudaStream_t stream) {
  constexpr int kRemembered = 64;      // devices; those past it are told each time
  static uint8_t raised[kRemembered];  // what the kernel may ask for
  if (device >= kRemembered || !__atomic_load_n(&raised[device], __ATOMIC_RELAXED)) {
    const cudaError_t error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostBytes);
    if (error != cudaSuccess) return error;
    if (device < kRemembered) __atomic_store_n(&raised[device], uint8_t{1}, __ATOMIC_RELAXED);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(args.groups) * args.blocks_per_group;
  config.blockDim = threads;
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributePreferredSharedMemoryCarveout;
  attributes[0].val.sharedMemCarveout = cudaSharedmemCarveoutMaxShared;  // or too few blocks are resident
  attributes[1].id = cudaLaunchAttributeCooperative;  // blocks wait for each other: all must be resident
  attributes[1].val.cooperative = 1;
  config.attrs = attributes;
  config.numAttrs = args.blocks_per_group > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kKernel, args);
}

}  // namespace fa3
