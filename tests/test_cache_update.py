"""Calls that append to a cache, turn, pad, pick entries and pages, on every backend: attention against the float64
reference, the cache against the CPU's rules bit for bit."""

import dataclasses

import frameworks
import numpy as np
import pytest
import reference
from hypothesis import example, given
from hypothesis import strategies as st
from test_prepare_kernel import Call, Case, as_the_cpu, cases, same

import fa3

every_backend = pytest.mark.parametrize("framework", frameworks.BACKENDS)


def pose(framework, call, leftpad, **options):
    """(out, lse, the cache's keys and values afterwards) as NumPy arrays."""
    c = call.case
    buffers = {id(array): buffer for array, buffer in call.kept}

    def put(array):
        return framework.put(array, buffers[id(array)])[0]

    for name in ("cu_seqlens_q", "cu_seqlens_k_new", "seqused_q", "cache_batch_idx", "page_table",
                 "rotary_seqlens"):
        if name in call.integers:
            options[name] = framework.put(call.integers[name])[0]
    if c.new is not None:
        options |= {"k": put(call.k_new), "v": put(call.v_new)}
    if call.cos is not None:
        options |= {"rotary_cos": put(call.cos), "rotary_sin": put(call.sin), "rotary_interleaved": c.interleaved}
    if leftpad is not None:
        options["cache_leftpad"] = framework.put(np.array(leftpad, np.int32))[0]
    k, v = put(call.k), put(call.v)
    cached = c.cached[0] if c.one_length else framework.put(call.integers["seqused_k"])[0]
    out, lse = fa3.flash_attn_with_kvcache(put(call.q), k, v, cache_seqlens=cached, causal=c.causal, return_lse=True,
                                           **options)
    return tuple(framework.numpy(array) for array in (out, lse, k, v))


@every_backend
@given(cases(longest=300, page_sizes=(16, 64, 8, 1, 3, 4, 24)), st.booleans(), st.sampled_from([0, 1, 3]), st.data())
@example(Case(cached=(200, 3), new=(1, 1), seqlens_q=(1, 1), ratio=3, rotary_dim=64, causal=True), False, 0, None)
@example(Case(cached=(70,), new=(0,), one_length=True, room=5), False, 0, None)
@example(Case(cached=(90, 3), new=(4, 4), seqlens_q=(4, 4), ratio=3, dtype="float8_e4m3fn"), False, 3, None)
def test_update(framework, case, padded, num_splits, data):
    if case.new is None:  # rotary asks for new keys
        case = dataclasses.replace(case, rotary_dim=0, rotary_seqlens=None)
    call = Call(case, 0)
    batch, c = case.batch, case
    leftpad = [data.draw(st.integers(0, length)) for length in c.cached] if padded else None
    k, v, _, _ = as_the_cpu(call)
    out, lse, k_after, v_after = pose(framework, call, leftpad, num_splits=num_splits)
    assert same(k_after, k) and same(v_after, v)
    ends = np.concatenate([[0], np.cumsum(c.seqlens_q)])
    for b in range(batch):
        used = int(call.integers["seqused_q"][b]) if c.uses_q else c.seqlens_q[b]
        rows = slice(ends[b], ends[b] + used) if c.varlen_q else (b, slice(used))
        queries = call.q[rows]
        if c.rotary_dim:
            first = c.cached[b] if c.rotary_seqlens is None else c.rotary_seqlens[b]
            at = first + (np.arange(used) if c.causal else np.zeros(used, int))
            queries = reference.turned_queries(queries, call.cos, call.sin, at, c.interleaved)
        keys, values = (
            reference.sequence_rows(x, b, seqused=[n + m for n, m in zip(c.cached, c.new_rows, strict=True)],
                                    cache_leftpad=leftpad,
                                    **{name: call.integers.get(name) for name in ("page_table", "cache_batch_idx")})
            for x in (k, v))
        options = {"scale": c.head_dim**-0.5, "causal": c.causal}
        exact, exact_lse = reference.attention(queries, keys, values, **options)
        naive = reference.naive(queries, keys, values, **options)
        got_lse = lse[:, ends[b]:ends[b] + used] if c.varlen_q else lse[b, :, :used]
        slack = 0.0
        if c.dtype == "float8_e4m3fn":
            slack = reference.fp8_score_error(queries, keys, values, **options)[..., 0].T
        reference.assert_close(out[rows], exact, naive, out.dtype)
        reference.assert_lse_close(got_lse, exact_lse, call.dtype, slack)


@every_backend
def test_new_keys_without_queries(framework):
    call = Call(Case(cached=(5, 9), new=(3, 3), seqlens_q=(0, 0), rotary_dim=32), 0)
    k, v, _, _ = as_the_cpu(call)
    out, _, k_after, v_after = pose(framework, call, None)
    assert out.shape == (2, 0, 1, 64) and same(k_after, k) and same(v_after, v)
