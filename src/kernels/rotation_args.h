// What the kernel that rotates on tensor cores is told.
#pragma once
#include "kernels/quantize_args.h"
#include "kernels/tma_operand.h"

namespace fa3 {

struct RotationArgs {
  QuantizeArgs common;
  TmaOperand x;     // in boxes of 64 dims and the rows of a tile
  TmaOperand rest;  // in boxes of as many dims as are left past the first block
};

}  // namespace fa3
