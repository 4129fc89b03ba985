# cython: language_level=3, boundscheck=False, wraparound=False
"""The public functions behind their signatures: arguments in, filled results out, in one crossing into C.

Each looks at q, k and v, then at everything else, makes the result, and calls a backend: the last checks come before
the first write.
"""
from libc.stdint cimport int64_t

from fa3 cimport _checks as check
from fa3 cimport _core
from fa3._array cimport Border, Output, border_of
from fa3._dlpack cimport DL_CPU, DL_CUDA
from fa3._problem cimport Problem
from fa3._view cimport ArrayView

from fa3 import _dtypes

cdef str FP8 = _dtypes.FP8
cdef tuple FP8_RESULTS = ("bfloat16", "float16")
cdef tuple FLOAT32 = ("float32",)
cdef tuple INT32 = ("int32",)
cdef int64_t METADATA = 16  # elements: any number does, but it is promised
cdef tuple COMBINED = ("float32", *_dtypes.HALF)
cdef tuple QUANTIZED = (*_dtypes.HALF, "float32")
cdef tuple GRANULARITIES = ("tensor", "head", "batch_head")  # by the axes of their descale
cdef tuple WITH_GRADIENTS = (*_dtypes.HALF, "float32", "float64")  # a GPU has the first two


cdef Problem problem_of(q, k, v, str k_name, str v_name, stream, dtype, bint written):
    cdef Problem problem = Problem.__new__(Problem)
    problem.begin(q, k, v, k_name, v_name, stream, dtype, written)
    return problem


def dense(
    q, k, v,
    softmax_scale, causal, window_size, attention_chunk, softcap, sinks,
    qv, q_descale, k_descale, v_descale, seqused_q, seqused_k,
    num_splits, batch_invariant, pack_gqa, sm_margin, fp8_accumulate, dropout_p, dropout_seed,
    return_lse, out, out_dtype, stream, dtype,
):
    """`fa3.flash_attn_func`."""
    cdef Problem problem = problem_of(q, k, v, "k", "v", stream, dtype, False)
    problem.dense_q()
    problem.dense_k()
    problem.extend(qv, q_descale, k_descale, v_descale, sinks, seqused_q, seqused_k)
    problem.settle(softmax_scale, causal, window_size, attention_chunk, softcap, num_splits, batch_invariant, pack_gqa,
                   sm_margin, fp8_accumulate)
    problem.drop(dropout_p, dropout_seed)
    return forward(problem, out, out_dtype, return_lse)


def varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    page_table,
    softmax_scale, causal, window_size, attention_chunk, softcap, sinks,
    qv, q_descale, k_descale, v_descale, seqused_q, seqused_k,
    num_splits, batch_invariant, pack_gqa, sm_margin, fp8_accumulate, dropout_p, dropout_seed,
    return_lse, out, out_dtype, stream, dtype,
):
    """`fa3.flash_attn_varlen_func`."""
    cdef Problem problem = problem_of(q, k, v, "k", "v", stream, dtype, False)
    problem.ragged_q(cu_seqlens_q, max_seqlen_q)
    if page_table is not None:
        problem.paged_k(page_table, max_seqlen_k)
    elif cu_seqlens_k is None:
        raise ValueError("cu_seqlens_k: got None, needs int32 (batch + 1,), or a page_table")
    else:
        problem.ragged_k(max_seqlen_k)
    problem.cumulative_k(cu_seqlens_k)
    problem.extend(qv, q_descale, k_descale, v_descale, sinks, seqused_q, seqused_k)
    problem.settle(softmax_scale, causal, window_size, attention_chunk, softcap, num_splits, batch_invariant, pack_gqa,
                   sm_margin, fp8_accumulate)
    problem.drop(dropout_p, dropout_seed)
    return forward(problem, out, out_dtype, return_lse)


