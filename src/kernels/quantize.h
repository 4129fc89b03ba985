#pragma once
#include <cuda_runtime.h>

#include "quantize_plan.h"

namespace fa3 {

/// Enqueue, on `device`, the current one, a planned quantisation whose arguments have their ticket and their parts of
/// the workspace.
cudaError_t launch_quantize(const QuantizePlan& plan, int device, cudaStream_t stream);

/// The same where the plan gives each thread a row.
cudaError_t launch_quantize_rows(const QuantizePlan& plan, int device, cudaStream_t stream);

}  // namespace fa3
