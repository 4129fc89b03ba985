#pragma once
#include "fa3.h"
#include "kernels/forward_args.h"

namespace fa3 {

/// One operand as the tensor core's loads want it.
struct OperandShape {
  int dtype;                   // fa3_dtype: 16 bits
  int head_dim, heads, batch;  // batch: 1 for a ragged operand
  int rows;                    // along the sequence axis
  int box_rows;                // rows that one load brings
  int swizzle;                 // bytes of a shared memory chunk: 32, 64 or 128
};

/// Describe `array` for TMA; see TmaOperand for what its axes are.
fa3_status encode_operand(const fa3_array& array, const OperandShape& shape, TmaOperand& operand);

}  // namespace fa3
