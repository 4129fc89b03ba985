/* fa3: exact attention on Hopper GPUs (compute capability 9.0). The C interface.
 *
 *   out = softmax(softmax_scale * q k^T + mask) v,   lse = log(sum(exp(scores)))
 *
 * How to call: fill an fa3_forward_params (zero it first, set struct_size), ask fa3_forward_workspace() how much device
 * memory the call needs, and hand that to fa3_forward() with a CUDA stream. A call checks every argument before it
 * enqueues anything, never allocates, never synchronises, keeps no state, and may be captured in a CUDA graph.
 *
 * Memory is the caller's throughout: nothing is kept after a call returns but what was enqueued on the stream, so
 * arrays and workspace must stay until that work is done. Calls from several threads, streams and devices are
 * independent; two calls that may run at once need a workspace each.
 *
 * Every function returns an fa3_status. On failure fa3_last_error() gives this thread's sentence about it.
 * Pointers named "device" are addresses on `device`; the library never reads them on the host.
 */
#ifndef FA3_H
#define FA3_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define FA3_API __attribute__((visibility("default")))
#else
#define FA3_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum fa3_status {
  FA3_OK = 0,
  FA3_ERROR_NULL = -1,         /* a pointer that the call needs is null */
  FA3_ERROR_HEAD_DIM = -2,     /* no kernel for this head dim */
  FA3_ERROR_HEAD_DIM_FP8 = -3, /* no fp8 kernel for this head dim */
  FA3_ERROR_DTYPE = -4,        /* an unknown or unfitting element type */
  FA3_ERROR_SHAPE = -5,        /* a size, stride or option that does not fit */
  FA3_ERROR_CU_SEQLENS = -6,   /* cumulative lengths that do not fit (told only under FA3_CHECK=1) */
  FA3_ERROR_WORKSPACE = -7,    /* no workspace given, but fa3_..._workspace() bytes of it are needed */
  /* -10 to -17: meaningful, but not there. */
  FA3_ERROR_NO_FP8 = -10,          /* a build without fp8; of one that lacks this head dim alone: -3 */
  FA3_ERROR_NO_PAGED_CACHE = -11,  /* reserved */
  FA3_ERROR_NO_CACHE_UPDATE = -12, /* rotary of fp8 */
  FA3_ERROR_NO_SPLIT = -13,        /* reserved */
  FA3_ERROR_NO_QV = -14,           /* qv and MLA in forms that are not built */
  FA3_ERROR_NO_BACKWARD = -15,     /* of this dtype and these head dims */
  FA3_ERROR_NO_DROPOUT = -16,      /* of fp8, with qv, MLA */
  FA3_ERROR_DEVICE = -17,          /* the device is not compute capability 9.0 */
  FA3_ERROR_CUDA = -100            /* CUDA failed; fa3_last_cuda_error() has its code */
} fa3_status;

typedef enum fa3_dtype { FA3_FLOAT16 = 1, FA3_BFLOAT16 = 2, FA3_FLOAT8_E4M3 = 3, FA3_FLOAT32 = 4 } fa3_dtype;

/* FA3_INT64: or unsigned, which has the same bits. */
typedef enum fa3_integer { FA3_INT64 = 0, FA3_INT32 = 1, FA3_UINT32 = 2 } fa3_integer;

/* A strided device array. Strides count elements and may be 0 or negative, except the last axis of q, k, v and out,
 * which must be contiguous. Axes are (batch, row, head, dim) for q, k, v, out and (batch, head, row, -) for lse;
 * a ragged batch (cu_seqlens) has no batch axis: its stride[0] is ignored. Addresses are multiples of an element's
 * bytes, as are those of all other arrays. 16-byte aligned addresses and strides are read by TMA as they are; others
 * are first copied into the workspace. */
typedef struct fa3_array {
  void* data; /* device; may be null when the array has no elements */
  int64_t stride[4];
} fa3_array;

/* Where each sequence's rows lie. Dense: sequence b has rows [0, rows) of batch entry b. Ragged: sequence b has rows
 * [cu_seqlens[b], cu_seqlens[b + 1]) of all `rows` rows. seqused then keeps the first seqused[b] of them. */
