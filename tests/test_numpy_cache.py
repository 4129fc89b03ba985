"""The CPU backend's caches against the float64 reference: paging, append, rotary, left padding, batch index.

Also the rules on lengths, offsets and pages, which only the CPU can look at.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
import reference
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import DTYPES, masks, place

from fa3 import _numpy

seeds = st.integers(0, 2**31)
pytestmark = pytest.mark.usefixtures("tiles")


@dataclass(frozen=True)
class CacheProblem:
    """One call with a cache. Lengths are per sequence; a layout is "dense", "indexed" or "paged"."""

    cached: tuple[int, ...] = (1,)  # rows of the cache in use before the append, left padding included
    new: tuple[int, ...] | None = None
    seqlens_q: tuple[int, ...] = (1,)
    leftpad: tuple[int, ...] | None = None
    layout: str = "dense"
    page_size: int = 16
    room: int = 0  # rows of the cache that nobody uses
    num_heads_kv: int = 1
    ratio: int = 1
    head_dim: int = 32
    head_dim_v: int = 32
    dtype: str = "float16"
    varlen_q: bool = False
    varlen_new: bool = False
    rotary_dim: int = 0
    interleaved: bool = True
    rotary_seqlens: tuple[int, ...] | None = None
    placement: str = "contiguous"
    mask: tuple = ()  # items of causal, window, chunk
    num_splits: int = 0

    @property
    def total(self):
        """Rows of each sequence's cache after the append."""
        return [length + new for length, new in zip(self.cached, self.new or [0] * len(self.cached), strict=True)]


