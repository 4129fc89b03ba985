// Bulk copies of plain memory by the copy engine, and turns that thread blocks take in device memory.
#pragma once
#include "arch/barrier.cuh"

namespace fa3::arch {

/// `bytes` (a multiple of 16, as both addresses) into shared memory; they count on `barrier`.
__device__ __forceinline__ void load_bytes(void* shared, const void* global, uint32_t bytes, Barrier& barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(&barrier.word))
               : "memory");
}

/// The same for both thread blocks of a cluster of two: into the same place of each, on its own barrier there.
__device__ __forceinline__ void load_bytes_for_both(void* shared, const void* global, uint32_t bytes,
                                                    Barrier& barrier) {
  const uint16_t blocks = 0b11;
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
      "%4;" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(&barrier.word)), "h"(blocks)
      : "memory");
}

/// Add floats of shared memory to those in device memory, each atomically, as one group of this thread.
__device__ __forceinline__ void add_floats(float* global, const float* shared, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/// Write floats of shared memory over those in device memory, as one group of this thread.
__device__ __forceinline__ void store_floats(float* global, const float* shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared_address(shared)),
               "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/// Until this thread's groups have read shared memory, which may then be written again.
__device__ __forceinline__ void wait_until_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

/// Until this thread's groups, but for the `kLater` last ones, are done in device memory too.
template <int kLater = 0>
__device__ __forceinline__ void wait_until_added() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kLater) : "memory");
}

/// Order what this thread wrote or read in device memory before what the copy engine does there, or after it.
__device__ __forceinline__ void fence_async_proxy_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

/// What stands in device memory, with all that came before it.
__device__ __forceinline__ uint32_t peek(const uint32_t* state) {
  uint32_t now;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(state) : "memory");
  return now;
}

/// The same, but from then on 1 if it was 0.
__device__ __forceinline__ uint32_t claim(uint32_t* state) {
  uint32_t was;
  asm volatile("atom.acquire.gpu.global.cas.b32 %0, [%1], 0, 1;" : "=r"(was) : "l"(state) : "memory");
  return was;
}

/// Wait for `turn` in device memory, which others count up. It may be over: sequences that overlap share turns.
__device__ __forceinline__ void wait_for_turn(const uint32_t* turns, uint32_t turn) {
  while (peek(turns) < turn) {
  }
  fence_async_proxy_global();
}

/// What this thread's bulk additions did comes before what whoever has the next turn does.
__device__ __forceinline__ void pass_turn(uint32_t* turns) {
  fence_async_proxy_global();
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(turns) : "memory");
}

}  // namespace fa3::arch
