// src/arch/l2.cuh on the emulated GPU.
#pragma once
#include "emulated.h"

namespace fa3::arch {

inline void store_to_l2(float4* to, const float4& x) { *to = x; }
inline void add_to_l2(float4* to, const float4& x) { *to = {to->x + x.x, to->y + x.y, to->z + x.z, to->w + x.w}; }
inline float4 load_from_l2(const float4* from) { return *from; }
inline void store_pair_to_l2(uint64_t* to, uint64_t first, uint64_t second) { to[0] = first, to[1] = second; }
inline void load_pair_from_l2(uint64_t* from, uint64_t& first, uint64_t& second) { first = from[0], second = from[1]; }
inline void prefetch_to_l2(const void*) {}

}  // namespace fa3::arch
