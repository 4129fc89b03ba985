// The backward kernels of a variant: the main one, which makes dK, dV and sums of dQ, and the one that rounds dQ.
#pragma once

#include "arch/dependents.cuh"
#include "kernels/backward_load.cuh"
#include "kernels/backward_mma.cuh"
#include "kernels/shared_limit.h"
#include "kernels/variant.h"

namespace fa3 {

template <class Traits, bool kDropout>
__global__ void __launch_bounds__(Traits::kThreads, 1) backward_kernel(const __grid_constant__ BackwardArgs args) {
  using Shared = BackwardShared<Traits>;
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);

  const int warpgroup = arch::uniform(threadIdx.x / 128);
  if (threadIdx.x == 0) {
    shared.init_barriers();
    if constexpr (kDropout) shared.seed = args.dropout.seed();
    arch::publish_barriers();
  }
  if constexpr (Traits::kPairs)
    arch::cluster_meet();
  else
    __syncthreads();

  if (warpgroup == Traits::kConsumers) {
    arch::shrink_registers<Traits::kProducerRegisters>();
    const int warp = arch::uniform(threadIdx.x / 32 % 4);
    if (warp == 0)
      BackwardLoader<Traits>(args, shared).run();
    else if (warp <= Traits::kConsumers)
      DqAdder<Traits>(args, shared, warp - 1).run();
    else if constexpr (Traits::kPairs)
      DsSender<Traits, Shared>(args.group, shared).run();
  } else {
    arch::grow_registers<Traits::kConsumerRegisters>();
    BackwardConsumer<Traits, kDropout>(args, shared).run();
  }
  if constexpr (Traits::kPairs) arch::cluster_meet();  // the other's last arrivals at barriers here
}

/// Without keys there is no main kernel to be early for.
template <class Traits>
__host__ __device__ __forceinline__ bool rounds_early(const ConvertArgs& args) {
  return Traits::kRoundsEarly && args.scratch.counts > 0;
}

/// Whether all has been added to the dQ of a KV head's queries. Device memory may say what it wants of lengths: where
/// the count never comes so far, the main kernel's end is waited for.
template <class Traits>
__device__ __forceinline__ bool is_added(const ConvertArgs& args, int batch, int head_kv) {
  const int adding = Traits::kDqShares * ceil_div(args.keys.span(batch).length, Traits::kTileN * Traits::kBlocks);
  return arch::peek(args.scratch.added + batch * args.num_heads_kv + head_kv) == static_cast<uint32_t>(adding);
}

/// Sums of dQ to rows: a warp has 16 rows of a share of a query tile. Early: from when the main kernel's thread blocks
/// have their last pieces of work, on multiprocessors that have none left, in the order of that work. Otherwise what
/// the main kernel had last comes first: it is in L2.
template <class Traits>
__global__ void __launch_bounds__(128) convert_dq_kernel(const __grid_constant__ ConvertArgs args) {
  __shared__ StagedRows staging[4];
  const QueryTiles tiles{args.queries, Traits::kTileM};
  const int together = args.queries.ragged() ? 1 : ceil_div(args.queries.rows, Traits::kTileM);  // tiles of a head
  const uint32_t index = Traits::kRoundsEarly ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
  const uint32_t place = index / Traits::kDqShares;
  const int part = index % Traits::kDqShares, head = place / together % args.num_heads;
  const int tile = place / together / args.num_heads * together + place % together;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int batch = tiles.sequence(tile, args.batch);
  if (rounds_early<Traits>(args)) {
    // One block waits in any case: what comes next in the stream waits for this kernel alone.
    const bool waits =
        index + 1 == gridDim.x || !is_added<Traits>(args, batch, head / (args.num_heads / args.num_heads_kv));
    if (waits) arch::wait_for_prerequisites();
  }
  const Span q = args.queries.span(batch);
  const int first = (tile - tiles.first(batch)) * Traits::kTileM + (Traits::kShareQueries ? 64 * part : 0) + 16 * warp;
  if (first < 0 || first >= q.length) return;  // no tile of a sequence's
  const int column = Traits::kShareQueries ? 0 : Traits::kDqColumns * part;
  const int64_t share = (head * args.scratch.query_tiles + tile) * Traits::kDqShares + part;
  const auto* sums = reinterpret_cast<const float4*>(args.scratch.dq + share * Traits::kDqFloats);
  const bool any = args.scratch.dq_turns[share] != 0;  // where no key is seen, nothing was written
  float x[Traits::kDqCount];
#pragma unroll
  for (int i = 0; i < Traits::kDqCount / 4; ++i) {
    const float4 sum = any ? sums[128 * i + threadIdx.x] : float4{};
    x[4 * i] = sum.x;
    x[4 * i + 1] = sum.y;
    x[4 * i + 2] = sum.z;
    x[4 * i + 3] = sum.w;
  }
  auto* const data = static_cast<uint16_t*>(args.dq.data) + (args.queries.ragged() ? 0 : batch * args.dq.stride[0]) +
                     (int64_t{q.begin} + first) * args.dq.stride[1] + head * args.dq.stride[2] + column;
  store_fragment<typename Traits::Element>(
      staging[warp], x, args.softmax_scale,
      {data, args.dq.stride[1], q.length - first, args.head_dim - column, args.dq.vectors}, lane);
}

/// Launch on `device`, the current one, whose shared memory limit is raised the first time.
template <class Traits, bool kDropout>
cudaError_t launch_backward(const BackwardArgs& args, int grid, int device, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(BackwardShared<Traits>);
  static_assert(kSharedBytes <= 227 * 1024, "a thread block has at most 227 KB of shared memory");
  if (const cudaError_t error = raise_shared_limit<backward_kernel<Traits, kDropout>>(kSharedBytes, device))
    return error;
  cudaLaunchAttribute pair{};
  pair.id = cudaLaunchAttributeClusterDimension;
  pair.val.clusterDim = {Traits::kBlocks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(grid);
  config.blockDim = Traits::kThreads;
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = &pair;
  config.numAttrs = Traits::kPairs ? 1 : 0;
  return cudaLaunchKernelEx(&config, backward_kernel<Traits, kDropout>, args);
}

template <class Traits>
cudaError_t launch_convert(const ConvertArgs& args, cudaStream_t stream) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  // Their sums' memory ends before their number does.
  config.gridDim = static_cast<unsigned>(args.scratch.query_tiles * args.num_heads * Traits::kDqShares);
  config.blockDim = 128;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = rounds_early<Traits>(args) ? 1 : 0;
  return cudaLaunchKernelEx(&config, convert_dq_kernel<Traits>, args);
}

template <class Traits>
BackwardVariant describe_backward(const char* name, int dtype) {
  return {
      .name = name,
      .dtype = dtype,
      .head_dim = Traits::kHeadDim,
      .head_dim_v = Traits::kHeadDimV,
      .tile_m = Traits::kTileM,
      .tile_n = Traits::kTileN,
      .threads = Traits::kThreads,
      .shared_memory = static_cast<int>(sizeof(BackwardShared<Traits>)),
      .blocks = Traits::kBlocks,
      .dq_floats = Traits::kDqShares * Traits::kDqFloats,
      .dq_shares = Traits::kDqShares,
      .swizzle_q_k = Traits::kSwizzleQK,
      .swizzle_v = Traits::kSwizzleV,
      .launch = launch_backward<Traits, false>,
      .launch_dropout = launch_backward<Traits, true>,
      .convert = launch_convert<Traits>,
  };
}

}  // namespace fa3
