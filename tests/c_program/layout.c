/* Prints where each field of fa3.h's structs lies: a C and a C++ compiler must agree. */
#include <fa3.h>
#include <stddef.h>
#include <stdio.h>

#define SIZE(type) printf("%s %zu\n", #type, sizeof(type));
#define FIELD(type, field) printf("%s.%s %zu\n", #type, #field, offsetof(type, field));

int main(void) {
  SIZE(fa3_array)
  FIELD(fa3_array, data) FIELD(fa3_array, stride) SIZE(fa3_lengths) FIELD(fa3_lengths, rows)
      FIELD(fa3_lengths, max_seqlen) FIELD(fa3_lengths, cu_seqlens) FIELD(fa3_lengths, seqused) SIZE(fa3_mask) FIELD(
          fa3_mask, causal) FIELD(fa3_mask, window_left) FIELD(fa3_mask, window_right) FIELD(fa3_mask, attention_chunk)
          SIZE(fa3_cache) FIELD(fa3_cache, k_new) FIELD(fa3_cache, v_new) FIELD(fa3_cache, cu_seqlens_k_new) FIELD(
              fa3_cache, rows_new) FIELD(fa3_cache, page_table) FIELD(fa3_cache, page_table_stride)
              FIELD(fa3_cache, max_pages) FIELD(fa3_cache, page_size) FIELD(fa3_cache, num_pages) FIELD(
                  fa3_cache, cache_batch_idx) FIELD(fa3_cache, cache_leftpad) FIELD(fa3_cache, rotary_cos)
                  FIELD(fa3_cache, rotary_sin) FIELD(fa3_cache, rotary_seqlens) FIELD(fa3_cache, rotary_rows) FIELD(
                      fa3_cache, rotary_dim) FIELD(fa3_cache, rotary_dtype) FIELD(fa3_cache, rotary_interleaved)
                      SIZE(fa3_descale) FIELD(fa3_descale, data) FIELD(fa3_descale, stride) SIZE(fa3_forward_params)
                          FIELD(fa3_forward_params, struct_size) FIELD(fa3_forward_params, device) FIELD(
                              fa3_forward_params, dtype) FIELD(fa3_forward_params, out_dtype)
                              FIELD(fa3_forward_params, batch) FIELD(fa3_forward_params, num_heads) FIELD(
                                  fa3_forward_params, num_heads_kv) FIELD(fa3_forward_params, head_dim)
                                  FIELD(fa3_forward_params, head_dim_v) FIELD(fa3_forward_params, q) FIELD(
                                      fa3_forward_params, k) FIELD(fa3_forward_params, v) FIELD(fa3_forward_params, out)
                                      FIELD(fa3_forward_params, lse) FIELD(fa3_forward_params, qv)
                                          FIELD(fa3_forward_params, queries) FIELD(fa3_forward_params, keys) FIELD(
                                              fa3_forward_params, mask) FIELD(fa3_forward_params, softmax_scale)
                                              FIELD(fa3_forward_params, softcap) FIELD(fa3_forward_params, sinks) FIELD(
                                                  fa3_forward_params, q_descale) FIELD(fa3_forward_params, k_descale)
                                                  FIELD(fa3_forward_params, v_descale) FIELD(
                                                      fa3_forward_params,
                                                      dropout_p) FIELD(fa3_forward_params,
                                                                       dropout_seed) FIELD(fa3_forward_params, cache)
                                                      FIELD(fa3_forward_params, num_splits) FIELD(
                                                          fa3_forward_params,
                                                          batch_invariant) FIELD(fa3_forward_params, pack_gqa)
                                                          FIELD(fa3_forward_params, sm_margin) SIZE(fa3_forward_plan)
                                                              FIELD(fa3_forward_plan, variant) FIELD(
                                                                  fa3_forward_plan,
                                                                  grid) FIELD(fa3_forward_plan, copy_q)
                                                                  FIELD(fa3_forward_plan, workspace) SIZE(fa3_variant)
                                                                      FIELD(fa3_variant, name) FIELD(fa3_variant, dtype)
                                                                          FIELD(fa3_variant, shared_memory)
                                                                              SIZE(fa3_device) FIELD(fa3_device, name)
                                                                                  FIELD(fa3_device, major)
                                                                                      FIELD(fa3_device,
                                                                                            total_memory) return 0;
}
