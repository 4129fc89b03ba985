// Matrix fragments to and from shared memory.
#pragma once
#include <cstdint>

#include "arch/wgmma.cuh"

namespace fa3::arch {

/// Store four 8 x 8 matrices of 16-bit elements. Lane 4 i + j holds elements 2 j and 2 j + 1 of each matrix's row i;
/// lane 8 m + i gives the (16-byte aligned) address of matrix m's row i.
__device__ __forceinline__ void store_matrices(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

__device__ __forceinline__ void store_matrices(void* row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  store_matrices(shared_address(row), a, b, c, d);
}

/// Load them in the same way.
__device__ __forceinline__ void load_matrices(uint32_t* to, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

/// Load four 8 x 8 matrices of 16-bit elements, transposed. Lane 8 m + i gives the (16-byte aligned) address of matrix
/// m's row i; lane 4 i + j gets elements i of each matrix's rows 2 j and 2 j + 1.
__device__ __forceinline__ void load_matrices_transposed(uint32_t row, uint32_t (&x)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row)
               : "memory");
}

}  // namespace fa3::arch
