// The conversions of src/arch/convert.cuh that the emulated kernels need, by what PTX says of them.
#pragma once
#include "emulated.h"

namespace fa3::arch {

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 1.1754944e-38f ? 0.f : y;  // NaN stays
}

inline float max_or_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::fmax(a, b); }

template <class Element>
uint32_t max_pair_or_nan(uint32_t a, uint32_t b) {
  const auto larger = [](auto x, auto y) { return std::isnan(x) || std::isnan(y) ? x + y : std::max(x, y); };
  if constexpr (std::is_same_v<Element, BFloat16>) {
    const float low = larger(__uint_as_float(a << 16), __uint_as_float(b << 16));
    const float high = larger(__uint_as_float(a & 0xffff0000), __uint_as_float(b & 0xffff0000));
    return __float_as_uint(low) >> 16 | (__float_as_uint(high) & 0xffff0000);
  } else {
    const auto half = [](uint32_t bits) { return std::bit_cast<_Float16>(static_cast<uint16_t>(bits)); };
    const auto bits = [&](uint32_t x, uint32_t y) {
      return uint32_t{std::bit_cast<uint16_t>(static_cast<_Float16>(larger(float(half(x)), float(half(y)))))};
    };
    return bits(a, b) | bits(a >> 16, b >> 16) << 16;
  }
}

/// To nearest even on the grid of e4m3, whose steps are 2^-9 up to 2^-6 and an eighth of each power of two above.
inline uint32_t e4m3(float value) {
  const uint32_t sign = std::signbit(value) ? 0x80 : 0;
  if (std::isnan(value)) return 0x7f;
  const float size = std::fmin(std::fabs(value), 448.f);
  const int exponent = std::max(size > 0 ? std::ilogb(size) : -6, -6);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, 3 - exponent)));  // 8 to 16, below 2^-6 less
  return sign | static_cast<uint32_t>(steps + (exponent + 6) * 8);
}

inline uint32_t pack_e4m3(float low, float high) { return e4m3(low) | e4m3(high) << 8; }
inline uint32_t pack_e4m3(float a, float b, float c, float d) { return pack_e4m3(a, b) | pack_e4m3(c, d) << 16; }

template <class Element>
float2 unpack(uint32_t pair) {
  if constexpr (std::is_same_v<Element, BFloat16>)
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000)};
  else
    return {half_to_float({static_cast<uint16_t>(pair)}), half_to_float({static_cast<uint16_t>(pair >> 16)})};
}

template <class Element>
uint32_t rounded(float value) {
  if (std::isnan(value)) return 0x7fff;
  if constexpr (std::is_same_v<Element, BFloat16>) {
    const uint32_t bits = __float_as_uint(value);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  } else {
    return std::bit_cast<uint16_t>(static_cast<_Float16>(value));
  }
}

template <class Element>
uint32_t pack(float low, float high) {
  return rounded<Element>(low) | rounded<Element>(high) << 16;
}

}  // namespace fa3::arch
