// Of src/arch/warpgroup.cuh what the emulated kernels need.
#pragma once
#include "emulated.h"

namespace fa3::arch {

inline uint32_t thread_anew() { return threadIdx.x; }

}  // namespace fa3::arch
