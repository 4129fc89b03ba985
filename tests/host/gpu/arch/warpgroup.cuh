// src/arch/warpgroup.cuh on the emulated GPU.
#pragma once
#include "emulated.h"

namespace fa3::arch {

template <int kRegisters>
void grow_registers() {}
template <int kRegisters>
void shrink_registers() {}

inline int uniform(int x) { return __shfl_sync(~0u, x, 0); }
inline bool leads() { return threadIdx.x % 32 == 0; }
inline bool elected() {
  __syncwarp();  // all lanes ask
  return leads();
}

inline void barrier_sync(int id, int threads) { emulated::block->meet_some(id, static_cast<unsigned>(threads)); }
inline void barrier_arrive(int id, int threads) { emulated::block->arrive(id, static_cast<unsigned>(threads)); }
inline bool barrier_any(int id, int threads, bool mine) {
  return emulated::block->any_of_some(id, static_cast<unsigned>(threads), mine);
}
inline uint32_t thread_anew() { return threadIdx.x; }

}  // namespace fa3::arch
