// Joining parts of the keys: from a call's arguments to its kernel's.
#include "combine_plan.h"

#include <algorithm>

#include "alignment.h"

namespace fa3 {
CombineArgs plan_combine(const fa3_combine_params& p) {
  CombineArgs args{};
  args.out_partial = static_cast<const float*>(p.out_partial.data);
  args.lse_partial = static_cast<const float*>(p.lse_partial.data);
  args.out_partial_step = p.out_partial_step;
  args.lse_partial_step = p.lse_partial_step;
  std::copy_n(p.out_partial.stride, 4, args.out_partial_stride);
  std::copy_n(p.lse_partial.stride, 3, args.lse_partial_stride);
  args.out = p.out.data;
  args.lse = static_cast<float*>(p.lse.data);
  std::copy_n(p.out.stride, 3, args.out_stride);
  std::copy_n(p.lse.stride, 3, args.lse_stride);
  args.splits = p.splits;
  args.rows = p.rows;
  args.num_heads = p.num_heads;
  args.head_dim_v = p.head_dim_v;
  args.count = int64_t{p.batch} * p.rows * p.num_heads;
  args.part_vectors = p.out_partial.stride[3] == 1 && p.out_partial_step % kCombineColumns == 0 &&
                      aligned(p.out_partial, sizeof(float), kCombineColumns * sizeof(float));
  const int itemsize = p.out_dtype == FA3_FLOAT32 ? 4 : 2;
  args.out_vectors = aligned(p.out, itemsize, kCombineColumns * itemsize);
  return args;
}

}  // namespace fa3
