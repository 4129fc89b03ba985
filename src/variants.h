#pragma once
#include <span>

#include "fa3.h"
#include "kernels/forward_args.h"

namespace fa3 {

/// One compiled forward kernel.
struct ForwardVariant {
  const char* name;
  int dtype, head_dim, head_dim_v;
  int consumers, tile_n;  // consumer warpgroups of 64 query rows each; keys of a block
  int threads, shared_memory;
  int blocks_per_sm;           // thread blocks that share a multiprocessor
  int part_bytes;              // of workspace, for each part of a split tile
  int swizzle_q_k, swizzle_v;  // bytes: the width of a shared memory chunk, and of a TMA box
  cudaError_t (*launch)(const ForwardArgs& args, int grid, int device, cudaStream_t stream);  // device: the current

  int tile_m() const { return 64 * consumers; }
};

std::span<const ForwardVariant> forward_variants();

}  // namespace fa3
