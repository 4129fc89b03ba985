#pragma once
#include "fa3.h"

namespace fa3 {

/// Every choice that a forward call makes, from its (validated) arguments and the device alone. Calls no CUDA.
fa3_status plan_forward(const fa3_forward_params& params, int num_sms, fa3_forward_plan& plan);

/// The plan as one line on stderr, if the environment has FA3_LOG=plan.
void log_plan(const fa3_forward_params& params, const fa3_forward_plan& plan);

/// The mask of the arguments as the kernels take it.
struct Visibility visibility_of(const fa3_mask& mask);
/// The same of a call: a lone query stands at the last key, and no right side hides anything from it.
struct Visibility visibility_of(const fa3_forward_params& params);

/// Rows of a typical sequence: between the mean and the caller's maximum, or the mean where no maximum was given.
int typical_seqlen(const fa3_lengths& lengths, int batch);

/// Whether an array with these rows has none. A ragged one may have some that belong to no sequence.
inline bool no_rows(const fa3_lengths& lengths, int batch) {
  return lengths.rows == 0 || (batch == 0 && !lengths.cu_seqlens);
}

/// What kernels multiply scores with: exponents of 2 are score * scale_log2 or, with a cap, scale_log2 * tanh(score *
/// softcap_scale). softcap_scale is 0 without a cap, and where the cap is so large that it changes no score.
struct ScoreScales {
  float scale_log2, softcap_scale;
  bool capped() const { return softcap_scale != 0; }
};
ScoreScales score_scales(float softmax_scale, float softcap);
/// The same of a forward call.
ScoreScales score_scales(const fa3_forward_params& params);

/// Dropout as the kernels take it.
struct Dropout dropout_of(const fa3_dropout& dropout);

/// Bytes that TMA wants addresses and strides to be multiples of.
inline constexpr int kTmaAlignment = 16;
/// Parts of the workspace begin at multiples of this.
inline constexpr size_t kWorkspaceAlignment = 256;

inline size_t workspace_aligned(size_t bytes) {
  return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}

/// Whether TMA can address an operand as it is: a step of 0 bytes is handled by not stepping, the rest must be positive
/// multiples of 16 below 2^40.
bool tma_addressable(const fa3_array& array, const fa3_lengths& lengths, int entries, int heads, int dtype);

/// Bytes of shared memory that TMA wants the place of a box to be a multiple of.
inline constexpr int kBoxAlignment = 128;

/// Rows of pages that TMA brings at once: the most that divide both a page and a block of keys; behind left padding,
/// where a box may begin anywhere in a page, one. 0 where so few make no place for a box.
int page_box_rows(const fa3_forward_params& params, const struct ForwardVariant& variant);

/// Rows of all query heads.
int64_t rows_of_heads(const fa3_forward_params& params);

/// How query heads share tiles.
struct Packing packing_of(const fa3_forward_params& params, bool packed);

/// The workspace's parts, each a multiple of kWorkspaceAlignment: what comes before the copies.
struct WorkspaceSizes {
  size_t counter, parts_done, parts, parts_lse, totals, seqlens_k;
};
WorkspaceSizes workspace_sizes(const fa3_forward_params& params, const fa3_forward_plan& plan);

/// Tiles of all queries: exact for dense batches, an upper bound for ragged ones whose sequences do not overlap.
int64_t most_tiles(const fa3_forward_params& params, const fa3_forward_plan& plan);

/// Whether rows of out are stored element by element: 16 bytes at a time do not fit every address and stride.
bool odd_out(const fa3_forward_params& params);

/// Bytes of an element of q, k and v.
inline int element_bytes(int dtype) { return dtype == FA3_FLOAT8_E4M3 ? 1 : 2; }

/// Bytes of a contiguous copy of an operand of so many batch entries (if it is not ragged), for one that TMA cannot
/// address; see fa3_forward_plan::copy_q.
size_t copy_bytes(const fa3_lengths& lengths, int entries, int heads, int head_dim, int dtype);

/// Values of fa3_forward_plan::copy_v.
enum : int32_t { kNoCopy, kPacked, kTurned };

/// Bytes of V turned for a kernel, in whole blocks of keys.
size_t turned_bytes(const fa3_forward_params& params, const struct ForwardVariant& variant);

}  // namespace fa3
