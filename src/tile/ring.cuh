// Stages of a pipeline.
#pragma once
#include <cstdint>

namespace fa3 {

/// A position in a ring of stages: how many have gone by. Producer and consumers each count on their own. `parity` is
/// that of the barriers' phase there; a producer waits for `empty` with the opposite parity, so that its first round
/// finds every stage free.
template <int kStages>
struct Ring {
  uint32_t count = 0;

  __device__ __forceinline__ uint32_t stage() const { return count % kStages; }
  __device__ __forceinline__ uint32_t parity() const { return count / kStages % 2; }
  __device__ __forceinline__ void advance() { ++count; }
};

}  // namespace fa3
