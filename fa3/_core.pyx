# cython: language_level=3, boundscheck=False, wraparound=False
"""The GPU backend: fill libfa3's structs, call it without the GIL, raise what it says."""

from libc.stdint cimport int32_t, int64_t, uintptr_t
from libc.string cimport memset

from fa3 cimport _fa3 as c
from fa3._array cimport Border, Output
from fa3._problem cimport Options, Problem
from fa3._view cimport ArrayView

from fa3._errors import raise_status

cdef extern from "<dlfcn.h>" nogil:
    ctypedef struct Dl_info:
        const char *dli_fname
    int dladdr(const void *address, Dl_info *info)

cdef dict DTYPES = {"float16": c.FA3_FLOAT16, "bfloat16": c.FA3_BFLOAT16, "float8_e4m3fn": c.FA3_FLOAT8_E4M3,
                    "float32": c.FA3_FLOAT32}
cdef dict SEED_TYPES = {"int64": c.FA3_INT64, "uint64": c.FA3_INT64, "int32": c.FA3_INT32, "uint32": c.FA3_UINT32}
cdef dict DTYPE_NAMES = {code: name for name, code in DTYPES.items()}


cdef int _tile_m = 0, _tile_n = 0


def use_tile(int tile_m, int tile_n):
    """Make every call take this tile, one of variants(); 0, 0: plan chooses again. For measurements."""
    global _tile_m, _tile_n
    _tile_m, _tile_n = tile_m, tile_n


cdef int check(int status) except -1:
    """Turn a status into an exception."""
    if status != c.FA3_OK:
        raise_status(status, c.fa3_status_string(status).decode(), c.fa3_last_error().decode(errors="replace"),
                     c.fa3_last_cuda_error())
        return -1
    return 0


cdef void set_rows(c.fa3_array *array, ArrayView view, bint ragged) noexcept:
    """(batch, row, head, dim), or (row, head, dim) of a ragged array."""
    cdef int axis
    array.data = <void *>view.data
    array.stride[0] = 0
    for axis in range(view.ndim):
        array.stride[axis + ragged] = view.c_strides[axis]
    if view.c_shape[view.ndim - 1] == 1:
        array.stride[3] = 1  # a single column has no stride of its own


