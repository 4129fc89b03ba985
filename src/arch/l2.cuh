// What goes by way of L2, as others write it there and L1 would not know: four floats that one thread alone stores and
// reads, and pairs of words that thread blocks leave for each other; and what will be read soon.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fa3::arch {

__device__ __forceinline__ void store_to_l2(float4* to, const float4& x) {
  asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
               : "memory");
}

/// The sum is on its way: nobody waits for it but a load of this thread's that follows.
__device__ __forceinline__ void add_to_l2(float4* to, const float4& x) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x.x), "f"(x.y), "f"(x.z),
               "f"(x.w)
               : "memory");
}

__device__ __forceinline__ float4 load_from_l2(const float4* from) {
  float4 x;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(from)
               : "memory");
  return x;
}

/// Two words side by side, at 16 bytes. Each is stored and loaded whole; both together only most often.
__device__ __forceinline__ void store_pair_to_l2(uint64_t* to, uint64_t first, uint64_t second) {
  asm volatile("st.relaxed.gpu.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(first), "l"(second) : "memory");
}

__device__ __forceinline__ void load_pair_from_l2(uint64_t* from, uint64_t& first, uint64_t& second) {
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(first), "=l"(second) : "l"(from) : "memory");
}

/// The line of L2 in which `at` lies is on its way: nobody waits.
__device__ __forceinline__ void prefetch_to_l2(const void* at) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(at)) : "memory");
}

}  // namespace fa3::arch
