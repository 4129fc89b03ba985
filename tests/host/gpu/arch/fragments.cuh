// src/arch/fragments.cuh on the emulated GPU.
#pragma once
#include "arch/wgmma.cuh"

namespace fa3::arch {

/// Where row `row` of matrix `matrix` is, of the addresses that a warp's lanes give.
inline uint8_t* matrix_row(const uint64_t* addresses, int matrix, int row) {
  const auto address = static_cast<uint32_t>(addresses[8 * matrix + row]);
  if (address % 16) emulated::fail("a row of a matrix lies off 16 bytes");
  return pointer_to<uint8_t>(address);
}

inline void store_matrices(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const uint64_t* const addresses = emulated::block->gather(row);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const uint32_t words[] = {a, b, c, d};
  for (int matrix = 0; matrix < 4; ++matrix)
    std::memcpy(matrix_row(addresses, matrix, lane / 4) + 4 * (lane % 4), &words[matrix], 4);
}
inline void store_matrices(void* row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  store_matrices(shared_address(row), a, b, c, d);
}

inline void load_matrices(uint32_t* to, const void* row) {
  const uint64_t* const addresses = emulated::block->gather(shared_address(row));
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int matrix = 0; matrix < 4; ++matrix)
    std::memcpy(&to[matrix], matrix_row(addresses, matrix, lane / 4) + 4 * (lane % 4), 4);
}

inline void load_matrices_transposed(uint32_t row, uint32_t (&x)[4]) {
  const uint64_t* const addresses = emulated::block->gather(row);
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t elements[2];
    for (int i = 0; i < 2; ++i)
      std::memcpy(&elements[i], matrix_row(addresses, matrix, 2 * (lane % 4) + i) + 2 * (lane / 4), 2);
    x[matrix] = elements[0] | static_cast<uint32_t>(elements[1]) << 16;
  }
}

}  // namespace fa3::arch
