// The C entry points: validate -> plan -> encode -> launch.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "combine_plan.h"
#include "cuda_status.h"
#include "device.h"
#include "fa3.h"
#include "kernels/prepare.h"
#include "kernels/turn_values.h"
#include "latent.h"
#include "operand.h"
#include "plan.h"
#include "prepare_plan.h"
#include "slow_checks.h"
#include "status.h"
#include "ticket.h"
#include "validate.h"
#include "variants.h"

namespace fa3 {
namespace {

fa3_status plan_checked(const fa3_forward_params* params, int num_sms, fa3_forward_plan& plan) {
  if (auto status = validate(params)) return status;
  if (auto status = check_num_sms(num_sms)) return status;
  return plan_forward(as_computed(*params), num_sms, plan);
}

bool nothing_to_do(const fa3_forward_params& p) { return p.batch == 0 || (p.queries.rows == 0 && !appends(p)); }

struct Launch {
  const fa3_forward_params& params;
  const fa3_forward_plan& plan;
  const ForwardVariant& variant;
  Workspace workspace;
  cudaStream_t stream;
  bool absorbed;  // before it became a call with qv

  uint16_t* rotated_q = nullptr;  // contiguous, in the workspace
  int32_t* seqlens_k = nullptr;   // (batch), there too: with the new keys

  /// Append to the cache and turn q, where the call asks for it.
  fa3_status prepare() {
    if (!appends(params) && !rotates(params)) return FA3_OK;
    PrepareArgs args = plan_prepare(params);
    args.rotated_q = rotated_q;
    args.seqlens_k = seqlens_k;
    if (args.blocks == 0) return FA3_OK;
    return checked(launch_prepare(args, params.dtype, stream), "prepare");
  }

  /// An operand for TMA: the caller's array, a copy of one that TMA cannot address, or what `prepare` made of it.
  fa3_status operand(fa3_array array, const fa3_lengths& lengths, int entries, bool copy, void* prepared,
                     OperandShape shape, TmaOperand& operand) {
    shape.dtype = params.dtype;
    if (prepared) array = contiguous(prepared, lengths.rows, shape.heads, shape.head_dim);
    return prepare_operand(array, lengths, entries, shape, copy && !prepared, params.q.data, workspace, stream,
                           operand);
  }

  /// V as the kernel's products read it.
  fa3_status turn(ForwardArgs& args) {
    const fa3_forward_params& p = params;
    void* const turned = workspace.take(turned_bytes(p, variant));
    args.turned_v = static_cast<const uint8_t*>(turned);
    const ValuesToTurn values{
        p.v.data, {p.v.stride[0], p.v.stride[1], p.v.stride[2]}, p.batch, p.keys.rows, p.num_heads_kv, p.head_dim_v};
    return checked(turn_values(values, variant.head_dim_v, variant.tile_n, turned, stream), "turn_values");
  }

  static Descale descale(const fa3_descale& given) {
    return {given.data, given.stride[0], given.stride[1], std::max(given.group, 1)};
  }

  /// The thread blocks of a pair take two tiles' queries together.
  int sharing() const { return plan.paired ? 2 : 1; }

  /// What is read.
  fa3_status fill_operands(ForwardArgs& args) {
    const fa3_forward_params& p = params;
    ForwardExtras& extras = args.extras;
    const Packing& packing = extras.packing;
    const OperandShape q{.head_dim = p.head_dim,
                         .heads = p.num_heads,
                         .group = packing.ratio,
                         .box_group = packing.heads,
                         .box_rows = packing.positions,
                         .swizzle = variant.swizzle_q_k};
    if (p.cache.page_table) extras.pages = {cache_rows(p), page_box_rows(p, variant)};
    const int box_rows = extras.pages.box_rows > 0 ? extras.pages.box_rows : plan.tile_n;
    const bool read_once = plan.num_m_blocks == 1 && packing.tiles == 1;
    const OperandShape k{.head_dim = p.head_dim,
                         .heads = p.num_heads_kv,
                         .box_rows = box_rows,
                         .swizzle = variant.swizzle_q_k,
                         .read_once = read_once};
    const OperandShape v{.head_dim = p.head_dim_v,
                         .heads = p.num_heads_kv,
                         .box_rows = box_rows,
                         .swizzle = variant.swizzle_v,
                         .read_once = read_once};
    if (auto status = operand(p.q, p.queries, p.batch, plan.copy_q, rotated_q, q, args.q)) return status;
    if (has_qv(p)) {
      OperandShape qv = q;
      qv.head_dim = p.head_dim_v;
      qv.swizzle = variant.swizzle_v;
      if (auto status = operand(p.qv, p.queries, p.batch, plan.copy_qv, nullptr, qv, args.qv)) return status;
    }
    const fa3_lengths stored = key_storage(p);
    if (auto status = operand(p.k, stored, key_entries(p), plan.copy_k, nullptr, k, args.k)) return status;
    if (auto status = operand(p.v, stored, key_entries(p), plan.copy_v == kPacked, nullptr, v, args.v)) return status;
    return plan.copy_v == kTurned ? turn(args) : FA3_OK;
  }

