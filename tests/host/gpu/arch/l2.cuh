// Of src/arch/l2.cuh what the emulated kernels need.
#pragma once
#include "emulated.h"

namespace fa3::arch {

inline void store_pair_to_l2(uint64_t* to, uint64_t first, uint64_t second) {
  std::atomic_ref(to[0]).store(first);
  std::atomic_ref(to[1]).store(second);
}

inline void load_pair_from_l2(uint64_t* from, uint64_t& first, uint64_t& second) {
  first = std::atomic_ref(from[0]).load();
  second = std::atomic_ref(from[1]).load();
}

inline void prefetch_to_l2(const void*) {}

}  // namespace fa3::arch
