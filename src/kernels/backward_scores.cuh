// What the backward does with a thread's elements of S, P and dP, whatever its tile.
#pragma once
#include "arch/convert.cuh"
#include "attention/dropout.cuh"

namespace fa3 {

template <int kCount>
__device__ __forceinline__ void clear(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = 0.f;
}

template <class Element, int kWords>
__device__ __forceinline__ void pack(const float (&x)[2 * kWords], uint32_t (&words)[kWords]) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = arch::pack<Element>(x[2 * i], x[2 * i + 1]);
}

/// The softcap's derivative, of its tanh.
__device__ __forceinline__ float slope(float tanh) {
  tanh = fmaxf(tanh, -1.f);  // minus infinity where P is 0
  return fmaf(-tanh, tanh, 1.f);
}

/// The gradient of what was dropped is 0, and that of the rest is still to be scaled.
template <int kCount, int kMasks>
__device__ __forceinline__ void keep(float (&dp)[kCount], const uint32_t (&kept)[kMasks]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (!is_kept(kept, i)) dp[i] = 0.f;
}

/// The probabilities that are left, for dV.
template <bool kDropout, int kWords, int kMasks>
__device__ __forceinline__ void drop(const uint32_t (&p)[kWords], const uint32_t (&kept)[kMasks],
                                     uint32_t (&left)[kWords]) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) left[i] = kDropout ? p[i] & kept_halves(kept, i) : p[i];
}

}  // namespace fa3
