#include "latent.h"

#include <cstdint>

#include "plan.h"

namespace fa3 {
namespace {

/// What lies behind the values' columns.
void leave_out_values(fa3_array& array, int element_bytes) {
  if (array.data) array.data = static_cast<uint8_t*>(array.data) + kMostLatentHeadDimV * element_bytes;
}

}  // namespace

fa3_forward_params as_computed(const fa3_forward_params& params) {
  fa3_forward_params p = params;
  if (!absorbed(params)) return p;
  p.head_dim = kMostLatentHeadDim;
  p.qv = params.q;
  const int bytes = element_bytes(p.dtype);
  leave_out_values(p.q, bytes);
  leave_out_values(p.k, bytes);
  leave_out_values(p.cache.k_new, bytes);
  return p;
}

}  // namespace fa3
