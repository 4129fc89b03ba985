/* What the C programs share: a call's arguments to start from, and checks that say what they saw. */
#ifndef CHECKS_H
#define CHECKS_H

#include <fa3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition, ...)                                \
  do {                                                       \
    if (!(condition)) {                                      \
      printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      printf(__VA_ARGS__);                                   \
      printf("\n(last error: \"%s\")\n", fa3_last_error());  \
      exit(1);                                               \
    }                                                        \
  } while (0)

/* A contiguous (batch, rows, heads, dim) array. */
static inline fa3_array packed(void* data, int64_t rows, int64_t heads, int64_t dim) {
  fa3_array array = {data, {rows * heads * dim, heads * dim, dim, 1}};
  return array;
}

/* Dense bfloat16 attention of head dim 128, which every build has; `data` is every array's address. */
static inline fa3_forward_params dense_call(int batch, int rows_q, int rows_k, int heads, int heads_kv, void* data) {
  fa3_forward_params p;
  memset(&p, 0, sizeof p);
  p.struct_size = sizeof p;
  p.dtype = p.out_dtype = FA3_BFLOAT16;
  p.batch = batch;
  p.num_heads = heads;
  p.num_heads_kv = heads_kv;
  p.head_dim = p.head_dim_v = 128;
  p.q = p.out = packed(data, rows_q, heads, 128);
  p.k = p.v = packed(data, rows_k, heads_kv, 128);
  p.queries.rows = rows_q;
  p.keys.rows = rows_k;
  p.mask.window_left = p.mask.window_right = -1;
  p.softmax_scale = 0.08838834764f;
  p.num_splits = 1;
  p.pack_gqa = -1;
  return p;
}

#endif
