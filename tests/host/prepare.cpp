// src/kernels/prepare.cu on an emulated GPU, for tests/test_prepare_kernel.py.
#include "kernels/prepare.cu"
#include "dynamic_shared.h"
#include "prepare_plan.h"

using namespace fa3;

extern "C" {

size_t params_size() { return sizeof(fa3_forward_params); }

/// Returns thread blocks.
int64_t prepare_emulated(const fa3_forward_params* params, uint16_t* rotated_q, int* seqlens_k) {
  PrepareArgs args = plan_prepare(*params);
  args.rotated_q = rotated_q;
  args.seqlens_k = appends(*params) ? seqlens_k : nullptr;
  launch_prepare(args, params->dtype, nullptr);
  return args.blocks;
}

}  // extern "C"
