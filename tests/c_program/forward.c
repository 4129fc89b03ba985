/* The C interface without a GPU: statuses and their texts, every check on arguments, plans, variants, devices.
 * `forward NAME` runs one check and exits 0 when all is as fa3.h says. tests/test_c_api.py compiles and runs it. */
#include <math.h>
#include <threads.h>

#include "checks.h"

static _Alignas(256) char memory[4096]; /* stands for device memory that nothing reads */
static void* const address = memory;

static void check_statuses(void) {
  static const int codes[] = {0, -1, -2, -3, -4, -5, -6, -7, -10, -11, -12, -13, -14, -15, -16, -17, -100};
  const int count = (int)(sizeof codes / sizeof *codes);
  const char* unknown = fa3_status_string(-9999);
  CHECK(unknown && *unknown, "an unknown status has a text too");
  for (int i = 0; i < count; ++i) {
    const char* text = fa3_status_string(codes[i]);
    CHECK(text && *text && strcmp(text, unknown), "status %d: \"%s\"", codes[i], text);
    for (int j = 0; j < i; ++j) CHECK(strcmp(text, fa3_status_string(codes[j])), "%d and %d", codes[i], codes[j]);
  }
}

/* All three entry points refuse the same way, before anything else is looked at, with a sentence that has `words`. */
static void expect(const fa3_forward_params* p, int code, const char* words) {
  size_t bytes = 1;
  fa3_forward_plan plan;
  int status = fa3_plan_forward(p, 132, &plan);
  CHECK(status == code, "fa3_plan_forward: %d, not %d (%s)", status, code, words);
  CHECK(strstr(fa3_last_error(), words), "no \"%s\"", words);
  status = fa3_forward_workspace(p, &bytes);
  CHECK(status == code && bytes == 0, "fa3_forward_workspace: %d, %zu bytes (%s)", status, bytes, words);
  CHECK(strstr(fa3_last_error(), words), "no \"%s\"", words);
  status = fa3_forward(p, NULL, NULL);
  CHECK(status == code, "fa3_forward: %d, not %d (%s)", status, code, words);
  CHECK(strstr(fa3_last_error(), words), "no \"%s\"", words);
  CHECK(fa3_last_cuda_error() == 0, "CUDA was not asked");
}

#define REFUSES(code, words, ...)                                \
  do {                                                           \
    fa3_forward_params p = dense_call(2, 10, 20, 4, 2, address); \
    __VA_ARGS__;                                                 \
    expect(&p, code, words);                                     \
  } while (0)