def kvcache(
    q, k_cache, v_cache,
    k, v, rotary_cos, rotary_sin, rotary_interleaved, rotary_seqlens,
    cache_seqlens, cache_batch_idx, cache_leftpad, page_table,
    cu_seqlens_q, cu_seqlens_k_new, max_seqlen_q, scheduler_metadata,
    softmax_scale, causal, window_size, attention_chunk, softcap, sinks,
    qv, q_descale, k_descale, v_descale, seqused_q,
    num_splits, batch_invariant, pack_gqa, sm_margin, fp8_accumulate,
    return_lse, out, out_dtype, stream, dtype,
):
    """`fa3.flash_attn_with_kvcache`."""
    cdef Problem problem = problem_of(q, k_cache, v_cache, "k_cache", "v_cache", stream, dtype, k is not None)
    if cu_seqlens_q is None:
        problem.dense_q()
    else:
        problem.ragged_q(cu_seqlens_q, max_seqlen_q)
    if page_table is None:
        problem.dense_k(cache_batch_idx is not None)
    else:
        check.without(page_table, "page_table", cache_batch_idx, "cache_batch_idx")
        problem.paged_k(page_table)
    check.together(k, "k", v, "v")
    check.together(rotary_cos, "rotary_cos", rotary_sin, "rotary_sin")
    check.needs(k, "k", cache_seqlens, "cache_seqlens")
    check.needs(cu_seqlens_k_new, "cu_seqlens_k_new", k, "k")
    check.needs(rotary_cos, "rotary_cos", k, "k")
    check.needs(rotary_seqlens, "rotary_seqlens", rotary_cos, "rotary_cos")
    if scheduler_metadata is not None:
        take_metadata(problem.border, scheduler_metadata)
    problem.append(cu_seqlens_k_new, k, v)
    problem.use_cache(cache_seqlens, cache_batch_idx, cache_leftpad)
    problem.rotate(rotary_cos, rotary_sin, rotary_seqlens)
    problem.extend(qv, q_descale, k_descale, v_descale, sinks, seqused_q)
    problem.settle(softmax_scale, causal, window_size, attention_chunk, softcap, num_splits, batch_invariant, pack_gqa,
                   sm_margin, fp8_accumulate)
    problem.options.rotary_interleaved = check.flag(rotary_interleaved, "rotary_interleaved")
    return forward(problem, out, out_dtype, return_lse)


cdef forward(Problem problem, out, out_dtype, return_lse):
    """Make the result and let a backend fill it."""
    cdef bint with_lse = check.flag(return_lse, "return_lse")
    cdef int64_t[check.MAX_NDIM] shape
    cdef Border border = problem.border
    cdef Output result, lse = None
    cdef ArrayView lse_view = None
    cdef tuple results = (problem.q.dtype,)
    if problem.q.dtype == FP8:
        results = FP8_RESULTS
    elif problem.narrows:  # q's own first
        results = FP8_RESULTS if problem.q.dtype == FP8_RESULTS[0] else FP8_RESULTS[::-1]
    problem.finish()
    result = result_of(border, out, "out", out_dtype, problem.out_shape(shape), shape, "the result's shape", results)
    if out is not None:
        check.apart(result.view, "out", problem.q, "q")
        check.apart(result.view, "out", problem.k, problem.k_name)
        check.apart(result.view, "out", problem.v, problem.v_name)
        check.apart(result.view, "out", problem.qv, "qv")
        check.apart(result.view, "out", problem.k_new, "k")
        check.apart(result.view, "out", problem.v_new, "v")
    if with_lse:
        lse = border.make(problem.lse_shape(shape), shape, "float32")
        lse_view = lse.view
    if problem.on_gpu and check.empty(result.view) and problem.k_new is None:  # nothing to compute, or to append
        return (result.array(), lse.array()) if with_lse else result.array()  # the CPU still looks at lengths
    if problem.narrows:
        narrow(problem)
    if problem.on_gpu:
        _core.forward(problem, result.view, lse_view)
    else:
        from fa3 import _numpy  # costs its import to those only who use it

        _numpy.forward(problem.q.numpy(), problem.k.numpy(), problem.v.numpy(), result.view.numpy(),
                       None if lse is None else lse.view.numpy(), batch=problem.batch,
                       max_seqlen_q=problem.max_seqlen_q, max_seqlen_k=problem.max_seqlen_k,
                       seqused_k_name="cache_seqlens" if problem.k_name == "k_cache" else "seqused_k",
                       **problem.arrays(), **<dict>problem.options)
    return (result.array(), lse.array()) if with_lse else result.array()


