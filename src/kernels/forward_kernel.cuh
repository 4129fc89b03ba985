// The forward kernel: a few producer warps, one to three consumer warpgroups, pieces of work until there are none left.
#pragma once

#include "arch/warpgroup.cuh"
#include "kernels/forward_decode.cuh"
#include "kernels/forward_epilogue.cuh"
#include "kernels/forward_load.cuh"
#include "kernels/forward_mma.cuh"
#include "kernels/forward_split.cuh"
#include "kernels/forward_tiles.cuh"
#include "kernels/forward_transpose.cuh"
#include "kernels/variant.h"

namespace fa3 {

template <class Traits, bool kDropout>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    forward_kernel(const __grid_constant__ typename Traits::Args args) {
  using Shared = ForwardShared<Traits>;
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);

  const uint32_t thread = arch::thread_anew();
  const int warpgroup = arch::uniform(thread / 128);
  // Of 16 bits two of the producers' four warps have a role only where rows are gathered, but fewer would save no
  // registers.
  const int producer = arch::uniform(thread / 32) - 4 * Traits::kConsumers;
  if (warpgroup == Traits::kConsumers) arch::shrink_registers<Traits::kProducerRegisters>();
  if (producer == 0) {
    Scheduler<Traits>(args, shared).run();
    return;
  }
  // Meanwhile: what does not need the first piece of work.
  const auto pair = Pair<Traits>::of(args);
  if (thread < 32) shared.make_barriers(args.gathers());
  if (producer == 1) prefetch_start<Traits>(args);
  if constexpr (kDropout)
    if (thread == 0) shared.seed = args.dropout.seed();
  shared.wait_for_barriers();
  if (pair.exists) arch::cluster_meet();
  if (warpgroup == Traits::kConsumers) {
    if (producer <= (args.gathers() ? Traits::kGatherers : 1)) {
      if (Traits::kTurnedV || !args.paged())  // values are turned for dense batches alone
        Loader<Traits, ContiguousKeys<Traits>>(args, shared, 0).run();
      else if (args.extras.pages.box_rows > 0)
        Loader<Traits, BoxedKeys<Traits>>(args, shared, 0).run();
      else
        Loader<Traits, GatheredKeys<Traits>>(args, shared, producer - 1).run();
    }
    if constexpr (Traits::kTurnsV)
      if (producer >= 2) Transposer<Traits>(args, shared, producer - 2).run();
  } else {
    arch::grow_registers<Traits::kConsumerRegisters>();
    Consumer<Traits, kDropout> consumer(args, shared, warpgroup);
    typename Consumer<Traits, kDropout>::Output o;
    while (const auto* work = consumer.next()) {
      const auto whole = [&] { return !Traits::Args::kMaySplit || arch::uniform(work->parts) == 1; };
      if constexpr (!Traits::kJoinsApart)
        if (!whole()) PartRows<Traits>(args, shared, *work, arch::thread_anew()).expect();
      RowScales scales;
      consumer.attend(*work, o, [&] {
        if (whole()) scales = finish_rows<Traits>(args, *work, arch::thread_anew(), consumer.softmax());
      });
      const uint32_t thread = arch::thread_anew();
      if (whole()) {
        store_rows(RowWriter<Traits>(args, *work, thread, scales, shared.staging), scales, o);
      } else if constexpr (Traits::kJoinsApart) {
        leave_rows<Traits>(args, *work, thread, o, consumer.softmax());
      } else {
        const PartRows<Traits> parts(args, shared, *work, thread);
        if (parts.leave(o, consumer.softmax())) parts.join();
      }
      consumer.done();
    }
    consumer.finish();
    if (pair.exists) arch::cluster_meet();
  }
}

/// Launch a kernel on `device`, the current one, in clusters of so many thread blocks if it has room for such; pairs
/// must be clusters; without that room `kElse` is launched, if there is one. What the kernel may ask for is raised the
/// first time.
template <class Traits, class Shared, auto kKernel, ForwardLaunch kElse = nullptr>
cudaError_t launch_kernel(const ForwardArgs& args, int grid, int cluster, int device, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(Shared);
  static_assert(Traits::kBlocksPerSm * (kSharedBytes + 1024) <= 228 * 1024,
                "a multiprocessor has 228 KB of shared memory, and keeps 1 KB for each thread block");
  constexpr int kRemembered = 64;              // devices; those past it are asked each time
  static uint8_t known_clusters[kRemembered];  // the largest; 0: not asked yet. <atomic> is half of a file's headers
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = Traits::kThreads;
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  int largest = device < kRemembered ? __atomic_load_n(&known_clusters[device], __ATOMIC_RELAXED) : 0;
  if (!largest) {
    cudaError_t error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error == cudaSuccess) error = cudaOccupancyMaxPotentialClusterSize(&largest, kKernel, &config);
    if (error != cudaSuccess) return error;
    largest = larger(largest, 1);
    if (device < kRemembered) __atomic_store_n(&known_clusters[device], largest, __ATOMIC_RELAXED);
  }
  if constexpr (kElse != nullptr)
    if (cluster > largest) return kElse(args, grid, cluster, device, stream);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  config.attrs = &attribute;
  config.numAttrs = args.extras.paired || (cluster > 1 && cluster <= largest);
  return cudaLaunchKernelEx(&config, kKernel, typename Traits::Args{args});
}

template <class Traits, bool kDropout>
constexpr ForwardLaunch launch_forward = launch_kernel<Traits, ForwardShared<Traits>, forward_kernel<Traits, kDropout>>;
template <class Traits>
constexpr ForwardLaunch launch_decode =
    launch_kernel<DecodeTraits<Traits>, DecodeShared<DecodeTraits<Traits>>, decode_kernel<DecodeTraits<Traits>>,
                  launch_forward<Traits, false>>;

template <class Traits>
ForwardVariant describe_forward(const char* name, int dtype) {
  ForwardVariant variant{
      .name = name,
      .dtype = dtype,
      .head_dim = Traits::kHeadDim,
      .head_dim_v = Traits::kHeadDimV,
      .has_qv = Traits::kHasQv,
      .consumers = Traits::kConsumers,
      .row_groups = Traits::kRowGroups,
      .tile_n = Traits::kTileN,
      .threads = Traits::kThreads,
      .shared_memory = static_cast<int>(sizeof(ForwardShared<Traits>)),
      .blocks_per_sm = Traits::kBlocksPerSm,
      .total_bytes = Traits::kSharedTotals ? 0 : Traits::kTotalBytes,
      .turned_v = Traits::kTurnedV,
      .pairs = Traits::kPairs,
      .part_bytes = Traits::kJoinsApart ? 0 : PartRows<Traits>::kBytes,
      .decoded_rows = 0,
      .joins_in_cluster = !Traits::kJoinsApart && PartRows<Traits>::kFitsShared,
      .swizzle_q_k = Traits::kSwizzleQK,
      .swizzle_v = Traits::kSwizzleV,
      .launch = launch_forward<Traits, false>,
      .launch_plain = nullptr,
      .launch_decode = nullptr,
      .launch_dropout = nullptr,
  };
  if constexpr (Traits::kHasPlain) variant.launch_plain = launch_forward<PlainTraits<Traits>, false>;
  if constexpr (Traits::kHasDecode) {
    variant.decoded_rows = DecodeTraits<Traits>::kMostJoinedRows;
    variant.launch_decode = launch_decode<Traits>;
  }
  if constexpr (Traits::kHasDropout) variant.launch_dropout = launch_forward<Traits, true>;
  return variant;
}

}  // namespace fa3
