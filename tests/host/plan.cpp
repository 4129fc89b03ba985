// src/plan.cpp without CUDA, for tests/test_plan_host.py: with a variant table of its own and the names in cuda_names/.
#include "plan.h"

#include "attention/block_range.h"
#include "latent.h"
#include "validate.h"
#include "variants.h"

namespace fa3 {

static cudaError_t any_launch(const ForwardArgs&, int, int, int, cudaStream_t) { return cudaError_t(); }

std::span<const ForwardVariant> forward_variants() {
  static const ForwardVariant table[] = {
      {"large", FA3_BFLOAT16, 128,  128, false, 3,   3,   80,      512,     0,       1,      0,
       false,   false,        3000, 0,   true,  128, 128, nullptr, nullptr, nullptr, nullptr},
      {"small", FA3_BFLOAT16, 128,  128, false, 2,   2,   128,     384,        0,       1,      0,
       false,   false,        2000, 0,   true,  128, 128, nullptr, any_launch, nullptr, nullptr},
  };
  return table;
}

}  // namespace fa3

/// The keys that a query row sees under the mask of a call's arguments.
extern "C" void key_interval(const fa3_mask* mask, int row, int seqlen_q, int seqlen_k, fa3::KeyInterval* out) {
  *out = fa3::visibility_of(*mask).keys(row, seqlen_q, seqlen_k);
}

/// (scale_log2, softcap_scale) of a call's arguments.
extern "C" void score_scales(float softmax_scale, float softcap, fa3::ScoreScales* out) {
  *out = fa3::score_scales(softmax_scale, softcap);
}

/// Plan a call as fa3_plan_forward does.
extern "C" int plan_checked(const fa3_forward_params* params, int num_sms) {
  fa3_forward_plan plan;
  if (auto status = fa3::validate(params)) return status;
  return fa3::plan_forward(fa3::as_computed(*params), num_sms, plan);
}

namespace {

/// A small causal call.
fa3_forward_params call_of(int batch, int rows, int heads) {
  fa3_forward_params params{};
  params.dtype = FA3_BFLOAT16;
  params.batch = batch;
  params.num_heads = params.num_heads_kv = heads;
  params.head_dim = params.head_dim_v = 128;
  params.queries.rows = params.keys.rows = rows;
  params.mask.causal = 1;
  params.softmax_scale = 1;
  return params;
}

}  // namespace

/// Plan it as fa3_forward does, and log it.
extern "C" int plan_and_log(int batch, int rows, int heads) {
  const fa3_forward_params params = call_of(batch, rows, heads);
  fa3_forward_plan plan;
  if (auto status = fa3::plan_forward(params, 132, plan)) return status;
  fa3::log_plan(params, plan);
  return FA3_OK;
}

extern "C" int takes_plain_kernel(float softcap) {
  fa3_forward_params params = call_of(3, 500, 4);
  params.softcap = softcap;
  fa3_forward_plan plan;
  return fa3::plan_forward(params, 132, plan) == FA3_OK && plan.plain;
}
