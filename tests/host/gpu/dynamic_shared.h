// Where kernels of emulated thread blocks have their dynamic shared memory. For one file of a library.
#pragma once
#include "threads.h"

namespace fa3 {
extern thread_local uint8_t dynamic_shared[];  // as the kernels declare it
thread_local __attribute__((aligned(1024))) uint8_t dynamic_shared[emulated::kMostShared];
}  // namespace fa3

uint8_t* emulated::own_shared_memory() { return fa3::dynamic_shared; }