static void check_arguments(void) {
  expect(NULL, FA3_ERROR_NULL, "params");
  REFUSES(FA3_ERROR_SHAPE, "struct_size", p.struct_size = 0);
  REFUSES(FA3_ERROR_SHAPE, "struct_size", p.struct_size -= 8);
  REFUSES(FA3_ERROR_NULL, "q", p.q.data = NULL);
  REFUSES(FA3_ERROR_NULL, "k", p.k.data = NULL);
  REFUSES(FA3_ERROR_NULL, "v", p.v.data = NULL);
  REFUSES(FA3_ERROR_NULL, "out", p.out.data = NULL);
  REFUSES(FA3_ERROR_HEAD_DIM, "head_dim", p.head_dim = 0);
  REFUSES(FA3_ERROR_HEAD_DIM, "head_dim", p.head_dim = -128);
  REFUSES(FA3_ERROR_HEAD_DIM, "12,", p.head_dim = 12);
  REFUSES(FA3_ERROR_HEAD_DIM, "264", p.head_dim_v = 264);
  REFUSES(FA3_ERROR_DTYPE, "dtype", p.dtype = 0);
  REFUSES(FA3_ERROR_DTYPE, "dtype", p.dtype = FA3_FLOAT32);
  REFUSES(FA3_ERROR_DTYPE, "dtype", p.dtype = 99);
  REFUSES(FA3_ERROR_DTYPE, "out_dtype", p.out_dtype = FA3_FLOAT32);
  REFUSES(FA3_ERROR_SHAPE, "batch", p.batch = -1);
  REFUSES(FA3_ERROR_SHAPE, "num_heads", p.num_heads = 0);
  REFUSES(FA3_ERROR_SHAPE, "num_heads", p.num_heads_kv = -1);
  REFUSES(FA3_ERROR_SHAPE, "multiple", p.num_heads_kv = 3);
  REFUSES(FA3_ERROR_SHAPE, "q", p.queries.rows = -1);
  REFUSES(FA3_ERROR_SHAPE, "2^30", p.keys.rows = (1 << 30) + 1);
  REFUSES(FA3_ERROR_SHAPE, "max_seqlen", p.queries.max_seqlen = -1);
  REFUSES(FA3_ERROR_SHAPE, "q: stride 2", p.q.stride[3] = 2);
  REFUSES(FA3_ERROR_SHAPE, "k: stride 0", p.k.stride[3] = 0);
  REFUSES(FA3_ERROR_SHAPE, "v: stride -1", p.v.stride[3] = -1);
  REFUSES(FA3_ERROR_SHAPE, "out: stride 3", p.out.stride[3] = 3);
  REFUSES(FA3_ERROR_SHAPE, "window_size", p.mask.window_left = -2);
  REFUSES(FA3_ERROR_SHAPE, "window_size", p.mask.window_right = -7);
  REFUSES(FA3_ERROR_SHAPE, "attention_chunk", p.mask.attention_chunk = -1);
  REFUSES(FA3_ERROR_SHAPE, "softmax_scale", p.softmax_scale = NAN);
  REFUSES(FA3_ERROR_SHAPE, "softmax_scale", p.softmax_scale = INFINITY);
  REFUSES(FA3_ERROR_SHAPE, "softcap", p.softcap = -1);
  REFUSES(FA3_ERROR_SHAPE, "softcap", p.softcap = NAN);
  REFUSES(FA3_ERROR_SHAPE, "num_splits", p.num_splits = -1);
  REFUSES(FA3_ERROR_SHAPE, "pack_gqa: 2, but it must be -1 (chosen), 0 or 1", p.pack_gqa = 2);
  REFUSES(FA3_ERROR_SHAPE, "pack_gqa: -2, but", p.pack_gqa = -2);
  REFUSES(FA3_ERROR_SHAPE, "sm_margin", p.sm_margin = -1);
}

static void check_fp8(void) {
  static const float factor = 1;
  REFUSES(FA3_ERROR_DTYPE, "out_dtype: 3, but of fp8 it must be", p.dtype = p.out_dtype = FA3_FLOAT8_E4M3);
  REFUSES(FA3_ERROR_HEAD_DIM_FP8, "head_dim: 72, but of fp8 it must be a multiple of 16", p.dtype = FA3_FLOAT8_E4M3;
          p.head_dim = 72);
  REFUSES(FA3_ERROR_DTYPE, "descale: given", p.k_descale.data = &factor);
  REFUSES(FA3_ERROR_SHAPE, "fp8_accumulate: -2, but", p.dtype = FA3_FLOAT8_E4M3; p.fp8_accumulate = -2);
  REFUSES(FA3_ERROR_SHAPE, "fp8_accumulate: 96, but", p.fp8_accumulate = 96);
  REFUSES(FA3_ERROR_SHAPE, "descale: a group of -1, 0 or 0", p.dtype = FA3_FLOAT8_E4M3; p.q_descale.group = -1);
}

static void check_missing_features(void) {
  REFUSES(FA3_ERROR_NO_QV, "qv: head dims 128 and 128 with it, but at most 64 and 512", p.qv = p.q);
  REFUSES(FA3_ERROR_NO_QV, "v: memory of its own, but with head dims 576 and 512", p.head_dim = 576; p.head_dim_v = 512;
          p.v.stride[1] += 8);
  REFUSES(FA3_ERROR_NO_QV, "rotary_cos: given, but with head dims 576 and 512", p.head_dim = 576; p.head_dim_v = 512;
          p.cache.rotary_cos = address);
  REFUSES(FA3_ERROR_HEAD_DIM, "head_dim: 512", p.head_dim = 64; p.head_dim_v = 512);
  REFUSES(FA3_ERROR_SHAPE, "qv: stride 2", p.head_dim = p.head_dim_v = 64; p.qv = p.q; p.qv.stride[3] = 2);
  REFUSES(FA3_ERROR_NULL, "qv: null data", p.head_dim = p.head_dim_v = 64; p.qv = p.q; p.qv.data = NULL);
  REFUSES(FA3_ERROR_SHAPE, "dropout_p: 1,", p.dropout.p = 1);
  REFUSES(FA3_ERROR_DTYPE, "dropout_seed: type 3", p.dropout.seed_type = 3);
  REFUSES(FA3_ERROR_NO_DROPOUT, "dropout_p: 0.1, but of fp8", p.dtype = FA3_FLOAT8_E4M3; p.dropout.p = 0.1f);
}

