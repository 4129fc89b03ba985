// Quantisation to e4m3 with the rotation, for head dims and layouts that models have: one thread, one row.
//
// Floor: as quantize.cu, 3 bytes an element; but a rotation is 7 sums an element at head dim 128, of 15 instructions in
// all, where lanes that share a row spend 29. The rows of a unit go to as many thread blocks as they
// fill once, so that a block keeps a unit's sums in shared memory while it rotates the next unit's rows, and only then
// asks for the scale. A unit that is too large for that is loaded and rotated twice.
#include "kernels/quantize_rows.cuh"

#include "kernels/quantize.h"
#include "kernels/quantize_launch.cuh"
#include "kernels/quantize_meeting.cuh"

namespace fa3 {
namespace {

/// What the amax of a unit gives, for the caller too.
template <class T>
__device__ __forceinline__ RowScale<T> scale_of(const QuantizeArgs& args, int unit, int rank, float amax) {
  const RowScale<T> scale(amax);
  if (rank == 0 && threadIdx.x == 0) keep_descale(args, unit / args.unit_heads, unit % args.unit_heads, scale.descale);
  return scale;
}

/// Units of which a block has one step each.
template <class T>
__device__ __forceinline__ void step_by_step(const QuantizeArgs& args, Rows<T>& rows, int group, int rank,
                                             Meeting& meeting) {
  const int units = (args.units - group + args.groups - 1) / args.groups;
  int unit = group, before = group;
  rows.load(RowSpan<T>(args, unit, rank));
  meeting.begin();
  for (int round = 0; round <= units; ++round, before = unit, unit += args.groups) {
    float v[T::kPart], amax = 0;
    if (round < units) {
      rows.take(v);
      if (round + 1 < units) rows.load(RowSpan<T>(args, unit + args.groups, rank));
      if (round > 0) meeting.ask(before);
      amax = rows.scan(v, unit, rank);
    }
    if (round == 0) {
      meeting.leave(unit, round, amax);
    } else {
      amax = round < units ? meeting.leave_and_take(unit, round, amax, before) : meeting.take(before, round - 1);
      if (round == units) meeting.depart();
      rows.write(RowSpan<T>(args, before, rank), scale_of<T>(args, before, rank, amax));
    }
    if (round < units) rows.hold(v);
  }
}

/// Units of any size, one after the other; the second pass goes backwards, so that it begins with what is in L2.
template <class T>
__device__ __forceinline__ void unit_by_unit(const QuantizeArgs& args, Rows<T>& rows, int group, int rank,
                                             Meeting& meeting) {
  for (int unit = group, round = 0; unit < args.units; unit += args.groups, ++round) {
    const int all = static_cast<int>((args.unit_rows + args.step_rows - 1) / static_cast<uint32_t>(args.step_rows));
    const int each = (all + args.blocks_per_group - 1) / args.blocks_per_group;
    const int first = rank * each, end = min(first + each, all);
    float v[T::kPart], amax = 0;
    if (first < end) rows.load(RowSpan<T>(args, unit, first));
    if (round == 0) meeting.begin();
    for (int step = first; step < end; ++step) {
      rows.take(v);
      // The second pass begins with the last step, too.
      rows.load(RowSpan<T>(args, unit, min(step + 1, end - 1)));
      amax = fmaxf(amax, rows.scan(v, unit, step));
    }
    meeting.leave(unit, round, amax);
    const RowScale<T> scale = scale_of<T>(args, unit, rank, meeting.take(unit, round));
    if (unit + args.groups >= args.units) meeting.depart();
    for (int step = end - 1; step >= first; --step) {
      rows.take(v);
      if (step > first) rows.load(RowSpan<T>(args, unit, step - 1));
      rows.rotate_again(v);
      rows.hold(v);
      rows.write(RowSpan<T>(args, unit, step), scale);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(T::kTile.threads(), RowTile::kBlocks)
    quantize_rows_kernel(const __grid_constant__ QuantizeArgs args) {
  extern __shared__ uint4 memory[];
  // Of two groups a multiprocessor has blocks of both, and one computes while the other waits.
  const int group = blockIdx.x / args.blocks_per_group, rank = blockIdx.x % args.blocks_per_group;
  Rows<T> rows(args, memory);
  Meeting meeting(args, group, rank);
  args.unit_steps ? step_by_step<T>(args, rows, group, rank, meeting)
                  : unit_by_unit<T>(args, rows, group, rank, meeting);
}

template <class T>
cudaError_t launch_rows(const QuantizeArgs& args, int device, cudaStream_t stream) {
  constexpr int kBytes = T::kTile.bytes();
  return launch_quantize_kernel<quantize_rows_kernel<T>, kBytes>(args, T::kTile.threads(), kBytes, device, stream);
}

template <class Element>
cudaError_t launch_head_dim(const QuantizePlan& plan, int device, cudaStream_t stream) {
  switch (plan.row_dim) {
    case 64:
      return launch_rows<RowsTraits<Element, 64>>(plan.args, device, stream);
    case 80:
      return launch_rows<RowsTraits<Element, 80>>(plan.args, device, stream);
    case 128:
      return launch_rows<RowsTraits<Element, 128>>(plan.args, device, stream);
    default:
      return launch_rows<RowsTraits<Element, 256>>(plan.args, device, stream);
  }
}

}  // namespace

cudaError_t launch_quantize_rows(const QuantizePlan& plan, int device, cudaStream_t stream) {
  return plan.kind.dtype == FA3_FLOAT16 ? launch_head_dim<Float16>(plan, device, stream)
                                        : launch_head_dim<BFloat16>(plan, device, stream);
}

}  // namespace fa3
