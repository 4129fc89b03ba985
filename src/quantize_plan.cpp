// The host's decisions about a quantisation: which rows share a scale, and which thread blocks share those rows.
#include "quantize_plan.h"

#include <algorithm>
#include <limits>

#include "alignment.h"

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

int64_t ceil_quotient(int64_t a, int64_t b) { return (a + b - 1) / b; }

QuantizeKind kind_of(const fa3_quantize_params& p, bool large) {
  const bool hadamard = p.hadamard != 0;
  if (p.head_dim > 256) return {p.dtype, hadamard, 3, 1};
  // The rotation of a power of two is half in the lanes' own registers; others cannot be cut in halves. Two groups of a
  // row also share the counting of rows and places, as several rows do in large units.
  const bool power = (p.head_dim & (p.head_dim - 1)) == 0, halves = p.head_dim % 16 == 0;
  const int columns = halves && (hadamard ? power : !large) ? 2 : 1;
  if (!large) return {p.dtype, hadamard, columns, 1};
  return {p.dtype, hadamard, columns, columns == 2 || (!hadamard && p.dtype == FA3_FLOAT32) ? 2 : 4};
}

/// Cuts units of so many rows into steps. Returns how many.
int64_t cut_steps(const QuantizeKind& kind, int64_t rows, QuantizeArgs& args) {
  args.row_lanes = kind.row_lanes(args.head_dim);
  args.warp_rows = 32 / args.row_lanes;
  args.slot_rows = kind.threads() / 32 * args.warp_rows;
  args.step_rows = args.slot_rows * kind.rows;
  args.places = kind.max_places();
  return ceil_quotient(rows, args.step_rows);
}

/// Whether the kernel that rotates tiles can take them: whatever TMA asks for, and codes 16 at a time.
bool tile_fits(const fa3_quantize_params& p, const QuantizeArgs& args) {
  if (!p.hadamard || p.dtype == FA3_FLOAT32 || !RotationTile::fits(p.head_dim) || !args.plain || args.cu_seqlens)
    return false;
  constexpr int64_t kMostBytes = int64_t{1} << 40;  // of a stride
  constexpr uint32_t kMostRows = INT32_MAX - RotationTile::kRows;
  bool fits = aligned(p.out, 1, 16) && args.rows.x[0] > 0 && args.unit_rows <= kMostRows;
  for (int64_t stride : {args.rows.x[0], args.x_unit[0], args.x_unit[1]})
    fits &= stride >= 0 && 2 * stride < kMostBytes;
  return fits && 2 * args.unit_rows >= RotationTile::kRows;  // or most of a tile's rows would be none
}

/// What the shape of a kernel for large units says of how they are shared.
struct Cut {
  int64_t steps, resident, held;  // of a unit, thread blocks, and steps that a block holds while others are loaded
  double meeting;                 // of a stream's block: what each costs, in steps
  bool streams;
};

Cut cut_large(const fa3_quantize_params& p, int64_t rows, int num_sms, QuantizePlan& plan) {
  QuantizeArgs& args = plan.args;
  Cut cut;
  if (tile_fits(p, args)) {
    const RotationTile tile{p.head_dim};
    plan.tile_dim = p.head_dim;
    args.step_rows = RotationTile::kRows;
    args.places = tile.places();
    cut = {ceil_quotient(rows, args.step_rows), num_sms, tile.held(), 4500. / tile.tile_bytes(), true};
  } else {
    plan.kind = kind_of(p, true);
    const int64_t steps = cut_steps(plan.kind, rows, args);
    cut = {steps, int64_t{num_sms} * (plan.kind.max_threads() / plan.kind.threads()), args.places - plan.kind.ring(), 0,
           plan.kind.streams() && !args.cu_seqlens};
  }
  cut.streams &= 2 * ceil_quotient(cut.steps, std::min(cut.resident, cut.steps)) <= cut.held;
  return cut;
}

/// Which thread blocks share a unit of so many rows. One that a small block can hold is a block's own, with nothing to
/// wait for; tiles come by few large blocks all the same. Larger ones go through groups of resident blocks: as many
/// groups as can hold a unit and have room for as much of others while they wait for its amax, but rather fewer than
/// leave groups idle in the last round. Units that are too large for that, and sequences, whose lengths only the device
/// knows, go one by one, and each time a group meets for about as long as a step takes.
void share_units(const fa3_quantize_params& p, int64_t rows, int num_sms, QuantizePlan& plan) {
  QuantizeArgs& args = plan.args;
  plan.kind = kind_of(p, false);
  const int64_t small_steps = cut_steps(plan.kind, rows, args);
  args.groups = args.units;
  args.blocks_per_group = 1;
  if (small_steps <= args.places && !tile_fits(p, args)) {
    if (!args.cu_seqlens) args.places = static_cast<int>(std::max<int64_t>(small_steps, 1));
    return;
  }
  const Cut cut = cut_large(p, rows, num_sms, plan);
  if (cut.streams) args.unit_steps = static_cast<int>(cut.steps);
  double best = std::numeric_limits<double>::max();
  for (int64_t groups = 1; groups <= std::min<int64_t>(args.units, cut.resident); ++groups) {
    const int64_t blocks = std::min(cut.resident / groups, cut.steps), each = ceil_quotient(cut.steps, blocks);
    if (cut.streams ? (blocks > 1 ? 2 : 1) * each > cut.held : groups > 1 && each > args.places) continue;
    const int64_t rounds = ceil_quotient(args.units, groups);
    const double busy = static_cast<double>(args.units) / (rounds * groups) * (groups * blocks) / cut.resident;
    const double meetings = blocks > 1 ? cut.meeting * static_cast<double>(blocks) / static_cast<double>(cut.steps) : 0;
    const double cost = cut.streams ? (1 + meetings) / busy : static_cast<double>(rounds * (each + 1));
    if (cost > best) continue;
    best = cost;
    args.groups = static_cast<int>(groups);
    args.blocks_per_group = static_cast<int>(blocks);
  }
}

}  // namespace

QuantizePlan plan_quantize(const fa3_quantize_params& p, int num_sms) {
  QuantizePlan plan{};
  QuantizeArgs& args = plan.args;
  args.x = p.x.data;
  args.out = static_cast<uint8_t*>(p.out.data);
  args.descale = p.descale;
  args.cu_seqlens = p.cu_seqlens;
  args.head_dim = p.head_dim;
  args.limit = p.hadamard ? kRotatedLimit : std::numeric_limits<float>::max();
  args.x_vectors = aligned(p.x, p.dtype == FA3_FLOAT32 ? 4 : 2, 16);
  args.out_vectors = aligned(p.out, 1, 8);
  describe_rows(p, args);
  args.plain = args.x_vectors && args.out_vectors && args.rows.count == 1;
  // How long sequences are only the device knows: cut up as if they were equal, and every block copes with any length.
  const int64_t rows = p.cu_seqlens && p.batch ? ceil_quotient(args.unit_rows, p.batch) : args.unit_rows;
  share_units(p, rows, num_sms, plan);
  if (plan.has_parts()) plan.workspace = (plan.part_words() + args.groups) * sizeof(uint64_t);
  return plan;
}

}  // namespace fa3
