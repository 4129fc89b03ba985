"""The CPU backend's gradients against float64, called directly: every option, every edge."""

from dataclasses import replace

import numpy as np
import pytest
import reference_gradients
import strategies
from hypothesis import assume, example, given
from hypothesis import strategies as st
from strategies import Problem, make

from fa3 import _numpy, _numpy_backward

DTYPES = ("float16", "bfloat16", "float32", "float64")
HEAD_DIMS = (*strategies.HEAD_DIMS, (1, 1), (5, 3), (64, 100))
seeds = st.integers(0, 2**31)
dropouts = st.sampled_from([0.0, 0.0, 0.1, 0.5, 0.9])
pytestmark = pytest.mark.usefixtures("tiles")


class Case:
    """A problem's forward result, gradients to go back from, and poisoned arrays for those to be made."""

    def __init__(self, problem, seed=0, p_drop=0.0, with_dlse=False, amplitude=1.0):
        self.problem, self.p_drop, self.seed = problem, p_drop, seed
        self.arrays = make(problem, seed, amplitude)
        self.dout = make(replace(problem, head_dim=problem.head_dim_v), seed + 1).q
        self.dlse = np.random.default_rng(seed).standard_normal(self.arrays.lse.shape).astype(np.float32)
        self.dlse = self.dlse if with_dlse else None
        self.gradients = [self.poisoned(name) for name in ("q", "k", "v")]
        self.dsinks = np.full(problem.num_heads, np.nan, np.float32) if problem.sinks else None

    def poisoned(self, name):
        """(buffer, view): NaN in the shape and the layout of an input, which no broadcast has."""
        like = getattr(self.arrays, name)
        placement = self.problem.placement_out
        return strategies.place(np.full(like.shape, np.nan, like.dtype), placement)

    @property
    def keywords(self):
        p, arrays = self.problem, self.arrays
        return dict(
            **arrays.lengths, sinks=arrays.sinks, batch=p.batch, max_seqlen_q=arrays.max_seqlen_q,
            max_seqlen_k=arrays.max_seqlen_k, softmax_scale=p.scale, causal=p.causal, window_left=p.window[0],
            window_right=p.window[1], attention_chunk=p.chunk, softcap=p.softcap, dropout_p=self.p_drop,
            dropout_seed=self.seed)

    def forward(self):
        arrays = self.arrays
        _numpy.forward(arrays.q, arrays.k, arrays.v, arrays.out, arrays.lse, num_splits=0, batch_invariant=False,
                       pack_gqa=None, sm_margin=0, **self.keywords)

    def backward(self):
        """(dq, dk, dv, dsinks)."""
        arrays = self.arrays
        views = [view for _, view in self.gradients]
        _numpy_backward.backward(self.dout, arrays.q, arrays.k, arrays.v, arrays.out, arrays.lse, *views, self.dsinks,
                                 dlse=self.dlse, **self.keywords)
        return *views, self.dsinks

    def reference(self, **options):
        return reference_gradients.batch(
            self.dout, self.arrays.q, self.arrays.k, self.arrays.v, dlse=self.dlse, p_drop=self.p_drop, seed=self.seed,
            sinks=self.arrays.sinks, **self.problem.formula, **self.arrays.lengths, **options)

    def check(self):
        self.forward()
        gradients = self.backward()
        reference_gradients.assert_gradients_close(*gradients, self.reference(), self.reference(naive=True))
        for buffer, view in self.gradients:  # what is not the gradient stays NaN
            view[...] = np.nan
            assert np.isnan(buffer.astype(np.float32)).all()


@given(strategies.problems(dtypes=DTYPES, head_dims=HEAD_DIMS, total_work=2**22), dropouts, st.booleans(), seeds)
@example(Problem(seqlens_q=(5,), seqlens_k=(3,), causal=True), 0.0, True, 0)  # the first two queries see nothing
@example(Problem(seqlens_q=(5,), seqlens_k=(3,), causal=True, sinks=True), 0.5, True, 0)
@example(Problem(seqlens_q=(5, 0, 2), seqlens_k=(0, 4, 2), varlen=True, sinks=True), 0.1, True, 0)
@example(Problem(seqlens_q=(), seqlens_k=()), 0.1, True, 0)
@example(Problem(seqlens_q=(), seqlens_k=(), varlen=True, sinks=True), 0.0, False, 0)
@example(Problem(seqlens_q=(9,), seqlens_k=(9,), window=(2**62, 2**62), chunk=2**62), 0.0, False, 0)
@example(Problem(seqlens_q=(40,), seqlens_k=(1,)), 0.0, False, 0)  # one key: P is 1, and dq the difference of equals
def test_gradients(problem, p_drop, with_dlse, seed):
    Case(problem, seed, p_drop, with_dlse).check()