/* Three new keys a sequence, the cache holding 17 of 20 rows, and all of a head turned. */
static fa3_forward_params cache_call(void) {
  fa3_forward_params p = dense_call(2, 10, 20, 4, 2, address);
  fa3_cache* c = &p.cache;
  c->k_new = c->v_new = packed(address, 3, 2, 128);
  c->rows_new = 3;
  c->seqlen = 17;
  c->rotary_cos = c->rotary_sin = address;
  c->rotary_rows = 20;
  c->rotary_dim = 128;
  c->rotary_dtype = FA3_FLOAT32;
  return p;
}

/* Nothing is appended. */
static void turn_queries_alone(fa3_forward_params* p) {
  p->cache.k_new.data = p->cache.v_new.data = NULL;
  p->cache.rows_new = p->cache.seqlen = 0;
}

#define CACHE_REFUSES(code, words, ...)  \
  do {                                   \
    fa3_forward_params p = cache_call(); \
    fa3_cache* const c = &p.cache;       \
    (void)c;                             \
    __VA_ARGS__;                         \
    expect(&p, code, words);             \
  } while (0)

/* An address that is not a multiple of an element's bytes. */
static void check_alignment(void) {
  static void* const odd = memory + 1;
  static void* const half = memory + 2;
  static const int32_t* const integers = (const int32_t*)(const void*)(memory + 2);
  REFUSES(FA3_ERROR_SHAPE, "q: its address is not a multiple of 2 bytes", p.q.data = odd);
  REFUSES(FA3_ERROR_SHAPE, "k: its address", p.k.data = odd);
  REFUSES(FA3_ERROR_SHAPE, "v: its address", p.v.data = odd);
  REFUSES(FA3_ERROR_SHAPE, "out: its address", p.out.data = odd);
  REFUSES(FA3_ERROR_SHAPE, "qv: its address", p.head_dim = 64; p.qv = p.q; p.qv.data = odd);
  REFUSES(FA3_ERROR_SHAPE, "lse: its address is not a multiple of 4 bytes", p.lse.data = half);
  REFUSES(FA3_ERROR_SHAPE, "sinks: its address", p.sinks = half);
  REFUSES(FA3_ERROR_SHAPE, "cu_seqlens_q: its address", p.queries.cu_seqlens = integers);
  REFUSES(FA3_ERROR_SHAPE, "seqused_q: its address", p.queries.seqused = integers);
  REFUSES(FA3_ERROR_SHAPE, "cu_seqlens_k: its address", p.keys.cu_seqlens = integers);
  REFUSES(FA3_ERROR_SHAPE, "seqused_k: its address", p.keys.seqused = integers);
  REFUSES(FA3_ERROR_SHAPE, "k_descale: its address", p.dtype = FA3_FLOAT8_E4M3; p.k_descale.data = half);
  CACHE_REFUSES(FA3_ERROR_SHAPE, "k_new: its address is not a multiple of 2 bytes", c->k_new.data = odd);
  CACHE_REFUSES(FA3_ERROR_SHAPE, "v_new: its address", c->v_new.data = odd);
  CACHE_REFUSES(FA3_ERROR_SHAPE, "cu_seqlens_k_new: its address", c->cu_seqlens_k_new = integers);
  CACHE_REFUSES(FA3_ERROR_SHAPE, "page_table: its address", c->page_table = integers);
  CACHE_REFUSES(FA3_ERROR_SHAPE, "cache_batch_idx: its address", c->cache_batch_idx = integers);
  CACHE_REFUSES(FA3_ERROR_SHAPE, "cache_leftpad: its address", c->cache_leftpad = integers);
  CACHE_REFUSES(FA3_ERROR_SHAPE, "rotary_seqlens: its address", c->rotary_seqlens = integers);
  CACHE_REFUSES(FA3_ERROR_SHAPE, "rotary_cos: its address is not a multiple of 4 bytes", c->rotary_cos = half);
  CACHE_REFUSES(FA3_ERROR_SHAPE, "rotary_sin: its address is not a multiple of 2 bytes", c->rotary_dtype = FA3_BFLOAT16;
                c->rotary_sin = odd);
  const fa3_forward_params p = dense_call(2, 10, 20, 4, 2, address);
  CHECK(fa3_forward(&p, memory + 8, NULL) == FA3_ERROR_SHAPE, "a workspace off its alignment");
  CHECK(strstr(fa3_last_error(), "workspace: its address is not a multiple of 16 bytes"), "which says so");
}

