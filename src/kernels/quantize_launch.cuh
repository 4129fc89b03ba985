// How the kernels of quantisation are launched.
#pragma once
#include <cuda_runtime.h>

#include "kernels/quantize_args.h"
#include "kernels/shared_limit.h"

namespace fa3 {

/// Enqueue `kKernel` on `device`, the current one, with so much dynamic shared memory, of at most `kMostBytes`. `args`
/// is what it takes, and `common` is in there.
template <auto kKernel, int kMostBytes, class Args>
cudaError_t launch_quantize_kernel(const Args& args, const QuantizeArgs& common, int threads, size_t bytes, int device,
                                   cudaStream_t stream) {
  if (const cudaError_t error = raise_shared_limit<kKernel>(kMostBytes, device)) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(common.groups) * common.blocks_per_group;
  config.blockDim = threads;
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributePreferredSharedMemoryCarveout;
  attributes[0].val.sharedMemCarveout = cudaSharedmemCarveoutMaxShared;  // or too few blocks are resident
  attributes[1].id = cudaLaunchAttributeCooperative;  // blocks wait for each other: all must be resident
  attributes[1].val.cooperative = 1;
  config.attrs = attributes;
  config.numAttrs = common.blocks_per_group > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kKernel, args);
}

}  // namespace fa3
