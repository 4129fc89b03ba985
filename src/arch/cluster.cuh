// Thread blocks of a cluster: they run at the same time, and read each other's shared memory.
#pragma once
#include <cstdint>

#include "arch/barrier.cuh"

namespace fa3::arch {

/// Thread blocks of this one's cluster; 1 if it was launched without one.
__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
  return size;
}

/// Arrive, and wait for every thread of the cluster that has not ended. What it has written to shared memory before is
/// then to be seen.
__device__ __forceinline__ void cluster_publish() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_acquire() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/// Both: at the start for the others' barriers, at the end for their last arrivals at this one's.
__device__ __forceinline__ void cluster_meet() {
  cluster_publish();
  cluster_acquire();
}

/// The same where nothing that this thread has written is to be seen: a release would wait until it is.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

/// Write to the same place as `own` in thread block `rank`, which counts the bytes on `barrier` there.
__device__ __forceinline__ void send(int* own, int value, Barrier& barrier, uint32_t rank) {
  asm volatile(
      "{.reg .b32 there, full;\n"
      "mapa.shared::cluster.u32 there, %0, %3;\n"
      "mapa.shared::cluster.u32 full, %2, %3;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], %1, [full];}" ::"r"(shared_address(own)),
      "r"(value), "r"(shared_address(&barrier.word)), "r"(rank)
      : "memory");
}

/// Four floats.
__device__ __forceinline__ void send(float4* own, const float4& x, Barrier& barrier, uint32_t rank) {
  asm volatile(
      "{.reg .b32 there, full;\n"
      "mapa.shared::cluster.u32 there, %0, %6;\n"
      "mapa.shared::cluster.u32 full, %5, %6;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%1, %2, %3, %4}, [full];}" ::"r"(
          shared_address(own)),
      "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(shared_address(&barrier.word)), "r"(rank)
      : "memory");
}

/// Copy shared memory to `there` of thread block `rank`, by the copy engine; the bytes are announced and counted on
/// `barrier` there.
__device__ __forceinline__ void copy_to(void* there, const void* own, uint32_t bytes, Barrier& barrier, uint32_t rank) {
  asm volatile(
      "{.reg .b32 there, full;\n"
      "mapa.shared::cluster.u32 there, %0, %4;\n"
      "mapa.shared::cluster.u32 full, %3, %4;\n"
      "mbarrier.arrive.expect_tx.shared::cluster.b64 _, [full], %2;\n"
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [there], [%1], %2, [full];}" ::"r"(
          shared_address(there)),
      "r"(shared_address(own)), "r"(bytes), "r"(shared_address(&barrier.word)), "r"(rank)
      : "memory");
}

/// The same place as `own`, in shared memory, in that of thread block `rank` of the cluster.
__device__ __forceinline__ const float* in_block(const float* own, uint32_t rank) {
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(own), "r"(rank));
  return reinterpret_cast<const float*>(address);
}

}  // namespace fa3::arch