/* Two sequences of at most 5 pages of 16 rows, out of 7 pages. */
static fa3_forward_params paged_call(void) {
  fa3_forward_params p = dense_call(2, 10, 80, 4, 2, address);
  p.cache.page_table = (const int32_t*)(const void*)memory;
  p.cache.page_table_stride = p.cache.max_pages = 5;
  p.cache.page_size = 16;
  p.cache.num_pages = 7;
  p.k = p.v = packed(address, 16, 2, 128);
  return p;
}

#define PAGES_REFUSE(words, ...)         \
  do {                                   \
    fa3_forward_params p = paged_call(); \
    __VA_ARGS__;                         \
    expect(&p, FA3_ERROR_SHAPE, words);  \
  } while (0)

/* Each size may be, but not all together. */
static void check_sizes(void) {
  enum { kMost = 1 << 30 };
  fa3_forward_plan plan;
  fa3_forward_params p = dense_call(2, 10, 20, 4, 2, address);
  REFUSES(FA3_ERROR_SHAPE, "batch: 1073741825, but at most 2^30", p.batch = kMost + 1);
  REFUSES(FA3_ERROR_SHAPE, "num_heads: 1073741826, but at most 2^30", p.num_heads = kMost + 2);
  REFUSES(FA3_ERROR_SHAPE, "q: 1073741824 x 1000 x 4 x 128 elements, but fewer than 2^44", p.batch = kMost;
          p.queries.rows = 1000);
  REFUSES(FA3_ERROR_SHAPE, "q: 2 x 1073741824 x 16384 x 128 elements", p.queries.rows = kMost; p.num_heads = 1 << 14);
  REFUSES(FA3_ERROR_SHAPE, "k: 64 x 1073741824 x 2 x 128 elements", p.batch = 64; p.keys.rows = kMost);
  PAGES_REFUSE("k: 2147483647 x 1073741824 x 2 x 128 elements", p.cache.page_size = kMost;
               p.cache.num_pages = INT32_MAX);
  CACHE_REFUSES(FA3_ERROR_SHAPE, "k_new: 128 x 1073741824 x 2 x 128 elements", p.batch = 128; c->rows_new = kMost;
                p.keys.seqused = (const int32_t*)(const void*)memory; c->rotary_rows = kMost);
  for (int i = 0; i < 3; ++i) {
    const int32_t num_sms = (const int32_t[]){0, -132, 65537}[i];
    CHECK(fa3_plan_forward(&p, num_sms, &plan) == FA3_ERROR_SHAPE, "%d multiprocessors", num_sms);
    CHECK(strstr(fa3_last_error(), "num_sms: "), "which says so");
  }
  CHECK(fa3_plan_forward(&p, 65536, &plan) == FA3_OK && fa3_plan_forward(&p, 1, &plan) == FA3_OK, "1 to 2^16");
}

