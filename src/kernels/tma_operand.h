// An operand that TMA loads.
#pragma once
#include <cuda.h>

#include <cstdint>

namespace fa3 {

/// Axes (dim, row, head, batch), and for q (dim, head of its KV head, row, KV head, batch). What lies past an axis' end
/// arrives as zeros.
struct TmaOperand {
  CUtensorMap map;
  int head_step, batch_step;  // 1, or 0 where the axis does not move
  // The same array without a map, for rows that TMA cannot bring.
  const uint8_t* data;
  int64_t row_bytes, head_bytes, batch_bytes;
};

}  // namespace fa3
