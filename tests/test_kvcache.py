"""flash_attn_with_kvcache and paged keys against the float64 reference."""

import dataclasses

import frameworks
import numpy as np
import pytest
import reference
import strategies
from hypothesis import given
from hypothesis import strategies as st
from test_attention import assert_right

import fa3

every_backend = pytest.mark.parametrize("framework", frameworks.BACKENDS)


def in_pages(array, lengths, page_size, table, num_pages, placement):
    """(pages, their buffer): the rows in use of array (batch, rows, heads, dim) where the table says, else NaN."""
    pages = np.full((num_pages, page_size, *array.shape[2:]), np.nan, array.dtype)
    for b, length in enumerate(lengths):
        for j in range(length):
            pages[table[b, j // page_size], j % page_size] = array[b, j]
    buffer, view = strategies.place(pages, placement)
    return view, buffer


def put_pages(framework, data, k, v, lengths):
    """k, v and page_table in the framework. Behind its sequences' ends the table says anything."""
    page_size = data.draw(st.sampled_from([16, 64, 8, 1, 3, 4, 2, 24, 256]))
    used = [-(-length // page_size) for length in lengths]
    max_pages = max(used, default=0) + data.draw(st.integers(0, 2))
    num_pages = sum(used) + data.draw(st.integers(0, 2))
    rng = np.random.default_rng(0)
    order = rng.permutation(num_pages)
    table = rng.choice([-1, 0, 10**6, 2**31 - 1], (len(lengths), max_pages)).astype(np.int32)
    for b, count in enumerate(used):
        table[b, :count] = order[sum(used[:b]):sum(used[:b + 1])]
    placement = data.draw(st.sampled_from(["contiguous", "sliced", "transposed"]))
    arrays = [framework.put(*in_pages(x, lengths, page_size, table, num_pages, placement))[0] for x in (k, v)]
    return *arrays, framework.put(table)[0]


@every_backend
@given(data=st.data())
def test_cache_that_is_only_read(framework, data):
    problem = data.draw(strategies.problems(dtypes=framework.dtypes))
    seqlen_q, seqlen_k = (max(lengths, default=0) for lengths in (problem.seqlens_q, problem.seqlens_k))
    ragged_q, one_length, paged = (data.draw(st.booleans()) for _ in range(3))
    problem = dataclasses.replace(
        problem, varlen=False, padding_q=None, seqlens_q=(seqlen_q,) * problem.batch, padding_k=problem.padding_k or 0,
        seqlens_k=(seqlen_k,) * problem.batch if one_length else problem.seqlens_k)
    arrays = strategies.make(problem)
    q, k, v = (framework.put(getattr(arrays, name), arrays.buffers[name][0])[0] for name in ("q", "k", "v"))
    options = framework.options(q)
    if paged:
        k, v, options["page_table"] = put_pages(framework, data, arrays.k, arrays.v, problem.seqlens_k)
    if arrays.sinks is not None:
        options["sinks"] = framework.put(arrays.sinks)[0]
    options.update((name, framework.put(array)[0]) for name, array in arrays.descales.items())
    if ragged_q:
        q = framework.put(arrays.q.reshape(-1, *arrays.q.shape[2:]))[0]
        options["cu_seqlens_q"] = framework.put(np.arange(problem.batch + 1, dtype=np.int32) * seqlen_q)[0]
    out = fa3.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=seqlen_k if one_length else framework.put(arrays.seqused_k)[0],
        softmax_scale=problem.softmax_scale, causal=problem.causal, window_size=problem.window,
        attention_chunk=problem.chunk, softcap=problem.softcap, **problem.how, **options)
    assert_right(problem, arrays, framework.numpy(out).reshape(arrays.out.shape))


@dataclasses.dataclass(frozen=True)
class Append:
    """One call that appends to a cache."""

    cached: tuple[int, ...]  # rows in use before
    new: tuple[int, ...]  # rows to append
    seqlen_q: int = 3
    page_size: int = 0  # 0: no pages
    causal: bool = True
    rotary_dim: int = 0  # 0: none
    interleaved: bool = True
    ragged: bool = False
    shuffled: bool = False


@st.composite
def appends(draw):
    batch = draw(st.integers(1, 3))
    length = st.integers(0, 20)
    ragged = draw(st.booleans())
    new = draw(st.lists(st.integers(0, 5), min_size=batch, max_size=batch)) if ragged else [draw(length)] * batch
    page_size = draw(st.sampled_from([0, 0, 1, 3, 16]))
    return Append(
        cached=tuple(draw(st.lists(length, min_size=batch, max_size=batch))), new=tuple(new),
        seqlen_q=draw(st.integers(1, 5)), page_size=page_size, causal=draw(st.booleans()),
        rotary_dim=draw(st.sampled_from([0, 16, 32])), interleaved=draw(st.booleans()), ragged=ragged,
        shuffled=page_size == 0 and draw(st.booleans()))


@given(problem=appends(), seed=st.integers(0, 3))
def test_cache_that_grows(problem, seed):
    rng = np.random.default_rng(seed)
    batch, heads, heads_kv, dim, dim_v = len(problem.cached), 4, 2, 32, 24
    capacity = 48
    half = problem.rotary_dim // 2

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    q = normal(batch, problem.seqlen_q, heads, dim)
    new_rows = (sum(problem.new),) if problem.ragged else (batch, problem.new[0])
    k_new, v_new = normal(*new_rows, heads_kv, dim), normal(*new_rows, heads_kv, dim_v)
    options = {"cache_seqlens": np.array(problem.cached, np.int32)}
    starts = np.concatenate([[0], np.cumsum(problem.new)]).astype(np.int32)
    if problem.ragged:
        options["cu_seqlens_k_new"] = starts
    cos, sin = np.cos(normal(64, half)), np.sin(normal(64, half))
    if half:
        options |= {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": problem.interleaved}
    if problem.page_size:
        pages = -(-capacity // problem.page_size)
        table = rng.permutation(batch * pages).reshape(batch, pages).astype(np.int32)
        options["page_table"] = table
        k_cache, v_cache = (np.full((batch * pages + 1, problem.page_size, heads_kv, d), np.nan, np.float32)
                            for d in (dim, dim_v))
    else:
        entries = rng.permutation(batch + 2)[:batch].astype(np.int32) if problem.shuffled else np.arange(batch)
        if problem.shuffled:
            options["cache_batch_idx"] = entries
        k_cache, v_cache = (np.full((batch + 2 * problem.shuffled, capacity, heads_kv, d), np.nan, np.float32)
                            for d in (dim, dim_v))

    def row(b, j):
        """Where row j of sequence b's cache is."""
        if problem.page_size:
            return table[b, j // problem.page_size], j % problem.page_size
        return entries[b], j

    for b, cached in enumerate(problem.cached):
        for j in range(cached):
            k_cache[row(b, j)], v_cache[row(b, j)] = normal(heads_kv, dim), normal(heads_kv, dim_v)
    k_expected, v_expected = k_cache.copy(), v_cache.copy()
    q_turned = q.astype(np.float64)
    for b, (cached, new) in enumerate(zip(problem.cached, problem.new, strict=True)):
        rows = (slice(starts[b], starts[b + 1]),) if problem.ragged else (b,)
        turned = k_new[rows]
        if half:
            turned = reference.rotate(turned, cos, sin, np.arange(cached, cached + new), problem.interleaved)
            at = cached + (np.arange(problem.seqlen_q) if problem.causal else np.zeros(problem.seqlen_q, int))
            q_turned[b] = reference.rotate(q[b], cos, sin, at, problem.interleaved)
        for j in range(new):
            k_expected[row(b, cached + j)], v_expected[row(b, cached + j)] = turned[j], v_new[rows][j]

    out = fa3.flash_attn_with_kvcache(q, k_cache, v_cache, k=k_new, v=v_new, causal=problem.causal, **options)

    np.testing.assert_allclose(k_cache, k_expected, rtol=1e-5, atol=1e-5)  # NaN where nothing was appended
    np.testing.assert_array_equal(v_cache, v_expected)
    for b, (cached, new) in enumerate(zip(problem.cached, problem.new, strict=True)):
        seen = [row(b, j) for j in range(cached + new)]
        keys = np.array([k_expected[at] for at in seen]).reshape(-1, heads_kv, dim)
        values = np.array([v_expected[at] for at in seen]).reshape(-1, heads_kv, dim_v)
        np.testing.assert_allclose(
            out[b], reference.attention(q_turned[b], keys, values, causal=problem.causal)[0], rtol=1e-4, atol=1e-5)


@every_backend
@given(lengths=st.lists(st.integers(0, 40) | st.integers(0, 300), min_size=1, max_size=3),
       page_size=st.integers(1, 17) | st.sampled_from([24, 32, 64, 128]))
def test_pages_are_read_like_rows(framework, lengths, page_size):
    rng = np.random.default_rng(0)
    dtype = np.float16 if framework.on_gpu else np.float32
    batch, longest = len(lengths), max(lengths)
    pages = max(1, -(-longest // page_size))
    k, v = (rng.standard_normal((batch, pages * page_size, 2, 16)).astype(dtype) for _ in range(2))
    table = rng.permutation(batch * pages).reshape(batch, pages).astype(np.int32)
    k_pages, v_pages = (np.empty((batch * pages, page_size, 2, 16), dtype) for _ in range(2))
    for array, paged in ((k, k_pages), (v, v_pages)):
        paged[table.reshape(-1)] = array.reshape(batch * pages, page_size, 2, 16)
    q = rng.standard_normal((batch, 3, 4, 16)).astype(dtype)
    used = np.array(lengths, np.int32)
    cu_seqlens_q = np.arange(batch + 1, dtype=np.int32) * 3
    ends = np.concatenate([[0], np.cumsum(used)]).astype(np.int32)
    flat_q, q, k, v, k_pages, v_pages, used, table, cu_seqlens_q, ends = (
        framework.put(x)[0]
        for x in (q.reshape(-1, 4, 16), q, k, v, k_pages, v_pages, used, table, cu_seqlens_q, ends))
    rows = framework.numpy(fa3.flash_attn_with_kvcache(q, k, v, cache_seqlens=used, causal=True))
    tolerance = 1e-3 if framework.on_gpu else 1e-5
    for result in (
            fa3.flash_attn_with_kvcache(q, k_pages, v_pages, cache_seqlens=used, page_table=table, causal=True),
            fa3.flash_attn_varlen_func(flat_q, k_pages, v_pages, cu_seqlens_q, None, seqused_k=used,
                                       page_table=table, causal=True),
            fa3.flash_attn_varlen_func(flat_q, k_pages, v_pages, cu_seqlens_q, ends, page_table=table, causal=True)):
        np.testing.assert_allclose(framework.numpy(result).reshape(rows.shape), rows, rtol=tolerance, atol=tolerance)
