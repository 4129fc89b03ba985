# Declarations of src/fa3.h, nothing else.
from libc.stdint cimport int32_t, int64_t, uint64_t

cdef extern from "fa3.h" nogil:
    enum:
        FA3_OK
        FA3_ERROR_WORKSPACE
        FA3_FLOAT16
        FA3_BFLOAT16
        FA3_FLOAT8_E4M3
        FA3_FLOAT32
        FA3_INT64
        FA3_INT32
        FA3_UINT32

    ctypedef struct fa3_array:
        void *data
        int64_t stride[4]

    ctypedef struct fa3_lengths:
        int32_t rows
        int32_t max_seqlen
        const int32_t *cu_seqlens
        const int32_t *seqused

    ctypedef struct fa3_mask:
        int32_t causal
        int32_t window_left
        int32_t window_right
        int32_t attention_chunk

    ctypedef struct fa3_cache:
        fa3_array k_new
        fa3_array v_new
        const int32_t *cu_seqlens_k_new
        int32_t rows_new
        int32_t seqlen
        const int32_t *page_table
        int64_t page_table_stride
        int32_t max_pages
        int32_t page_size
        int32_t num_pages
        const int32_t *cache_batch_idx
        int32_t batch_entries
        const int32_t *cache_leftpad
        const void *rotary_cos
        const void *rotary_sin
        const int32_t *rotary_seqlens
        int32_t rotary_rows
        int32_t rotary_dim
        int32_t rotary_dtype
        int32_t rotary_interleaved

    ctypedef struct fa3_descale:
        const float *data
        int64_t stride[2]
        int32_t group

    ctypedef struct fa3_dropout:
        float p
        int32_t seed_type
        uint64_t seed
        const void *seed_data

    ctypedef struct fa3_forward_params:
        size_t struct_size
        int32_t device
        int32_t dtype
        int32_t out_dtype
        int32_t batch
        int32_t num_heads
        int32_t num_heads_kv
        int32_t head_dim
        int32_t head_dim_v
        fa3_array q
        fa3_array k
        fa3_array v
        fa3_array out
        fa3_array lse
        fa3_array qv
        fa3_lengths queries
        fa3_lengths keys
        fa3_mask mask
        float softmax_scale
        float softcap
        const float *sinks
        fa3_descale q_descale
        fa3_descale k_descale
        fa3_descale v_descale
        fa3_dropout dropout
        fa3_cache cache
        int32_t num_splits
        int32_t batch_invariant
        int32_t pack_gqa
        int32_t sm_margin
        int32_t tile_m
        int32_t tile_n
        int32_t fp8_accumulate

    ctypedef struct fa3_backward_params:
        size_t struct_size
        int32_t device
        int32_t dtype
        int32_t batch
        int32_t num_heads
        int32_t num_heads_kv
        int32_t head_dim
        int32_t head_dim_v
        fa3_array dout
        fa3_array q
        fa3_array k
        fa3_array v
        fa3_array out
        fa3_array lse
        fa3_array dlse
        fa3_array dq
        fa3_array dk
        fa3_array dv
        float *dsinks
        fa3_lengths queries
        fa3_lengths keys
        fa3_mask mask
        float softmax_scale
        float softcap
        const float *sinks
        fa3_dropout dropout
        int32_t deterministic

    ctypedef struct fa3_combine_params:
        size_t struct_size
        int32_t device
        int32_t out_dtype
        int32_t splits
        int32_t batch
        int32_t rows
        int32_t num_heads
        int32_t head_dim_v
        fa3_array out_partial
        fa3_array lse_partial
        int64_t out_partial_step
        int64_t lse_partial_step
        fa3_array out
        fa3_array lse

    ctypedef struct fa3_quantize_params:
        size_t struct_size
        int32_t device
        int32_t dtype
        int32_t granularity
        int32_t hadamard
        int32_t batch
        int32_t rows
        int32_t num_heads
        int32_t head_dim
        const int32_t *cu_seqlens
        fa3_array x
        fa3_array out
        float *descale
        int64_t descale_stride[2]

    ctypedef struct fa3_forward_plan:
        int32_t variant
        int32_t tile_m
        int32_t tile_n
        int32_t pack_gqa
        int32_t whole_tiles
        int32_t num_splits
        int32_t num_m_blocks
        int32_t grid
        int32_t cluster
        int32_t paired
        int32_t plain
        int32_t decode
        int32_t dynamic
        int32_t heads_per_section
        int32_t short_m_blocks
        int32_t copy_q
        int32_t copy_k
        int32_t copy_v
        int32_t copy_qv
        int32_t accumulate_blocks
        size_t workspace

    ctypedef struct fa3_variant:
        const char *name
        int32_t dtype
        int32_t head_dim
        int32_t head_dim_v
        int32_t tile_m
        int32_t tile_n
        int32_t threads
        int32_t shared_memory
        int32_t blocks_per_sm
        int32_t has_qv

    ctypedef struct fa3_device:
        char name[256]
        int32_t major
        int32_t minor
        int32_t num_sms
        uint64_t total_memory

    int fa3_forward_workspace(const fa3_forward_params *params, size_t *bytes)
    int fa3_forward(const fa3_forward_params *params, void *workspace, void *stream)
    int fa3_backward_workspace(const fa3_backward_params *params, size_t *bytes)
    int fa3_backward(const fa3_backward_params *params, void *workspace, void *stream)
    int fa3_backward_variant(int32_t index, fa3_variant *variant)
    int fa3_quantize_workspace(const fa3_quantize_params *params, size_t *bytes)
    int fa3_quantize_fp8(const fa3_quantize_params *params, void *workspace, void *stream)
    int fa3_combine(const fa3_combine_params *params, void *stream)
    int fa3_plan_forward(const fa3_forward_params *params, int32_t num_sms, fa3_forward_plan *plan)
    int fa3_forward_variant(int32_t index, fa3_variant *variant)
    const char *fa3_status_string(int status)
    const char *fa3_last_error()
    int fa3_last_cuda_error()
    int fa3_device_count(int32_t *count)
    int fa3_device_query(int32_t device, fa3_device *info)
    int fa3_versions(int32_t *runtime, int32_t *driver)
    int fa3_pointer_device(const void *pointer, int *device)
    int fa3_stream_wait(void *waiting, void *signalling, int device)
