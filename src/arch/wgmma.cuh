// Warpgroup matrix products: their order, and the shared memory descriptors they read.
#pragma once
#include <cstdint>

#include "wgmma_shapes.h"

namespace fa3::arch {

/// Before the first product that reads registers or shared memory written since the last one.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/// Wait until at most kPending groups are in flight.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// An accumulator that a finished product wrote: keeps the compiler from reading it before the wait.
template <int kCount>
__device__ __forceinline__ void wgmma_wrote(float (&accumulator)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(accumulator[i])::"memory");
}

/// A product's operand in registers: keeps the compiler from making it between products, whose order it would break.
template <int kCount>
__device__ __forceinline__ void wgmma_reads(uint32_t (&operand)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(operand[i])::"memory");
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// The same for a descriptor, in units of 16 bytes. What is above the block's own 256 KB says which block of a cluster
/// it is.
__device__ __forceinline__ uint32_t descriptor_address(const void* pointer) {
  return (shared_address(pointer) & 0x3ffff) >> 4;
}

/// A descriptor's constant part (PTX ISA, "matrix descriptor"): byte offsets in bits 16-29 and 32-45, swizzle in 62-63.
/// The address joins in bits 0-13; all three count 16 bytes.
__host__ __device__ constexpr uint64_t descriptor_layout(int swizzle, int leading_offset, int stride_offset) {
  const uint64_t mode = swizzle == 128 ? 1 : swizzle == 64 ? 2 : 3;
  return uint64_t(leading_offset >> 4) << 16 | uint64_t(stride_offset >> 4) << 32 | mode << 62;
}

/// The whole of it. The address and the offset beside it share a word, and a 32-bit sum keeps both in one register.
__device__ __forceinline__ uint64_t descriptor(uint64_t layout, uint32_t address) {
  return layout >> 32 << 32 | static_cast<uint32_t>(layout) + address;
}

}  // namespace fa3::arch