typedef struct fa3_lengths {
  int32_t rows;              /* dense: rows of a batch entry; ragged: rows of the array; at most 2^30 */
  int32_t max_seqlen;        /* ragged: the longest sequence, or 0 if not known; only steers the choice of tiles */
  const int32_t* cu_seqlens; /* device (batch + 1), or null: dense */
  const int32_t* seqused;    /* device (batch), or null: all rows */
} fa3_lengths;

/* Query i of a sequence stands at position p = i + seqlen_k - seqlen_q. It sees key j if
 * p - window_left <= j <= p + window_right (-1: unbounded), j <= p if causal, and, if attention_chunk = c > 0,
 * floor(p / c) == floor(j / c). */
typedef struct fa3_mask {
  int32_t causal; /* 0 or 1 */
  int32_t window_left, window_right;
  int32_t attention_chunk;
} fa3_mask;

/* A key-value cache: what is appended to it before attention, and how its rows are found. All zero: no cache. keys.rows
 * are then the rows that a sequence has room for, and keys.seqused those in use before the new ones. Sequence b's new
 * keys are put into k and v from row keys.seqused[b] on, as far as there is room, and turned there as rotary says:
 * new key i stands at position rotary_seqlens[b] + i; so does query i under a mask, without one all stand at
 * rotary_seqlens[b]. A position past rotary_rows counts as the last. Two sequences that share a row of the cache must
 * not both be appended to. */
typedef struct fa3_cache {
  fa3_array k_new, v_new;          /* (batch, row, head_kv, dim), or null data */
  const int32_t* cu_seqlens_k_new; /* device (batch + 1), or null */
  int32_t rows_new;                /* rows of k_new along its row axis */
  int32_t seqlen;                  /* with k_new and without keys.seqused: rows in use before it, of all sequences */
  /* device (batch, max_pages), or null: contiguous. Row j of sequence b is row j % page_size of page
   * page_table[b][j / page_size]; k and v are (page, row of it, head, dim), keys.rows the rows that a sequence has room
   * for, and keys.cu_seqlens says lengths only. Rows of pages that do not exist count as zeros. */
  const int32_t* page_table;
  int64_t page_table_stride; /* elements between sequences */
  int32_t max_pages, page_size, num_pages;
  const int32_t* cache_batch_idx; /* device (batch), or null: sequence b has batch entry b of k and v */
  int32_t batch_entries;          /* with cache_batch_idx: batch entries of k and v */
  const int32_t* cache_leftpad;   /* device (batch), or null: first rows to leave out; positions count from there */
  const void *rotary_cos, *rotary_sin; /* device (rotary_rows, rotary_dim / 2), contiguous, or null */
  /* device (batch), or null: the rows in use before the new ones. With keys.cu_seqlens one of it and keys.seqused is
   * needed. */
  const int32_t* rotary_seqlens;
  int32_t rotary_rows;        /* at most 2^30 */
  int32_t rotary_dim;         /* a multiple of 16 up to head_dim */
  int32_t rotary_dtype;       /* dtype, or FA3_FLOAT32 */
  int32_t rotary_interleaved; /* 1: elements 2i and 2i + 1 are a pair; 0: i and i + rotary_dim / 2 */
} fa3_cache;

/* Per-head factors of fp8 operands: fp32, strides (batch, head), 0 to broadcast; null: 1. Heads h of q share the factor
 * at h / group: with group = num_heads / num_heads_kv there is one for each KV head. 0 means 1, and k and v have no
 * groups. */
typedef struct fa3_descale {
  const float* data; /* device */
  int64_t stride[2];
  int32_t group;
} fa3_descale;

/* Each probability is kept with 1 - p, rounded to 15 bits, and then divided by it. Which are kept is Philox4x32-10 of
 * the seed at (batch, head, query, key), counted within the call and the sequence. Its key is the seed, the lower 32
 * bits first, its counter (head, key / 32 * 4 + key % 8 / 2, batch, query / 16 * 8 + query % 8). Of the four words
 * number query % 16 / 8 + key % 16 / 8 * 2 counts, turned right by 8 bits if key % 32 >= 16, and of that the lower 15
 * bits of its lower half, or if key is odd of its upper one. Below p * 2^15, rounded and at most 2^15 - 1, they drop
 * the element; of p above 1/2, unless they are below (1 - p) * 2^15. */