@st.composite
def cache_problems(draw):
    batch = draw(st.integers(1, 3))

    def per_sequence(strategy):
        return tuple(draw(strategy) for _ in range(batch))

    varlen_q, varlen_new = draw(st.booleans()), draw(st.booleans())
    cached = per_sequence(st.integers(0, 6) | st.sampled_from([15, 16, 17, 40, 70]))
    new = draw(st.none() | st.just(per_sequence(st.integers(0, 20))))
    if new is not None and not varlen_new:
        new = new[:1] * batch
    seqlens_q = per_sequence(st.integers(0, 3) | st.sampled_from([1, 16, 33]))
    head_dim, head_dim_v = draw(st.sampled_from([(32, 32), (16, 24), (64, 64), (40, 40)]))
    rotary_dim = draw(st.sampled_from([0, 16, head_dim // 16 * 16]))
    return CacheProblem(
        cached=cached, new=new, seqlens_q=seqlens_q if varlen_q else seqlens_q[:1] * batch,
        leftpad=draw(st.none() | st.just(tuple(draw(st.integers(0, length)) for length in cached))),
        layout=draw(st.sampled_from(["dense", "indexed", "paged"])),
        page_size=draw(st.sampled_from([16, 1, 3, 8, 64])), room=draw(st.sampled_from([0, 1, 19])),
        num_heads_kv=draw(st.integers(1, 3)), ratio=draw(st.sampled_from([1, 2, 3, 7])),
        head_dim=head_dim, head_dim_v=head_dim_v, dtype=draw(st.sampled_from(["float16", "bfloat16", "float32"])),
        varlen_q=varlen_q, varlen_new=varlen_new, rotary_dim=rotary_dim, interleaved=draw(st.booleans()),
        rotary_seqlens=draw(st.none() | st.just(per_sequence(st.integers(0, 50)))) if rotary_dim else None,
        placement=draw(st.sampled_from(["contiguous", "sliced", "transposed"])), mask=tuple(draw(masks()).items()),
        num_splits=draw(st.sampled_from([0, 1, 3])),
    )


def make(problem, seed):
    """Arrays and keywords of a call: NaN in the cache wherever no sequence has a row."""
    rng = np.random.default_rng(seed)
    p, dtype, batch = problem, DTYPES[problem.dtype], len(problem.cached)

    def normal(rows, heads, dim):
        return rng.standard_normal((rows, heads, dim)).astype(np.float32).astype(dtype)

    keywords = dict(seqused_k=np.array(p.cached, np.int32))
    capacity = max(p.total) + p.room
    if p.layout == "paged":
        max_pages = -(-capacity // p.page_size) or 1
        num_pages = batch * max_pages + 2
        pages = rng.permutation(num_pages)[:batch * max_pages].reshape(batch, max_pages).astype(np.int32)
        shape = (num_pages, p.page_size)
        table = pages.copy()
        for b, total in enumerate(p.total):  # what the table says past a sequence's end does not matter
            table[b, -(-total // p.page_size):] = rng.choice([-1, 10**6, 2**31 - 1])
        keywords["page_table"] = table
    elif p.layout == "indexed":
        shape = (batch + 2, capacity)
        keywords["cache_batch_idx"] = rng.permutation(batch + 2)[:batch].astype(np.int32)
    else:
        shape = (batch, capacity)

    def cache(dim):
        values = np.full((*shape, p.num_heads_kv, dim), np.nan, dtype)
        for b, length in enumerate(p.cached):
            rows = normal(length, p.num_heads_kv, dim)
            for j in range(p.leftpad[b] if p.leftpad else 0, length):
                if p.layout == "paged":
                    values[pages[b, j // p.page_size], j % p.page_size] = rows[j]
                else:
                    values[keywords.get("cache_batch_idx", range(batch))[b], j] = rows[j]
        return place(values, p.placement)[1]

    k, v = cache(p.head_dim), cache(p.head_dim_v)
    q_rows = [normal(length, p.num_heads_kv * p.ratio, p.head_dim) for length in p.seqlens_q]
    q = np.concatenate(q_rows) if p.varlen_q else np.stack(q_rows)
    if p.varlen_q:
        keywords["cu_seqlens_q"] = cumulated(p.seqlens_q)
    if p.leftpad is not None:
        keywords["cache_leftpad"] = np.array(p.leftpad, np.int32)
    new_k = new_v = None
    if p.new is not None:
        new_k = [normal(length, p.num_heads_kv, p.head_dim) for length in p.new]
        new_v = [normal(length, p.num_heads_kv, p.head_dim_v) for length in p.new]
        join = np.concatenate if p.varlen_new else np.stack
        keywords.update(k_new=join(new_k), v_new=join(new_v))
        if p.varlen_new:
            keywords["cu_seqlens_k_new"] = cumulated(p.new)
    if p.rotary_dim:
        angles = rng.uniform(0, 6, (150, p.rotary_dim // 2)).astype(np.float32)
        keywords.update(rotary_cos=np.cos(angles), rotary_sin=np.sin(angles), rotary_interleaved=p.interleaved)
        if p.rotary_seqlens is not None:
            keywords["rotary_seqlens"] = np.array(p.rotary_seqlens, np.int32)
    return q, k, v, q_rows, new_k, new_v, keywords


def cumulated(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def forward(q, k, v, out, lse, **keywords):
    """Call the backend with the defaults of a full, unmasked call."""
    defaults = dict(
        batch=len(q) if "cu_seqlens_q" not in keywords else len(keywords["cu_seqlens_q"]) - 1, max_seqlen_q=1000,
        max_seqlen_k=4096, softmax_scale=q.shape[-1] ** -0.5, causal=False, window_left=-1, window_right=-1,
        attention_chunk=0, softcap=0.0, num_splits=0, batch_invariant=False, pack_gqa=None, sm_margin=0,
    )
    _numpy.forward(q, k, v, out, lse, **(defaults | keywords))


@given(cache_problems(), seeds)
@example(CacheProblem(cached=(0,), new=(3,), seqlens_q=(3,), rotary_dim=16), 0)
@example(CacheProblem(cached=(5, 5), leftpad=(5, 0), seqlens_q=(2, 2)), 0)  # the first sequence sees nothing
@example(CacheProblem(cached=(17,), layout="paged", leftpad=(16,), page_size=16), 0)
def test_cache(problem, seed):
    p, batch = problem, len(problem.cached)
    q, k, v, q_rows, new_k, new_v, keywords = make(p, seed)
    k_before, v_before = k.copy(), v.copy()
    mask = dict(p.mask)
    num_heads = q.shape[-2]
    out = np.full((*q.shape[:-1], p.head_dim_v), np.nan, q.dtype)
    lse = np.full((num_heads, len(q)) if p.varlen_q else (batch, num_heads, q.shape[1]), np.nan, np.float32)
    window = mask.get("window", (-1, -1))
    forward(q, k, v, out, lse, **keywords, causal=mask.get("causal", False), window_left=window[0],
            window_right=window[1], attention_chunk=mask.get("chunk", 0), num_splits=p.num_splits)

    local = mask.get("causal") or max(window) >= 0 or mask.get("chunk", 0) > 0
    cos, sin = keywords.get("rotary_cos"), keywords.get("rotary_sin")
    where = {name: keywords.get(name) for name in ("page_table", "cache_batch_idx")}
    total = np.array(p.total)
    first_q = 0
    for b in range(batch):
        offset = p.cached[b] if p.rotary_seqlens is None else p.rotary_seqlens[b]
        queries = q_rows[b]
        if p.rotary_dim:
            at = offset + (np.arange(len(queries)) if local else np.zeros(len(queries), int))
            queries = reference.turned_queries(queries, cos, sin, at, p.interleaved)
        keys, values = (reference.sequence_rows(x, b, seqused=total, **where) for x in (k, v))
        if p.new is not None:
            turned = new_k[b].astype(np.float64)
            if p.rotary_dim:
                turned = reference.rotate(turned, cos, sin, offset + np.arange(p.new[b]), p.interleaved)
            appended = keys[p.cached[b]:].astype(np.float64)
            rounding = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-21}[p.dtype]
            np.testing.assert_allclose(appended, turned, rtol=0, atol=rounding * np.abs(turned).max(initial=0.0))
            assert np.array_equal(values[p.cached[b]:], new_v[b])
        first_key = p.leftpad[b] if p.leftpad else 0
        inputs = keys[first_key:], values[first_key:]
        exact, exact_lse = reference.attention(queries, *inputs, scale=p.head_dim**-0.5, **mask)
        naive = reference.naive(queries, *inputs, scale=p.head_dim**-0.5, **mask)
        if p.varlen_q:
            rows = slice(first_q, first_q + p.seqlens_q[b])
            got, got_lse = out[rows], lse[:, rows]
            first_q = rows.stop
        else:
            got, got_lse = out[b], lse[b]
        reference.assert_close(got, exact, naive, out.dtype)
        reference.assert_lse_close(got_lse, exact_lse, q.dtype)

    # Nothing but the new rows has changed in the caches.
    for cache, before in ((k, k_before), (v, v_before)):
        for b in range(batch):
            for j in range(p.cached[b], p.total[b]):
                at = j
                if p.layout == "paged":
                    entry, at = keywords["page_table"][b, j // p.page_size], j % p.page_size
                else:
                    entry = keywords.get("cache_batch_idx", range(batch))[b]
                before[entry, at] = cache[entry, at]
        assert cache.tobytes() == before.tobytes()


@given(st.lists(st.integers(0, 20), min_size=1, max_size=3), st.booleans(), seeds)
def test_paged_lengths_from_cu_seqlens(seqlens_k, causal, seed):
    problem = CacheProblem(cached=tuple(seqlens_k), seqlens_q=(4,) * len(seqlens_k), layout="paged", page_size=3)
    q, k, v, _, _, _, keywords = make(problem, seed)
    keywords.pop("seqused_k")
    out = np.empty(q.shape, q.dtype)
    forward(q, k, v, out, None, **keywords, cu_seqlens_k=cumulated(seqlens_k), causal=causal)
    inputs = dict(page_table=keywords["page_table"], cu_seqlens_k=cumulated(seqlens_k), causal=causal)
    exact = reference.forward(q, k, v, **inputs)
    naive = reference.forward(q, k, v, evaluate=reference.naive, **inputs)
    reference.assert_close(out, exact.out, naive.out, out.dtype)


def ints(*values):
    return np.array(values, np.int32)


VARLEN = dict(cu_seqlens_q=ints(0, 4, 8), cu_seqlens_k=ints(0, 4, 8))
PAGED = dict(page_table=ints(0, 1, 2, 3).reshape(2, 2))
NEW = dict(k_new=np.ones((2, 3, 1, 16), np.float32), v_new=np.ones((2, 3, 1, 16), np.float32))
TABLES = dict(rotary_cos=np.ones((6, 8), np.float32), rotary_sin=np.ones((6, 8), np.float32))


@pytest.mark.parametrize("q_shape, k_shape, keywords, message", [
    ((8,), (8,), VARLEN | dict(cu_seqlens_q=ints(1, 4, 8)), "cu_seqlens_q: begins with 1"),
    ((8,), (8,), VARLEN | dict(cu_seqlens_q=ints(0, 5, 4)), "cu_seqlens_q: falls from 5 to 4 at entry 2"),
    ((8,), (8,), VARLEN | dict(cu_seqlens_q=ints(0, 4, 9)), "cu_seqlens_q: ends with 9, but the array has 8"),
    ((8,), (8,), VARLEN | dict(cu_seqlens_k=ints(-1, 4, 8)), "cu_seqlens_k: begins with -1"),
    ((8,), (8,), VARLEN | dict(cu_seqlens_k=ints(0, -1, 8)), "cu_seqlens_k: falls from 0 to -1 at entry 1"),
    ((8,), (8,), VARLEN | dict(cu_seqlens_k=ints(0, 4, 9)), "cu_seqlens_k: ends with 9, but the array has 8"),
    ((8,), (8,), VARLEN | dict(max_seqlen_q=3), "max_seqlen_q: 3, but sequence 0 has 4"),
    ((8,), (8,), VARLEN | dict(max_seqlen_k=3), "max_seqlen_k: 3, but sequence 0 has 4"),
    ((8,), (8,), VARLEN | dict(seqused_q=ints(4, 5)), "seqused_q: 5 for sequence 1"),
    ((8,), (8,), VARLEN | dict(seqused_k=ints(-1, 4)), "seqused_k: -1 for sequence 0"),
    ((2, 4), (2, 4), dict(seqused_q=ints(5, 4)), "seqused_q: 5 for sequence 0"),
    ((2, 4), (2, 4), dict(seqused_k=ints(4, 5)), "seqused_k: 5 for sequence 1"),
    ((2, 4), (4, 4), PAGED | dict(seqused_k=ints(4, 9)), "seqused_k: 9 for sequence 1"),
    ((2, 4), (3, 4), PAGED | dict(seqused_k=ints(4, 5)), r"page_table: page 3 at \[1, 1\], but there are 3"),
    ((2, 4), (3, 4), dict(page_table=ints(0, 1, -1, 2).reshape(2, 2)), r"page_table: page -1 at \[1, 0\]"),
    ((2, 4), (3, 4), PAGED | dict(seqused_k=ints(4, 4), **NEW), r"page_table: page 3 at \[1, 1\]"),
    ((2, 4), (4, 4), PAGED | dict(cu_seqlens_k=ints(0, 9, 10)), "cu_seqlens_k: 9 for sequence 0"),
    ((2, 4), (4, 4), PAGED | dict(cache_batch_idx=ints(0, 1)), "cache_batch_idx: given with page_table"),
    ((2, 4), (3, 4), dict(cache_batch_idx=ints(0, 3)), "cache_batch_idx: 3 for sequence 1"),
    ((2, 4), (3, 4), dict(cache_batch_idx=ints(-1, 0)), "cache_batch_idx: -1 for sequence 0"),
    ((2, 4), (2, 8), dict(cache_leftpad=ints(0, 4), seqused_k=ints(8, 3)), "cache_leftpad: 4 for sequence 1"),
    ((2, 4), (2, 8), dict(cache_leftpad=ints(-1, 4)), "cache_leftpad: -1 for sequence 0"),
    ((2, 4), (2, 8), dict(seqused_k=ints(5, 6), **NEW), "seqused_k: sequence 1 has 6 keys and gets 3, but has"),
    ((2, 4), (2, 8), NEW, "seqused_k: sequence 0 has 8 keys and gets 3, but has"),
    ((2, 4), (2, 2), dict(seqused_k=ints(0, 0), seqused_k_name="cache_seqlens", **NEW), "k: 3 rows for sequence 0"),
    ((2, 4), (2, 8), dict(seqused_k=ints(0, 9), seqused_k_name="cache_seqlens"), "cache_seqlens: 9 for sequence 1"),
    ((2, 4), (4, 4), PAGED | dict(seqused_k=ints(4, 5), max_seqlen_k=4), "max_seqlen_k: 4, but sequence 1 has 5"),
    ((2, 4), (4, 4), PAGED | dict(max_seqlen_k=7), "max_seqlen_k: 7, but sequence 0 has 8"),
    ((2, 4), (2, 8), dict(k_new=np.ones((5, 1, 16)), v_new=np.ones((5, 1, 16)), seqused_k=ints(0, 0),
                          cu_seqlens_k_new=ints(0, 3, 6)), "cu_seqlens_k_new: ends with 6"),
    ((2, 2), (2, 8), dict(seqused_k=ints(4, 3), **NEW, **TABLES), "rotary_cos: 6 positions, but sequence 0 needs 7"),
    ((2, 4), (2, 8), dict(seqused_k=ints(2, 3), **TABLES, causal=True), "rotary_cos: .* sequence 1 needs 7"),
    ((2, 4), (2, 8), dict(rotary_seqlens=ints(0, -1), **TABLES), "rotary_seqlens: -1 for sequence 1"),
])
def test_what_does_not_fit_is_refused_before_the_first_write(q_shape, k_shape, keywords, message):
    q = np.ones((*q_shape, 1, 16), np.float32)
    k, v, out = np.ones((*k_shape, 1, 16), np.float32), np.ones((*k_shape, 1, 16), np.float32), np.full_like(q, 7)
    lse = np.full((1, 8) if len(q_shape) == 1 else (2, 1, 4), 7, np.float32)
    with pytest.raises(ValueError, match=message):
        forward(q, k, v, out, lse, **keywords)
    assert (out == 7).all() and (lse == 7).all() and (k == 1).all() and (v == 1).all()


def test_rotary_positions_of_queries_that_see_all_keys_are_one():
    """Without a mask all queries stand at cache_seqlens: six positions are enough for eight queries at 5."""
    q, cache = np.ones((1, 8, 1, 16), np.float32), np.ones((1, 8, 1, 16), np.float32)
    out = np.empty_like(q)
    forward(q, cache, cache.copy(), out, None, seqused_k=ints(5), **TABLES)
    assert np.array_equal(out, np.ones_like(out))


@pytest.mark.parametrize("interleaved", [True, False])
def test_fp8_pairs_that_rotary_turns_past_the_largest_number(interleaved):
    """448 and 448 turned by 45 degrees are 0 and 634, which e4m3 does not have: ±448, and NaN stays NaN."""
    fp8, half = ml_dtypes.float8_e4m3fn, np.sqrt(np.float32(0.5))
    q, new = np.full((1, 1, 1, 16), 448, fp8), np.full((1, 1, 1, 16), -448, fp8)
    new[..., 0] = np.nan
    k, v = np.zeros((1, 2, 1, 16), fp8), np.zeros((1, 2, 1, 16), fp8)
    v[0, 1] = 2
    out, lse = np.empty((1, 1, 1, 16), ml_dtypes.bfloat16), np.empty((1, 1, 1), np.float32)
    tables = dict(rotary_cos=np.full((2, 8), half), rotary_sin=np.full((2, 8), half), rotary_interleaved=interleaved)
    forward(q, k, v, out, lse, seqused_k=ints(1), k_new=new, v_new=v[:, :1].copy(), **tables)
    turned = np.tile([0.0, -448], 8) if interleaved else np.repeat([0.0, -448], 8)
    turned[[0, 1 if interleaved else 8]] = np.nan
    assert np.array_equal(k[0, 1, 0].astype(float), turned, equal_nan=True) and not k[0, 0].any()

    new[..., 0] = -448
    forward(q, k, v, out, lse, seqused_k=ints(1), k_new=new, v_new=v[:, :1].copy(), **tables)
    assert np.isfinite(out.astype(float)).all()  # the first key has a score of 0, the second of -8 * 448² / 4
    assert np.isclose(lse, 0, atol=1e-5)


@pytest.mark.parametrize("num_splits", [1, 4])
def test_decode_over_many_pages(num_splits):
    problem = CacheProblem(cached=(2048, 1000), seqlens_q=(1, 1), layout="paged", page_size=16, num_heads_kv=2, ratio=8)
    q, k, v, _, _, _, keywords = make(problem, 0)
    out = np.empty(q.shape, q.dtype)
    forward(q, k, v, out, None, **keywords, causal=True, num_splits=num_splits)
    exact = reference.forward(q, k, v, **keywords, causal=True)
    naive = reference.forward(q, k, v, evaluate=reference.naive, **keywords, causal=True)
    reference.assert_close(out, exact.out, naive.out, out.dtype)
