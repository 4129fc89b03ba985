// e4m3 values turned once, in device memory, for forward kernels whose tiles would each turn all of them.
#include "arch/fragments.cuh"
#include "kernels/launch.h"
#include "kernels/turn_values.h"
#include "tile/turn.cuh"

namespace fa3 {
namespace {

constexpr int kWarps = 4;

/// A warp turns 32 keys of one head: as the Transposer does, but its rows come from device memory and go there.
template <int kDims>
__global__ void __launch_bounds__(32 * kWarps, 4)
    turn_values_kernel(ValuesToTurn values, uint4* turned, int steps, int64_t units) {
  using To = TurnedTile<32, kDims>;
  constexpr int kVectors = kDims / 16;           // of a row
  constexpr int kRowBytes = 16 * kVectors + 16;  // so that equal vectors of 8 rows meet all banks
  __shared__ __align__(16) uint8_t rows[kWarps][32 * kRowBytes];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t unit = int64_t{blockIdx.x} * kWarps + warp;
  if (unit >= units) return;
  const int step = static_cast<int>(unit % steps), first_key = 32 * step;
  const int head = static_cast<int>(unit / steps % values.heads);
  const int64_t batch = unit / steps / values.heads;
  const auto* const from = static_cast<const uint8_t*>(values.data) + batch * values.stride[0] +
                           first_key * values.stride[1] + head * values.stride[2];

  uint4 row[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int key = (32 * i + lane) / kVectors, column = (32 * i + lane) % kVectors * 16;
    const bool exists = first_key + key < values.rows && column < values.head_dim;
    row[i] = exists ? __ldg(reinterpret_cast<const uint4*>(from + key * values.stride[1] + column)) : uint4{};
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int key = (32 * i + lane) / kVectors, column = (32 * i + lane) % kVectors * 16;
    *reinterpret_cast<uint4*>(rows[warp] + key * kRowBytes + column) = row[i];
  }
  __syncwarp();

  uint32_t x[To::kGroups][4];
  const uint32_t own = arch::shared_address(rows[warp]);
#pragma unroll
  for (int group = 0; group < To::kGroups; ++group)
    arch::load_matrices_transposed(own + lane * kRowBytes + 16 * group, x[group]);
  __syncwarp();  // all is read, and the place is free
  const TurningLane turning(lane, 128);
#pragma unroll
  for (int group = 0; group < To::kGroups; ++group) store_turned(own + group * To::kGroupBytes, x[group], turning);
  __syncwarp();
  uint4* const to = turned + unit * (To::kBytes / 16);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) to[32 * i + lane] = reinterpret_cast<const uint4*>(rows[warp])[32 * i + lane];
}

}  // namespace

cudaError_t turn_values(const ValuesToTurn& values, int dims, int block_keys, void* turned, cudaStream_t stream) {
  const int steps = ceil_div(values.rows, block_keys) * (block_keys / 32);
  const int64_t units = int64_t{values.batch} * values.heads * steps;
  const auto kernel = dims == 64    ? turn_values_kernel<64>
                      : dims == 80  ? turn_values_kernel<80>
                      : dims == 128 ? turn_values_kernel<128>
                      : dims == 192 ? turn_values_kernel<192>
                      : dims == 256 ? turn_values_kernel<256>
                                    : nullptr;
  if (!kernel) return cudaErrorInvalidValue;
  const auto blocks = static_cast<unsigned>((units + kWarps - 1) / kWarps);
  return launch_plainly(kernel, blocks, 32 * kWarps, stream, values, static_cast<uint4*>(turned), steps, units);
}

}  // namespace fa3
