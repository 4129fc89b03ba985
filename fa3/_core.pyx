# cython: language_level=3
"""The GPU backend: fill libfa3's structs, call it without the GIL, raise what it says."""

from libc.stdint cimport int32_t, int64_t, uintptr_t
from libc.string cimport memset

from fa3 cimport _fa3 as c
from fa3._view cimport ArrayView

from fa3._errors import raise_status

cdef extern from "<dlfcn.h>" nogil:
    ctypedef struct Dl_info:
        const char *dli_fname
    int dladdr(const void *address, Dl_info *info)

_DTYPES = {"float16": c.FA3_FLOAT16, "bfloat16": c.FA3_BFLOAT16, "float8_e4m3fn": c.FA3_FLOAT8_E4M3,
           "float32": c.FA3_FLOAT32}
_DTYPE_NAMES = {code: name for name, code in _DTYPES.items()}


cdef int check(int status) except -1:
    """Turn a status into an exception."""
    if status != c.FA3_OK:
        raise_status(status, c.fa3_status_string(status).decode(), c.fa3_last_error().decode(errors="replace"),
                     c.fa3_last_cuda_error())
        return -1
    return 0


cdef void set_rows(c.fa3_array *array, ArrayView view, bint ragged):
    """(batch, row, head, dim), or (row, head, dim) of a ragged array."""
    cdef int axis
    array.data = <void *>view.data
    array.stride[0] = 0
    for axis in range(view.ndim):
        array.stride[axis + ragged] = view.c_strides[axis]
    if view.c_shape[view.ndim - 1] == 1:
        array.stride[3] = 1  # a single column has no stride of its own


cdef void set_descale(c.fa3_descale *descale, ArrayView view):
    """(), (head,) or (batch, head)."""
    cdef int axis
    if view is None:
        return
    descale.data = <const float *>view.data
    for axis in range(view.ndim):
        descale.stride[2 - view.ndim + axis] = view.c_strides[axis]


cdef inline const int32_t *integers(ArrayView view) noexcept:
    if view is None:
        return NULL
    return <const int32_t *>view.data


cdef int fill_cache(c.fa3_cache *cache, ArrayView k, dict arrays, bint rotary_interleaved) except -1:
    """The part of the struct that speaks of a key-value cache."""
    cdef ArrayView k_new = arrays.pop("k_new", None), v_new = arrays.pop("v_new", None)
    cdef ArrayView cu_seqlens_k_new = arrays.pop("cu_seqlens_k_new", None)
    cdef ArrayView pages = arrays.pop("page_table", None)
    cdef ArrayView cos = arrays.pop("rotary_cos", None), sin = arrays.pop("rotary_sin", None)
    if k_new is not None:
        set_rows(&cache.k_new, k_new, cu_seqlens_k_new is not None)
        set_rows(&cache.v_new, v_new, cu_seqlens_k_new is not None)
        cache.rows_new = <int32_t>k_new.c_shape[k_new.ndim - 3]
        cache.cu_seqlens_k_new = integers(cu_seqlens_k_new)
    if pages is not None:
        cache.page_table = integers(pages)
        cache.page_table_stride = pages.c_strides[0]
        cache.max_pages = <int32_t>pages.c_shape[1]
        cache.num_pages = <int32_t>k.c_shape[0]
        cache.page_size = <int32_t>k.c_shape[1]
    cache.cache_batch_idx = integers(arrays.pop("cache_batch_idx", None))
    cache.cache_leftpad = integers(arrays.pop("cache_leftpad", None))
    if cos is not None:
        cache.rotary_cos = <const void *>cos.data
        cache.rotary_sin = <const void *>sin.data
        cache.rotary_rows = <int32_t>cos.c_shape[0]
        cache.rotary_dim = <int32_t>(2 * cos.c_shape[1])
        cache.rotary_dtype = _DTYPES[cos.dtype]
        cache.rotary_interleaved = rotary_interleaved
        cache.rotary_seqlens = integers(arrays.pop("rotary_seqlens", None))
    return 0