static void check_pages(void) {
  fa3_forward_plan plan;
  fa3_forward_params p = paged_call();
  CHECK(fa3_plan_forward(&p, 132, &plan) == FA3_OK && !plan.copy_k && !plan.copy_v, "pages");
  p.k.stride[0] += 1;
  CHECK(fa3_plan_forward(&p, 132, &plan) == FA3_OK && plan.copy_k && plan.workspace >= 7 * 16 * 2 * 128 * 2,
        "all 7 pages are copied: %zu", plan.workspace);
  p = paged_call();
  p.cache.num_pages = 0;
  p.k.data = p.v.data = NULL;
  CHECK(fa3_plan_forward(&p, 132, &plan) == FA3_OK, "no page at all");
  PAGES_REFUSE("page_size: 0", p.cache.page_size = 0);
  PAGES_REFUSE("num_pages, max_pages: -1, 5", p.cache.num_pages = -1);
  PAGES_REFUSE("num_pages, max_pages: 7, -1", p.cache.max_pages = -1);
  PAGES_REFUSE("k: 81 rows of a sequence, but page_table has room for 5 pages of 16", p.keys.rows = 81);
}

static void check_cache_arguments(void) {
  static const int32_t* const integers = (const int32_t*)(const void*)memory;
  fa3_forward_plan plan;
  fa3_forward_params p = cache_call();
  const size_t lengths = 256, turned = 2 * 10 * 4 * 128 * 2;
  CHECK(fa3_plan_forward(&p, 132, &plan) == FA3_OK, "a call that appends and turns");
  CHECK(plan.copy_q && !plan.copy_k && plan.workspace == lengths + turned, "%zu bytes", plan.workspace);
  p.cache.cache_batch_idx = p.cache.cache_leftpad = p.keys.seqused = p.cache.rotary_seqlens = integers;
  p.cache.batch_entries = 7;
  CHECK(fa3_plan_forward(&p, 132, &plan) == FA3_OK && plan.workspace == lengths + turned, "entries and padding");
  p.k.stride[1] += 1;
  CHECK(fa3_plan_forward(&p, 132, &plan) == FA3_OK && plan.copy_k, "a stride that TMA cannot address");
  CHECK(plan.workspace == lengths + turned + 7 * 20 * 2 * 128 * 2, "all 7 entries are copied: %zu", plan.workspace);
  p = cache_call();
  p.queries.rows = 0;
  CHECK(fa3_plan_forward(&p, 132, &plan) == FA3_OK, "new keys without queries");
  p.batch = 17;
  p.keys.seqused = integers;
  p.cache.rows_new = p.cache.rotary_rows = 1 << 30;
  CHECK(fa3_plan_forward(&p, 132, &plan) == FA3_ERROR_SHAPE && strstr(fa3_last_error(), "thread blocks"), "2^34 rows");

  CACHE_REFUSES(FA3_ERROR_NULL, "v_new: null", c->v_new.data = NULL);
  CACHE_REFUSES(FA3_ERROR_NULL, "k_new: null", c->k_new.data = NULL);
  CACHE_REFUSES(FA3_ERROR_NULL, "rows_new is 3", c->k_new.data = c->v_new.data = NULL);
  CACHE_REFUSES(FA3_ERROR_SHAPE, "k_new: -1 rows", c->rows_new = -1);
  CACHE_REFUSES(FA3_ERROR_SHAPE, "k_new: stride 2", c->k_new.stride[3] = 2);
  CACHE_REFUSES(FA3_ERROR_SHAPE, "v_new: stride 0", c->v_new.stride[3] = 0);
  CACHE_REFUSES(FA3_ERROR_SHAPE, "cache.seqlen: 18 and 3", c->seqlen = 18);
  CACHE_REFUSES(FA3_ERROR_SHAPE, "cache.seqlen: -1", c->seqlen = -1);
  CACHE_REFUSES(FA3_ERROR_SHAPE, "cache.seqlen: 21 and 0", c->seqlen = 21; c->cu_seqlens_k_new = integers);
  CACHE_REFUSES(FA3_ERROR_SHAPE, "k_new: given, but", p.keys.cu_seqlens = integers);
  REFUSES(FA3_ERROR_SHAPE, "cache_leftpad: given, but", p.keys.cu_seqlens = p.cache.cache_leftpad = integers);
  REFUSES(FA3_ERROR_SHAPE, "cache_batch_idx: given, but", p.keys.cu_seqlens = p.cache.cache_batch_idx = integers);
  REFUSES(FA3_ERROR_SHAPE, "batch_entries: 0", p.cache.cache_batch_idx = integers);
  CACHE_REFUSES(FA3_ERROR_NULL, "rotary_sin: null", c->rotary_sin = NULL);
  CACHE_REFUSES(FA3_ERROR_NULL, "rotary_cos: null", c->rotary_cos = NULL);
  REFUSES(FA3_ERROR_NULL, "rotary_seqlens", p.cache.rotary_seqlens = integers);
  CACHE_REFUSES(FA3_ERROR_NULL, "rotary_seqlens: null pointer, but with cu_seqlens", turn_queries_alone(&p);
                p.keys.cu_seqlens = integers);
  p = cache_call();
  turn_queries_alone(&p);
  p.keys.cu_seqlens = p.keys.seqused = integers;
  CHECK(fa3_plan_forward(&p, 132, &plan) == FA3_OK, "seqused says where queries stand");
  p.keys.seqused = NULL;
  p.cache.rotary_seqlens = integers;
  CHECK(fa3_plan_forward(&p, 132, &plan) == FA3_OK, "rotary_seqlens says it");
  CACHE_REFUSES(FA3_ERROR_DTYPE, "rotary_dtype: 1", c->rotary_dtype = FA3_FLOAT16);
  CACHE_REFUSES(FA3_ERROR_SHAPE, "rotary_dim: 24", c->rotary_dim = 24);
  CACHE_REFUSES(FA3_ERROR_SHAPE, "rotary_dim: 0", c->rotary_dim = 0);
  CACHE_REFUSES(FA3_ERROR_SHAPE, "rotary_dim: 144", c->rotary_dim = 144);
  CACHE_REFUSES(FA3_ERROR_SHAPE, "rotary_interleaved: 2", c->rotary_interleaved = 2);
  CACHE_REFUSES(FA3_ERROR_SHAPE, "rotary_rows: 0", c->rotary_rows = 0);
  CACHE_REFUSES(FA3_ERROR_SHAPE, "rotary_rows: 19 positions, but the new keys need 20", c->rotary_rows = 19);
  CACHE_REFUSES(FA3_ERROR_SHAPE, "rotary_rows: 2 positions", c->rotary_rows = 2; p.keys.seqused = integers);
  CACHE_REFUSES(FA3_ERROR_SHAPE, "num_heads: 1048578", p.num_heads = (1 << 20) + 2);
}

