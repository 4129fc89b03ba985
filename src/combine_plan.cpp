// Joining parts of the keys: from a call's arguments to its kernel's.
#include "combine_plan.h"

#include <algorithm>
#include <initializer_list>

namespace fa3 {
namespace {

constexpr int kColumns = 4;  // of a vector

bool steps_fit(std::initializer_list<int64_t> steps) {
  return std::all_of(steps.begin(), steps.end(), [](int64_t step) { return step % kColumns == 0; });
}

bool aligned(const void* address, size_t bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

}  // namespace

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
  const int64_t* from = p.out_partial.stride;
  args.part_vectors = from[3] == 1 && aligned(p.out_partial.data, kColumns * sizeof(float)) &&
                      steps_fit({p.out_partial_step, from[0], from[1], from[2]});
  args.out_vectors = aligned(p.out.data, kColumns * (p.out_dtype == FA3_FLOAT32 ? 4 : 2)) &&
                     steps_fit({p.out.stride[0], p.out.stride[1], p.out.stride[2]});
  return args;
}

}  // namespace fa3
