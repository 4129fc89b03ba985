// Copies of 16 bytes into shared memory, each from where its thread says.
#pragma once
#include <cstdint>

namespace fa3::arch {

/// 16 bytes, both addresses aligned to as many; without `exists` zeros, and nothing is read.
__device__ __forceinline__ void copy_vector(uint32_t shared, const void* global, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(exists ? 16 : 0)
               : "memory");
}

/// This thread's copies since the last such call are a group.
__device__ __forceinline__ void close_vectors() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Until this thread's groups, but for the `kLater` last ones, are there, for it to see.
template <int kLater>
__device__ __forceinline__ void wait_for_vectors() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLater) : "memory");
}

}  // namespace fa3::arch