cdef int fill(c.fa3_forward_params *p, ArrayView q, ArrayView k, ArrayView v, ArrayView out, ArrayView lse,
              dict arrays, int batch, int max_seqlen_q, int max_seqlen_k, double softmax_scale, bint causal,
              int window_left, int window_right, int attention_chunk, double softcap, int num_splits,
              bint batch_invariant, object pack_gqa, int sm_margin, bint rotary_interleaved, int device) except -1:
    """The struct, in the header's order."""
    cdef ArrayView cu_seqlens_q = arrays.pop("cu_seqlens_q", None), cu_seqlens_k = arrays.pop("cu_seqlens_k", None)
    cdef ArrayView qv = arrays.pop("qv", None), sinks = arrays.pop("sinks", None)
    cdef bint ragged_q = q.ndim == 3, ragged_k = k.ndim == 3
    memset(p, 0, sizeof(c.fa3_forward_params))
    p.struct_size = sizeof(c.fa3_forward_params)
    p.device = device
    p.dtype = _DTYPES[q.dtype]
    p.out_dtype = _DTYPES[out.dtype]
    p.batch = batch
    p.num_heads = <int32_t>q.c_shape[q.ndim - 2]
    p.num_heads_kv = <int32_t>k.c_shape[k.ndim - 2]
    p.head_dim = <int32_t>q.c_shape[q.ndim - 1]
    p.head_dim_v = <int32_t>v.c_shape[v.ndim - 1]
    set_rows(&p.q, q, ragged_q)
    set_rows(&p.k, k, ragged_k)
    set_rows(&p.v, v, ragged_k)
    set_rows(&p.out, out, ragged_q)
    if lse is not None:  # (batch, head, row), or (head, row) of a ragged q
        p.lse.data = <void *>lse.data
        p.lse.stride[0] = 0 if ragged_q else lse.c_strides[0]
        p.lse.stride[1] = lse.c_strides[lse.ndim - 2]
        p.lse.stride[2] = lse.c_strides[lse.ndim - 1]
    if qv is not None:
        set_rows(&p.qv, qv, ragged_q)
    p.queries.rows = <int32_t>q.c_shape[0] if ragged_q else max_seqlen_q
    p.queries.max_seqlen = max_seqlen_q
    p.queries.cu_seqlens = integers(cu_seqlens_q)
    p.queries.seqused = integers(arrays.pop("seqused_q", None))
    p.keys.rows = <int32_t>k.c_shape[0] if ragged_k else max_seqlen_k
    p.keys.max_seqlen = max_seqlen_k
    p.keys.cu_seqlens = integers(cu_seqlens_k)
    p.keys.seqused = integers(arrays.pop("seqused_k", None))
    p.mask.causal = causal
    p.mask.window_left = window_left
    p.mask.window_right = window_right
    p.mask.attention_chunk = attention_chunk
    p.softmax_scale = softmax_scale
    p.softcap = softcap
    if sinks is not None:
        p.sinks = <const float *>sinks.data
    set_descale(&p.q_descale, arrays.pop("q_descale", None))
    set_descale(&p.k_descale, arrays.pop("k_descale", None))
    set_descale(&p.v_descale, arrays.pop("v_descale", None))
    fill_cache(&p.cache, k, arrays, rotary_interleaved)
    p.num_splits = num_splits
    p.batch_invariant = batch_invariant
    p.pack_gqa = -1 if pack_gqa is None else pack_gqa
    p.sm_margin = sm_margin
    if arrays:
        raise TypeError(f"unknown arrays: {', '.join(arrays)}")
    return 0


