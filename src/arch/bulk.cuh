// Bulk copies of plain memory by the copy engine, and turns that thread blocks take in device memory.
#pragma once
#include <cuda/ptx>

#include "arch/barrier.cuh"

namespace fa3::arch {

/// `bytes` (a multiple of 16, as both addresses) into shared memory; they count on `barrier`.
__device__ __forceinline__ void load_bytes(void* shared, const void* global, uint32_t bytes, Barrier& barrier) {
  cuda::ptx::cp_async_bulk(cuda::ptx::space_cluster, cuda::ptx::space_global, shared, global, bytes, &barrier.word);
}

/// Add floats of shared memory to those in device memory, each atomically, as one group of this thread.
__device__ __forceinline__ void add_floats(float* global, const float* shared, uint32_t bytes) {
  cuda::ptx::cp_reduce_async_bulk(cuda::ptx::space_global, cuda::ptx::space_shared, cuda::ptx::op_add, global, shared,
                                  bytes);
  cuda::ptx::cp_async_bulk_commit_group();
}

/// Until this thread's groups have read shared memory, which may then be written again.
__device__ __forceinline__ void wait_until_read() { cuda::ptx::cp_async_bulk_wait_group_read(cuda::ptx::n32_t<0>()); }

/// Until this thread's groups are done in device memory too.
__device__ __forceinline__ void wait_until_added() { cuda::ptx::cp_async_bulk_wait_group(cuda::ptx::n32_t<0>()); }

/// Wait for `turn` in device memory, which others count up.
__device__ __forceinline__ void wait_for_turn(const uint32_t* turns, uint32_t turn) {
  uint32_t now;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(turns) : "memory");
  } while (now != turn);
  cuda::ptx::fence_proxy_async(cuda::ptx::space_global);
}

/// What this thread's bulk additions did comes before what whoever has the next turn does.
__device__ __forceinline__ void pass_turn(uint32_t* turns) {
  cuda::ptx::fence_proxy_async(cuda::ptx::space_global);
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(turns) : "memory");
}

}  // namespace fa3::arch
