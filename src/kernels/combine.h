#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "attention/seqlen.h"

namespace fa3 {

inline constexpr int kCombineThreads = 64;  // few, so that few rows still reach many multiprocessors
inline constexpr int kCombineColumns = 4;   // a thread's, of one row

/// Results of attention over disjoint parts of the keys, and where their sum goes. Strides count elements: batch, row,
/// head.
struct CombineArgs {
  const float *out_partial, *lse_partial;
  int64_t out_partial_step, lse_partial_step;  // from a part to the next
  int64_t out_partial_stride[4], lse_partial_stride[3];
  void* out;
  float* lse;  // or null
  int64_t out_stride[3], lse_stride[3];
  int splits, rows, num_heads, head_dim_v;
  int64_t count;                   // rows of all heads and batch entries
  bool part_vectors, out_vectors;  // 4 elements lie as one vector, for every address and stride
  Lengths queries;                 // which rows are there
  int sequences;                   // that they are of; 0: all rows are
};

/// Enqueue it; `out_dtype` is an fa3_dtype.
cudaError_t launch_combine(const CombineArgs& args, int out_dtype, cudaStream_t stream);

}  // namespace fa3