static void check_null_results(void) {
  const fa3_forward_params p = dense_call(2, 10, 20, 4, 2, address);
  int device = 0;
  CHECK(fa3_forward_workspace(&p, NULL) == FA3_ERROR_NULL, "bytes");
  CHECK(fa3_plan_forward(&p, 132, NULL) == FA3_ERROR_NULL, "plan");
  CHECK(fa3_forward_variant(0, NULL) == FA3_ERROR_NULL, "variant");
  CHECK(fa3_device_count(NULL) == FA3_ERROR_NULL, "count");
  CHECK(fa3_device_query(0, NULL) == FA3_ERROR_NULL, "info");
  CHECK(fa3_versions(NULL, &device) == FA3_ERROR_NULL, "runtime");
  CHECK(fa3_pointer_device(memory, NULL) == FA3_ERROR_NULL, "device");
}

static void check_variants(void) {
  fa3_variant variant;
  int count = 0;
  for (; fa3_forward_variant(count, &variant) == FA3_OK; ++count) {
    CHECK(variant.name && *variant.name, "variant %d", count);
    CHECK(variant.tile_m % 64 == 0 && variant.tile_n % 8 == 0 && variant.threads % 128 == 0, "%s", variant.name);
    CHECK(*fa3_last_error() == '\0', "a call that succeeds leaves no error");
  }
  CHECK(count > 0, "no kernels");
  CHECK(fa3_forward_variant(count, &variant) == FA3_ERROR_SHAPE, "past the last");
  CHECK(fa3_forward_variant(-1, &variant) == FA3_ERROR_SHAPE, "before the first");
}