cdef int narrow(Problem problem) except -1:
    """Make q fp8, with a factor for each sequence and head, as `quantize_fp8` does."""
    cdef int64_t[2] scales = [problem.batch, problem.num_heads]
    cdef Output codes = problem.border.make(problem.q.ndim, problem.q.c_shape, FP8)
    cdef Output descale = problem.border.make(2, scales, "float32")
    fill_codes(problem.border, problem.q, codes.view, descale.view, problem.cu_seqlens_q, "cu_seqlens_q", False)
    problem.q, problem.q_descale = codes.view, descale.view
    problem.narrowed = (codes, descale)
    return 0


cdef int fill_codes(Border border, ArrayView x, ArrayView codes, ArrayView descale, ArrayView ends, str ends_name,
                    bint rotated) except -1:
    """Have a backend quantise x, whose sequences begin where `ends` says, which the caller calls `ends_name`."""
    if border.device_type == DL_CUDA:
        return 0 if check.empty(descale) else _core.quantize(border, x, codes, descale, ends, rotated)
    from fa3 import _numpy_fp8

    _numpy_fp8.quantize(x.numpy(), codes.numpy(), descale.numpy(), None if ends is None else ends.numpy(), rotated,
                        ends_name)
    return 0


cdef int take_metadata(Border border, array) except -1:
    """What `scheduler_metadata` made, or something else: no value of it is ever read."""
    cdef ArrayView view = border.take(array, "scheduler_metadata")
    check.dtype(view, "scheduler_metadata", INT32)
    return check.shape(view, "scheduler_metadata", 1, &METADATA, "(16,), as of get_scheduler_metadata")


def scheduler_metadata(
    batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens,
    headdim_v, page_size, max_seqlen_k_new, causal, window_size, attention_chunk, has_softcap, num_splits,
    pack_gqa, sm_margin, stream,
):
    """`fa3.get_scheduler_metadata`."""
    cdef Border border = border_of(cache_seqlens, "cache_seqlens", stream, None)
    cdef int64_t sequences = check.integer(batch_size, "batch_size", 0)
    cdef int left, right
    check.dtype(border.view, "cache_seqlens", INT32)
    check.shape(border.view, "cache_seqlens", 1, &sequences, "(batch_size,)")
    for name, size, least in (
            ("max_seqlen_q", max_seqlen_q, 0), ("max_seqlen_k", max_seqlen_k, 0), ("num_heads_q", num_heads_q, 0),
            ("num_heads_kv", num_heads_kv, 1), ("headdim", headdim, 1), ("headdim_v", headdim_v, 1),
            ("page_size", page_size, 1), ("max_seqlen_k_new", max_seqlen_k_new, 0), ("num_splits", num_splits, 0),
            ("sm_margin", sm_margin, 0)):
        if size is not None or name not in ("headdim_v", "page_size"):
            check.integer(size, name, least)
    check.flag(causal, "causal")
    check.window(window_size, &left, &right)
    check.chunk(attention_chunk)
    check.flag(has_softcap, "has_softcap")
    if pack_gqa is not None:
        check.flag(pack_gqa, "pack_gqa")
    return border.make(1, &METADATA, "int32").array()