  void fill_result(ForwardArgs& args) const {
    const fa3_forward_params& p = params;
    args.out = p.out.data;
    args.out_float16 = p.out_dtype == FA3_FLOAT16;
    args.lse = static_cast<float*>(p.lse.data);
    args.extras.odd_out = odd_out(p);
    for (int axis = 0; axis < 3; ++axis) {
      args.out_stride[axis] = p.out.stride[axis];
      args.lse_stride[axis] = p.lse.stride[axis];
    }
  }

  /// Which queries see which keys.
  void fill_rows(ForwardArgs& args) const {
    const fa3_forward_params& p = params;
    args.queries = {p.queries.rows, p.queries.cu_seqlens, p.queries.seqused};
    args.keys = {{p.keys.rows, p.keys.cu_seqlens, seqlens_k ? seqlens_k : p.keys.seqused},
                 p.cache.cache_leftpad,
                 p.cache.cache_batch_idx,
                 p.cache.page_table != nullptr};
    args.visibility = visibility_of(p);
    args.batch = p.batch;
    args.num_heads_kv = p.num_heads_kv;
    args.head_dim = p.head_dim;
    args.head_dim_v = p.head_dim_v;
  }

  /// What becomes of scores, up to their sums.
  void fill_scores(ForwardArgs& args) const {
    const fa3_forward_params& p = params;
    ForwardExtras& extras = args.extras;
    args.q_descale = descale(p.q_descale);
    args.k_descale = descale(p.k_descale);
    args.v_descale = descale(p.v_descale);
    args.absorbed = absorbed;
    args.accumulate_blocks = plan.accumulate_blocks;
    const ScoreScales scales = score_scales(p);
    args.score_scale_log2 = scales.scale_log2;
    args.hidden = args.score_scale_log2 < 0 ? INFINITY : -INFINITY;
    extras.softcap_scale = scales.softcap_scale;
    extras.plain_blocks = !scales.capped();
    extras.sinks = p.sinks;
    extras.exact_max = p.batch_invariant;
    args.dropout = dropout_of(p.dropout);
  }

  /// Who does what, once `fill_rows` has been there.
  void fill_schedule(ForwardArgs& args) const {
    const fa3_forward_params& p = params;
    const Packing& packing = args.extras.packing;
    args.heads = Divisor::of(p.num_heads_kv * packing.tiles);
    args.extras.paired = plan.paired;
    args.queries_of_tile = Divisor::of(variant.row_groups * packing.positions * sharing());
    args.most_tiles = static_cast<int>(most_tiles(p, plan));
    args.order = {plan.heads_per_section, plan.short_m_blocks};
    args.plain_pieces = !p.queries.cu_seqlens && !p.queries.seqused && plan.num_m_blocks == 1 && !args.piece_counter &&
                        args.visibility.full() && !p.keys.cu_seqlens && !p.cache.cache_leftpad;
    args.extras.splits = Splits::of(plan.whole_tiles / sharing(), plan.num_splits);
  }

  fa3_status fill(ForwardArgs& args) {
    args.extras.packing = packing_of(params, plan.pack_gqa > 1);
    if (auto status = fill_operands(args)) return status;
    fill_result(args);
    fill_rows(args);
    fill_scores(args);
    fill_schedule(args);
    return FA3_OK;
  }

  fa3_status run() {
    ForwardArgs args{};
    args.ticket = draw_ticket();
    const WorkspaceSizes sizes = workspace_sizes(params, plan);
    if (sizes.counter) args.piece_counter = static_cast<uint64_t*>(workspace.take(sizes.counter));
    if (sizes.parts) {
      args.parts_done = static_cast<uint64_t*>(workspace.take(sizes.parts_done));
      args.parts = static_cast<float*>(workspace.take(sizes.parts));
      args.parts_lse = static_cast<float*>(workspace.take(sizes.parts_lse));
      args.part_rows = rows_of_heads(params);
    }
    if (sizes.totals) args.totals = static_cast<float4*>(workspace.take(sizes.totals));
    if (sizes.seqlens_k) seqlens_k = static_cast<int32_t*>(workspace.take(sizes.seqlens_k));
    if (rotates(params))
      rotated_q = static_cast<uint16_t*>(
          workspace.take(copy_bytes(params.queries, params.batch, params.num_heads, params.head_dim, params.dtype)));
    if (auto status = prepare()) return status;
    if (params.queries.rows == 0) return FA3_OK;  // only the cache was written
    if (auto status = fill(args)) return status;
    const auto launch = args.dropout.active ? variant.launch_dropout
                        : plan.decode       ? variant.launch_decode
                        : plan.plain        ? variant.launch_plain
                                            : variant.launch;
    const cudaError_t error = launch(args, plan.grid, plan.cluster, params.device, stream);
    if (auto status = checked(error, variant.name)) return status;
    return sizes.parts && variant.joins_apart() ? join(args) : FA3_OK;
  }