static void check_plans(void) {
  fa3_forward_plan plan;
  fa3_forward_params p = dense_call(2, 10, 20, 4, 2, address);
  CHECK(fa3_plan_forward(&p, 132, &plan) == FA3_OK, "a plain call");
  CHECK(plan.grid == 8 && plan.dynamic == 0 && plan.workspace == 0, "8 equal tiles on 132 multiprocessors");
  CHECK(!plan.copy_q && !plan.copy_k && !plan.copy_v, "aligned operands");
  p.k.stride[1] += 1;
  CHECK(fa3_plan_forward(&p, 132, &plan) == FA3_OK && plan.copy_k, "a stride that TMA cannot address");
  CHECK(plan.workspace == 2 * 20 * 2 * 128 * 2, "the copy's bytes, not %zu", plan.workspace);
}

static void check_splits_and_packing(void) {
  fa3_forward_plan plan;
  fa3_forward_params p = dense_call(1, 1, 1000, 8, 2, address);
  CHECK(fa3_plan_forward(&p, 132, &plan) == FA3_OK && plan.num_splits == 1, "num_splits 1: none");
  p.num_splits = 3;
  p.pack_gqa = 1;
  CHECK(fa3_plan_forward(&p, 132, &plan) == FA3_OK, "three parts of packed heads");
  CHECK(plan.num_splits == 3 && plan.whole_tiles == 0 && plan.pack_gqa == 4 && plan.grid == 2 * 3, "%d parts, %d heads",
        plan.num_splits, plan.pack_gqa);
  CHECK(plan.workspace > (size_t)(2 * 3) * 4 * 128 * 4, "%zu bytes for the parts", plan.workspace);
  p.num_splits = 10000;
  CHECK(fa3_plan_forward(&p, 132, &plan) == FA3_OK && plan.num_splits <= 1000 / plan.tile_n + 1, "a part for a block");
  p.pack_gqa = 0;
  CHECK(fa3_plan_forward(&p, 132, &plan) == FA3_OK && plan.pack_gqa == 1, "no packing");
}

/* Each compiled tile can be asked for; what is not compiled is refused. */
static void check_tiles(void) {
  fa3_forward_plan plan;
  fa3_variant variant;
  fa3_forward_params p = dense_call(2, 10, 20, 4, 2, address);
  for (int i = 0; fa3_forward_variant(i, &variant) == FA3_OK; ++i) {
    if (variant.dtype != FA3_BFLOAT16 || variant.head_dim != 128 || variant.head_dim_v != 128) continue;
    p.tile_m = variant.tile_m;
    p.tile_n = variant.tile_n;
    CHECK(fa3_plan_forward(&p, 132, &plan) == FA3_OK && plan.variant == i, "%s, not %d", variant.name, plan.variant);
  }
  CHECK(p.tile_m, "no tile was asked for");
  p.tile_m = 65;
  CHECK(fa3_plan_forward(&p, 132, &plan) == FA3_ERROR_HEAD_DIM && strstr(fa3_last_error(), "tile"), "a tile of 65");
}

/* With batch_invariant a sequence meets the same kernel whatever else is in the batch. */
static void check_batch_invariant_plan(void) {
  static const int32_t placeholder = 0;
  fa3_forward_plan plan, other;
  fa3_forward_params p = dense_call(1, 100, 100, 4, 2, address);
  p.queries.cu_seqlens = p.keys.cu_seqlens = &placeholder;
  p.batch_invariant = 1;
  CHECK(fa3_plan_forward(&p, 132, &plan) == FA3_OK, "one sequence of 100");
  p.batch = 2;
  p.queries.rows = p.keys.rows = 100 + 50000;
  CHECK(fa3_plan_forward(&p, 132, &other) == FA3_OK, "beside one of 50,000");
  CHECK(plan.variant == other.variant, "batch_invariant: tiles of %d x %d and %d x %d", plan.tile_m, plan.tile_n,
        other.tile_m, other.tile_n);
  CHECK(plan.pack_gqa == other.pack_gqa && plan.num_splits == 1 && other.num_splits == 1, "the same sums");
}