def combine(out_partial, lse_partial, out, out_dtype):
    """`fa3.flash_attn_combine`."""
    cdef Border border = border_of(out_partial, "out_partial", None, None)
    cdef ArrayView parts = border.view, lse_parts = border.take(lse_partial, "lse_partial")
    cdef Output result, lse
    check.dtype(parts, "out_partial", FLOAT32)
    check.ndim(parts, "out_partial", 5, "(splits, batch, seqlen_q, num_heads, head_dim_v)")
    check.dtype(lse_parts, "lse_partial", FLOAT32)
    check.shape(lse_parts, "lse_partial", 4, parts.c_shape, "(splits, batch, seqlen_q, num_heads)")
    if parts.c_shape[0] < 1:
        raise ValueError("out_partial: splits 0, needs at least 1")
    result = result_of(border, out, "out", out_dtype, 4, parts.c_shape + 1, "the result's shape", COMBINED)
    if out is not None:
        check.apart(result.view, "out", parts, "out_partial")
        check.apart(result.view, "out", lse_parts, "lse_partial")
    lse = border.make(3, parts.c_shape + 1, "float32")
    if border.device_type == DL_CPU:
        from fa3 import _numpy

        _numpy.combine(parts.numpy(), lse_parts.numpy(), result.view.numpy(), lse.view.numpy())
    else:
        check.fits(parts.c_shape[0], "out_partial", "splits")
        for axis, name in enumerate(("batch", "seqlen_q", "num_heads", "head_dim_v")):
            check.fits(parts.c_shape[axis + 1], "out_partial", name)
        _core.combine(border, parts, lse_parts, result.view, lse.view)
    return result.array(), lse.array()


def dense_backward(
    dout, q, k, v, out, lse,
    softmax_scale, causal, window_size, attention_chunk, softcap, sinks,
    dlse, seqused_q, seqused_k, sm_margin, deterministic, dropout_p, dropout_seed,
    dq, dk, dv, stream, dtype,
):
    """`fa3.flash_attn_backward`."""
    cdef Problem problem = problem_of(q, k, v, "k", "v", stream, dtype, False)
    problem.dense_q()
    problem.dense_k()
    problem.extend(None, None, None, None, sinks, seqused_q, seqused_k)
    problem.settle(softmax_scale, causal, window_size, attention_chunk, softcap, 0, False, None, sm_margin)
    problem.drop(dropout_p, dropout_seed)
    return backward(problem, dout, out, lse, dlse, deterministic, dq, dk, dv, dtype)


def varlen_backward(
    dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    softmax_scale, causal, window_size, attention_chunk, softcap, sinks,
    dlse, seqused_q, seqused_k, sm_margin, deterministic, dropout_p, dropout_seed,
    dq, dk, dv, stream, dtype,
):
    """`fa3.flash_attn_varlen_backward`."""
    cdef Problem problem = problem_of(q, k, v, "k", "v", stream, dtype, False)
    problem.ragged_q(cu_seqlens_q, max_seqlen_q)
    problem.ragged_k(max_seqlen_k)
    if cu_seqlens_k is None:
        raise ValueError("cu_seqlens_k: got None, needs int32 (batch + 1,)")
    problem.cumulative_k(cu_seqlens_k)
    problem.extend(None, None, None, None, sinks, seqused_q, seqused_k)
    problem.settle(softmax_scale, causal, window_size, attention_chunk, softcap, 0, False, None, sm_margin)
    problem.drop(dropout_p, dropout_seed)
    return backward(problem, dout, out, lse, dlse, deterministic, dq, dk, dv, dtype)


