#include "latent.h"

#include <cstdint>

namespace fa3 {
namespace {

/// What lies behind the values' columns.
void leave_out_values(fa3_array& array) {
  if (array.data) array.data = static_cast<uint16_t*>(array.data) + kMostLatentHeadDimV;
}

}  // namespace

fa3_forward_params as_computed(const fa3_forward_params& params) {
  fa3_forward_params p = params;
  if (!absorbed(params)) return p;
  p.head_dim = kMostLatentHeadDim;
  p.qv = params.q;
  leave_out_values(p.q);
  leave_out_values(p.k);
  leave_out_values(p.cache.k_new);
  return p;
}

}  // namespace fa3