cdef void set_descale(c.fa3_descale *descale, ArrayView view, int64_t num_heads) noexcept:
    """(), (head,) or (batch, head), where `num_heads` heads may share fewer factors."""
    cdef int axis
    if view is None:
        return
    descale.data = <const float *>view.data
    if view.ndim > 0:
        descale.group = <int32_t>(num_heads // view.c_shape[view.ndim - 1])
    for axis in range(view.ndim):
        descale.stride[2 - view.ndim + axis] = view.c_strides[axis]


cdef inline const int32_t *integers(ArrayView view) noexcept:
    if view is None:
        return NULL
    return <const int32_t *>view.data


cdef int fill_cache(c.fa3_cache *cache, Problem problem) except -1:
    """The part of the struct that speaks of a key-value cache."""
    cdef ArrayView k_new = problem.k_new, pages = problem.page_table, cos = problem.rotary_cos
    cdef bint ragged_new = problem.cu_seqlens_k_new is not None
    cache.seqlen = <int32_t>problem.cached
    if k_new is not None:
        set_rows(&cache.k_new, k_new, ragged_new)
        set_rows(&cache.v_new, problem.v_new, ragged_new)
        cache.rows_new = <int32_t>k_new.c_shape[k_new.ndim - 3]
        cache.cu_seqlens_k_new = integers(problem.cu_seqlens_k_new)
    if pages is not None:
        cache.page_table = integers(pages)
        cache.page_table_stride = pages.c_strides[0]
        cache.max_pages = <int32_t>pages.c_shape[1]
        cache.num_pages = <int32_t>problem.k.c_shape[0]
        cache.page_size = <int32_t>problem.k.c_shape[1]
    if problem.cache_batch_idx is not None:
        cache.cache_batch_idx = integers(problem.cache_batch_idx)
        cache.batch_entries = <int32_t>problem.k.c_shape[0]
    cache.cache_leftpad = integers(problem.cache_leftpad)
    if cos is not None:
        cache.rotary_cos = <const void *>cos.data
        cache.rotary_sin = <const void *>problem.rotary_sin.data
        cache.rotary_rows = <int32_t>cos.c_shape[0]
        cache.rotary_dim = <int32_t>(2 * cos.c_shape[1])
        cache.rotary_dtype = DTYPES[cos.dtype]
        cache.rotary_interleaved = problem.options.rotary_interleaved
        cache.rotary_seqlens = integers(problem.rotary_seqlens)
    return 0


cdef void set_lse(c.fa3_array *array, ArrayView lse) noexcept:
    """(batch, head, row), or (head, row) of a ragged q; or None."""
    if lse is None:
        return
    array.data = <void *>lse.data
    array.stride[0] = 0 if lse.ndim == 2 else lse.c_strides[0]
    array.stride[1] = lse.c_strides[lse.ndim - 2]
    array.stride[2] = lse.c_strides[lse.ndim - 1]


cdef void fill_lengths(c.fa3_lengths *queries, c.fa3_lengths *keys, Problem problem) noexcept:
    cdef ArrayView q = problem.q, k = problem.k
    queries.rows = <int32_t>q.c_shape[q.ndim - 3]
    queries.max_seqlen = <int32_t>problem.max_seqlen_q
    queries.cu_seqlens = integers(problem.cu_seqlens_q)
    queries.seqused = integers(problem.seqused_q)
    keys.rows = <int32_t>(k.c_shape[0] if k.ndim == 3 else problem.max_seqlen_k)
    keys.max_seqlen = <int32_t>problem.max_seqlen_k
    keys.cu_seqlens = integers(problem.cu_seqlens_k)
    keys.seqused = integers(problem.seqused_k)


cdef void fill_mask(c.fa3_mask *mask, const Options *options) noexcept:
    mask.causal = options.causal
    mask.window_left = options.window_left
    mask.window_right = options.window_right
    mask.attention_chunk = options.attention_chunk


cdef int fill_dropout(c.fa3_dropout *dropout, Problem problem) except -1:
    cdef ArrayView seed = problem.dropout_seed
    dropout.p = problem.options.dropout_p
    dropout.seed = problem.options.dropout_seed
    if seed is not None and dropout.p > 0:
        dropout.seed_data = <const void *>seed.data
        dropout.seed_type = SEED_TYPES[seed.dtype]
    return 0


cdef int fill(c.fa3_forward_params *p, Problem problem, ArrayView out, ArrayView lse) except -1:
    """The struct, in the header's order. `Problem.finish` has seen that its sizes fit."""
    cdef Options *options = &problem.options
    cdef ArrayView q = problem.q, k = problem.k
    cdef bint ragged_q = q.ndim == 3, ragged_k = k.ndim == 3
    memset(p, 0, sizeof(c.fa3_forward_params))
    p.struct_size = sizeof(c.fa3_forward_params)
    p.device = problem.border.device_id
    p.dtype = DTYPES[q.dtype]
    p.out_dtype = DTYPES[out.dtype]
    p.batch = <int32_t>problem.batch
    p.num_heads = <int32_t>problem.num_heads
    p.num_heads_kv = <int32_t>problem.num_heads_kv
    p.head_dim = <int32_t>problem.head_dim
    p.head_dim_v = <int32_t>problem.head_dim_v
    set_rows(&p.q, q, ragged_q)
    set_rows(&p.k, k, ragged_k)
    set_rows(&p.v, problem.v, ragged_k)
    set_rows(&p.out, out, ragged_q)
    set_lse(&p.lse, lse)
    if problem.qv is not None:
        set_rows(&p.qv, problem.qv, ragged_q)
    fill_lengths(&p.queries, &p.keys, problem)
    fill_mask(&p.mask, options)
    p.softmax_scale = options.softmax_scale
    p.softcap = options.softcap
    if problem.sinks is not None:
        p.sinks = <const float *>problem.sinks.data
    set_descale(&p.q_descale, problem.q_descale, problem.num_heads)
    set_descale(&p.k_descale, problem.k_descale, problem.num_heads_kv)
    set_descale(&p.v_descale, problem.v_descale, problem.num_heads_kv)
    fill_dropout(&p.dropout, problem)
    fill_cache(&p.cache, problem)
    p.num_splits = options.num_splits
    p.batch_invariant = options.batch_invariant
    p.pack_gqa = options.pack_gqa
    p.sm_margin = options.sm_margin
    p.tile_m, p.tile_n = _tile_m, _tile_n
    p.fp8_accumulate = options.fp8_accumulate
    return 0


cdef int forward(Problem problem, ArrayView out, ArrayView lse) except -1:
    """Enqueue attention on the problem's stream. Most calls need no workspace, and cross into C once."""
    cdef c.fa3_forward_params params
    cdef void *stream = <void *>problem.border.stream
    cdef int status
    fill(&params, problem, out, lse)
    with nogil:
        status = c.fa3_forward(&params, NULL, stream)
    if status == c.FA3_ERROR_WORKSPACE:
        return forward_with_workspace(problem, &params)
    return check(status)


cdef int forward_with_workspace(Problem problem, c.fa3_forward_params *params) except -1:
    """The same with memory of the caller's framework.

    It lives until the call is enqueued: the stream's order does the rest.
    """
    cdef void *stream = <void *>problem.border.stream
    cdef size_t nbytes = 0
    cdef int64_t length
    cdef Output workspace
    cdef void *data
    cdef int status
    check(c.fa3_forward_workspace(params, &nbytes))
    length = nbytes
    workspace = problem.border.make(1, &length, "uint8")
    data = <void *>workspace.view.data
    with nogil:
        status = c.fa3_forward(params, data, stream)
    return check(status)


cdef int backward(Problem problem, ArrayView dout, ArrayView out, ArrayView lse, ArrayView dlse, ArrayView dq,
                  ArrayView dk, ArrayView dv, ArrayView dsinks, bint deterministic) except -1:
    """Enqueue the gradients on the problem's stream."""
    cdef c.fa3_backward_params p
    cdef Options *options = &problem.options
    cdef ArrayView q = problem.q, k = problem.k
    cdef bint ragged_q = q.ndim == 3, ragged_k = k.ndim == 3
    cdef void *stream = <void *>problem.border.stream
    cdef void *data = NULL
    cdef size_t nbytes = 0
    cdef int64_t length
    cdef Output workspace
    cdef int status
    memset(&p, 0, sizeof(p))
    p.struct_size = sizeof(p)
    p.device = problem.border.device_id
    p.dtype = DTYPES[q.dtype]
    p.batch = <int32_t>problem.batch
    p.num_heads = <int32_t>problem.num_heads
    p.num_heads_kv = <int32_t>problem.num_heads_kv
    p.head_dim = <int32_t>problem.head_dim
    p.head_dim_v = <int32_t>problem.head_dim_v
    set_rows(&p.dout, dout, ragged_q)
    set_rows(&p.q, q, ragged_q)
    set_rows(&p.k, k, ragged_k)
    set_rows(&p.v, problem.v, ragged_k)
    set_rows(&p.out, out, ragged_q)
    set_lse(&p.lse, lse)
    set_lse(&p.dlse, dlse)
    set_rows(&p.dq, dq, ragged_q)
    set_rows(&p.dk, dk, ragged_k)
    set_rows(&p.dv, dv, ragged_k)
    fill_lengths(&p.queries, &p.keys, problem)
    fill_mask(&p.mask, options)
    p.softmax_scale = options.softmax_scale
    p.softcap = options.softcap
    if dsinks is not None:
        p.sinks = <const float *>problem.sinks.data
        p.dsinks = <float *>dsinks.data
    fill_dropout(&p.dropout, problem)
    p.deterministic = deterministic
    check(c.fa3_backward_workspace(&p, &nbytes))
    if nbytes > 0:
        length = nbytes
        workspace = problem.border.make(1, &length, "uint8")
        data = <void *>workspace.view.data
    with nogil:
        status = c.fa3_backward(&p, data, stream)
    return check(status)


cdef int combine(Border border, ArrayView parts, ArrayView lse_parts, ArrayView out, ArrayView lse) except -1:
    """Enqueue the joining of parts on the border's stream."""
    cdef c.fa3_combine_params p
    cdef void *stream = <void *>border.stream
    cdef int axis, status
    memset(&p, 0, sizeof(p))
    p.struct_size = sizeof(p)
    p.device = border.device_id
    p.out_dtype = DTYPES[out.dtype]
    p.splits = <int32_t>parts.c_shape[0]
    p.batch, p.rows, p.num_heads = <int32_t>out.c_shape[0], <int32_t>out.c_shape[1], <int32_t>out.c_shape[2]
    p.head_dim_v = <int32_t>out.c_shape[3]
    p.out_partial.data, p.lse_partial.data = <void *>parts.data, <void *>lse_parts.data
    p.out_partial_step, p.lse_partial_step = parts.c_strides[0], lse_parts.c_strides[0]
    for axis in range(4):
        p.out_partial.stride[axis] = parts.c_strides[axis + 1]
    set_rows(&p.out, out, False)
    p.lse.data = <void *>lse.data
    for axis in range(3):
        p.lse_partial.stride[axis] = lse_parts.c_strides[axis + 1]
        p.lse.stride[axis] = lse.c_strides[axis]
    with nogil:
        status = c.fa3_combine(&p, stream)
    return check(status)


cdef int quantize(Border border, ArrayView x, ArrayView codes, ArrayView descale, ArrayView cu_seqlens,
                  bint hadamard) except -1:
    """Enqueue quantisation on the border's stream; the axes of descale say what shares a scale."""
    cdef c.fa3_quantize_params p
    cdef void *stream = <void *>border.stream
    cdef void *data = NULL
    cdef bint ragged = x.ndim == 3
    cdef size_t nbytes = 0
    cdef int64_t length
    cdef Output workspace
    cdef int axis, status
    memset(&p, 0, sizeof(p))
    p.struct_size = sizeof(p)
    p.device = border.device_id
    p.dtype = DTYPES[x.dtype]
    p.granularity = descale.ndim
    p.hadamard = hadamard
    p.batch = 1 if ragged else <int32_t>x.c_shape[0]
    if cu_seqlens is not None:
        p.batch = <int32_t>(cu_seqlens.c_shape[0] - 1)
        p.cu_seqlens = integers(cu_seqlens)
    p.rows = <int32_t>x.c_shape[x.ndim - 3]
    p.num_heads = <int32_t>x.c_shape[x.ndim - 2]
    p.head_dim = <int32_t>x.c_shape[x.ndim - 1]
    set_rows(&p.x, x, ragged)
    set_rows(&p.out, codes, ragged)
    p.descale = <float *>descale.data
    for axis in range(descale.ndim):
        p.descale_stride[2 - descale.ndim + axis] = descale.c_strides[axis]
    check(c.fa3_quantize_workspace(&p, &nbytes))
    if nbytes > 0:
        length = nbytes
        workspace = border.make(1, &length, "uint8")
        data = <void *>workspace.view.data
    with nogil:
        status = c.fa3_quantize_fp8(&p, data, stream)
    return check(status)


def plan(*, str dtype, int batch, int seqlen_q, int seqlen_k, int num_heads, int num_heads_kv, int head_dim,
         int head_dim_v, bint causal=False, int window_left=-1, int window_right=-1, int attention_chunk=0,
         bint ragged=False, bint seqused_q=False, bint seqused_k=False, int max_seqlen_q=0, int max_seqlen_k=0,
         tuple q_strides=None, tuple k_strides=None, tuple v_strides=None, uintptr_t address=4096, int num_splits=0,
         bint batch_invariant=False, object pack_gqa=None, int sm_margin=0, object fp8_accumulate=None,
         bint has_qv=False, int page_size=0, int num_sms=132):
    """What a forward call of these sizes would do, as a dict: see fa3_forward_plan in fa3.h. Needs no GPU.

    For a ragged batch, seqlen_q and seqlen_k are the totals. Strides are (batch, row, head) in elements; None:
    contiguous.
    """
    cdef c.fa3_forward_params p
    cdef c.fa3_forward_plan result
    cdef int32_t placeholder = 0
    memset(&p, 0, sizeof(p))
    p.struct_size = sizeof(p)
    p.dtype = p.out_dtype = DTYPES[dtype]
    if p.dtype == c.FA3_FLOAT8_E4M3:
        p.out_dtype = c.FA3_BFLOAT16
    p.batch, p.num_heads, p.num_heads_kv = batch, num_heads, num_heads_kv
    p.head_dim, p.head_dim_v = head_dim, head_dim_v
    set_strides(&p.q, q_strides, seqlen_q, num_heads, head_dim, address)
    set_strides(&p.k, k_strides, page_size or seqlen_k, num_heads_kv, head_dim, address)
    set_strides(&p.v, v_strides, page_size or seqlen_k, num_heads_kv, head_dim_v, address)
    set_strides(&p.out, None, seqlen_q, num_heads, head_dim_v, address)
    if has_qv:
        set_strides(&p.qv, None, seqlen_q, num_heads, head_dim_v, address)
    p.queries.rows, p.keys.rows = seqlen_q, seqlen_k
    if ragged:
        p.queries.cu_seqlens = p.keys.cu_seqlens = &placeholder  # only asked for being there
        p.queries.max_seqlen, p.keys.max_seqlen = max_seqlen_q, max_seqlen_k
    if seqused_q:
        p.queries.seqused = &placeholder
    if seqused_k:
        p.keys.seqused = &placeholder
    if page_size:
        p.cache.page_table, p.cache.page_size = &placeholder, page_size
        p.cache.max_pages = (seqlen_k + page_size - 1) // page_size
        p.cache.page_table_stride, p.cache.num_pages = p.cache.max_pages, batch * p.cache.max_pages
    p.mask.causal, p.mask.attention_chunk = causal, attention_chunk
    p.mask.window_left, p.mask.window_right = window_left, window_right
    p.softmax_scale = 1
    p.num_splits = num_splits
    p.batch_invariant = batch_invariant
    p.pack_gqa = -1 if pack_gqa is None else pack_gqa
    p.sm_margin = sm_margin
    p.tile_m, p.tile_n = _tile_m, _tile_n
    p.fp8_accumulate = fp8_accumulate or 0
    check(c.fa3_plan_forward(&p, num_sms, &result))
    return result


cdef int set_strides(c.fa3_array *array, tuple strides, int64_t rows, int64_t heads, int64_t head_dim,
                     uintptr_t address) except -1:
    array.data = <void *>address
    if strides is None:
        strides = (rows * heads * head_dim, heads * head_dim, head_dim)
    array.stride[0], array.stride[1], array.stride[2] = strides
    array.stride[3] = 1
    return 0


cdef dict described(const c.fa3_variant *variant):
    return {
        "name": variant.name.decode(), "dtype": DTYPE_NAMES[variant.dtype], "head_dim": variant.head_dim,
        "head_dim_v": variant.head_dim_v, "tile_m": variant.tile_m, "tile_n": variant.tile_n,
        "threads": variant.threads, "shared_memory": variant.shared_memory, "blocks_per_sm": variant.blocks_per_sm,
        "has_qv": bool(variant.has_qv)}


def variants():
    """The compiled forward kernels: a dict each, in the order that plan()["variant"] counts."""
    cdef c.fa3_variant variant
    found = []
    while c.fa3_forward_variant(<int32_t>len(found), &variant) == c.FA3_OK:
        found.append(described(&variant))
    return found


def backward_variants():
    """The compiled backward kernels; tile_m counts queries of a step, tile_n keys of a thread block."""
    cdef c.fa3_variant variant
    found = []
    while c.fa3_backward_variant(<int32_t>len(found), &variant) == c.FA3_OK:
        found.append(described(&variant))
    return found


def device_count():
    """CUDA devices on this machine; 0 where there is no driver."""
    cdef int32_t count = 0
    check(c.fa3_device_count(&count))
    return count


def device_info(int device):
    """What CUDA says of a device."""
    cdef c.fa3_device info
    check(c.fa3_device_query(device, &info))
    return {"name": info.name.decode(), "compute_capability": (info.major, info.minor), "num_sms": info.num_sms,
            "total_memory": info.total_memory}


def build_info():
    """CUDA's versions, as (major, minor): the runtime that is linked in, and the driver's or None."""
    cdef int32_t runtime = 0, driver = 0
    check(c.fa3_versions(&runtime, &driver))
    return {"cuda_runtime": divmod(runtime // 10, 100), "cuda_driver": divmod(driver // 10, 100) if driver else None}


def get_library():
    """The path of libfa3.so, for C programs to link."""
    cdef Dl_info info
    if not dladdr(<const void *>c.fa3_forward, &info):
        raise RuntimeError("the dynamic linker does not know where libfa3 was loaded from")
    return info.dli_fname.decode()
