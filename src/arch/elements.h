// The elements of arrays, as templates tell them apart: CUDA's own types are a quarter of a file's headers.
#pragma once
#include <cstdint>

namespace fa3 {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
struct Float8E4M3 {
  uint8_t bits;
};

}  // namespace fa3