typedef struct fa3_dropout {
  float p;               /* from 0, none, to below 1 */
  int32_t seed_type;     /* of seed_data: fa3_integer */
  uint64_t seed;         /* where seed_data is null */
  const void* seed_data; /* device: one integer, read by the kernels; negative ones count modulo 2^64; or null */
} fa3_dropout;

typedef struct fa3_forward_params {
  size_t struct_size; /* sizeof(fa3_forward_params): any other, as of another version's struct, is refused */
  int32_t device;     /* CUDA ordinal of every array */
  int32_t dtype;      /* of q, k, v: fa3_dtype */
  int32_t out_dtype;  /* dtype, or for fp8 FA3_BFLOAT16 / FA3_FLOAT16 */

  /* num_heads % num_heads_kv == 0; batch and num_heads at most 2^30, and q, k and k_new fewer than 2^44 elements */
  int32_t batch, num_heads, num_heads_kv;
  /* Of q, k; of v, out. With qv at most 64 and 512. Without it at most 256 each, or 576 and 512, where v must be k's
   * memory, with its strides: its first 512 columns. */
  int32_t head_dim, head_dim_v;

  fa3_array q, k, v, out;
  fa3_array lse; /* fp32 (batch, head, row), or null data */
  fa3_array qv;  /* (batch, row, head, head_dim_v): scores are of q k^T + qv v^T; or all zero: none */
  fa3_lengths queries, keys;

  fa3_mask mask;
  float softmax_scale;
  float softcap;      /* 0: none; else scores become softcap * tanh(scores / softcap) */
  const float* sinks; /* device (num_heads), or null: a logit that joins each row's denominator */
  fa3_descale q_descale, k_descale, v_descale;
  fa3_dropout dropout;

  fa3_cache cache;
  int32_t num_splits;      /* 0: chosen; 1: none; n: that many */
  int32_t batch_invariant; /* 1: a sequence's bits do not depend on the rest of the batch */
  int32_t pack_gqa;        /* -1: chosen; 0, 1 */
  int32_t sm_margin;       /* multiprocessors to leave free */
  int32_t tile_m, tile_n;  /* 0: chosen; else a tile of fa3_forward_variant, for measurements */
  /* Of fp8, of whose products tensor cores keep 13 bits below the largest of what they add. n > 0: a sum of weighted
   * values moves on to fp32 after n keys, or fewer, so that they are whole blocks, at least two; -1: never; 0: chosen,
   * after 2,112 keys. Where shared memory has no room for such sums they are in the workspace: chosen if a row may sum
   * more than 4,096 keys, or with batch_invariant, and n < 1,024 means each block, but not with qv. */
  int32_t fp8_accumulate;
} fa3_forward_params;

/* Gradients of q, k, v and the sinks, from that of the forward's result and from what the forward was given and gave.
 * Axes as in fa3_forward_params. All rows of dq, dk and dv are written: those that no sequence has in use become 0. */
typedef struct fa3_backward_params {
  size_t struct_size; /* sizeof(fa3_backward_params) */
  int32_t device;     /* CUDA ordinal of every array */
  int32_t dtype;      /* of q, k, v, out and their gradients: fa3_dtype */

  int32_t batch, num_heads, num_heads_kv; /* num_heads % num_heads_kv == 0; at most 65,535 */
  int32_t head_dim, head_dim_v;           /* of q, k; of v, out */

  fa3_array dout, q, k, v, out; /* dout like out */
  fa3_array lse, dlse;          /* fp32 (batch, head, row); dlse may have null data: no gradient comes by lse */
  fa3_array dq, dk, dv;         /* like q, k, v */
  float* dsinks;                /* device (num_heads), or null without sinks */
  fa3_lengths queries, keys;

  fa3_mask mask;
  float softmax_scale;
  float softcap;
  const float* sinks;  /* device (num_heads), or null */
  fa3_dropout dropout; /* the forward's */

  int32_t deterministic; /* 1: dq is summed in one order, and bitwise repeatable; dk and dv always are */
} fa3_backward_params;

