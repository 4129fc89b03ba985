#pragma once
#include <cuda_runtime.h>

#include "tensor_map.h"

namespace fa3 {

/// Hands out the workspace from its start.
class Workspace {
 public:
  explicit Workspace(void* base) : next_(static_cast<char*>(base)) {}
  void* take(size_t bytes) {
    char* part = next_;
    next_ += bytes;
    return part;
  }

 private:
  char* next_;
};

/// (batch, row, head, dim) without gaps.
inline fa3_array contiguous(void* data, int rows, int heads, int head_dim) {
  const int64_t row = int64_t{heads} * head_dim;
  return {data, {row * rows, row, head_dim, 1}};
}

/// An operand for TMA: the caller's array or, with `copy`, one in the workspace, which is enqueued. `shape` is filled
/// in but for rows and batch. Where there are no rows the map is of `spare`, any address, and nothing must be loaded.
fa3_status prepare_operand(fa3_array array, const fa3_lengths& lengths, int entries, OperandShape shape, bool copy,
                           void* spare, Workspace& workspace, cudaStream_t stream, TmaOperand& operand);

}  // namespace fa3
