// One lane of a warp on the CPU, for src/attention/softmax.cuh: a shuffle gives its own value back.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <type_traits>

#include "arch/elements.h"

#define __device__
#define __forceinline__ inline

inline float __fdividef(float a, float b) { return a / b; }
inline float __log2f(float x) { return std::log2(x); }
inline float __shfl_xor_sync(unsigned, float value, int) { return value; }
inline bool __any_sync(unsigned, bool predicate) { return predicate; }
inline bool __all_sync(unsigned, bool predicate) { return predicate; }

namespace fa3::arch {

inline float exp2_fast(float x) { return std::exp2(x); }

/// The code whose value is nearest, of those of one sign.
inline uint32_t e4m3(float value) {
  auto decoded = [](int code) { return code < 8 ? std::ldexp(code, -9) : std::ldexp(8 + code % 8, code / 8 - 10); };
  uint32_t best = 0;
  for (int code = 1; code < 127; ++code)
    if (std::fabs(decoded(code) - value) < std::fabs(decoded(best) - value)) best = code;
  return best;
}

inline uint32_t pack_e4m3(float a, float b, float c, float d) {
  return e4m3(a) | e4m3(b) << 8 | e4m3(c) << 16 | e4m3(d) << 24;
}

template <class Element>
uint32_t pack(float, float) {
  std::abort();  // 16 bits are not what is tested
}

}  // namespace fa3::arch
