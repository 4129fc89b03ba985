// Quantisation to e4m3: one kernel that finds the amax of the rows that share a scale, and then rounds them.
//
// Floor: x read once and a byte an element written, 3 bytes for 16-bit x. So that x is read once, what was loaded stays
// in shared memory until amax is known: 29 MB on 132 multiprocessors, or half of that with a rotation, whose results
// are kept in fp32. What does not fit is read again, from L2 where it is still there. Each warp keeps to places of its
// own, so that shared memory needs no barrier; asynchronous copies fill them, a ring of steps ahead. Units that fit go
// through as one stream (quantize_stream.cuh), others one by one; what blocks tell each other is in quantize_parts.cuh.
#include "kernels/quantize.h"

#include "kernels/quantize_launch.cuh"
#include "kernels/quantize_meeting.cuh"
#include "kernels/quantize_share.cuh"
#include "kernels/quantize_stream.cuh"

namespace fa3 {
namespace {

/// Units of any size, one after the other: what does not fit is loaded twice.
template <class T>
__device__ __forceinline__ void unit_by_unit(const QuantizeArgs& args, Share<T>& share, int group, int rank,
                                             const Meeting& meeting) {
  constexpr int kRing = T::kRing;
  for (int unit = group, round = 0; unit < args.units; unit += args.groups, ++round) {
    const Unit<T> rows(args, unit);
    const int all = rows.steps(args), each = (all + args.blocks_per_group - 1) / args.blocks_per_group;
    const int first = rank * each, steps = max(min(each, all - first), 0);
    const Places places(args.places, steps, kRing);
    const auto load = [&](int step) { share.load(rows, first + step, places.of(step)); };

    float amax = 0;
    for (int step = 0; step < kRing; ++step) {
      if (step < steps) load(step);
      __pipeline_commit();
    }
    if (round == 0) meeting.begin();
    for (int step = 0; step < steps; ++step) {
      __pipeline_wait_prior(kRing - 1);
      amax = fmaxf(amax, share.scan(rows, first + step, places.of(step)));
      if (step + kRing < steps) load(step + kRing);
      __pipeline_commit();
    }
    meeting.leave(unit, round, amax);
    const Scale<T> scale(share.lane(), descale_of(meeting.take(unit, round)));
    if (unit + args.groups >= args.units) meeting.depart();
    if (rank == 0 && threadIdx.x == 0)
      keep_descale(args, unit / args.unit_heads, unit % args.unit_heads, scale.descale);
    for (int step = steps - 1; step >= 0; --step) {
      __pipeline_wait_prior(kRing - 1);
      share.write(rows, first + step, places.of(step), places.lost(step), scale);
      const int next = step - kRing;
      if (next >= 0 && places.lost(next)) load(next);
      __pipeline_commit();
    }
  }
}

template <class T>
__global__ void __launch_bounds__(T::kKind.bound(), T::kKind.min_blocks())
    quantize_kernel(const __grid_constant__ QuantizeArgs args) {
  extern __shared__ __align__(128) uint4 memory[];  // asynchronous copies write whole lines
  const Lane<T> lane(args.head_dim, args.row_lanes);
  const int group = blockIdx.x % args.groups, rank = blockIdx.x / args.groups;
  Share<T> share(args, lane, memory);
  const Meeting meeting(args, group, rank);
  unit_by_unit<T>(args, share, group, rank, meeting);
}

template <class T>
__global__ void __launch_bounds__(T::kKind.max_threads() + 32, 1)
    quantize_stream_kernel(const __grid_constant__ QuantizeArgs args) {
  extern __shared__ __align__(128) uint4 memory[];  // asynchronous copies write whole lines
  const int group = blockIdx.x % args.groups, rank = blockIdx.x / args.groups;
  prefetch_steps(args, sizeof(typename T::Type), group, rank, T::kRing);
  const Lane<T> lane(args.head_dim, args.row_lanes);
  Share<T> share(args, lane, memory);
  stream<T>(args, share, group, rank);
}

template <class T>
cudaError_t launch(const QuantizePlan& plan, int device, cudaStream_t stream) {
  const size_t bytes = static_cast<size_t>(plan.args.places) * T::kKind.place_bytes(T::kThreads);
  if constexpr (T::kStreams) {
    constexpr int kThreads = T::kThreads + 32;  // a warp that gathers
    if (plan.args.unit_steps)
      return launch_quantize_kernel<quantize_stream_kernel<T>, kMaxPlacesBytes>(plan.args, plan.args, kThreads, bytes,
                                                                                device, stream);
  }
  return launch_quantize_kernel<quantize_kernel<T>, kMaxPlacesBytes>(plan.args, plan.args, T::kThreads, bytes, device,
                                                                     stream);
}

template <class Element, bool kHadamard>
cudaError_t launch_shape(const QuantizePlan& plan, int device, cudaStream_t stream) {
  constexpr int kRows = !kHadamard && sizeof(Element) == 4 ? 2 : 4;
  const int columns = plan.kind.columns, rows = plan.kind.rows;
  if (columns == 3) return launch<QuantizeTraits<Element, kHadamard, 3, 1>>(plan, device, stream);
  if (columns == 1 && rows == 1) return launch<QuantizeTraits<Element, kHadamard, 1, 1>>(plan, device, stream);
  if (columns == 1) return launch<QuantizeTraits<Element, kHadamard, 1, kRows>>(plan, device, stream);
  if constexpr (kHadamard)
    if (rows == 2) return launch<QuantizeTraits<Element, true, 2, 2>>(plan, device, stream);
  return launch<QuantizeTraits<Element, kHadamard, 2, 1>>(plan, device, stream);
}

template <class Element>
cudaError_t launch_element(const QuantizePlan& plan, int device, cudaStream_t stream) {
  return plan.kind.hadamard ? launch_shape<Element, true>(plan, device, stream)
                            : launch_shape<Element, false>(plan, device, stream);
}

}  // namespace

cudaError_t launch_quantize(const QuantizePlan& plan, int device, cudaStream_t stream) {
  switch (plan.kind.dtype) {
    case FA3_FLOAT16:
      return launch_element<Float16>(plan, device, stream);
    case FA3_BFLOAT16:
      return launch_element<BFloat16>(plan, device, stream);
    default:
      return launch_element<float>(plan, device, stream);
  }
}

}  // namespace fa3