@given(strategies.problems(dtypes=DTYPES, total_work=2**21, max_batch=2), seeds, st.sampled_from([3.0, 10.0]))
def test_large_scores(problem, seed, amplitude):
    Case(replace(problem, softmax_scale=None), seed, amplitude=amplitude).check()


@given(strategies.problems(dtypes=DTYPES, total_work=2**21), dropouts, seeds)
def test_repeats_bit_for_bit(problem, p_drop, seed):
    first, second = (Case(problem, seed, p_drop) for _ in range(2))
    for case in (first, second):
        case.forward()
    for one, other in zip(first.backward(), second.backward(), strict=True):
        assert (one is None and other is None) or one.tobytes() == other.tobytes()


@given(strategies.problems(dtypes=("float32", "float16"), total_work=2**20, max_batch=2), dropouts, st.data(), seeds)
def test_nan_reaches_only_those_who_see_it(problem, p_drop, data, seed):
    """NaN in any input: gradients are finite where, and only where, the formula's are."""
    assume(problem.batch)
    case = Case(replace(problem, placement_q="contiguous", placement_kv="contiguous", sinks=False), seed, p_drop)
    arrays = {"q": case.arrays.q, "k": case.arrays.k, "v": case.arrays.v, "dout": case.dout}
    for _ in range(data.draw(st.integers(1, 3))):
        array = arrays[data.draw(st.sampled_from(list(arrays)))]
        if array.size:
            where = tuple(data.draw(st.integers(0, n - 1)) for n in array.shape)
            array[where] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    case.forward()
    exact = case.reference()
    for got, name in zip(case.backward(), ("dq", "dk", "dv"), strict=False):
        assert np.array_equal(np.isfinite(got), np.isfinite(getattr(exact, name))), name


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_in_no_use_holds_anything(value):
    """Rows past seqused, in inputs and in what the forward left unwritten; and queries that see nothing."""
    case = Case(Problem(seqlens_q=(3, 30), seqlens_k=(5, 20), num_heads_kv=2, ratio=2, padding_q=6, padding_k=6,
                        causal=True, sinks=True), with_dlse=True)
    for array, lengths in ((case.arrays.q, case.problem.seqlens_q), (case.arrays.k, case.problem.seqlens_k),
                           (case.arrays.v, case.problem.seqlens_k), (case.dout, case.problem.seqlens_q)):
        for b, length in enumerate(lengths):
            array[b, length:] = value
    exact, naive = case.reference(), case.reference(naive=True)
    case.dout[1, :10] = value  # query 9 of 30 is the last to stand before all 20 keys
    case.forward()
    dq, dk, dv, dsinks = case.backward()
    reference_gradients.assert_gradients_close(dq, dk, dv, dsinks, exact, naive)
    assert (dq[0, 3:] == 0).all() and (dk[0, 5:] == 0).all() and (dv[0, 5:] == 0).all() and (dq[1, :10] == 0).all()


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_gradients_of_parts_of_the_keys_sum_up(dtype):
    """With out and lse of all keys, each part gives its share: in fp64 the sum of P must not be made 1."""
    case = Case(Problem(seqlens_q=(30,), seqlens_k=(50,), num_heads_kv=2, ratio=3, dtype=dtype))
    case.forward()
    exact, naive = case.reference(), case.reference(naive=True)
    k, v = case.arrays.k, case.arrays.v
    dq = np.zeros(case.arrays.q.shape)
    for part in (slice(0, 20), slice(20, 50)):
        case.arrays.k, case.arrays.v = k[:, part], v[:, part]
        case.arrays.max_seqlen_k = part.stop - part.start
        case.gradients = [case.poisoned(name) for name in ("q", "k", "v")]
        views = case.backward()
        dq += views[0]
        np.testing.assert_allclose(views[1], exact.dk[:, part], rtol=1e-2, atol=1e-3)
        np.testing.assert_allclose(views[2], exact.dv[:, part], rtol=1e-2, atol=1e-3)
    tolerance = 4 * abs(naive.dq - exact.dq).max() + 1e-6
    assert abs(dq - exact.dq).max() < tolerance