/* Empty problems succeed and launch nothing, so they need no device. */
static void check_empty(void) {
  size_t bytes = 1;
  fa3_forward_params p = dense_call(0, 10, 20, 4, 2, NULL);
  CHECK(fa3_forward_workspace(&p, &bytes) == FA3_OK && bytes == 0, "batch 0");
  CHECK(fa3_forward(&p, NULL, NULL) == FA3_OK, "batch 0");
  p = dense_call(3, 0, 20, 4, 2, address);
  p.q.data = p.out.data = NULL;
  CHECK(fa3_forward_workspace(&p, &bytes) == FA3_OK && bytes == 0, "no queries");
  CHECK(fa3_forward(&p, NULL, NULL) == FA3_OK, "no queries");
}

static int fail_in_thread(void* unused) {
  (void)unused;
  fa3_forward_params p = dense_call(2, 10, 20, 4, 2, address);
  CHECK(*fa3_last_error() == '\0', "a new thread has not failed");
  p.batch = -3;
  CHECK(fa3_forward(&p, NULL, NULL) == FA3_ERROR_SHAPE && strstr(fa3_last_error(), "batch"), "this thread's error");
  return 0;
}

static void check_errors_are_per_thread(void) {
  thrd_t thread;
  fa3_forward_params p = dense_call(2, 10, 20, 4, 2, address);
  p.sm_margin = -1;
  CHECK(fa3_forward(&p, NULL, NULL) == FA3_ERROR_SHAPE, "sm_margin");
  CHECK(thrd_create(&thread, fail_in_thread, NULL) == thrd_success, "a thread");
  thrd_join(thread, NULL);
  CHECK(strstr(fa3_last_error(), "sm_margin"), "another thread's failure replaced this thread's sentence");
}

static void check_devices(void) {
  int32_t count = -1, runtime = 0, driver = -1;
  fa3_device info;
  CHECK(fa3_device_count(&count) == FA3_OK && count >= 0, "%d devices", count);
  CHECK(fa3_versions(&runtime, &driver) == FA3_OK && runtime >= 13000 && driver >= 0, "%d, %d", runtime, driver);
  CHECK(fa3_device_query(count, &info) == FA3_ERROR_CUDA && fa3_last_cuda_error() != 0, "a device past the last");
  printf("devices %d\n", count);
  if (count > 0) return;

  /* Without a driver every call that needs one says so, and nothing crashes. */
  size_t bytes = 1;
  const fa3_forward_params p = dense_call(2, 10, 20, 4, 2, address);
  CHECK(fa3_forward(&p, NULL, NULL) == FA3_ERROR_CUDA, "no device");
  CHECK(fa3_last_cuda_error() != 0 && *fa3_last_error(), "what CUDA said");
  CHECK(fa3_forward_workspace(&p, &bytes) == FA3_ERROR_CUDA && bytes == 0, "no device");
  CHECK(fa3_stream_wait(NULL, NULL, 0) == FA3_ERROR_CUDA, "no device");
  CHECK(fa3_device_count(&count) == FA3_OK && fa3_last_cuda_error() == 0, "a failure is not kept");
}

static const struct {
  const char* name;
  void (*run)(void);
} checks[] = {
    {"statuses", check_statuses},
    {"arguments", check_arguments},
    {"alignment", check_alignment},
    {"sizes", check_sizes},
    {"fp8", check_fp8},
    {"missing_features", check_missing_features},
    {"pages", check_pages},
    {"cache_arguments", check_cache_arguments},
    {"null_results", check_null_results},
    {"variants", check_variants},
    {"plans", check_plans},
    {"splits_and_packing", check_splits_and_packing},
    {"tiles", check_tiles},
    {"batch_invariant_plan", check_batch_invariant_plan},
    {"empty", check_empty},
    {"errors_are_per_thread", check_errors_are_per_thread},
    {"devices", check_devices},
};

/* Runs the check that the argument names; without one, lists them. */
int main(int argc, char** argv) {
  for (size_t i = 0; i < sizeof checks / sizeof *checks; ++i) {
    if (argc < 2) {
      printf("%s\n", checks[i].name);
    } else if (!strcmp(argv[1], checks[i].name)) {
      checks[i].run();
      return 0;
    }
  }
  return argc < 2 ? 0 : 2;
}
