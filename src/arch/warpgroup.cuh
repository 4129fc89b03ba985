// Registers and roles: setmaxnreg, warp-uniform indices, named barriers.
#pragma once
#include <cstdint>

namespace fa3::arch {

template <int kRegisters>
__device__ __forceinline__ void grow_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg takes multiples of 8");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void shrink_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg takes multiples of 8");
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

/// The same value for every lane, in a form that the compiler knows to be uniform.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

/// True for the lane of a warp that does what is to be done once.
__device__ __forceinline__ bool leads() { return threadIdx.x % 32 == 0; }

/// True for one lane of a warp, all of which calls. The compiler knows that it is one; a TMA load of any other single
/// lane stands in a loop over lanes.
__device__ __forceinline__ bool elected() {
  uint32_t elected;
  asm volatile(
      "{.reg .pred p;\n"
      "elect.sync _|p, -1;\n"
      "selp.u32 %0, 1, 0, p;}"
      : "=r"(elected));
  return elected;
}

/// Named barrier `id` (0 is __syncthreads') of `threads` threads: wait for all to arrive.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// The same, and whether any of them says so.
__device__ __forceinline__ bool barrier_any(int id, int threads, bool mine) {
  uint32_t any;
  asm volatile(
      "{.reg .pred mine, any;\n"
      "setp.ne.u32 mine, %3, 0;\n"
      "bar.red.or.pred any, %1, %2, mine;\n"
      "selp.u32 %0, 1, 0, any;}"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(static_cast<uint32_t>(mine))
      : "memory");
  return any;
}

/// Arrive without waiting.
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// threadIdx.x, read anew. What follows from it is then not held in registers between one use and the next: for what
/// comes after a main loop that needs them all.
__device__ __forceinline__ uint32_t thread_anew() {
  uint32_t x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

}  // namespace fa3::arch
