// What a compiled kernel is, to who chooses and launches it.
#pragma once
#include "fa3.h"
#include "kernels/backward_args.h"
#include "kernels/forward_args.h"

namespace fa3 {

/// cluster: thread blocks of one, 1: none; device: the current.
using ForwardLaunch = cudaError_t (*)(const ForwardArgs& args, int grid, int cluster, int device, cudaStream_t stream);

/// One compiled forward kernel.
struct ForwardVariant {
  const char* name;
  int dtype, head_dim, head_dim_v;
  bool has_qv;             // scores add qv v
  int consumers;           // warpgroups
  int row_groups, tile_n;  // 64 query rows each; keys of a block
  int threads, shared_memory;
  int blocks_per_sm;           // thread blocks that share a multiprocessor
  int total_bytes;             // fp8: of workspace, for each thread block's sums in fp32; 0: shared memory has room
  bool turned_v;               // V comes turned: see ForwardArgs::turned_v
  bool pairs;                  // thread blocks can share keys and values: see ForwardArgs::paired
  int part_bytes;              // of workspace, for each part of a split tile; 0: see joins_apart()
  int decoded_rows;            // of a tile that the kernel for decoding may split; 0: there is none
  bool joins_in_cluster;       // a part fits into shared memory, where the other blocks of a cluster can read it
  int swizzle_q_k, swizzle_v;  // bytes: the width of a shared memory chunk, and of a TMA box
  // The last three may be null: see ForwardTraits::kHasPlain, kHasDecode and kHasDropout.
  ForwardLaunch launch, launch_plain, launch_decode, launch_dropout;

  int tile_m() const { return 64 * row_groups; }
  /// The parts of split tiles are results of their own, which the kernel of combine joins.
  bool joins_apart() const { return part_bytes == 0; }
};

/// One compiled backward kernel, with the one that rounds its dQ.
struct BackwardVariant {
  const char* name;
  int dtype, head_dim, head_dim_v;
  int tile_m, tile_n;  // queries of a step, keys of a thread block
  int threads, shared_memory;
  int blocks;     // thread blocks that work on neighbouring keys together
  int dq_floats;  // of workspace, for each query tile of a head
  int dq_shares;  // what a query tile's dQ is added in, each with a turn of its own
  int swizzle_q_k, swizzle_v;
  cudaError_t (*launch)(const BackwardArgs& args, int grid, int device, cudaStream_t stream);  // device: the current
  cudaError_t (*launch_dropout)(const BackwardArgs& args, int grid, int device, cudaStream_t stream);
  cudaError_t (*convert)(const ConvertArgs& args, cudaStream_t stream);
};

}  // namespace fa3
