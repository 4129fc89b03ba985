"""From checked arguments to a filled result: settle the options, make out and lse, and call a backend."""

from fa3 import _checks as check
from fa3 import _core
from fa3._dtypes import name_of


def options(problem, softmax_scale, causal, window_size, attention_chunk, softcap, num_splits,
            batch_invariant, pack_gqa, sm_margin):
    """Check the options that are numbers, and settle their defaults; returns the backends' keywords."""
    if softmax_scale is None:
        depth = problem.head_dim + (problem.head_dim_v if "qv" in problem.arrays else 0)
        softmax_scale = depth ** -0.5
    else:
        softmax_scale = check.number(softmax_scale, "softmax_scale")
    causal = check.flag(causal, "causal")
    left, right = check.window(window_size)
    softcap = check.number(softcap, "softcap")
    if softcap < 0:
        raise ValueError(f"softcap: {softcap}, needs at least 0")
    return {
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_left": left,
        "window_right": 0 if causal else right,
        "attention_chunk": check.chunk(attention_chunk),
        "softcap": softcap,
        "num_splits": min(check.integer(num_splits, "num_splits", 0), max(problem.max_seqlen_k, 1)),
        "batch_invariant": check.flag(batch_invariant, "batch_invariant"),
        "pack_gqa": None if pack_gqa is None else check.flag(pack_gqa, "pack_gqa"),
        "sm_margin": check.integer(sm_margin, "sm_margin", 0),
    }


def forward(border, problem, settled, out, out_dtype, return_lse):
    """Make the result and let a backend fill it: the last checks, and the first writes."""
    return_lse = check.flag(return_lse, "return_lse")
    problem.finish()
    q, k, v, arrays = problem.q, problem.k, problem.v, problem.arrays
    allowed = ("bfloat16", "float16") if q.dtype == check.FP8 else (q.dtype,)
    result = _result(border, out, out_dtype, problem.out_shape, allowed, allowed[0],
                     ((q, "q"), (k, problem.k_name), (v, problem.v_name)))
    lse = border.empty(problem.lse_shape, "float32") if return_lse else None
    sizes = {"batch": problem.batch, "max_seqlen_q": problem.max_seqlen_q,
             "max_seqlen_k": problem.max_seqlen_k}
    if 0 in result.view.shape and "k_new" not in arrays:
        pass  # nothing to compute, and nothing to append
    elif border.device_type == check.CPU:
        from fa3 import _numpy  # costs its import to those only who use it

        _numpy.forward(q.numpy(), k.numpy(), v.numpy(), result.view.numpy(), lse and lse.view.numpy(),
                       **{name: view.numpy() for name, view in arrays.items()}, **sizes, **settled)
    else:
        _core.forward(q, k, v, result.view, lse and lse.view, **arrays, **sizes, **settled,
                      stream=border.stream, device=border.device_id,
                      allocate=lambda nbytes: border.empty((nbytes,), "uint8").view)
    return (result.array(), lse.array()) if return_lse else result.array()


def combine(border, lse_partial, out, out_dtype):
    """Check the parts of `flash_attn_combine` and have a backend join them."""
    parts, lse_parts = border.view, border.take(lse_partial, "lse_partial")
    check.dtype(parts, "out_partial", ("float32",))
    check.ndim(parts, "out_partial", 5, "(splits, batch, seqlen_q, num_heads, head_dim_v)")
    check.dtype(lse_parts, "lse_partial", ("float32",))
    check.shape(lse_parts, "lse_partial", parts.shape[:-1], "(splits, batch, seqlen_q, num_heads)")
    if parts.shape[0] < 1:
        raise ValueError("out_partial: splits 0, needs at least 1")
    result = _result(border, out, out_dtype, parts.shape[1:], ("float32", *check.HALF), "float32",
                     ((parts, "out_partial"), (lse_parts, "lse_partial")))
    lse = border.empty(lse_parts.shape[1:], "float32")
    if border.device_type == check.CPU:
        from fa3 import _numpy

        _numpy.combine(parts.numpy(), lse_parts.numpy(), result.view.numpy(), lse.view.numpy())
    else:
        _core.combine(parts, lse_parts, result.view, lse.view, stream=border.stream, device=border.device_id)
    return result.array(), lse.array()


def _result(border, out, out_dtype, shape, allowed, default, inputs):
    """The Output to write: a new array of the caller's framework, or the checked `out`."""
    dtype = default if out_dtype is None else name_of(out_dtype)
    if dtype not in allowed:
        raise TypeError(f"out_dtype: {dtype}, needs {' or '.join(allowed)}")
    if out is None:
        return border.empty(shape, dtype)
    result = border.wrap(out, "out")
    view = result.view
    check.dtype(view, "out", (dtype,) if out_dtype is not None else allowed)
    check.shape(view, "out", shape, "the result's shape")
    if border.device_type == check.CUDA:
        check.contiguous_rows(view, "out")
    check.no_overlap(view, "out")
    check.not_input(view, "out", inputs)
    return result
