// src/kernels/quantize.cu on an emulated GPU, and the counting that it relies on, for tests/test_quantize_kernel.py.
#include "dynamic_shared.h"
#include "quantize_kernels.h"
#include "quantize_plan.h"

using namespace fa3;

namespace {

/// Boxes of so many columns of a tile's rows; 0: there are none.
TmaOperand operand_of(const QuantizeArgs& args, int columns) {
  const int heads = args.unit_heads, batch = args.units / args.unit_heads;
  TmaOperand operand{};
  operand.map = {.data = static_cast<const uint8_t*>(args.x),
                 .axes = 4,
                 .element_bytes = 2,
                 .swizzle = 2 * columns,
                 .extents = {args.head_dim, args.unit_rows, heads, batch},
                 .strides = {2, 2 * args.rows.x[0], 2 * args.x_unit[1], 2 * args.x_unit[0]},
                 .box = {columns, RotationTile::kRows, 1, 1}};
  operand.head_step = heads > 1;
  operand.batch_step = batch > 1;
  return operand;
}

void launch(const QuantizePlan& plan) {
  if (!plan.tile_dim) {
    launch_quantize(plan, 0, nullptr);
    return;
  }
  const RotationTile tile{plan.tile_dim};
  launch_rotation(plan, {plan.args, operand_of(plan.args, tile.kChunkDims), operand_of(plan.args, tile.rest())}, 0,
                  nullptr);
}

}  // namespace

extern "C" {

/// Quantise on a GPU of so many multiprocessors, with a workspace full of `garbage`; twice, as a graph replays a
/// launch. At most `places` (0: as many as there are) make small problems overflow the chip, unit by unit. Returns
/// thread blocks to a scale, -1 where something is written behind the workspace, and -2 where a launch leaves in it
/// what a replay would take for its own.
int quantize_emulated(const fa3_quantize_params* params, int num_sms, int places, int late_copies, uint64_t garbage) {
  QuantizePlan plan = plan_quantize(*params, num_sms);
  if (places) {
    plan.args.places = std::min(plan.args.places, places);
    plan.args.unit_steps = 0;
  }
  std::vector<uint64_t> workspace(plan.workspace / sizeof(uint64_t) + 1, garbage);
  plan.args.ticket = 0x123456789a;
  plan.args.parts = workspace.data();
  plan.args.departures = workspace.data() + plan.part_words();
  using emulated::Choices;
  emulated::choices = {late_copies ? Choices::kLate : Choices::kEarly, garbage + places, num_sms};
  const auto end = workspace.end() - 1;
  for (int replay = 0; replay < 2; ++replay) {
    launch(plan);
    if (plan.has_parts() && std::any_of(workspace.begin(), end, [](uint64_t word) { return word != 0; })) return -2;
  }
  return *end == garbage ? plan.args.blocks_per_group : -1;
}

/// groups, blocks per group, places, workspace bytes, axes of rows, and the shared memory that all blocks of a
/// multiprocessor take with the 1 KiB a block that is the system's and 2 of the kernel's own; how many blocks that is,
/// the steps of a unit that goes through as part of a stream, the head dim of the kernel that rotates tiles, and the
/// threads, columns and rows of the kernel.
void plan_of(const fa3_quantize_params* params, int num_sms, int64_t* out) {
  const QuantizePlan plan = plan_quantize(*params, num_sms);
  const RotationTile tile{plan.tile_dim};
  const int64_t bytes =
      plan.tile_dim ? tile.bytes() : int64_t{plan.args.places} * plan.kind.place_bytes(plan.kind.threads());
  out[0] = plan.args.groups;
  out[1] = plan.args.blocks_per_group;
  out[2] = plan.args.places;
  out[3] = static_cast<int64_t>(plan.workspace);
  out[4] = plan.args.rows.count;
  out[6] = plan.tile_dim ? 1 : plan.kind.max_threads() / plan.kind.threads();
  out[5] = (bytes + 3 * 1024) * out[6];
  out[7] = plan.args.unit_steps;
  out[8] = plan.tile_dim;
  out[9] = plan.tile_dim ? tile.threads() : plan.kind.threads() + (plan.args.unit_steps ? 32 : 0);
  out[10] = plan.kind.columns;
  out[11] = plan.kind.rows;
}

void quotients(uint32_t divisor, int count, const uint32_t* n, uint32_t* out) {
  const Divisor by = Divisor::of(static_cast<int>(divisor));
  for (int i = 0; i < count; ++i) out[i] = by.quotient(static_cast<int>(n[i]));
}

}  // extern "C"
