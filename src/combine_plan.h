#pragma once
#include "fa3.h"
#include "kernels/combine.h"

namespace fa3 {

/// What the kernel of a (validated) call is launched with.
CombineArgs plan_combine(const fa3_combine_params& params);

}  // namespace fa3
