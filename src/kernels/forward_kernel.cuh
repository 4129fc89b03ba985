// The forward kernel: one producer warp, two or three consumer warpgroups, tiles until there are none left.
#pragma once
#include "arch/warpgroup.cuh"
#include "kernels/forward_epilogue.cuh"
#include "kernels/forward_load.cuh"
#include "kernels/forward_mma.cuh"
#include "variants.h"

namespace fa3 {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    forward_kernel(const __grid_constant__ ForwardArgs args) {
  using Shared = ForwardShared<Traits>;
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);

  const int warpgroup = arch::uniform(threadIdx.x / 128);
  if (threadIdx.x == 0) {
    shared.init_barriers();
    arch::publish_barriers();
  }
  __syncthreads();

  if (warpgroup == Traits::kConsumers) {
    arch::shrink_registers<Traits::kProducerRegisters>();
    if (arch::uniform(threadIdx.x / 32) == 4 * Traits::kConsumers) {  // a lone warp would save no registers
      Producer<Traits> producer(args, shared);
      producer.run(threadIdx.x % 32);
    }
  } else {
    arch::grow_registers<Traits::kConsumerRegisters>();
    Consumer<Traits> consumer(args, shared, warpgroup);
    float o[Traits::kHeadDimV / 2];
    while (const TileWork* work = consumer.next()) {
      consumer.attend(*work, o);
      store_rows<Traits>(args, *work, consumer.first_row(*work) + 16 * consumer.warp(), consumer.lane(), o,
                         consumer.softmax());
      consumer.done();
    }
    consumer.finish();
  }
}

/// Launch on the current device, whose shared memory limit is raised the first time.
template <class Traits>
cudaError_t launch_forward(const ForwardArgs& args, int grid, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(ForwardShared<Traits>);
  static_assert(Traits::kBlocksPerSm * (kSharedBytes + 1024) <= 228 * 1024,
                "a multiprocessor has 228 KB of shared memory, and keeps 1 KB for each thread block");
  const cudaError_t error =
      cudaFuncSetAttribute(forward_kernel<Traits>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  forward_kernel<Traits><<<grid, Traits::kThreads, kSharedBytes, stream>>>(args);
  return cudaGetLastError();
}

template <class Traits>
ForwardVariant describe_forward(const char* name, int dtype) {
  return {name,
          dtype,
          Traits::kHeadDim,
          Traits::kHeadDimV,
          Traits::kConsumers,
          Traits::kTileN,
          Traits::kThreads,
          static_cast<int>(sizeof(ForwardShared<Traits>)),
          Traits::kBlocksPerSm,
          Traits::kSwizzleQK,
          Traits::kSwizzleV,
          launch_forward<Traits>};
}

}  // namespace fa3
