// Stages of a pipeline.
#pragma once
#include <cstdint>

namespace fa3 {

/// A position in a ring of stages, and the parity of the barriers' phase there. Producer and consumers each go round on
/// their own; the producer waits for `empty` with the opposite parity, so that its first round finds every stage free.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace fa3
