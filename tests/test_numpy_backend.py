"""The CPU backend against the float64 reference, called directly: every option, every edge."""

from dataclasses import replace

import numpy as np
import pytest
import reference
import strategies
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import DTYPES, Problem, make

from fa3 import _numpy

ALL_DTYPES = ("float16", "bfloat16", "float8_e4m3fn", "float32", "float64")
ANY_HEAD_DIMS = (*strategies.HEAD_DIMS, (1, 1), (5, 3), (64, 100))
seeds = st.integers(0, 2**31)
pytestmark = pytest.mark.usefixtures("tiles")


def run(problem, arrays, **options):
    """Call the backend on a problem's arrays; `options` override or add keywords."""
    p = problem
    keywords = dict(
        **arrays.lengths, sinks=arrays.sinks, batch=p.batch, max_seqlen_q=arrays.max_seqlen_q,
        max_seqlen_k=arrays.max_seqlen_k, softmax_scale=p.scale, causal=p.causal, window_left=p.window[0],
        window_right=p.window[1], attention_chunk=p.chunk, softcap=p.softcap, num_splits=0, batch_invariant=False,
        pack_gqa=None, sm_margin=0,
    )
    _numpy.forward(arrays.q, arrays.k, arrays.v, arrays.out, arrays.lse, **(keywords | options))


def check(problem, arrays, **options):
    """Compare out and lse with the reference in the rows in use, and say which those are."""
    inputs = arrays.q, arrays.k, arrays.v
    keywords = dict(sinks=arrays.sinks, **problem.formula, **(arrays.lengths | options))
    exact = reference.forward(*inputs, **keywords)
    naive = reference.forward(*inputs, evaluate=reference.naive, **keywords)
    used = exact.used
    reference.assert_close(arrays.out[used], exact.out[used], naive.out[used], arrays.out.dtype)
    lse, exact_lse = (np.moveaxis(x, -2, -1)[used] for x in (arrays.lse, exact.lse))
    reference.assert_lse_close(lse, exact_lse, arrays.q.dtype)
    return used


@given(strategies.problems(dtypes=ALL_DTYPES, head_dims=ANY_HEAD_DIMS), seeds)
@example(Problem(seqlens_q=(5,), seqlens_k=(3,), causal=True), 0)  # the first two queries see nothing
@example(Problem(seqlens_q=(5, 0, 2), seqlens_k=(0, 4, 2), varlen=True, sinks=True), 0)
@example(Problem(seqlens_q=(), seqlens_k=()), 0)
@example(Problem(seqlens_q=(), seqlens_k=(), varlen=True), 0)
@example(Problem(seqlens_q=(9,), seqlens_k=(9,), window=(2**62, 2**62), chunk=2**62), 0)
def test_forward(problem, seed):
    arrays = make(problem, seed)
    run(problem, arrays)
    arrays.assert_only_written(check(problem, arrays))


@given(strategies.problems(dtypes=("float16", "float32")), st.sampled_from([1, 2, 3, 7, 40]), seeds)
def test_splits_give_the_same_result(problem, num_splits, seed):
    arrays = make(problem, seed)
    run(problem, arrays, num_splits=num_splits)
    arrays.assert_only_written(check(problem, arrays))


@given(strategies.problems(dtypes=("bfloat16",), max_batch=2), seeds)
def test_lse_may_be_left_out(problem, seed):
    arrays, other = make(problem, seed), make(problem, seed)
    run(problem, arrays)
    other_out = other.out
    _, other.lse = other.lse, None
    run(problem, other)
    assert arrays.out.tobytes() == other_out.tobytes()


@given(strategies.problems(), st.sampled_from([0, 1, 3]), seeds)
def test_repeats_bit_for_bit(problem, num_splits, seed):
    first, second = make(problem, seed), make(problem, seed)
    run(problem, first, num_splits=num_splits)
    run(problem, second, num_splits=num_splits)
    assert first.out.tobytes() == second.out.tobytes() and first.lse.tobytes() == second.lse.tobytes()


@given(strategies.problems(max_batch=3), seeds)
def test_a_sequence_does_not_depend_on_its_batch(problem, seed):
    arrays = make(replace(problem, varlen=True, padding_q=None, padding_k=None), seed)
    whole = replace(problem, varlen=True)
    run(whole, arrays, batch_invariant=True)
    out, lse = arrays.out.copy(), arrays.lse.copy()
    for b in range(problem.batch):
        rows = slice(*arrays.cu_seqlens_q[b:b + 2])
        keys = slice(*arrays.cu_seqlens_k[b:b + 2])
        alone = replace(whole, seqlens_q=problem.seqlens_q[b:b + 1], seqlens_k=problem.seqlens_k[b:b + 1])
        own = strategies.Arrays(
            arrays.q[rows], arrays.k[keys], arrays.v[keys], arrays.out[rows], arrays.lse[:, rows], sinks=arrays.sinks,
            cu_seqlens_q=np.array([0, rows.stop - rows.start]), cu_seqlens_k=np.array([0, keys.stop - keys.start]),
            max_seqlen_q=arrays.max_seqlen_q, max_seqlen_k=arrays.max_seqlen_k,
        )
        own.out[...], own.lse[...] = np.nan, np.nan
        run(alone, own, batch_invariant=True)
    assert arrays.out.tobytes() == out.tobytes() and arrays.lse.tobytes() == lse.tobytes()