cdef backward(Problem problem, dout, out, lse, dlse, deterministic, dq, dk, dv, dtype):
    """Look at what the forward gave, make the gradients, and let a backend fill them."""
    cdef Border border = problem.border
    cdef ArrayView dout_view, out_view, lse_view, dlse_view = None
    cdef bint in_order = check.flag(deterministic, "deterministic")  # a GPU's matter: NumPy adds in one order
    cdef list gradients
    cdef Output dsinks = None
    check.dtype(problem.q, "q", WITH_GRADIENTS)
    dout_view = like_out(problem, dout, "dout", dtype)
    out_view = like_out(problem, out, "out", dtype)
    lse_view = like_lse(problem, lse, "lse")
    if dlse is not None:
        dlse_view = like_lse(problem, dlse, "dlse")
    problem.finish()
    inputs = ((problem.q, "q"), (problem.k, "k"), (problem.v, "v"), (dout_view, "dout"), (out_view, "out"),
              (lse_view, "lse"), (dlse_view, "dlse"))
    gradients = [gradient_of(border, dq, "dq", problem.q, "q", inputs),
                 gradient_of(border, dk, "dk", problem.k, "k", inputs),
                 gradient_of(border, dv, "dv", problem.v, "v", inputs)]
    apart(gradients)
    if problem.sinks is not None:
        dsinks = border.make(1, &problem.num_heads, "float32")
    if problem.on_gpu:
        _core.backward(problem, dout_view, out_view, lse_view, dlse_view, (<Output>gradients[0]).view,
                       (<Output>gradients[1]).view, (<Output>gradients[2]).view,
                       None if dsinks is None else dsinks.view, in_order)
    else:
        backward_on_cpu(problem, dout_view, out_view, lse_view, dlse_view, gradients, dsinks)
    if dsinks is not None:
        gradients.append(dsinks)
    return tuple([(<Output>gradient).array() for gradient in gradients])


cdef int backward_on_cpu(Problem problem, ArrayView dout_view, ArrayView out_view, ArrayView lse_view,
                         ArrayView dlse_view, list gradients, Output dsinks) except -1:
    from fa3 import _numpy_backward

    _numpy_backward.backward(
        dout_view.numpy(), problem.q.numpy(), problem.k.numpy(), problem.v.numpy(), out_view.numpy(), lse_view.numpy(),
        *[(<Output>gradient).view.numpy() for gradient in gradients], None if dsinks is None else dsinks.view.numpy(),
        dlse=None if dlse_view is None else dlse_view.numpy(), batch=problem.batch, max_seqlen_q=problem.max_seqlen_q,
        max_seqlen_k=problem.max_seqlen_k, softmax_scale=problem.options.softmax_scale, causal=problem.options.causal,
        window_left=problem.options.window_left, window_right=problem.options.window_right,
        attention_chunk=problem.options.attention_chunk, softcap=problem.options.softcap,
        dropout_p=problem.options.dropout_p, dropout_seed=problem.options.dropout_seed, **problem.arrays())
    return 0


cdef ArrayView like_out(Problem problem, array, str name, dtype):
    """A view of the forward's result, or of its gradient."""
    cdef int64_t[check.MAX_NDIM] shape
    cdef ArrayView view = problem.border.take(array, name, dtype)
    check.same_dtype(view, name, problem.q, "q")
    check.shape(view, name, problem.out_shape(shape), shape, "q's shape with head_dim_v")
    if problem.on_gpu:
        check.contiguous_rows(view, name)
    return view


cdef ArrayView like_lse(Problem problem, array, str name):
    """A view of the forward's lse, or of its gradient."""
    cdef int64_t[check.MAX_NDIM] shape
    cdef ArrayView view = problem.border.take(array, name)
    cdef int dims = problem.lse_shape(shape)
    check.dtype(view, name, FLOAT32)
    check.shape(view, name, dims, shape,
                "(batch, num_heads, seqlen_q)" if dims == 3 else "(num_heads, total_q)")
    return view


cdef Output gradient_of(Border border, array, str name, ArrayView of, str of_name, tuple inputs):
    """The Output for the gradient of an input: an array like it, in memory that no input has."""
    cdef Output gradient = result_of(border, array, name, None, of.ndim, of.c_shape, f"{of_name}'s shape", (of.dtype,))
    if array is not None:
        for view, input_name in inputs:
            check.apart(gradient.view, name, <ArrayView>view, <str>input_name)
    return gradient


