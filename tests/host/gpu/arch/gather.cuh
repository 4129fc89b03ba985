// src/arch/gather.cuh on the emulated GPU.
#pragma once
#include <cuda_pipeline_primitives.h>

#include "arch/wgmma.cuh"

namespace fa3::arch {

inline void copy_vector(uint32_t shared, const void* global, bool exists) {
  if (shared % 16 || (exists && reinterpret_cast<uintptr_t>(global) % 16)) emulated::fail("a vector off 16 bytes");
  emulated::copy_later([to = pointer_to<uint8_t>(shared), global, exists] {
    std::memset(to, 0, 16);
    if (exists) std::memcpy(to, global, 16);
  });
}
inline void close_vectors() { emulated::close_copies(); }
template <int kLater>
void wait_for_vectors() {
  emulated::wait_for_copies(kLater);
}

}  // namespace fa3::arch

inline void* __cvta_shared_to_generic(uint32_t address) { return fa3::arch::pointer_to<void>(address); }
