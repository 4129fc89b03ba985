// Joins the results of attention over disjoint parts of the keys.
#include "kernels/combine.h"

#include <cmath>

#include "arch/convert.cuh"
#include "arch/host_device.h"
#include "fa3.h"
#include "kernels/launch.h"

namespace fa3 {
namespace {

constexpr int kThreads = kCombineThreads, kColumns = kCombineColumns;
constexpr int kTogether = 8;  // parts on their way at once

/// Some columns of `parts` parts, the first of them at `from`. Nothing stands between the loads, so that all are on
/// their way before the first is waited for.
__device__ __forceinline__ void load_parts(const CombineArgs& args, const float* from, int parts, int count,
                                           float (&x)[kTogether][kColumns]) {
  if (args.part_vectors && count == kColumns) {
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      float4 vector = make_float4(0, 0, 0, 0);
      if (n < parts) vector = *reinterpret_cast<const float4*>(from + n * args.out_partial_step);
      x[n][0] = vector.x, x[n][1] = vector.y, x[n][2] = vector.z, x[n][3] = vector.w;
    }
    return;
  }
#pragma unroll
  for (int n = 0; n < kTogether; ++n)
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
      x[n][i] = n < parts && i < count ? from[n * args.out_partial_step + i * args.out_partial_stride[3]] : 0.f;
}

__device__ __forceinline__ void store_columns(const CombineArgs& args, float* to, int count,
                                              const float (&x)[kColumns]) {
  if (args.out_vectors && count == kColumns) {
    *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i)
    if (i < count) to[i] = x[i];
}

template <class Element>
__device__ __forceinline__ void store_columns(const CombineArgs& args, Element* to, int count,
                                              const float (&x)[kColumns]) {
  const uint2 words = make_uint2(arch::pack<Element>(x[0], x[1]), arch::pack<Element>(x[2], x[3]));
  if (args.out_vectors && count == kColumns) {
    *reinterpret_cast<uint2*>(to) = words;
    return;
  }
  auto* const bits = reinterpret_cast<uint16_t*>(to);
#pragma unroll
  for (int i = 0; i < kColumns; ++i)
    if (i < count) bits[i] = static_cast<uint16_t>((i < 2 ? words.x : words.y) >> 16 * (i % 2));
}

/// Every thread weighs the parts of its row for itself: their lse are few, and in the cache.
template <class Element>
__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ CombineArgs args) {
  const int groups = larger(ceil_div(args.head_dim_v, kColumns), 1);  // without columns there is still an lse
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x, which = index / groups;
  if (which >= args.count) return;
  const int column = static_cast<int>(index - which * groups) * kColumns;
  const int head = static_cast<int>(which % args.num_heads);
  const int64_t rest = which / args.num_heads, row = rest % args.rows, batch = rest / args.rows;
  if (args.sequences > 0 && !args.queries.owner(rest, args.sequences).used) return;
  auto place = [&](const auto& stride) { return batch * stride[0] + row * stride[1] + head * stride[2]; };
  const float* const lse = args.lse_partial + place(args.lse_partial_stride);
  const float* const parts = args.out_partial + place(args.out_partial_stride) + column * args.out_partial_stride[3];
  const int count = smaller(args.head_dim_v - column, kColumns);

  float largest = -INFINITY, sum = 0, x[kColumns] = {};
#pragma unroll 1
  for (int first = 0; first < args.splits; first += kTogether) {
    const int together = smaller(args.splits - first, kTogether);
    float part[kTogether], values[kTogether][kColumns];
#pragma unroll
    for (int n = 0; n < kTogether; ++n) part[n] = n < together ? lse[(first + n) * args.lse_partial_step] : -INFINITY;
    load_parts(args, parts + first * args.out_partial_step, together, count, values);
    float top = largest;
#pragma unroll
    for (int n = 0; n < kTogether; ++n) top = fmaxf(top, part[n]);
    const float shift = top == -INFINITY ? 0.f : top;  // so that a part that saw nothing weighs 0, beside others or not
    const float shrink = expf(largest - shift);
    largest = top;
    sum *= shrink;
#pragma unroll
    for (float& value : x) value *= shrink;
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      const float share = expf(part[n] - shift);
      sum += share;
#pragma unroll
      for (int i = 0; i < kColumns; ++i)
        if (part[n] != -INFINITY) x[i] += share * values[n][i];  // else its out may hold anything
    }
  }
  const float scale = sum == 0 ? 0.f : 1.f / sum;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) x[i] *= scale;
  store_columns(args, static_cast<Element*>(args.out) + place(args.out_stride) + column, count, x);
  if (args.lse && column == 0) args.lse[place(args.lse_stride)] = largest + logf(sum);
}

template <class Element>
cudaError_t launch(const CombineArgs& args, cudaStream_t stream) {
  const int64_t threads = args.count * larger(ceil_div(args.head_dim_v, kColumns), 1);
  const auto blocks = static_cast<unsigned>((threads + kThreads - 1) / kThreads);
  return launch_plainly(combine_kernel<Element>, blocks, kThreads, stream, args);
}

}  // namespace

cudaError_t launch_combine(const CombineArgs& args, int out_dtype, cudaStream_t stream) {
  if (out_dtype == FA3_FLOAT32) return launch<float>(args, stream);
  return out_dtype == FA3_FLOAT16 ? launch<Float16>(args, stream) : launch<BFloat16>(args, stream);
}

}  // namespace fa3
