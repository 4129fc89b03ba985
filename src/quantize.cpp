// The C entry points of quantisation: validate -> plan -> launch.
#include "kernels/quantize.h"

#include "cuda_status.h"
#include "device.h"
#include "fa3.h"
#include "plan.h"
#include "quantize_plan.h"
#include "slow_checks.h"
#include "status.h"
#include "tensor_map.h"
#include "ticket.h"
#include "validate.h"

namespace fa3 {
namespace {

/// An empty x has scales all the same, unless it has no heads, or no batch entries to have them.
bool no_scales(const fa3_quantize_params& p) {
  return (p.granularity != FA3_PER_TENSOR && p.num_heads == 0) || (p.granularity == FA3_PER_BATCH_HEAD && p.batch == 0);
}

/// Describe x for TMA: the axes of units, and that of their rows.
fa3_status encode_rows(const QuantizePlan& plan, RotationArgs& args) {
  const QuantizeArgs& common = args.common;
  fa3_array x{};
  x.data = const_cast<void*>(common.x);
  x.stride[0] = common.x_unit[0];
  x.stride[1] = common.rows.x[0];
  x.stride[2] = common.x_unit[1];
  OperandShape shape;
  shape.dtype = plan.kind.dtype;
  shape.head_dim = common.head_dim;
  shape.heads = common.unit_heads;
  shape.batch = common.units / common.unit_heads;
  shape.rows = static_cast<int>(common.unit_rows);
  shape.box_rows = RotationTile::kRows;
  shape.swizzle = 2 * RotationTile::kChunkDims;
  shape.read_once = true;
  if (auto status = encode_operand(x, shape, args.x)) return status;
  const int rest = RotationTile{plan.tile_dim}.rest();
  if (!rest) return FA3_OK;
  shape.swizzle = 2 * rest;
  return encode_operand(x, shape, args.rest);
}

fa3_status launch(const QuantizePlan& plan, int device, cudaStream_t stream) {
  if (!plan.tile_dim) return checked(launch_quantize(plan, device, stream), "quantize");
  RotationArgs args{};
  args.common = plan.args;
  if (auto status = encode_rows(plan, args)) return status;
  return checked(launch_rotation(plan, args, device, stream), "quantize");
}

fa3_status quantize(const fa3_quantize_params* params, void* workspace, cudaStream_t stream) {
  if (auto status = validate(params)) return status;
  if (auto status = check_workspace(workspace)) return status;
  if (no_scales(*params)) return FA3_OK;
  const DeviceScope scope(params->device);
  if (scope.status()) return scope.status();
  int num_sms = 0;
  if (auto status = hopper_sms(params->device, num_sms)) return status;
  QuantizePlan plan = plan_quantize(*params, num_sms);
  if (plan.workspace && !workspace)
    return fail(FA3_ERROR_WORKSPACE, "workspace: null, but %zu bytes are needed", plan.workspace);
  if (auto status = slow_checks(*params, stream)) return status;
  plan.args.ticket = draw_ticket();
  plan.args.parts = static_cast<uint64_t*>(workspace);
  plan.args.departures = plan.args.parts + plan.part_words();
  return launch(plan, params->device, stream);
}

fa3_status workspace_bytes(const fa3_quantize_params* params, size_t* bytes) {
  if (!bytes) return fail(FA3_ERROR_NULL, "bytes: null pointer");
  *bytes = 0;
  if (auto status = validate(params)) return status;
  if (no_scales(*params)) return FA3_OK;
  int num_sms = 0;
  if (auto status = hopper_sms(params->device, num_sms)) return status;
  *bytes = workspace_aligned(plan_quantize(*params, num_sms).workspace);
  return FA3_OK;
}

}  // namespace
}  // namespace fa3

extern "C" int fa3_quantize_fp8(const fa3_quantize_params* params, void* workspace, void* stream) {
  fa3::clear_error();
  return fa3::quantize(params, workspace, static_cast<cudaStream_t>(stream));
}

extern "C" int fa3_quantize_workspace(const fa3_quantize_params* params, size_t* bytes) {
  fa3::clear_error();
  return fa3::workspace_bytes(params, bytes);
}
