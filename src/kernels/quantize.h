#pragma once
#include <cuda_runtime.h>

#include "kernels/quantize_kind.h"
#include "kernels/rotation_args.h"

namespace fa3 {

/// Enqueue, on `device`, the current one, a planned quantisation whose arguments have their ticket and their parts of
/// the workspace.
cudaError_t launch_quantize(const QuantizePlan& plan, int device, cudaStream_t stream);

/// The same where the plan has a tile; of `args` all is there.
cudaError_t launch_rotation(const QuantizePlan& plan, const RotationArgs& args, int device, cudaStream_t stream);

}  // namespace fa3
