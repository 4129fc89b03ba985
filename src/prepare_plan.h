#pragma once
#include "fa3.h"
#include "kernels/prepare_args.h"

namespace fa3 {

/// Whether a call puts new keys into its cache, and whether it turns queries by their positions.
bool appends(const fa3_forward_params& params);
bool rotates(const fa3_forward_params& params);

/// Whether queries that turn stand at a position each, or all at their sequence's first.
bool turns_each_query(const fa3_mask& mask);

/// Batch entries of k and v, or their pages.
int key_entries(const fa3_forward_params& params);

/// The rows of one of them.
fa3_lengths key_storage(const fa3_forward_params& params);

/// Where its sequences' rows lie.
CacheRows cache_rows(const fa3_forward_params& params);

/// What the kernel before a (validated) call's attention is launched with, but for its parts of the workspace.
PrepareArgs plan_prepare(const fa3_forward_params& params);

}  // namespace fa3
