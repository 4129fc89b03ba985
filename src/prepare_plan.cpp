// What comes before attention on a cache: appending and turning, from the call's arguments alone.
#include "prepare_plan.h"

#include <algorithm>

#include "alignment.h"
#include "plan.h"

namespace fa3 {
namespace {

constexpr int kVector = 8;  // elements

StridedRows rows_of(const fa3_array& array, int dtype) {
  const int itemsize = element_bytes(dtype);
  return {
      array.data, {array.stride[0], array.stride[1], array.stride[2]}, aligned(array, itemsize, kVector * itemsize)};
}

/// Small rows share a thread block, large ones have one each.
int rows_per_block(int units) { return std::max(kPrepareThreads / units, 1); }

}  // namespace

bool appends(const fa3_forward_params& params) { return params.cache.k_new.data; }
bool rotates(const fa3_forward_params& params) { return params.cache.rotary_cos; }

bool turns_each_query(const fa3_mask& mask) {
  return mask.causal || mask.window_left >= 0 || mask.window_right >= 0 || mask.attention_chunk > 0;
}

int key_entries(const fa3_forward_params& params) {
  const fa3_cache& c = params.cache;
  return c.page_table ? c.num_pages : c.cache_batch_idx ? c.batch_entries : params.batch;
}

fa3_lengths key_storage(const fa3_forward_params& params) {
  return params.cache.page_table ? fa3_lengths{params.cache.page_size, 0, nullptr, nullptr} : params.keys;
}

CacheRows cache_rows(const fa3_forward_params& params) {
  const fa3_cache& c = params.cache;
  return {params.keys.rows,
          key_entries(params),
          c.cache_batch_idx,
          c.page_table,
          c.page_table_stride,
          c.max_pages,
          Divisor::of(std::max(c.page_size, 1))};
}

PrepareArgs plan_prepare(const fa3_forward_params& p) {
  const fa3_cache& c = p.cache;
  PrepareArgs args{};
  args.batch = p.batch;
  args.num_heads = p.num_heads;
  args.num_heads_kv = p.num_heads_kv;
  args.head_dim = p.head_dim;
  args.head_dim_v = p.head_dim_v;
  args.queries = {p.queries.rows, p.queries.cu_seqlens, p.queries.seqused};
  args.new_keys = {c.rows_new, c.cu_seqlens_k_new, nullptr};
  args.cached = {p.keys.rows, c.k_new.data ? c.seqlen : p.keys.rows, p.keys.seqused};
  args.cache = cache_rows(p);
  if (rotates(p)) {
    args.rotary = {.cos = c.rotary_cos,
                   .sin = c.rotary_sin,
                   .seqlens = c.rotary_seqlens,
                   .rows = c.rotary_rows,
                   .dim = c.rotary_dim,
                   .fp32 = c.rotary_dtype == FA3_FLOAT32,
                   .vectors = aligned(c.rotary_cos, 16) && aligned(c.rotary_sin, 16),
                   .interleaved = c.rotary_interleaved != 0,
                   .each_query = turns_each_query(p.mask)};
    args.q = rows_of(p.q, p.dtype);
    args.query_rows = int64_t{p.queries.rows} * (p.queries.cu_seqlens ? 1 : p.batch);
    args.query_rows_per_block = rows_per_block(args.units_of_query());
    args.blocks = (args.query_rows + args.query_rows_per_block - 1) / args.query_rows_per_block;
  }
  if (appends(p)) {
    args.k_new = rows_of(c.k_new, p.dtype);
    args.v_new = rows_of(c.v_new, p.dtype);
    args.k = rows_of(p.k, p.dtype);
    args.v = rows_of(p.v, p.dtype);
    args.new_rows = int64_t{c.rows_new} * (c.cu_seqlens_k_new ? 1 : p.batch);
    args.new_rows_per_block = rows_per_block(args.units_of_new_row());
    args.new_blocks = (args.new_rows + args.new_rows_per_block - 1) / args.new_rows_per_block;
    args.blocks += args.new_blocks;
    // Lengths are written by the first threads, one each.
    args.blocks = std::max<int64_t>(args.blocks, ceil_div(p.batch, kPrepareThreads));
  }
  return args;
}

}  // namespace fa3
