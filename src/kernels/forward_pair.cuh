// Two thread blocks of a cluster with neighbouring tiles of a head: each brings half of the keys and values to both.
#pragma once
#include "arch/cluster.cuh"
#include "kernels/forward_args.h"

namespace fa3 {

/// A thread block's part in its pair. To the scheduler, a pair's tiles are one of twice as many rows. Both load the
/// same blocks of keys, those that any of these rows sees, and go on when a stage is empty in both.
template <class Traits>
struct Pair {
  bool exists;
  int rank;

  __device__ __forceinline__ static Pair of(const typename Traits::Args& args) {
    if constexpr (Traits::kPairs)
      return {args.paired(), args.paired() ? static_cast<int>(blockIdx.x % 2) : 0};
    else
      return {false, 0};
  }

  __device__ __forceinline__ int blocks() const { return exists ? 2 : 1; }

  /// Whether this thread block of a pair brings the `part`-th of many parts.
  __device__ __forceinline__ bool brings(int part) const { return part % 2 == rank; }
};

}  // namespace fa3
