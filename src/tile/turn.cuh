// The instruction of tile/transpose.h that turns.
#pragma once
#include "arch/fragments.cuh"
#include "tile/transpose.h"

namespace fa3 {

/// 32 keys of 16 dims as load_matrices_transposed() brought them, turned, to where they begin in shared memory.
__device__ __forceinline__ void store_turned(uint32_t to, const uint32_t (&x)[4], const TurningLane& lane) {
  arch::store_matrices(to + lane.target, __byte_perm(x[0], x[1], lane.evens), __byte_perm(x[0], x[1], lane.odds()),
                       __byte_perm(x[2], x[3], lane.evens), __byte_perm(x[2], x[3], lane.odds()));
}

}  // namespace fa3
