/* A stand-in for the GPU: libfa3's entry points that remember what they were asked. Loaded with RTLD_GLOBAL before fa3,
 * so that the dynamic linker finds these functions first. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <inttypes.h>
#include <stdio.h>

#include "fa3.h"

/* What the next call gets, and what the last one brought. */
struct {
  int32_t status;
  size_t workspace_bytes;
  void* current_stream;
  size_t calls;     /* of fa3_forward that were enqueued */
  size_t crossings; /* of any of these functions that a call of attention makes */
  int32_t with_gil;
  void *workspace, *stream;
  fa3_forward_params params;
} stand_in;

int fa3_forward_workspace(const fa3_forward_params* params, size_t* bytes) {
  (void)params;
  stand_in.crossings += 1;
  *bytes = stand_in.workspace_bytes;
  return FA3_OK;
}

int fa3_forward(const fa3_forward_params* params, void* workspace, void* stream) {
  static int (*has_gil)(void);
  stand_in.crossings += 1;
  if (stand_in.workspace_bytes && !workspace) return FA3_ERROR_WORKSPACE;
  if (!has_gil) has_gil = (int (*)(void))dlsym(RTLD_DEFAULT, "PyGILState_Check");
  stand_in.calls += 1;
  stand_in.with_gil = has_gil();
  stand_in.workspace = workspace;
  stand_in.stream = stream;
  stand_in.params = *params;
  return stand_in.status;
}

/* For exchange.c. */
void* current_cuda_stream(void) { return stand_in.current_stream; }

const char* fa3_last_error(void) { return stand_in.status ? "the stand-in was told to fail" : ""; }
int fa3_last_cuda_error(void) { return stand_in.status ? 999 : 0; }

/* The last call's struct, a field to a line, in the header's order. */
const char* stand_in_describe(void) {
  static char text[8192];
  const fa3_forward_params* p = &stand_in.params;
  size_t length = 0;
#define SAY(...) length += (size_t)snprintf(text + length, sizeof text - length, __VA_ARGS__)
#define INT(field) SAY(#field " %" PRId64 "\n", (int64_t)p->field)
#define REAL(field) SAY(#field " %.9g\n", (double)p->field)
#define POINTER(field) SAY(#field " 0x%" PRIxPTR "\n", (uintptr_t)p->field)
#define ARRAY(field)                                                                                        \
  SAY(#field " 0x%" PRIxPTR " %" PRId64 " %" PRId64 " %" PRId64 " %" PRId64 "\n", (uintptr_t)p->field.data, \
      p->field.stride[0], p->field.stride[1], p->field.stride[2], p->field.stride[3])
#define DESCALE(field)                                                                                     \
  SAY(#field " 0x%" PRIxPTR " %" PRId64 " %" PRId64 " %d\n", (uintptr_t)p->field.data, p->field.stride[0], \
      p->field.stride[1], p->field.group)
  INT(struct_size);
  INT(device);
  INT(dtype);
  INT(out_dtype);
  INT(batch);
  INT(num_heads);
  INT(num_heads_kv);
  INT(head_dim);
  INT(head_dim_v);
  ARRAY(q);
  ARRAY(k);
  ARRAY(v);
  ARRAY(out);
  ARRAY(lse);
  ARRAY(qv);
  INT(queries.rows);
  INT(queries.max_seqlen);
  POINTER(queries.cu_seqlens);
  POINTER(queries.seqused);
  INT(keys.rows);
  INT(keys.max_seqlen);
  POINTER(keys.cu_seqlens);
  POINTER(keys.seqused);
  INT(mask.causal);
  INT(mask.window_left);
  INT(mask.window_right);
  INT(mask.attention_chunk);
  REAL(softmax_scale);
  REAL(softcap);
  POINTER(sinks);
  DESCALE(q_descale);
  DESCALE(k_descale);
  DESCALE(v_descale);
  REAL(dropout.p);
  INT(dropout.seed);
  POINTER(dropout.seed_data);
  INT(dropout.seed_type);
  ARRAY(cache.k_new);
  ARRAY(cache.v_new);
  POINTER(cache.cu_seqlens_k_new);
  INT(cache.rows_new);
  INT(cache.seqlen);
  POINTER(cache.page_table);
  INT(cache.page_table_stride);
  INT(cache.max_pages);
  INT(cache.page_size);
  INT(cache.num_pages);
  POINTER(cache.cache_batch_idx);
  INT(cache.batch_entries);
  POINTER(cache.cache_leftpad);
  POINTER(cache.rotary_cos);
  POINTER(cache.rotary_sin);
  POINTER(cache.rotary_seqlens);
  INT(cache.rotary_rows);
  INT(cache.rotary_dim);
  INT(cache.rotary_dtype);
  INT(cache.rotary_interleaved);
  INT(num_splits);
  INT(batch_invariant);
  INT(pack_gqa);
  INT(sm_margin);
  INT(tile_m);
  INT(tile_n);
  return text;
}
