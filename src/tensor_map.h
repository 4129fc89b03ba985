#pragma once
#include "fa3.h"
#include "kernels/forward_args.h"

namespace fa3 {

/// One operand as the tensor core's loads want it.
struct OperandShape {
  int dtype = 0;                           // fa3_dtype
  int head_dim = 0, heads = 0, batch = 0;  // batch: 1 for a ragged operand
  int rows = 0;                            // along the sequence axis
  int group = 0;  // heads side by side on an axis of their own, as q's of one KV head; 0: no such axis
  int box_group = 0, box_rows = 0;  // heads (with such an axis) and rows that one load brings
  int swizzle = 0;                  // bytes of a shared memory chunk: 32, 64 or 128
  bool read_once = false;           // by one thread block: nobody else is served by more than was asked for
};

/// Describe `array` for TMA; see TmaOperand for what its axes are.
fa3_status encode_operand(const fa3_array& array, const OperandShape& shape, TmaOperand& operand);

}  // namespace fa3