  /// Join the parts that kernels leave for it, of rows that a sequence uses.
  fa3_status join(const ForwardArgs& forward) {
    const fa3_forward_params& p = params;
    const int64_t heads = p.num_heads, rows = p.queries.rows;
    fa3_combine_params parts{};
    parts.out_dtype = p.out_dtype;
    parts.splits = plan.num_splits;
    parts.batch = p.queries.cu_seqlens ? 1 : p.batch;
    parts.rows = p.queries.rows;
    parts.num_heads = p.num_heads;
    parts.head_dim_v = p.head_dim_v;
    parts.out_partial = contiguous(forward.parts, rows, heads, p.head_dim_v);
    parts.lse_partial = {forward.parts_lse, {rows * heads, heads, 1, 0}};
    parts.out_partial_step = forward.part_rows * p.head_dim_v;
    parts.lse_partial_step = forward.part_rows;
    parts.out = p.out;
    parts.lse = {p.lse.data, {p.lse.stride[0], p.lse.stride[2], p.lse.stride[1], 0}};
    CombineArgs args = plan_combine(parts);
    args.queries = forward.queries;
    args.sequences = p.queries.cu_seqlens || p.queries.seqused ? p.batch : 0;
    return checked(launch_combine(args, p.out_dtype, stream), "combine");
  }
};

fa3_status forward(const fa3_forward_params* params, void* workspace, cudaStream_t stream) {
  if (auto status = validate(params)) return status;
  if (auto status = check_workspace(workspace)) return status;
  const fa3_forward_params p = as_computed(*params);
  if (nothing_to_do(p)) return FA3_OK;
  const DeviceScope scope(p.device);
  if (scope.status()) return scope.status();
  int num_sms = 0;
  if (auto status = hopper_sms(p.device, num_sms)) return status;
  fa3_forward_plan plan;
  if (auto status = plan_forward(p, num_sms, plan)) return status;
  if (plan.workspace && !workspace)
    return fail(FA3_ERROR_WORKSPACE, "workspace: null, but %zu bytes are needed", plan.workspace);
  log_plan(p, plan);
  if (auto status = slow_checks(p, stream)) return status;
  return Launch{p, plan, forward_variants()[plan.variant], Workspace(workspace), stream, absorbed(*params)}.run();
}

fa3_status workspace_bytes(const fa3_forward_params* params, size_t* bytes) {
  if (!bytes) return fail(FA3_ERROR_NULL, "bytes: null pointer");
  *bytes = 0;
  if (auto status = validate(params)) return status;
  const fa3_forward_params p = as_computed(*params);
  if (nothing_to_do(p)) return FA3_OK;
  int num_sms = 0;
  if (auto status = hopper_sms(p.device, num_sms)) return status;
  fa3_forward_plan plan;
  if (auto status = plan_forward(p, num_sms, plan)) return status;
  *bytes = plan.workspace;
  return FA3_OK;
}

}  // namespace
}  // namespace fa3

extern "C" int fa3_forward(const fa3_forward_params* params, void* workspace, void* stream) {
  fa3::clear_error();
  return fa3::forward(params, workspace, static_cast<cudaStream_t>(stream));
}

extern "C" int fa3_forward_workspace(const fa3_forward_params* params, size_t* bytes) {
  fa3::clear_error();
  return fa3::workspace_bytes(params, bytes);
}

extern "C" int fa3_plan_forward(const fa3_forward_params* params, int32_t num_sms, fa3_forward_plan* plan) {
  fa3::clear_error();
  if (!plan) return fa3::fail(FA3_ERROR_NULL, "plan: null pointer");
  return fa3::plan_checked(params, num_sms, *plan);
}

extern "C" int fa3_forward_variant(int32_t index, fa3_variant* variant) {
  fa3::clear_error();
  const auto variants = fa3::forward_variants();
  if (!variant) return fa3::fail(FA3_ERROR_NULL, "variant: null pointer");
  if (index < 0 || index >= static_cast<int>(variants.size()))
    return fa3::fail(FA3_ERROR_SHAPE, "index: %d, but there are %zu variants", index, variants.size());
  const fa3::ForwardVariant& v = variants[index];
  *variant = {v.name,   v.dtype,   v.head_dim,      v.head_dim_v,    v.tile_m(),
              v.tile_n, v.threads, v.shared_memory, v.blocks_per_sm, v.has_qv};
  return FA3_OK;
}