/* How much of x shares one scale of fa3_quantize_fp8, and so which strides of descale count. */
typedef enum fa3_granularity {
  FA3_PER_TENSOR = 0,    /* all of x; descale () */
  FA3_PER_HEAD = 1,      /* each head of all sequences; descale (head) */
  FA3_PER_BATCH_HEAD = 2 /* each head of each sequence; descale (batch, head) */
} fa3_granularity;

/* x = out * descale, out rounded to float8_e4m3fn, descale = amax / 448. NaN and infinity do not count for amax; NaN
 * stays NaN, infinity saturates. descale is 1 where all is 0, and at least 2^-90. It has at most 2^30 elements. */
typedef struct fa3_quantize_params {
  size_t struct_size;  /* sizeof(fa3_quantize_params) */
  int32_t device;      /* CUDA ordinal of every array */
  int32_t dtype;       /* of x: FA3_FLOAT16, FA3_BFLOAT16 or FA3_FLOAT32 */
  int32_t granularity; /* fa3_granularity */
  int32_t hadamard;    /* 1: rotate head_dim first, as quantize_fp8's documentation says; q and k alike */
  int32_t batch;       /* a ragged x without cu_seqlens is a batch of 1 */
  int32_t rows;        /* of a batch entry; with cu_seqlens, of all sequences; batch * rows * num_heads < 2^31 */
  int32_t num_heads;
  int32_t head_dim;          /* a multiple of 8 up to 576 */
  const int32_t* cu_seqlens; /* device (batch + 1), or null: dense; only for FA3_PER_BATCH_HEAD */
  fa3_array x, out;          /* (batch, row, head, dim); out has a byte an element, which no two share */
  float* descale;            /* device */
  int64_t descale_stride[2]; /* (batch, head) */
} fa3_quantize_params;

/* Attention over disjoint parts of the keys, joined: lse = log(sum_i exp(lse_i)), out = sum_i exp(lse_i - lse) out_i. A
 * part whose lse is -inf saw nothing and is left out, whatever its out holds. */
typedef struct fa3_combine_params {
  size_t struct_size; /* sizeof(fa3_combine_params) */
  int32_t device;     /* CUDA ordinal of every array */
  int32_t out_dtype;  /* FA3_FLOAT32, FA3_FLOAT16 or FA3_BFLOAT16 */
  int32_t splits;     /* parts, 1 to 2^30 */
  int32_t batch, rows, num_heads;
  int32_t head_dim_v;
  fa3_array out_partial, lse_partial; /* of the first part: fp32 (batch, row, head, dim) and (batch, row, head, -);
                                         any stride along dim */
  int64_t out_partial_step, lse_partial_step; /* elements from a part to the next */
  fa3_array out;                              /* (batch, row, head, dim) */
  fa3_array lse;                              /* fp32 (batch, row, head, -), or null data */
} fa3_combine_params;

/* What a call will do: the choices that fa3_forward makes from its arguments and the device. */
typedef struct fa3_forward_plan {
  int32_t variant;                 /* index for fa3_forward_variant */
  int32_t tile_m, tile_n;          /* queries and keys of a tile */
  int32_t pack_gqa;                /* query heads that share a tile's rows; 1: no packing */
  int32_t whole_tiles, num_splits; /* tiles from whole_tiles on are split into so many parts along the keys */
  int32_t num_m_blocks;            /* tiles along the queries of a typical sequence */
  int32_t grid;                    /* thread blocks */
  int32_t cluster;                 /* of them that join a tile's parts among them; 1: through memory */
  int32_t paired;                  /* 1: clusters are of two, which share keys and values instead */
  int32_t plain;                   /* 1: the tile's kernel for calls with none of: packed heads, pages,
                                    * softcap, sinks, batch_invariant, dropout, an out that 16-byte stores
                                    * do not fit, splits of tiles of 64 queries */
  int32_t decode;                  /* 1: the tile's kernel for few queries on many keys, whatever
                                    * plain says */
  int32_t dynamic;                 /* 1: work is handed out by a counter in the workspace */
  int32_t heads_per_section;       /* heads whose tiles take turns, so that their keys stay in L2 */
  int32_t short_m_blocks;          /* tiles of each head that wait for the end, where they fill gaps */
  /* 1: copied to the workspace first: TMA cannot address it, or q turns. copy_v 2: with keys along its rows, as fp8
   * products read them */
  int32_t copy_q, copy_k, copy_v, copy_qv;
  int32_t accumulate_blocks; /* of keys, whose fp8 products are added up before fp32 goes on; 0: all */
  size_t workspace;          /* bytes */
} fa3_forward_plan;