def forward(ArrayView q, ArrayView k, ArrayView v, ArrayView out, ArrayView lse, *, int batch, int max_seqlen_q,
            int max_seqlen_k, double softmax_scale, bint causal, int window_left, int window_right,
            int attention_chunk, double softcap, int num_splits, bint batch_invariant, object pack_gqa, int sm_margin,
            bint rotary_interleaved=True, uintptr_t stream, int device, object allocate, **arrays):
    """Enqueue attention on `stream`; the arguments are those of the CPU's backend, as ArrayViews.

    `allocate(nbytes)` returns an ArrayView of as much memory on the device, for the workspace.
    """
    cdef c.fa3_forward_params params
    cdef size_t nbytes = 0
    cdef ArrayView workspace = None
    cdef void *workspace_data = NULL
    cdef int status
    fill(&params, q, k, v, out, lse, arrays, batch, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_left,
         window_right, attention_chunk, softcap, num_splits, batch_invariant, pack_gqa, sm_margin, rotary_interleaved,
         device)
    check(c.fa3_forward_workspace(&params, &nbytes))
    if nbytes:
        workspace = allocate(nbytes)
        workspace_data = <void *>workspace.data
    with nogil:
        status = c.fa3_forward(&params, workspace_data, <void *>stream)
    check(status)


def combine(ArrayView out_partial, ArrayView lse_partial, ArrayView out, ArrayView lse, *, uintptr_t stream,
            int device):
    """Join partial results: not built for the GPU yet."""
    raise_status(-13, "", "flash_attn_combine: is not built for the GPU yet; it works on CPU arrays")


def plan(*, str dtype, int batch, int seqlen_q, int seqlen_k, int num_heads, int num_heads_kv, int head_dim,
         int head_dim_v, bint causal=False, int window_left=-1, int window_right=-1, int attention_chunk=0,
         bint ragged=False, int max_seqlen_q=0, int max_seqlen_k=0, tuple q_strides=None, tuple k_strides=None,
         tuple v_strides=None, uintptr_t address=4096, int sm_margin=0, int num_sms=132):
    """What a forward call of these sizes would do, as a dict: see fa3_forward_plan in fa3.h. Needs no GPU.

    For a ragged batch, seqlen_q and seqlen_k are the totals. Strides are (batch, row, head) in elements; None:
    contiguous.
    """
    cdef c.fa3_forward_params p
    cdef c.fa3_forward_plan result
    cdef int32_t placeholder = 0
    memset(&p, 0, sizeof(p))
    p.struct_size = sizeof(p)
    p.dtype = p.out_dtype = _DTYPES[dtype]
    p.batch, p.num_heads, p.num_heads_kv = batch, num_heads, num_heads_kv
    p.head_dim, p.head_dim_v = head_dim, head_dim_v
    set_strides(&p.q, q_strides, seqlen_q, num_heads, head_dim, address)
    set_strides(&p.k, k_strides, seqlen_k, num_heads_kv, head_dim, address)
    set_strides(&p.v, v_strides, seqlen_k, num_heads_kv, head_dim_v, address)
    set_strides(&p.out, None, seqlen_q, num_heads, head_dim_v, address)
    p.queries.rows, p.keys.rows = seqlen_q, seqlen_k
    if ragged:
        p.queries.cu_seqlens = p.keys.cu_seqlens = &placeholder  # only asked for being there
        p.queries.max_seqlen, p.keys.max_seqlen = max_seqlen_q, max_seqlen_k
    p.mask.causal, p.mask.attention_chunk = causal, attention_chunk
    p.mask.window_left, p.mask.window_right = window_left, window_right
    p.softmax_scale = 1
    p.sm_margin = sm_margin
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


def variants():
    """The compiled forward kernels: a dict each, in the order that plan()["variant"] counts."""
    cdef c.fa3_variant variant
    found = []
    while c.fa3_forward_variant(<int32_t>len(found), &variant) == c.FA3_OK:
        found.append({
            "name": variant.name.decode(), "dtype": _DTYPE_NAMES[variant.dtype], "head_dim": variant.head_dim,
            "head_dim_v": variant.head_dim_v, "tile_m": variant.tile_m, "tile_n": variant.tile_n,
            "threads": variant.threads, "shared_memory": variant.shared_memory,
            "blocks_per_sm": variant.blocks_per_sm})
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
