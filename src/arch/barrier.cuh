// Shared memory barriers of the copy engine and the warps, and the loads that complete on them.
#pragma once
#include <cuda.h>

#include <cuda/ptx>

#include "arch/wgmma.cuh"

namespace fa3::arch {

/// A hardware barrier. A phase ends when its arrivals and its announced bytes are all in; phases alternate in parity.
struct Barrier {
  uint64_t word;

  __device__ __forceinline__ void init(int arrivals) { cuda::ptx::mbarrier_init(&word, arrivals); }

  __device__ __forceinline__ void wait(uint32_t parity) {
    while (!cuda::ptx::mbarrier_try_wait_parity(&word, parity)) {
    }
  }

  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&word)) : "memory");
  }

  /// Arrive, and announce what the copy engine will bring.
  __device__ __forceinline__ void arrive_expecting(uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&word)), "r"(bytes)
                 : "memory");
  }
};

/// Order this thread's ordinary writes to shared memory before what tensor cores and the copy engine do there next.
__device__ __forceinline__ void fence_async_proxy() { cuda::ptx::fence_proxy_async(cuda::ptx::space_shared); }

/// Make initialised barriers visible to the copy engine; a __syncthreads() must follow for the other threads.
__device__ __forceinline__ void publish_barriers() {
  cuda::ptx::fence_mbarrier_init(cuda::ptx::sem_release, cuda::ptx::scope_cluster);
}

/// Fetch a map into the copy engine's cache before the first load needs it.
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/// One box of an operand with kAxes axes into shared memory; its bytes count on `barrier`.
template <int kAxes>
__device__ __forceinline__ void load_box(void* shared, const CUtensorMap* map, const int32_t (&at)[kAxes],
                                         Barrier& barrier) {
  cuda::ptx::cp_async_bulk_tensor(cuda::ptx::space_cluster, cuda::ptx::space_global, shared, map, at, &barrier.word);
}

}  // namespace fa3::arch
