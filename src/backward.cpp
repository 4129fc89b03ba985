// The C entry points of the backward: validate -> plan -> launch.
#include <cuda_runtime.h>

#include <algorithm>

#include "alignment.h"
#include "backward_plan.h"
#include "cuda_status.h"
#include "device.h"
#include "fa3.h"
#include "kernels/backward_rows.h"
#include "operand.h"
#include "plan.h"
#include "slow_checks.h"
#include "status.h"
#include "validate.h"
#include "variants.h"

namespace fa3 {
namespace {

RowArray row_array(const fa3_array& array) {
  return {array.data, {array.stride[0], array.stride[1], array.stride[2]}, aligned(array, 2, 16)};
}

Lengths lengths_of(const fa3_lengths& lengths) { return {lengths.rows, lengths.cu_seqlens, lengths.seqused}; }

struct BackwardLaunch {
  const fa3_backward_params& params;
  const BackwardPlan& plan;
  const BackwardVariant& variant;
  int num_sms;
  Workspace workspace;
  cudaStream_t stream;
  BackwardScratch scratch{};

  fa3_status run() {
    scratch.query_tiles = plan.query_tiles;
    scratch.stats = static_cast<float*>(workspace.take(plan.stats));
    scratch.dq = static_cast<float*>(workspace.take(plan.dq));
    scratch.dq_turns = static_cast<uint32_t*>(workspace.take(plan.turns));
    scratch.in_order = params.deterministic;
    if (plan.sink_parts) scratch.sink_parts = static_cast<float*>(workspace.take(plan.sink_parts));
    if (plan.counts) {
      scratch.taken = static_cast<uint32_t*>(workspace.take(plan.counters));
      scratch.added = scratch.taken + 1;
      scratch.counts = plan.counts;
    }
    if (plan.query_tiles)
      if (auto status = prepare()) return status;
    if (plan.key_tiles && !plan.query_tiles)
      if (auto status = clear_counts()) return status;
    if (plan.key_tiles)
      if (auto status = main_kernel()) return status;
    if (plan.query_tiles)
      if (auto status = finish_queries()) return status;
    if (auto status = clear(params.dq, params.queries, params.num_heads, params.head_dim)) return status;
    if (auto status = clear(params.dk, params.keys, params.num_heads_kv, params.head_dim)) return status;
    return clear(params.dv, params.keys, params.num_heads_kv, params.head_dim_v);
  }

  BackwardProblem problem() const {
    return {scratch, lengths_of(params.queries), lengths_of(params.keys), visibility_of(params.mask), params.batch};
  }

  fa3_status prepare() {
    const fa3_backward_params& p = params;
    PrepareBackwardArgs args{};
    static_cast<BackwardProblem&>(args) = problem();
    args.out = row_array(p.out);
    args.dout = row_array(p.dout);
    args.lse = static_cast<const float*>(p.lse.data);
    args.dlse = static_cast<const float*>(p.dlse.data);
    for (int axis = 0; axis < 3; ++axis) {
      args.lse_stride[axis] = p.lse.stride[axis];
      args.dlse_stride[axis] = p.dlse.stride[axis];
    }
    args.sinks = p.sinks;
    args.num_heads = p.num_heads;
    args.head_dim_v = p.head_dim_v;
    args.tile_m = variant.tile_m;
    args.dq_shares = variant.dq_shares;
    return checked(prepare_backward(args, p.dtype, stream), "prepare_backward");
  }

  /// What prepare() does beside the rest of it.
  fa3_status clear_counts() const {
    return checked(cudaMemsetAsync(scratch.taken, 0, plan.counts * sizeof(uint32_t), stream), "cudaMemsetAsync");
  }

  fa3_status operand(const fa3_array& array, const fa3_lengths& lengths, bool copy, OperandShape shape,
                     TmaOperand& operand) {
    shape.dtype = params.dtype;
    return prepare_operand(array, lengths, params.batch, shape, copy, params.k.data, workspace, stream, operand);
  }

