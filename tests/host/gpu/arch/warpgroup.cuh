// Of src/arch/warpgroup.cuh what the emulated kernels need.
#pragma once
#include "emulated.h"

namespace fa3::arch {

inline uint32_t thread_anew() { return threadIdx.x; }

inline int uniform(int x) { return x; }

/// Of named barriers there is one.
inline void barrier_sync(int, int threads) { emulated::block->meet_some(static_cast<unsigned>(threads)); }

}  // namespace fa3::arch