@given(strategies.problems(dtypes=("float8_e4m3fn",), ratios=(1, 3)), st.data(), seeds)
def test_descales(problem, data, seed):
    arrays = make(problem, seed)
    rng = np.random.default_rng(seed)
    heads, heads_kv, batch = problem.num_heads, problem.num_heads_kv, problem.batch
    shapes = {"q_descale": [(), (heads_kv,), (batch, heads_kv), (heads,), (batch, heads)],
              "k_descale": [(), (heads_kv,), (batch, heads_kv)], "v_descale": [(), (heads_kv,), (batch, heads_kv)]}
    descales = {}
    for name, choices in shapes.items():
        shape = data.draw(st.none() | st.sampled_from(choices), label=name)
        if shape is not None:
            stored = (1,) * len(shape) if data.draw(st.booleans(), label="stride 0") else shape
            descales[name] = np.broadcast_to(np.float32(rng.uniform(0.25, 2.0, stored)), shape)
    run(problem, arrays, **descales)
    check(problem, arrays, **descales)


@given(strategies.problems(dtypes=("float16", "bfloat16", "float32", "float8_e4m3fn")), st.booleans(), seeds)
def test_qv(problem, with_descales, seed):
    arrays = make(problem, seed)
    qv = make(replace(problem, head_dim=problem.head_dim_v), seed + 1).q
    scale = (problem.head_dim + problem.head_dim_v) ** -0.5
    descales = {}
    if with_descales:
        descales = dict(q_descale=np.float32(0.5), k_descale=np.float32(2), v_descale=np.float32(0.7))
    run(problem, arrays, qv=qv, softmax_scale=scale, **descales)
    check(replace(problem, softmax_scale=scale), arrays, qv=qv, **descales)


@given(strategies.problems(max_batch=3), seeds, st.sampled_from([3.0, 10.0]))
def test_large_scores(problem, seed, amplitude):
    problem = replace(problem, softmax_scale=None)
    arrays = make(problem, seed, amplitude)
    run(problem, arrays)
    check(problem, arrays)


@given(strategies.problems(max_batch=2), st.data(), seeds)
def test_nan_reaches_only_those_who_see_it(problem, data, seed):
    arrays = make(replace(problem, placement_q="contiguous", placement_kv="contiguous"), seed)
    for _ in range(data.draw(st.integers(1, 3))):
        array = getattr(arrays, data.draw(st.sampled_from(["q", "k", "v"])))
        if array.size:
            where = tuple(data.draw(st.integers(0, n - 1)) for n in array.shape)
            array[where] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    run(problem, arrays)
    keywords = dict(sinks=arrays.sinks, **problem.formula, **arrays.lengths)
    exact = reference.forward(arrays.q, arrays.k, arrays.v, **keywords)
    out = arrays.out[exact.used].astype(np.float64)
    assert np.array_equal(np.isfinite(out), np.isfinite(exact.out[exact.used]))


@given(st.lists(st.sampled_from([-np.inf, -90.0, -1.0, 0.0, 5.0, 90.0]), min_size=1, max_size=5), seeds)
def test_combine(means, seed):
    rng = np.random.default_rng(seed)
    splits, shape = len(means), (2, 3, 2)
    lse_partial = (rng.standard_normal((splits, *shape)) + np.reshape(means, (-1, 1, 1, 1))).astype(np.float32)
    out_partial = rng.standard_normal((splits, *shape, 8)).astype(np.float32)
    lse64, out64 = lse_partial.astype(np.float64), out_partial.astype(np.float64)
    out_partial[lse_partial == -np.inf] = np.nan  # a split that saw nothing may hold anything
    out, lse = np.full((*shape, 8), np.nan, np.float16), np.full(shape, np.nan, np.float32)
    _numpy.combine(out_partial, lse_partial, out, lse)
    with np.errstate(divide="ignore"):
        expected_lse = np.log(np.exp(lse64).sum(0))
    weights = np.exp(lse64) / np.maximum(np.exp(lse64).sum(0), 1e-300)
    expected = (weights[..., None] * out64).sum(0)
    reference.assert_close(out, expected, expected, np.float16)
    reference.assert_lse_close(lse, expected_lse)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_out_may_be_of_another_dtype(dtype):
    problem = Problem(seqlens_q=(20,), seqlens_k=(30,), dtype=dtype)
    arrays = make(problem)
    for out_dtype in ("float16", "bfloat16", "float32"):
        arrays.out = np.zeros(arrays.out.shape, DTYPES[out_dtype])
        run(problem, arrays)
        exact = reference.forward(arrays.q, arrays.k, arrays.v, **problem.formula)
        naive = reference.forward(arrays.q, arrays.k, arrays.v, evaluate=reference.naive, **problem.formula)
        reference.assert_close(arrays.out, exact.out, naive.out, arrays.out.dtype)
