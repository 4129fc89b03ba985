// Multi-head latent attention: what its two forms are, and that they are one.
#pragma once
#include "fa3.h"

namespace fa3 {

/// Head dims that kernels with qv have, at most.
inline constexpr int kMostLatentHeadDim = 64, kMostLatentHeadDimV = 512;

/// Whether scores add qv v. Of an empty array qv has no address, but strides.
inline bool has_qv(const fa3_forward_params& params) { return params.qv.data || params.qv.stride[3]; }

/// Whether values are the first columns of the keys: head dims (576, 512).
inline bool absorbed(const fa3_forward_params& params) {
  return !has_qv(params) && params.head_dim == kMostLatentHeadDim + kMostLatentHeadDimV &&
         params.head_dim_v == kMostLatentHeadDimV;
}

/// A (validated) call as kernels know it. An absorbed one has qv in front of q, and v in front of k.
fa3_forward_params as_computed(const fa3_forward_params& params);

}  // namespace fa3
