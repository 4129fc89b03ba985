// CUDA's language for g++: what kernels are written with, on the threads of threads.h. Only what the kernels of src/
// use is here.
#pragma once
#include <math.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <type_traits>
#include <utility>

#include "arch/elements.h"
#include "threads.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ thread_local
#define __align__(bytes) __attribute__((aligned(bytes)))

#include "arch/integers.cuh"

using std::max;
using std::min;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulated {
struct Index {
  const unsigned& x;
};
}  // namespace emulated
#define threadIdx (emulated::Index{emulated::thread_number})

inline void __syncthreads() { emulated::block->meet_block(); }
inline void __syncwarp() { emulated::block->gather(0); }

/// What lane `source(lane)` of the warp has.
template <class T, class Source>
T of_lane(T value, Source source) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  const uint64_t* const lanes = emulated::block->gather(std::bit_cast<Bits>(value));
  return std::bit_cast<T>(static_cast<Bits>(lanes[source(threadIdx.x % 32)]));
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return of_lane(value, [lane](unsigned) { return lane % 32; });
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return of_lane(value, [mask](unsigned lane) { return lane ^ mask; });
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned step) {
  return of_lane(value, [step](unsigned lane) { return lane < step ? lane : lane - step; });
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  const uint64_t* lanes = emulated::block->gather(predicate != 0);
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane) ballot |= static_cast<unsigned>(lanes[lane]) << lane;
  return ballot;
}
inline int __any_sync(unsigned all, int predicate) { return __ballot_sync(all, predicate) != 0; }
inline int __all_sync(unsigned all, int predicate) { return __ballot_sync(all, predicate) == ~0u; }
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  const uint64_t* lanes = emulated::block->gather(value);
  return static_cast<unsigned>(*std::max_element(lanes, lanes + 32));
}
inline void __nanosleep(unsigned) { emulated::block->poll(); }

inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline int __popc(unsigned value) { return std::popcount(value); }
inline int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }
inline int __ffs(int value) { return value ? std::countr_zero(static_cast<unsigned>(value)) + 1 : 0; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.f / a; }
inline float __log2f(float x) { return std::log2(x); }

template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
template <class T>
void __stcs(T* to, T value) {
  *to = value;
}
inline size_t __cvta_generic_to_global(const void* address) { return reinterpret_cast<size_t>(address); }
template <class T>
T atomicAdd(T* word, T value) {
  return std::exchange(*word, *word + value);
}
template <class T>
T atomicMax(T* word, T value) {
  return std::exchange(*word, std::max(*word, value));
}
template <class T>
T atomicCAS(T* word, T expected, T value) {
  return *word == expected ? std::exchange(*word, value) : *word;
}

inline float half_to_float(fa3::Float16 half) { return static_cast<float>(std::bit_cast<_Float16>(half.bits)); }
