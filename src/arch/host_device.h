// Functions marked so run on the host too: a machine without a GPU brute-forces them in tests.
#pragma once

#ifdef __CUDACC__
#define FA3_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FA3_HOST_DEVICE inline
#endif

namespace fa3 {

FA3_HOST_DEVICE constexpr int smaller(int a, int b) { return a < b ? a : b; }
FA3_HOST_DEVICE constexpr int larger(int a, int b) { return a > b ? a : b; }
FA3_HOST_DEVICE constexpr int clamped(int x, int low, int high) { return larger(low, smaller(x, high)); }
FA3_HOST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace fa3
