// The backward's work on single rows, around its main kernel.
#include "kernels/backward_rows.h"

#include "arch/convert.cuh"
#include "fa3.h"
#include "kernels/launch.h"

namespace fa3 {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 8;   // of a warp, that share a row
constexpr int kVector = 8;  // elements of 16 bytes; head dims are multiples of it
constexpr float kLog2e = 1.4426950408889634f;

/// 8 elements of an array that may be aligned to 2 bytes only.
__device__ __forceinline__ uint4 load_vector(const uint16_t* from, bool vectors) {
  if (vectors) return *reinterpret_cast<const uint4*>(from);
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = from[2 * i] | uint32_t{from[2 * i + 1]} << 16;
  return make_uint4(words[0], words[1], words[2], words[3]);
}

template <class Element>
__device__ __forceinline__ float dot(const uint4& a, const uint4& b) {
  const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 p = arch::unpack<Element>(x[i]), q = arch::unpack<Element>(y[i]);
    sum = fmaf(p.x, q.x, sum);
    sum = fmaf(p.y, q.y, sum);
  }
  return sum;
}

__device__ __forceinline__ const uint16_t* row_of(const RowArray& array, int64_t batch, int64_t row, int head) {
  return static_cast<const uint16_t*>(array.data) + batch * array.stride[0] + row * array.stride[1] +
         head * array.stride[2];
}

/// A thread block has a query tile of a head; 8 lanes have a row.
template <class Element>
__global__ void __launch_bounds__(kThreads) prepare_backward_kernel(const __grid_constant__ PrepareBackwardArgs args) {
  const int tile = blockIdx.x, head = blockIdx.y, lane = threadIdx.x % kLanes;
  const QueryTiles tiles{args.queries, args.tile_m};
  const int batch = tiles.sequence(tile, args.batch);
  const Span q = args.queries.span(batch), k = args.keys.span(batch);
  const int first = (tile - tiles.first(batch)) * args.tile_m;
  const int64_t place = head * args.scratch.query_tiles + tile, entry = args.queries.ragged() ? 0 : batch;
  float* const stats = args.scratch.stats + place * (2 * args.tile_m);
  float sink_part = 0;

  for (int row = threadIdx.x / kLanes; row < args.tile_m; row += kThreads / kLanes) {
    const int query = first + row;
    const bool exists = query >= 0 && query < q.length;  // negative: cu_seqlens that begin past 0
    const KeyInterval keys = args.visibility.keys(query, q.length, k.length);
    const bool sees = exists && keys.begin < keys.end;
    float delta = 0;
    if (sees) {  // what out and dout hold where nothing is seen does not count
      const uint16_t* const out = row_of(args.out, entry, int64_t{q.begin} + query, head);
      const uint16_t* const dout = row_of(args.dout, entry, int64_t{q.begin} + query, head);
      for (int at = kVector * lane; at < args.head_dim_v; at += kVector * kLanes)
        delta += dot<Element>(load_vector(out + at, args.out.vectors), load_vector(dout + at, args.dout.vectors));
    }
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) delta += __shfl_xor_sync(~0u, delta, step);
    if (lane != 0) continue;
    float lse = 0;
    if (exists) {
      const int64_t at = int64_t{q.begin} + query;
      lse = args.lse[entry * args.lse_stride[0] + head * args.lse_stride[1] + at * args.lse_stride[2]];
      if (lse == -INFINITY) lse = 0;  // no score above minus infinity: exponentials are then 0, not NaN
      if (args.dlse)
        delta -= args.dlse[entry * args.dlse_stride[0] + head * args.dlse_stride[1] + at * args.dlse_stride[2]];
      if (args.sinks) {
        const float weight = exp2f((args.sinks[head] - lse) * kLog2e);
        if (weight != 0) sink_part -= weight * delta;
      }
    }
    stats[row] = sees ? lse * kLog2e : INFINITY;
    stats[args.tile_m + row] = sees ? delta : 0;
  }

  const int64_t count = (int64_t{head} * gridDim.x + tile) * kThreads + threadIdx.x;
  if (count < args.scratch.counts) args.scratch.taken[count] = 0;
  if (threadIdx.x < args.dq_shares) args.scratch.dq_turns[place * args.dq_shares + threadIdx.x] = 0;
  if (args.sinks) {
    __shared__ float parts[kThreads / kLanes];
    if (lane == 0) parts[threadIdx.x / kLanes] = sink_part;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int i = 1; i < kThreads / kLanes; ++i) sink_part += parts[i];
      args.scratch.sink_parts[place] = sink_part;
    }
  }
}

/// A thread block has a head.
__global__ void __launch_bounds__(kThreads) sum_sinks_kernel(const float* parts, int64_t query_tiles, float* dsinks) {
  __shared__ float sums[kThreads];
  float sum = 0;
  for (int64_t i = threadIdx.x; i < query_tiles; i += kThreads) sum += parts[blockIdx.x * query_tiles + i];
  sums[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) dsinks[blockIdx.x] = sums[0];
}

/// A warp has a row of all heads.
__global__ void __launch_bounds__(kThreads)
    clear_unused_rows_kernel(const __grid_constant__ RowArray array, const __grid_constant__ Lengths lengths, int batch,
                             int heads, int head_dim) {
  const int64_t index = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
  int sequence = static_cast<int>(index / lengths.rows);
  const int row = static_cast<int>(index % lengths.rows);
  if (sequence >= (lengths.ragged() ? 1 : batch)) return;
  if (lengths.ragged()) {  // the last that begins at or before the row: of empty ones, the one behind them
    int high = batch;
    while (high - sequence > 1) {
      const int middle = (sequence + high) / 2;
      if (lengths.cu_seqlens[middle] <= row)
        sequence = middle;
      else
        high = middle;
    }
  }
  const Span span = batch > 0 ? lengths.span(sequence) : Span{0, 0};
  if (row >= span.begin && row < span.begin + span.length) return;
  auto* const to =
      static_cast<uint16_t*>(array.data) + (lengths.ragged() ? 0 : sequence * array.stride[0]) + row * array.stride[1];
  for (int head = 0; head < heads; ++head)
    for (int i = threadIdx.x % 32; i < head_dim; i += 32) to[head * array.stride[2] + i] = 0;
}

}  // namespace

cudaError_t prepare_backward(const PrepareBackwardArgs& args, int dtype, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(args.scratch.query_tiles), args.num_heads);
  const auto kernel = dtype == FA3_FLOAT16 ? prepare_backward_kernel<Float16> : prepare_backward_kernel<BFloat16>;
  return launch_plainly(kernel, grid, kThreads, stream, args);
}

cudaError_t sum_sinks(const BackwardScratch& scratch, int num_heads, float* dsinks, cudaStream_t stream) {
  return launch_plainly(sum_sinks_kernel, num_heads, kThreads, stream, scratch.sink_parts, scratch.query_tiles, dsinks);
}

cudaError_t clear_unused_rows(const RowArray& array, const Lengths& lengths, int batch, int heads, int head_dim,
                              cudaStream_t stream) {
  const int64_t rows = int64_t{lengths.rows} * (lengths.ragged() ? 1 : batch);
  const auto grid = static_cast<unsigned>((rows + kThreads / 32 - 1) / (kThreads / 32));
  return launch_plainly(clear_unused_rows_kernel, grid, kThreads, stream, array, lengths, batch, heads, head_dim);
}

}  // namespace fa3
