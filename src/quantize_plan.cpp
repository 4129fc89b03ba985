// The host's decisions about a quantisation: which rows share a scale, and which thread blocks share those rows.
#include "quantize_plan.h"

#include <algorithm>
#include <limits>

#include "plan.h"

namespace fa3 {
namespace {

struct Axis {
  int64_t size, x, out;
};

/// Appends an axis inside the last one, or makes one of both where their strides say that they are.
void append(const Axis& axis, Axis (&axes)[3], int& count) {
  if (axis.size == 1 && count > 0) return;
  if (count > 0) {
    Axis& outer = axes[count - 1];
    const bool one = outer.size == 1, nested = outer.x == axis.size * axis.x && outer.out == axis.size * axis.out;
    if (one || nested) {
      outer = {outer.size * axis.size, axis.x, axis.out};
      return;
    }
  }
  axes[count++] = axis;
}

void describe_rows(const fa3_quantize_params& p, QuantizeArgs& args) {
  const Axis batch{p.batch, p.x.stride[0], p.out.stride[0]}, rows{p.rows, p.x.stride[1], p.out.stride[1]},
      heads{p.num_heads, p.x.stride[2], p.out.stride[2]};
  const bool per_head = p.granularity != FA3_PER_TENSOR, per_batch = p.granularity == FA3_PER_BATCH_HEAD;
  Axis axes[3];
  int count = 0;
  if (!per_batch) append(batch, axes, count);
  append(rows, axes, count);
  if (!per_head) append(heads, axes, count);
  int64_t unit_rows = 1;
  for (int i = 0; i < count; ++i) unit_rows *= axes[i].size;
  args.rows.count = count;
  for (int i = 0; i < count && unit_rows; ++i) {
    args.rows.size[i] = Divisor::of(static_cast<int>(axes[i].size));
    args.rows.x[i] = axes[i].x;
    args.rows.out[i] = axes[i].out;
  }
  args.unit_rows = static_cast<uint32_t>(unit_rows);
  args.units = (per_batch ? p.batch : 1) * (per_head ? p.num_heads : 1);
  args.unit_heads = per_head ? p.num_heads : 1;
  if (per_batch && !p.cu_seqlens) args.x_unit[0] = batch.x, args.out_unit[0] = batch.out;
  if (per_batch) args.descale_stride[0] = p.descale_stride[0];
  if (per_head) args.x_unit[1] = heads.x, args.out_unit[1] = heads.out, args.descale_stride[1] = p.descale_stride[1];
}

bool multiples_of(int64_t alignment, const fa3_array& array, int64_t itemsize) {
  auto remainder = reinterpret_cast<uintptr_t>(array.data) % alignment;
  for (int axis = 0; axis < 3; ++axis) remainder |= array.stride[axis] * itemsize % alignment != 0;
  return remainder == 0;
}

int64_t ceil_quotient(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Which thread blocks share a unit. One that a block can hold is a block's own, with nothing to wait for. Larger ones
/// are worked on by groups of resident blocks, several units at a time so that some load while others wait for
/// their amax or write: as many as the chip holds, but rather fewer than leave groups idle in the last round.
void share_units(const QuantizePlan& plan, int64_t steps, int num_sms, QuantizeArgs& args) {
  const int64_t places = plan.kind.max_places(), resident = int64_t{num_sms} * plan.kind.blocks_per_sm();
  // With cu_seqlens a block may get more steps than it is planned for.
  args.places = static_cast<int>(args.cu_seqlens ? places : std::clamp<int64_t>(steps, 1, places));
  args.groups = args.units;
  args.blocks_per_group = 1;
  if (steps <= places) return;
  const int64_t most_groups = std::clamp<int64_t>(resident / ceil_quotient(steps, places), 1, args.units);
  double best = 0;
  for (int64_t groups = 1; groups <= most_groups; ++groups) {
    const int64_t rounds = ceil_quotient(args.units, groups), blocks = std::min(resident / groups, steps / 2);
    const double busy = static_cast<double>(args.units) / (rounds * groups) * (groups * blocks) / resident;
    if (busy < best || rounds * blocks > kMaxArrivals) continue;
    best = busy;
    args.groups = static_cast<int>(groups);
    args.blocks_per_group = static_cast<int>(blocks);
  }
}

}  // namespace

QuantizeKind quantize_kind(const fa3_quantize_params& p) {
  // Two groups of a row in each lane share the counting of rows and places, which is half of the instructions. The
  // rotation of a power of two is then half in the lanes' own registers, too; others cannot be cut in halves.
  const bool power = (p.head_dim & (p.head_dim - 1)) == 0;
  const bool halved = p.head_dim % 16 == 0 && p.head_dim <= 256 && (power || !p.hadamard);
  return {p.dtype, p.hadamard != 0, halved ? 2 : (p.head_dim / 8 + 31) / 32};
}

QuantizePlan plan_quantize(const fa3_quantize_params& p, int num_sms) {
  QuantizePlan plan{};
  QuantizeArgs& args = plan.args;
  plan.kind = quantize_kind(p);
  args.x = p.x.data;
  args.out = static_cast<uint8_t*>(p.out.data);
  args.descale = p.descale;
  args.cu_seqlens = p.cu_seqlens;
  args.head_dim = p.head_dim;
  args.row_lanes = plan.kind.row_lanes(p.head_dim);
  args.step_rows = plan.kind.step_rows(p.head_dim);
  args.limit = p.hadamard ? kRotatedLimit : std::numeric_limits<float>::max();
  args.x_vectors = multiples_of(16, p.x, p.dtype == FA3_FLOAT32 ? 4 : 2);
  args.out_vectors = multiples_of(8, p.out, 1);
  describe_rows(p, args);
  args.plain = args.x_vectors && args.out_vectors && args.rows.count == 1 && 32 % args.row_lanes == 0 &&
               args.row_lanes * plan.kind.slots * 8 == p.head_dim;
  // How long sequences are only the device knows: cut up as if they were equal, and every block copes with any length.
  const int64_t rows = p.cu_seqlens && p.batch ? ceil_quotient(args.unit_rows, p.batch) : args.unit_rows;
  share_units(plan, ceil_quotient(rows, args.step_rows), num_sms, args);
  if (args.blocks_per_group > 1) {
    const auto aligned = [](size_t bytes) {
      return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
    };
    plan.arrivals_bytes = aligned(args.groups * sizeof(uint64_t));
    plan.parts_bytes = aligned(size_t{2} * args.groups * args.blocks_per_group * sizeof(float));
  }
  return plan;
}

}  // namespace fa3
