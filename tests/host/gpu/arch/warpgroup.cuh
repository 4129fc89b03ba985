// Of src/arch/warpgroup.cuh what the emulated kernels need.
#pragma once
#include "emulated.h"

namespace fa3::arch {

template <int kRegisters>
void grow_registers() {}
template <int kRegisters>
void shrink_registers() {}

inline int uniform(int x) { return x; }
inline bool leads() { return threadIdx.x % 32 == 0; }
inline bool elected() { return leads(); }

inline void barrier_sync(int id, int threads) { emulated::block->meet_some(id, static_cast<unsigned>(threads)); }
inline void barrier_arrive(int id, int threads) { emulated::block->arrive(id, static_cast<unsigned>(threads)); }
inline bool barrier_any(int id, int threads, bool mine) {
  return emulated::block->any_of_some(id, static_cast<unsigned>(threads), mine);
}

}  // namespace fa3::arch