cdef int apart(list gradients) except -1:
    """No gradient in the memory of another."""
    cdef Output dq = gradients[0], dk = gradients[1], dv = gradients[2]
    check.apart(dk.view, "dk", dq.view, "dq")
    check.apart(dv.view, "dv", dq.view, "dq")
    return check.apart(dv.view, "dv", dk.view, "dk")


cdef Output result_of(Border border, out, str name, out_dtype, int ndim, const int64_t *shape, str axes, tuple allowed):
    """The Output to write: a new array of the caller's framework, or the checked `out`, which the caller calls `name`.

    Of the dtypes of `allowed`, the first by default; `axes` says in words what the shape is.
    """
    cdef str dtype = <str>allowed[0] if out_dtype is None else _dtypes.name_of(out_dtype, "out_dtype")
    cdef Output result
    if dtype not in allowed:
        raise TypeError(f"out_dtype: {dtype}, needs {' or '.join(allowed)}")
    if out is None:
        return border.make(ndim, shape, dtype)
    result = border.wrap(out, name)
    check.dtype(result.view, name, allowed if out_dtype is None else (dtype,))
    check.shape(result.view, name, ndim, shape, axes)
    if border.device_type == DL_CUDA:
        check.contiguous_rows(result.view, name)
    check.no_overlap(result.view, name)
    return result


def quantize(x, granularity, hadamard, cu_seqlens, stream, dtype):
    """`fa3.quantize_fp8`."""
    cdef Border border = border_of(x, "x", stream, dtype)
    cdef ArrayView view = border.view, ends = None
    cdef bint on_gpu = border.device_type == DL_CUDA, rotated = check.flag(hadamard, "hadamard")
    cdef int64_t[2] scales
    cdef int shared
    cdef Output codes, descale
    check.dtype(view, "x", QUANTIZED)
    if view.ndim != 4:
        check.ndim(view, "x", 3, "(total, num_heads, head_dim), or 4: (batch, seqlen, num_heads, head_dim)")
    if not isinstance(granularity, str) or granularity not in GRANULARITIES:
        raise ValueError(f"granularity: {granularity!r}, needs one of {', '.join(map(repr, GRANULARITIES))}")
    shared = GRANULARITIES.index(granularity)  # axes of descale
    if cu_seqlens is not None:
        if view.ndim == 4 or shared != 2:
            raise ValueError("cu_seqlens: given, needs None except for granularity 'batch_head' of a ragged x")
        ends = border.take(cu_seqlens, "cu_seqlens")
        check.dtype(ends, "cu_seqlens", INT32)
        if ends.ndim != 1 or ends.c_shape[0] == 0:
            raise ValueError(f"cu_seqlens: shape {ends.shape}, needs (batch + 1,)")
    elif view.ndim == 3 and shared == 2:
        raise ValueError("cu_seqlens: got None, needs int32 (batch + 1,) for granularity 'batch_head' of a ragged x")
    if on_gpu:
        check.contiguous_rows(view, "x")
        check.quantized_head_dim(view.c_shape[view.ndim - 1])
        if ends is not None:
            check.contiguous_rows(ends, "cu_seqlens")
            check.fits(ends.c_shape[0], "cu_seqlens", "batch")
        if view.ndim == 4:
            check.fits(view.c_shape[0], "x", "batch")
        check.fits(view.c_shape[view.ndim - 3], "x", "rows")
        check.fits(view.c_shape[view.ndim - 2], "x", "num_heads")
    scales[0] = view.c_shape[0] if ends is None else ends.c_shape[0] - 1
    scales[1] = view.c_shape[view.ndim - 2]
    codes = border.make(view.ndim, view.c_shape, FP8)
    descale = border.make(shared, &scales[2 - shared], "float32")
    fill_codes(border, view, codes.view, descale.view, ends, "cu_seqlens", rotated)
    return codes.array(), descale.array()
