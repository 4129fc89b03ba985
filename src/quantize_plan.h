#pragma once
#include "kernels/quantize_kind.h"

namespace fa3 {

/// Every choice that a (validated) call makes, on a device with so many multiprocessors.
QuantizePlan plan_quantize(const fa3_quantize_params& params, int num_sms);

}  // namespace fa3
