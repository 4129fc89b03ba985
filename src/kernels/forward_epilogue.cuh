// A warpgroup's rows of output and lse, from registers to memory.
#pragma once
#include "attention/softmax.cuh"
#include "kernels/forward_args.h"
#include "kernels/forward_traits.cuh"

namespace fa3 {

/// A quad holds a row in pairs: lane q has columns 8 i + 2 q and + 1 of each group i of 8. Swap them within the quad,
/// so that lane q holds all 8 columns of group q: 16 bytes, one store.
__device__ __forceinline__ void gather_group(uint32_t (&x)[4], int quad_lane) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = quad_lane & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t received = __shfl_xor_sync(~0u, upper ? x[i] : x[i | bit], bit);
      (upper ? x[i] : x[i | bit]) = received;
    }
  }
}

template <class Traits>
__device__ __forceinline__ void store_rows(const ForwardArgs& args, const TileWork& work, int first_row, int lane,
                                           const float (&o)[Traits::kHeadDimV / 2],
                                           const Softmax<typename Traits::Element, Traits::kTileN>& softmax) {
  using Element = typename Traits::Element;
  constexpr int kGroups = Traits::kHeadDimV / 8;  // of 8 columns
  const int quad = lane / 4, quad_lane = lane % 4;
  const float sink = args.sinks ? args.sinks[work.head] : -INFINITY;
  const int batch = args.queries.ragged() ? 0 : work.batch;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const auto result = softmax.finish(r, sink);
    const int row = first_row + quad + 8 * r;
    const bool exists = row < work.seqlen_q;
    const int64_t out_row = work.q_begin + row;
    if (args.lse && exists && quad_lane == 0)
      args.lse[batch * args.lse_stride[0] + work.head * args.lse_stride[1] + out_row * args.lse_stride[2]] = result.lse;
    auto* out = static_cast<Element*>(args.out) + batch * args.out_stride[0] + out_row * args.out_stride[1] +
                work.head * args.out_stride[2];
#pragma unroll
    for (int i = 0; i < kGroups; i += 4) {
      uint32_t x[4] = {};
#pragma unroll
      for (int j = 0; j < 4 && i + j < kGroups; ++j) {
        const int e = 4 * (i + j) + 2 * r;
        x[j] = result.empty ? 0u : arch::pack<Element>(o[e] * result.scale, o[e + 1] * result.scale);
      }
      gather_group(x, quad_lane);
      const int column = 8 * (i + quad_lane);
      if (!exists || column >= args.head_dim_v) continue;
      if (args.out_vectors) {
        *reinterpret_cast<uint4*>(out + column) = make_uint4(x[0], x[1], x[2], x[3]);
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e)
          reinterpret_cast<uint16_t*>(out)[column + e] = static_cast<uint16_t>(x[e / 2] >> 16 * (e % 2));
      }
    }
  }
}

}  // namespace fa3