  fa3_status main_kernel() {
    const fa3_backward_params& p = params;
    const BackwardVariant& v = variant;
    BackwardArgs args{};
    static_cast<BackwardProblem&>(args) = problem();
    const OperandShape q{.head_dim = p.head_dim, .heads = p.num_heads, .box_rows = v.tile_m, .swizzle = v.swizzle_q_k};
    const OperandShape dout{
        .head_dim = p.head_dim_v, .heads = p.num_heads, .box_rows = v.tile_m, .swizzle = v.swizzle_v};
    const OperandShape key{
        .head_dim = p.head_dim, .heads = p.num_heads_kv, .box_rows = v.tile_n, .swizzle = v.swizzle_q_k};
    const OperandShape value{
        .head_dim = p.head_dim_v, .heads = p.num_heads_kv, .box_rows = v.tile_n, .swizzle = v.swizzle_v};
    if (auto status = operand(p.q, p.queries, plan.copy_q, q, args.q)) return status;
    if (auto status = operand(p.k, p.keys, plan.copy_k, key, args.k)) return status;
    if (auto status = operand(p.v, p.keys, plan.copy_v, value, args.v)) return status;
    if (auto status = operand(p.dout, p.queries, plan.copy_dout, dout, args.dout)) return status;
    args.dk = row_array(p.dk);
    args.dv = row_array(p.dv);
    args.num_heads_kv = p.num_heads_kv;
    args.group = p.num_heads / p.num_heads_kv;
    args.head_dim = p.head_dim;
    args.head_dim_v = p.head_dim_v;
    const ScoreScales scales = score_scales(p.softmax_scale, p.softcap);
    args.score_scale_log2 = scales.scale_log2;
    args.softcap_scale = scales.softcap_scale;
    args.softmax_scale = p.softmax_scale;
    args.dropout = dropout_of(p.dropout);
    args.order = plan.order;
    args.key_tiles = plan.key_tiles;
    const auto launch = args.dropout.active ? v.launch_dropout : v.launch;
    const int grid = std::min(plan.key_tiles, num_sms / v.blocks) * v.blocks;
    return checked(launch(args, grid, p.device, stream), v.name);
  }

  /// dQ, and the sinks' gradients.
  fa3_status finish_queries() {
    const fa3_backward_params& p = params;
    ConvertArgs args{};
    static_cast<BackwardProblem&>(args) = problem();
    args.dq = row_array(p.dq);
    args.num_heads = p.num_heads;
    args.num_heads_kv = p.num_heads_kv;
    args.head_dim = p.head_dim;
    args.softmax_scale = p.softmax_scale;
    if (auto status = checked(variant.convert(args, stream), "convert_dq")) return status;
    return p.sinks ? checked(sum_sinks(scratch, p.num_heads, p.dsinks, stream), "sum_sinks") : FA3_OK;
  }

  /// What no sequence has in use: all rows of a ragged batch without sequences.
  fa3_status clear(const fa3_array& array, const fa3_lengths& lengths, int heads, int head_dim) const {
    if (no_rows(lengths, params.batch) || !(lengths.cu_seqlens || lengths.seqused)) return FA3_OK;
    const cudaError_t error =
        clear_unused_rows(row_array(array), lengths_of(lengths), params.batch, heads, head_dim, stream);
    return checked(error, "clear_unused_rows");
  }
};

fa3_status backward(const fa3_backward_params* params, void* workspace, cudaStream_t stream) {
  if (auto status = validate(params)) return status;
  if (auto status = check_workspace(workspace)) return status;
  const DeviceScope scope(params->device);
  if (scope.status()) return scope.status();
  int num_sms = 0;
  if (auto status = hopper_sms(params->device, num_sms)) return status;
  BackwardPlan plan;
  if (auto status = plan_backward(*params, plan)) return status;
  if (plan.workspace() && !workspace)
    return fail(FA3_ERROR_WORKSPACE, "workspace: null, but %zu bytes are needed", plan.workspace());
  if (auto status = slow_checks(*params, stream)) return status;
  if (params->sinks && plan.query_tiles == 0) {
    const cudaError_t error = cudaMemsetAsync(params->dsinks, 0, params->num_heads * sizeof(float), stream);
    if (auto status = checked(error, "cudaMemsetAsync")) return status;
  }
  return BackwardLaunch{*params, plan, backward_variants()[plan.variant], num_sms, Workspace(workspace), stream}.run();
}

fa3_status workspace_bytes(const fa3_backward_params* params, size_t* bytes) {
  if (!bytes) return fail(FA3_ERROR_NULL, "bytes: null pointer");
  *bytes = 0;
  if (auto status = validate(params)) return status;
  BackwardPlan plan;
  if (auto status = plan_backward(*params, plan)) return status;
  *bytes = plan.workspace();
  return FA3_OK;
}

}  // namespace
}  // namespace fa3

extern "C" int fa3_backward(const fa3_backward_params* params, void* workspace, void* stream) {
  fa3::clear_error();
  return fa3::backward(params, workspace, static_cast<cudaStream_t>(stream));
}

extern "C" int fa3_backward_workspace(const fa3_backward_params* params, size_t* bytes) {
  fa3::clear_error();
  return fa3::workspace_bytes(params, bytes);
}

extern "C" int fa3_backward_variant(int32_t index, fa3_variant* variant) {
  fa3::clear_error();
  const auto variants = fa3::backward_variants();
  if (!variant) return fa3::fail(FA3_ERROR_NULL, "variant: null pointer");
  if (index < 0 || index >= static_cast<int>(variants.size()))
    return fa3::fail(FA3_ERROR_SHAPE, "index: %d, but there are %zu variants", index, variants.size());
  const fa3::BackwardVariant& v = variants[index];
  *variant = {v.name, v.dtype, v.head_dim, v.head_dim_v, v.tile_m, v.tile_n, v.threads, v.shared_memory, 1, 0};
  return FA3_OK;
}