typedef struct fa3_variant {
  const char* name;
  int32_t dtype, head_dim, head_dim_v, tile_m, tile_n;
  int32_t threads, shared_memory; /* threads, bytes of a thread block */
  int32_t blocks_per_sm;          /* thread blocks that share a multiprocessor */
  int32_t has_qv;                 /* 1: for calls with qv */
} fa3_variant;

typedef struct fa3_device {
  char name[256];
  int32_t major, minor, num_sms;
  uint64_t total_memory; /* bytes */
} fa3_device;

/* Bytes of device memory that fa3_forward needs for these arguments; often 0. Its address must be a multiple of 16, and
 * had better be one of 256, as cudaMalloc's are. */
FA3_API int fa3_forward_workspace(const fa3_forward_params* params, size_t* bytes);

/* Enqueue attention on `stream` (a cudaStream_t). `workspace` may be null: where one is needed after all, nothing is
 * enqueued and FA3_ERROR_WORKSPACE returned, so that most calls need not ask first. It need not be initialised. */
FA3_API int fa3_forward(const fa3_forward_params* params, void* workspace, void* stream);

/* The choices fa3_forward would make on a device with num_sms multiprocessors, 1 to 2^16. Needs no GPU. */
FA3_API int fa3_plan_forward(const fa3_forward_params* params, int32_t num_sms, fa3_forward_plan* plan);

/* The compiled forward kernels: FA3_ERROR_SHAPE once index is past the last. */
FA3_API int fa3_forward_variant(int32_t index, fa3_variant* variant);

/* Bytes of device memory that fa3_backward needs for these arguments, aligned as fa3_forward's. */
FA3_API int fa3_backward_workspace(const fa3_backward_params* params, size_t* bytes);

/* Enqueue the gradients on `stream`: a few kernels. `workspace` as in fa3_forward; it need not be initialised. */
FA3_API int fa3_backward(const fa3_backward_params* params, void* workspace, void* stream);

/* The compiled backward kernels: FA3_ERROR_SHAPE once index is past the last. tile_m queries of a step, tile_n keys of
 * a thread block. */
FA3_API int fa3_backward_variant(int32_t index, fa3_variant* variant);

/* Bytes of device memory that fa3_quantize_fp8 needs, aligned as fa3_forward's; 0 where each scale is of so few
 * elements that one small thread block holds them. */
FA3_API int fa3_quantize_workspace(const fa3_quantize_params* params, size_t* bytes);

/* Enqueue the quantisation on `stream`: one kernel, launched cooperatively where thread blocks share a scale.
 * `workspace` as in fa3_forward. */
FA3_API int fa3_quantize_fp8(const fa3_quantize_params* params, void* workspace, void* stream);

/* Enqueue the joining of parts on `stream`: one kernel, without a workspace. */
FA3_API int fa3_combine(const fa3_combine_params* params, void* stream);

/* A status as a few words. What this thread's last call of another function failed at, in a sentence, or "". Its code
 * where it was CUDA that failed, a cudaError_t or, of the driver's functions, a CUresult; else 0. */
FA3_API const char* fa3_status_string(int status);
FA3_API const char* fa3_last_error(void);
FA3_API int fa3_last_cuda_error(void);

/* Devices. count is 0, without an error, where there is no driver. */
FA3_API int fa3_device_count(int32_t* count);
FA3_API int fa3_device_query(int32_t device, fa3_device* info);
FA3_API int fa3_versions(int32_t* runtime, int32_t* driver); /* as CUDA counts: 13000 is 13.0; driver 0: none */

/* The device that owns a pointer; -1 if it is host memory. */
FA3_API int fa3_pointer_device(const void* pointer, int* device);
/* Order `waiting` behind all that is enqueued on `signalling` so far, without a host sync. */
FA3_API int fa3_stream_wait(void* waiting, void* signalling, int device);

#ifdef __cplusplus
}
#endif
#endif /* FA3_H */
