// Of src/arch/barrier.cuh what the emulated kernels need.
#pragma once
#include "emulated.h"

namespace fa3::arch {

struct Barrier {
  int arrivals, missing;
  uint32_t phase;

  void init(int threads) { arrivals = missing = threads, phase = 0; }
  void arrive() {
    if (--missing) return;
    missing = arrivals;
    ++phase;
  }
  void wait(uint32_t parity) const {
    while (phase % 2 == parity) emulated::block->yield();
  }
};

}  // namespace fa3::arch
