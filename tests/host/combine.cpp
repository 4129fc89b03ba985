// src/kernels/combine.cu on an emulated GPU, for tests/test_combine.py.
#include "kernels/combine.cu"
#include "combine_plan.h"
#include "dynamic_shared.h"

extern "C" {

size_t params_size() { return sizeof(fa3_combine_params); }

void combine_emulated(const fa3_combine_params* params) {
  fa3::launch_combine(fa3::plan_combine(*params), params->out_dtype, nullptr);
}

}  // extern "C"
