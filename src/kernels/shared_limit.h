// Kernels that want more shared memory than 48 KB have to say so once on each device.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fa3 {

/// Raise what `kKernel` may ask for on `device`, the current one, to `bytes`, the first time.
template <auto kKernel>
cudaError_t raise_shared_limit(int bytes, int device) {
  constexpr int kRemembered = 64;      // devices; those past it are told each time
  static uint8_t raised[kRemembered];  // <atomic> is half of a file's headers
  if (device < kRemembered && __atomic_load_n(&raised[device], __ATOMIC_RELAXED)) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess && device < kRemembered) __atomic_store_n(&raised[device], uint8_t{1}, __ATOMIC_RELAXED);
  return error;
}

}  // namespace fa3
