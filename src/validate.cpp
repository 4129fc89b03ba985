// Every rule on arguments, one named check each. None reads device memory. The first that fails gives the status.
#include "validate.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <utility>

#include "kernels/combine.h"
#include "latent.h"
#include "plan.h"
#include "prepare_plan.h"
#include "status.h"

namespace fa3 {
namespace {

constexpr int kMaxRows = 1 << 30;  // positions plus a window must fit in 32 bits
constexpr int kMaxBatch = 1 << 30, kMaxHeads = 1 << 30;
constexpr int kMaxHeadDim = 256;
constexpr int kMaxQuantizedHeadDim = 576;  // the largest that any attention takes

/// A struct of another header's would be read past its end, or in the wrong places.
template <class Params>
fa3_status check_struct(const Params* p, const char* name) {
  if (!p) return fail(FA3_ERROR_NULL, "params: null pointer");
  if (p->struct_size == sizeof(Params)) return FA3_OK;
  return fail(FA3_ERROR_SHAPE, "struct_size: %zu, but this library's %s has %zu bytes", p->struct_size, name,
              sizeof(Params));
}

/// Multi-head latent attention: what of it is built.
fa3_status check_latent(const fa3_forward_params& p) {
  if (!has_qv(p) && !absorbed(p)) return FA3_OK;
  if (p.dropout.p > 0)
    return fail(FA3_ERROR_NO_DROPOUT, "dropout_p: %g, but with %s dropout is not built for the GPU; needs 0",
                p.dropout.p, has_qv(p) ? "qv" : "head dims 576 and 512");
  if (has_qv(p) && (p.head_dim > kMostLatentHeadDim || p.head_dim_v > kMostLatentHeadDimV))
    return fail(FA3_ERROR_NO_QV, "qv: head dims %d and %d with it, but at most %d and %d are built for the GPU",
                p.head_dim, p.head_dim_v, kMostLatentHeadDim, kMostLatentHeadDimV);
  if (has_qv(p)) return FA3_OK;
  bool same_memory = p.k.data == p.v.data;
  for (int axis = 0; axis < 3; ++axis) same_memory &= p.k.stride[axis] == p.v.stride[axis];
  if (!same_memory)
    return fail(FA3_ERROR_NO_QV,
                "v: memory of its own, but with head dims 576 and 512 it must be k's first 512 columns");
  if (p.cache.rotary_cos)
    return fail(FA3_ERROR_NO_QV, "rotary_cos: given, but with head dims 576 and 512 it would turn the values; give qv");
  return FA3_OK;
}

fa3_status check_dtypes(const fa3_forward_params& p) {
  const bool fp8 = p.dtype == FA3_FLOAT8_E4M3;
  if (fp8 && p.dropout.p > 0)
    return fail(FA3_ERROR_NO_DROPOUT, "dropout_p: %g, but of fp8 dropout is not built for the GPU; needs 0",
                p.dropout.p);
  if (!fp8 && p.dtype != FA3_FLOAT16 && p.dtype != FA3_BFLOAT16)
    return fail(FA3_ERROR_DTYPE, "dtype: %d is no fa3_dtype that q, k, v can have", p.dtype);
  if (fp8 && p.out_dtype != FA3_FLOAT16 && p.out_dtype != FA3_BFLOAT16)
    return fail(FA3_ERROR_DTYPE, "out_dtype: %d, but of fp8 it must be FA3_BFLOAT16 or FA3_FLOAT16", p.out_dtype);
  if (!fp8 && (p.q_descale.data || p.k_descale.data || p.v_descale.data))
    return fail(FA3_ERROR_DTYPE, "descale: given, but q has dtype %d, and only FA3_FLOAT8_E4M3 takes it", p.dtype);
  if (!fp8 && p.out_dtype != p.dtype) return fail(FA3_ERROR_DTYPE, "out_dtype: %d, but q has %d", p.out_dtype, p.dtype);
  return FA3_OK;
}

fa3_status check_sizes(int batch, int num_heads, int num_heads_kv) {
  if (batch < 0) return fail(FA3_ERROR_SHAPE, "batch: %d is negative", batch);
  if (batch > kMaxBatch) return fail(FA3_ERROR_SHAPE, "batch: %d, but at most 2^30 are possible", batch);
  if (num_heads > kMaxHeads) return fail(FA3_ERROR_SHAPE, "num_heads: %d, but at most 2^30 are possible", num_heads);
  if (num_heads < 1 || num_heads_kv < 1)
    return fail(FA3_ERROR_SHAPE, "num_heads: %d on %d, but both must be at least 1", num_heads, num_heads_kv);
  if (num_heads % num_heads_kv)
    return fail(FA3_ERROR_SHAPE, "num_heads: %d, not a multiple of num_heads_kv %d", num_heads, num_heads_kv);
  return FA3_OK;
}

fa3_status check_choices(const fa3_forward_params& p) {
  if (p.num_splits < 0) return fail(FA3_ERROR_SHAPE, "num_splits: %d is negative", p.num_splits);
  if (p.pack_gqa < -1 || p.pack_gqa > 1)
    return fail(FA3_ERROR_SHAPE, "pack_gqa: %d, but it must be -1 (chosen), 0 or 1", p.pack_gqa);
  if (p.fp8_accumulate < -1 || (p.fp8_accumulate && p.dtype != FA3_FLOAT8_E4M3))
    return fail(FA3_ERROR_SHAPE, "fp8_accumulate: %d, but of fp8 it must be at least -1, else 0", p.fp8_accumulate);
  if (p.sm_margin < 0) return fail(FA3_ERROR_SHAPE, "sm_margin: %d is negative", p.sm_margin);
  return FA3_OK;
}

fa3_status check_head_dims(int head_dim, int head_dim_v, int dtype, int most = kMaxHeadDim) {
  for (int dim : {head_dim, head_dim_v}) {
    if (dtype == FA3_FLOAT8_E4M3 && dim % 16)
      return fail(FA3_ERROR_HEAD_DIM_FP8, "head_dim: %d, but of fp8 it must be a multiple of 16 on the GPU", dim);
    if (dim < 8 || dim % 8 || dim > most)
      return fail(FA3_ERROR_HEAD_DIM, "head_dim: %d, but it must be a multiple of 8 up to %d on the GPU", dim, most);
  }
  return FA3_OK;
}

fa3_status check_groups(const fa3_forward_params& p) {
  if (p.q_descale.group < 0 || p.k_descale.group < 0 || p.v_descale.group < 0)
    return fail(FA3_ERROR_SHAPE, "descale: a group of %d, %d or %d heads is negative", p.q_descale.group,
                p.k_descale.group, p.v_descale.group);
  return FA3_OK;
}

fa3_status check_lengths(const fa3_lengths& lengths, const char* name) {
  if (lengths.rows < 0 || lengths.rows > kMaxRows)
    return fail(FA3_ERROR_SHAPE, "%s: %d rows, but 0 to 2^30 are possible", name, lengths.rows);
  if (lengths.max_seqlen < 0)
    return fail(FA3_ERROR_SHAPE, "max_seqlen of %s: %d is negative", name, lengths.max_seqlen);
  return FA3_OK;
}

/// More than any memory holds, or any GPU computes with. Up to there counts of rows and of tiles, and the bytes of
/// copies and of as many parts as there may be, are below 2^63; as doubles these products do not overflow either.
fa3_status check_elements(double entries, double rows, double heads, double dim, const char* name) {
  if (entries * rows * heads * dim < 0x1p44) return FA3_OK;
  return fail(FA3_ERROR_SHAPE, "%s: %.0f x %.0f x %.0f x %.0f elements, but fewer than 2^44 are possible", name,
              entries, rows, heads, dim);
}

fa3_status check_elements(const fa3_lengths& lengths, int entries, int heads, int dim, const char* name) {
  return check_elements(lengths.cu_seqlens ? 1 : entries, lengths.rows, heads, dim, name);
}

/// Before attention, heads are counted in 32 bits.
fa3_status check_cache_sizes(const fa3_forward_params& p, int dim) {
  const fa3_cache& c = p.cache;
  if (!c.k_new.data && !c.rotary_cos) return FA3_OK;
  constexpr int kMostHeads = 1 << 20;
  if (p.num_heads > kMostHeads)
    return fail(FA3_ERROR_SHAPE, "num_heads: %d, but at most 2^20 can be appended or turned", p.num_heads);
  return check_elements({c.rows_new, 0, c.cu_seqlens_k_new, nullptr}, p.batch, p.num_heads_kv, dim, "k_new");
}

/// What a call's sizes come to; each by itself is as it may be.
fa3_status check_products(const fa3_forward_params& p) {
  const int dim = std::max(p.head_dim, p.head_dim_v);
  if (auto status = check_elements(p.queries, p.batch, p.num_heads, dim, "q")) return status;
  if (auto status = check_elements(key_storage(p), key_entries(p), p.num_heads_kv, dim, "k")) return status;
  return check_cache_sizes(p, dim);
}

/// Of a power of two: nothing is read or written across the bounds of its elements.
fa3_status check_aligned(const void* address, int bytes, const char* name) {
  if ((reinterpret_cast<uintptr_t>(address) & (bytes - 1)) == 0) return FA3_OK;
  return fail(FA3_ERROR_SHAPE, "%s: its address is not a multiple of %d bytes", name, bytes);
}

struct Words {
  const void* address;  // of 4-byte elements
  const char* name;
};
template <int kCount>
fa3_status check_aligned(const Words (&arrays)[kCount]) {
  for (const auto& [address, name] : arrays)
    if (auto status = check_aligned(address, 4, name)) return status;
  return FA3_OK;
}

fa3_status check_array(const fa3_array& array, bool empty, int element_bytes, const char* name) {
  if (empty) return FA3_OK;
  if (!array.data) return fail(FA3_ERROR_NULL, "%s: null data", name);
  if (array.stride[3] != 1)
    return fail(FA3_ERROR_SHAPE, "%s: stride %lld along head_dim, but it must be contiguous (1)", name,
                static_cast<long long>(array.stride[3]));
  return check_aligned(array.data, element_bytes, name);
}

/// What says how long sequences are, and the numbers beside out.
fa3_status check_words(const fa3_forward_params& p) {
  const fa3_cache& c = p.cache;
  return check_aligned({{p.lse.data, "lse"},
                        {p.sinks, "sinks"},
                        {p.queries.cu_seqlens, "cu_seqlens_q"},
                        {p.queries.seqused, "seqused_q"},
                        {p.keys.cu_seqlens, "cu_seqlens_k"},
                        {p.keys.seqused, "seqused_k"},
                        {p.q_descale.data, "q_descale"},
                        {p.k_descale.data, "k_descale"},
                        {p.v_descale.data, "v_descale"},
                        {c.cu_seqlens_k_new, "cu_seqlens_k_new"},
                        {c.page_table, "page_table"},
                        {c.cache_batch_idx, "cache_batch_idx"},
                        {c.cache_leftpad, "cache_leftpad"},
                        {c.rotary_seqlens, "rotary_seqlens"}});
}

fa3_status check_arrays(const fa3_forward_params& p) {
  const bool no_queries = p.batch == 0 || p.queries.rows == 0,
             no_keys = p.batch == 0 || p.keys.rows == 0 || (p.cache.page_table && p.cache.num_pages == 0);
  const int bytes = element_bytes(p.dtype);
  if (auto status = check_array(p.q, no_queries, bytes, "q")) return status;
  if (auto status = check_array(p.out, no_queries, 2, "out")) return status;
  if (auto status = check_array(p.qv, no_queries || !has_qv(p), bytes, "qv")) return status;
  if (auto status = check_array(p.k, no_keys, bytes, "k")) return status;
  if (auto status = check_array(p.v, no_keys, bytes, "v")) return status;
  return check_words(p);
}

/// What says which rows of k and v are a sequence's.
fa3_status check_cache_rows(const fa3_forward_params& p) {
  const fa3_cache& c = p.cache;
  if (p.keys.cu_seqlens)
    for (const auto& [array, name] : {std::pair{static_cast<const void*>(c.k_new.data), "k_new"},
                                      {c.cache_batch_idx, "cache_batch_idx"},
                                      {c.cache_leftpad, "cache_leftpad"}})
      if (array) return fail(FA3_ERROR_SHAPE, "%s: given, but the keys have cu_seqlens and so are no cache", name);
  if (c.cache_batch_idx && c.page_table)
    return fail(FA3_ERROR_SHAPE, "cache_batch_idx: given with page_table, but pages have no batch entries");
  if (c.cache_batch_idx && c.batch_entries < 1)
    return fail(FA3_ERROR_SHAPE, "batch_entries: %d, but cache_batch_idx needs at least 1", c.batch_entries);
  return FA3_OK;
}

fa3_status check_pages(const fa3_forward_params& p) {
  const fa3_cache& c = p.cache;
  if (!c.page_table) return FA3_OK;
  if (c.page_size < 1 || c.page_size > kMaxRows)
    return fail(FA3_ERROR_SHAPE, "page_size: %d, but 1 to 2^30 are possible", c.page_size);
  if (c.num_pages < 0 || c.max_pages < 0)
    return fail(FA3_ERROR_SHAPE, "num_pages, max_pages: %d, %d, but neither may be negative", c.num_pages, c.max_pages);
  if (p.keys.rows > int64_t{c.max_pages} * c.page_size)
    return fail(FA3_ERROR_SHAPE, "k: %d rows of a sequence, but page_table has room for %d pages of %d", p.keys.rows,
                c.max_pages, c.page_size);
  return FA3_OK;
}

fa3_status check_new_keys(const fa3_forward_params& p) {
  const fa3_cache& c = p.cache;
  if (!c.k_new.data != !c.v_new.data)
    return fail(FA3_ERROR_NULL, "%s: null data, but the other is given", c.k_new.data ? "v_new" : "k_new");
  if (!c.k_new.data) {
    if (c.rows_new) return fail(FA3_ERROR_NULL, "k_new: null data, but rows_new is %d", c.rows_new);
    return FA3_OK;
  }
  if (auto status = check_lengths({c.rows_new, 0, c.cu_seqlens_k_new, nullptr}, "k_new")) return status;
  const bool empty = p.batch == 0 || c.rows_new == 0;
  if (auto status = check_array(c.k_new, empty, element_bytes(p.dtype), "k_new")) return status;
  if (auto status = check_array(c.v_new, empty, element_bytes(p.dtype), "v_new")) return status;
  if (p.keys.seqused) return FA3_OK;
  const int least_new = c.cu_seqlens_k_new ? 0 : c.rows_new;
  if (c.seqlen < 0 || c.seqlen > p.keys.rows - least_new)
    return fail(FA3_ERROR_SHAPE, "cache.seqlen: %d and %d new keys, but k has room for %d", c.seqlen, least_new,
                p.keys.rows);
  return FA3_OK;
}

fa3_status check_rotary(const fa3_forward_params& p) {
  const fa3_cache& c = p.cache;
  if (p.dtype == FA3_FLOAT8_E4M3 && c.rotary_cos)
    return fail(FA3_ERROR_NO_CACHE_UPDATE, "rotary_cos: fp8 does not turn on the GPU; turn q and k, then quantise");
  if (!c.rotary_cos != !c.rotary_sin)
    return fail(FA3_ERROR_NULL, "%s: null pointer, but the other is given", c.rotary_cos ? "rotary_sin" : "rotary_cos");
  if (!c.rotary_cos) {
    if (c.rotary_seqlens) return fail(FA3_ERROR_NULL, "rotary_cos: null pointer, but rotary_seqlens is given");
    return FA3_OK;
  }
  if (p.keys.cu_seqlens && !p.keys.seqused && !c.rotary_seqlens)
    return fail(FA3_ERROR_NULL,
                "rotary_seqlens: null pointer, but with cu_seqlens of the keys it or seqused is needed");
  if (c.rotary_dtype != FA3_FLOAT32 && c.rotary_dtype != p.dtype)
    return fail(FA3_ERROR_DTYPE, "rotary_dtype: %d, but it must be FA3_FLOAT32 or q's %d", c.rotary_dtype, p.dtype);
  if (c.rotary_dim < 16 || c.rotary_dim % 16 || c.rotary_dim > p.head_dim)
    return fail(FA3_ERROR_SHAPE, "rotary_dim: %d, but it must be a multiple of 16 from 16 to head_dim %d", c.rotary_dim,
                p.head_dim);
  if (c.rotary_interleaved != 0 && c.rotary_interleaved != 1)
    return fail(FA3_ERROR_SHAPE, "rotary_interleaved: %d, but it must be 0 or 1", c.rotary_interleaved);
  if (c.rotary_rows < 1 || c.rotary_rows > kMaxRows)
    return fail(FA3_ERROR_SHAPE, "rotary_rows: %d, but 1 to 2^30 are possible", c.rotary_rows);
  const int bytes = c.rotary_dtype == FA3_FLOAT32 ? 4 : 2;
  if (auto status = check_aligned(c.rotary_cos, bytes, "rotary_cos")) return status;
  if (auto status = check_aligned(c.rotary_sin, bytes, "rotary_sin")) return status;
  // Where the first position is in device memory, it is at least 0.
  const bool known = !c.rotary_seqlens && !p.keys.seqused;
  const int64_t first = !known ? 0 : c.k_new.data ? c.seqlen : p.keys.rows;
  if (c.k_new.data && !c.cu_seqlens_k_new && p.batch > 0 && first + c.rows_new > c.rotary_rows)
    return fail(FA3_ERROR_SHAPE, "rotary_rows: %d positions, but the new keys need %lld", c.rotary_rows,
                static_cast<long long>(first + c.rows_new));
  return FA3_OK;
}

fa3_status check_cache(const fa3_forward_params& p) {
  if (auto status = check_cache_rows(p)) return status;
  if (auto status = check_pages(p)) return status;
  if (auto status = check_new_keys(p)) return status;
  return check_rotary(p);
}

fa3_status check_mask(const fa3_mask& mask) {
  if (mask.window_left < -1 || mask.window_right < -1)
    return fail(FA3_ERROR_SHAPE, "window_size: (%d, %d), but each must be at least -1 (unbounded)", mask.window_left,
                mask.window_right);
  if (mask.attention_chunk < 0) return fail(FA3_ERROR_SHAPE, "attention_chunk: %d is negative", mask.attention_chunk);
  return FA3_OK;
}

fa3_status check_scalars(float softmax_scale, float softcap) {
  if (!std::isfinite(softmax_scale)) return fail(FA3_ERROR_SHAPE, "softmax_scale: %g is not finite", softmax_scale);
  if (!(softcap >= 0) || std::isinf(softcap))
    return fail(FA3_ERROR_SHAPE, "softcap: %g, but it must be 0 or positive", softcap);
  return FA3_OK;
}

fa3_status check_dropout(const fa3_dropout& dropout) {
  if (!(dropout.p >= 0 && dropout.p < 1))
    return fail(FA3_ERROR_SHAPE, "dropout_p: %g, but it must be from 0 to below 1", dropout.p);
  if (dropout.seed_type < FA3_INT64 || dropout.seed_type > FA3_UINT32)
    return fail(FA3_ERROR_DTYPE, "dropout_seed: type %d is no fa3_integer", dropout.seed_type);
  return check_aligned(dropout.seed_data, dropout.seed_type == FA3_INT64 ? 8 : 4, "dropout_seed");
}

fa3_status check_backward_kinds(const fa3_backward_params& p) {
  if (p.dtype != FA3_FLOAT16 && p.dtype != FA3_BFLOAT16)
    return fail(FA3_ERROR_DTYPE, "dtype: %d is no fa3_dtype that q, k, v can have", p.dtype);
  return FA3_OK;
}

/// Heads are an axis of a grid of thread blocks.
fa3_status check_backward_heads(const fa3_backward_params& p) {
  constexpr int kMostHeads = 65535;
  if (p.num_heads > kMostHeads)
    return fail(FA3_ERROR_SHAPE, "num_heads: %d, but the backward takes at most %d", p.num_heads, kMostHeads);
  return FA3_OK;
}

fa3_status check_backward_arrays(const fa3_backward_params& p) {
  const bool no_queries = no_rows(p.queries, p.batch), no_keys = no_rows(p.keys, p.batch);
  const struct {
    const fa3_array& array;
    bool empty;
    const char* name;
  } arrays[] = {{p.dout, no_queries, "dout"}, {p.q, no_queries, "q"},   {p.k, no_keys, "k"},   {p.v, no_keys, "v"},
                {p.out, no_queries, "out"},   {p.dq, no_queries, "dq"}, {p.dk, no_keys, "dk"}, {p.dv, no_keys, "dv"}};
  for (const auto& [array, empty, name] : arrays)
    if (auto status = check_array(array, empty, 2, name)) return status;
  if (!no_queries && !p.lse.data) return fail(FA3_ERROR_NULL, "lse: null data");
  if (!p.sinks != !p.dsinks) return fail(FA3_ERROR_NULL, "sinks, dsinks: one is null, but both or none must be given");
  return check_aligned({{p.lse.data, "lse"},
                        {p.dlse.data, "dlse"},
                        {p.sinks, "sinks"},
                        {p.dsinks, "dsinks"},
                        {p.queries.cu_seqlens, "cu_seqlens_q"},
                        {p.queries.seqused, "seqused_q"},
                        {p.keys.cu_seqlens, "cu_seqlens_k"},
                        {p.keys.seqused, "seqused_k"}});
}

fa3_status check_quantize_kinds(const fa3_quantize_params& p) {
  if (p.dtype != FA3_FLOAT16 && p.dtype != FA3_BFLOAT16 && p.dtype != FA3_FLOAT32)
    return fail(FA3_ERROR_DTYPE, "dtype: %d is no fa3_dtype that x can have", p.dtype);
  if (p.granularity < FA3_PER_TENSOR || p.granularity > FA3_PER_BATCH_HEAD)
    return fail(FA3_ERROR_SHAPE, "granularity: %d is no fa3_granularity", p.granularity);
  if (p.cu_seqlens && p.granularity != FA3_PER_BATCH_HEAD)
    return fail(FA3_ERROR_SHAPE, "cu_seqlens: given, but only FA3_PER_BATCH_HEAD takes it");
  return FA3_OK;
}

fa3_status check_quantize_sizes(const fa3_quantize_params& p) {
  if (p.batch < 0) return fail(FA3_ERROR_SHAPE, "batch: %d is negative", p.batch);
  if (p.rows < 0) return fail(FA3_ERROR_SHAPE, "rows: %d is negative", p.rows);
  if (p.num_heads < 0) return fail(FA3_ERROR_SHAPE, "num_heads: %d is negative", p.num_heads);
  const int64_t entries = p.cu_seqlens ? 1 : p.batch, rows = int64_t{p.rows} * p.num_heads;
  // Rows are counted in 32 bits; so are scales, and what comes after one is at most as many further on.
  if (rows >= 1ll << 31 || entries * rows >= 1ll << 31)
    return fail(FA3_ERROR_SHAPE, "x: %d x %d x %d rows of head_dim, but fewer than 2^31 are possible",
                static_cast<int>(entries), p.rows, p.num_heads);
  const int64_t scales = (p.granularity == FA3_PER_BATCH_HEAD ? p.batch : int64_t{1}) *
                         (p.granularity == FA3_PER_TENSOR ? 1 : p.num_heads);
  if (scales > 1ll << 30)
    return fail(FA3_ERROR_SHAPE, "descale: %lld scales, but at most 2^30 are possible", static_cast<long long>(scales));
  if (p.head_dim < 8 || p.head_dim % 8 || p.head_dim > kMaxQuantizedHeadDim)
    return fail(FA3_ERROR_HEAD_DIM, "head_dim: %d, but it must be a multiple of 8 up to %d", p.head_dim,
                kMaxQuantizedHeadDim);
  return FA3_OK;
}

fa3_status check_quantize_arrays(const fa3_quantize_params& p) {
  const bool empty = (p.batch == 0 && !p.cu_seqlens) || p.rows == 0 || p.num_heads == 0;
  const bool no_scale =
      (p.granularity == FA3_PER_BATCH_HEAD && p.batch == 0) || (p.granularity != FA3_PER_TENSOR && p.num_heads == 0);
  if (auto status = check_array(p.x, empty, p.dtype == FA3_FLOAT32 ? 4 : 2, "x")) return status;
  if (auto status = check_array(p.out, empty, 1, "out")) return status;
  if (!no_scale && !p.descale) return fail(FA3_ERROR_NULL, "descale: null pointer");
  return check_aligned({{p.descale, "descale"}, {p.cu_seqlens, "cu_seqlens"}});
}

fa3_status check_combine_sizes(const fa3_combine_params& p) {
  if (p.out_dtype != FA3_FLOAT32 && p.out_dtype != FA3_FLOAT16 && p.out_dtype != FA3_BFLOAT16)
    return fail(FA3_ERROR_DTYPE, "out_dtype: %d, but it must be FA3_FLOAT32, FA3_FLOAT16 or FA3_BFLOAT16", p.out_dtype);
  constexpr int kMost = 1 << 30;  // so that a round of parts, or of columns, more is an int
  if (p.splits < 1 || p.splits > kMost)
    return fail(FA3_ERROR_SHAPE, "splits: %d, but it must be from 1 to 2^30", p.splits);
  if (p.batch < 0 || p.rows < 0 || p.num_heads < 0 || p.head_dim_v < 0)
    return fail(FA3_ERROR_SHAPE, "out: (%d, %d, %d, %d), but no size may be negative", p.batch, p.rows, p.num_heads,
                p.head_dim_v);
  if (p.head_dim_v > kMost) return fail(FA3_ERROR_SHAPE, "head_dim_v: %d, but at most 2^30 are possible", p.head_dim_v);
  // A grid has 2^31 - 1 blocks. As doubles no product overflows.
  const double row_threads = std::max(ceil_div(p.head_dim_v, kCombineColumns), 1);
  if (double(p.batch) * p.rows * p.num_heads * row_threads > double(kCombineThreads) * INT32_MAX)
    return fail(FA3_ERROR_SHAPE, "out: (%d, %d, %d, %d) has more elements than a grid of threads can take", p.batch,
                p.rows, p.num_heads, p.head_dim_v);
  return FA3_OK;
}

fa3_status check_combine_arrays(const fa3_combine_params& p) {
  if (p.batch == 0 || p.rows == 0 || p.num_heads == 0) return FA3_OK;
  if (!p.lse_partial.data) return fail(FA3_ERROR_NULL, "lse_partial: null data");
  if (p.head_dim_v > 0 && !p.out_partial.data) return fail(FA3_ERROR_NULL, "out_partial: null data");
  if (auto status = check_array(p.out, p.head_dim_v == 0, p.out_dtype == FA3_FLOAT32 ? 4 : 2, "out")) return status;
  return check_aligned({{p.out_partial.data, "out_partial"}, {p.lse_partial.data, "lse_partial"}, {p.lse.data, "lse"}});
}

}  // namespace

fa3_status check_num_sms(int num_sms) {
  constexpr int kMost = 1 << 16;  // so that rounds of pieces and their estimates are ints
  if (num_sms >= 1 && num_sms <= kMost) return FA3_OK;
  return fail(FA3_ERROR_SHAPE, "num_sms: %d, but it must be from 1 to 2^16", num_sms);
}

/// What the copy engine and vectors need. Allocators of frameworks give more, but not all of them 256.
fa3_status check_workspace(const void* workspace) { return check_aligned(workspace, 16, "workspace"); }

fa3_status validate(const fa3_combine_params* params) {
  if (auto status = check_struct(params, "fa3_combine_params")) return status;
  if (auto status = check_combine_sizes(*params)) return status;
  return check_combine_arrays(*params);
}

fa3_status validate(const fa3_quantize_params* params) {
  if (auto status = check_struct(params, "fa3_quantize_params")) return status;
  const fa3_quantize_params& p = *params;
  if (auto status = check_quantize_kinds(p)) return status;
  if (auto status = check_quantize_sizes(p)) return status;
  return check_quantize_arrays(p);
}

fa3_status validate(const fa3_forward_params* params) {
  if (auto status = check_struct(params, "fa3_forward_params")) return status;
  const fa3_forward_params& p = *params;
  if (auto status = check_dtypes(p)) return status;
  if (auto status = check_latent(p)) return status;
  if (auto status = check_sizes(p.batch, p.num_heads, p.num_heads_kv)) return status;
  if (auto status = check_choices(p)) return status;
  const int most = absorbed(p) ? p.head_dim : has_qv(p) ? kMostLatentHeadDimV : kMaxHeadDim;
  if (auto status = check_head_dims(p.head_dim, p.head_dim_v, p.dtype, most)) return status;
  if (auto status = check_groups(p)) return status;
  if (auto status = check_lengths(p.queries, "q")) return status;
  if (auto status = check_lengths(p.keys, "k")) return status;
  if (auto status = check_arrays(p)) return status;
  if (auto status = check_cache(p)) return status;
  if (auto status = check_products(p)) return status;
  if (auto status = check_mask(p.mask)) return status;
  if (auto status = check_scalars(p.softmax_scale, p.softcap)) return status;
  return check_dropout(p.dropout);
}

fa3_status validate(const fa3_backward_params* params) {
  if (auto status = check_struct(params, "fa3_backward_params")) return status;
  const fa3_backward_params& p = *params;
  if (auto status = check_backward_kinds(p)) return status;
  if (auto status = check_sizes(p.batch, p.num_heads, p.num_heads_kv)) return status;
  if (auto status = check_backward_heads(p)) return status;
  if (auto status = check_head_dims(p.head_dim, p.head_dim_v, p.dtype)) return status;
  if (auto status = check_lengths(p.queries, "q")) return status;
  if (auto status = check_lengths(p.keys, "k")) return status;
  const int dim = std::max(p.head_dim, p.head_dim_v);
  if (auto status = check_elements(p.queries, p.batch, p.num_heads, dim, "q")) return status;
  if (auto status = check_elements(p.keys, p.batch, p.num_heads_kv, dim, "k")) return status;
  if (auto status = check_backward_arrays(p)) return status;
  if (auto status = check_mask(p.mask)) return status;
  if (auto status = check_scalars(p.softmax_scale, p.softcap)) return status;
  return check_dropout(p.dropout);
}

}  // namespace fa3
