"""Dropout: Philox against its published answers, the layout element by element, statistics, and the forward."""

import itertools

import frameworks
import numpy as np
import philox
import pytest
import reference
import reference_gradients
import strategies
from hypothesis import given
from hypothesis import strategies as st
from strategies import Problem
from test_attention import pose

import fa3
from fa3 import _philox

# From the known-answer file of Random123, which the generator's authors publish: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8)),
    ((0xffffffff,) * 4, (0xffffffff,) * 2, (0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd)),
    ((0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344), (0xa4093822, 0x299f31d0),
     (0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1)),
]
any_seed = st.integers(0, 2**64 - 1)
probabilities = st.sampled_from([0.1, 0.5, 0.9]) | st.floats(1e-3, 0.999)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    seed = key[0] + (key[1] << 32)
    assert tuple(int(word) for word in _philox.philox4x32([np.uint64(c) for c in counter], seed)) == words
    assert philox.philox4x32_10(seed, *counter) == words


@given(any_seed, st.integers(0, 2**31 - 1), st.integers(0, 2**20), st.integers(0, 2**30), st.integers(0, 2**30),
       st.integers(1, 40), st.integers(1, 40), probabilities)
def test_a_tile_keeps_what_its_elements_keep(seed, batch, head, query, key, rows, columns, p):
    kept = _philox.Dropout(p, seed).keep(
        batch, slice(head, head + 2), slice(query, query + rows), slice(key, key + columns))
    expected = [[[philox.is_kept(p, philox.fifteen_bits(seed, batch, h, i, j)) for j in range(key, key + columns)]
                 for i in range(query, query + rows)] for h in range(head, head + 2)]
    assert np.array_equal(kept, expected)


def test_one_call_is_a_lanes_share_of_two_blocks():
    """What _philox.py says of Hopper's accumulators, lane by lane: the reason for the layout."""
    seed, batch, head, query, key = 7, 3, 2, 32, 96
    kept = np.array([[philox.fifteen_bits(seed, batch, head, query + i, key + j) for j in range(32)]
                     for i in range(16)])

    def call(row, pair):
        return philox.philox4x32_10(seed, head, 4 * (key // 32) + pair, batch, 8 * (query // 16) + row)

    def halves(word, second):
        if second:
            word = word >> 8 | word % 256 << 24
        return word & 0x7FFF, word >> 16 & 0x7FFF

    def register(block, lane, i):
        """Both halves of a lane's register i of a 16 x 16 block."""
        row, column = lane // 4 + 8 * (i % 2), 2 * (lane % 4) + 8 * (i // 2)
        return tuple(block[row, column:column + 2])

    for lane, second in itertools.product(range(32), range(2)):
        block = kept[:, 16 * second:][:, :16]
        words = call(lane // 4, lane % 4)
        for i in range(4):  # queries as rows
            assert register(block, lane, i) == halves(words[i], second)
        own, other = (lane // 4) % 2, lane ^ 4  # keys as rows
        mine = call(2 * (lane % 4) + own, lane // 8)
        theirs = call(2 * (other % 4) + 1 - own, other // 8)
        even, odd = (theirs, mine) if own else (mine, theirs)
        for i in range(4):
            pair = even[i // 2 + i % 2 * 2], odd[i // 2 + i % 2 * 2]
            assert register(block.T, lane, i) == tuple(halves(word, second)[own] for word in pair)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_the_share_that_is_kept(p):
    """Of 4 million elements, and of each head, query and key: within 5 standard deviations of 1 - p."""
    kept = _philox.Dropout(p, 1234).keep(5, slice(0, 4), slice(0, 1024), slice(0, 1024))
    for axes in ((0, 1, 2), (1, 2), (0, 2), (0, 1)):
        share = kept.mean(axis=axes)
        count = kept.size / share.size
        assert (abs(share - (1 - p)) <= 5 * np.sqrt(p * (1 - p) / count)).all()


def test_elements_are_independent():
    """Neighbours along every axis, other batch entries and other seeds: correlations of no more than chance."""
    def signs(seed, batch):
        return np.where(_philox.Dropout(0.5, seed).keep(batch, slice(0, 4), slice(0, 512), slice(0, 512)), 1.0, -1.0)

    first = signs(0, 0)
    pairs = {"batch": (first, signs(0, 1)), "seed": (first, signs(1, 0)), "high word": (first, signs(2**32, 0)),
             "head": (first[:-1], first[1:])}
    for step in (1, 2, 4, 8, 16):
        pairs[f"query {step}"] = first[:, step:], first[:, :-step]
        pairs[f"key {step}"] = first[..., step:], first[..., :-step]
    for name, (one, other) in pairs.items():
        assert abs((one * other).mean()) <= 5 / np.sqrt(one.size), name
    assert abs((first[:, 1:, 1:] * first[:, :-1, 1:] * first[:, 1:, :-1] * first[:, :-1, :-1]).mean()) < 5e-3


def test_what_shares_bits_is_dropped_together_hardly_more_often():
    """A key's lower bits are upper ones of a key 16 before or behind it: the correlation that _philox.py admits."""
    kept = _philox.Dropout(0.1, 99).keep(0, slice(0, 8), slice(0, 1024), slice(0, 1024))
    kept = np.where(kept, 1 / 3, -3).reshape(8, 1024, 32, 2, 16)  # mean 0, variance 1
    for step in (-1, 0, 1):
        share = (kept[..., 0, 1:-1] * kept[..., 1, 1 + step:15 + step]).mean()
        assert abs(share) < 0.004


def test_probabilities_are_rounded_to_fifteen_bits():
    """Of their fp32 values, which a C caller has as well."""
    dropped = {0.1: 3277, 0.5: 16384, 0.25 + 2**-16: 8192, 0.25 + 2**-15: 8193, 1e-9: 0, 0.9999999: 32767}
    assert {p: _philox.Dropout(p, 0).dropped for p in dropped} == dropped


@pytest.mark.parametrize(("p", "kept"), [
    (0.5 - 2**-15, range(16383, 32768)), (0.5, range(16384, 32768)), (0.5 + 2**-17, range(16384, 32768)),
    (0.5 + 2**-15, range(16383)), (0.9999999, range(1))])
def test_up_to_a_half_low_numbers_drop_and_then_high_ones(p, kept):
    bits = philox.fifteen_bits(3, np.uint64(0), *np.indices((2, 256, 256), np.uint64))
    keep = _philox.Dropout(p, 3).keep(0, slice(0, 2), slice(0, 256), slice(0, 256))
    assert np.array_equal(keep, (bits >= kept.start) & (bits < kept.stop))


def test_the_ends_of_the_range():
    everything = [_philox.Dropout(p, 0).keep(0, slice(0, 1), slice(0, 512), slice(0, 512)) for p in (1e-9, 0.9999999)]
    assert everything[0].all()
    assert 0 < everything[1].sum() < 40  # one in 32,768 is kept, at the least


# The forward.

@pytest.mark.parametrize("framework", frameworks.ALL)
@given(data=st.data())
def test_forward(framework, data):
    problem = data.draw(strategies.problems(dtypes=framework.dtypes[:2], total_work=2**20))
    check_forward(framework, problem, data.draw(probabilities), data.draw(any_seed))


@pytest.mark.parametrize("framework", frameworks.ALL)
def test_parts_of_a_split_query_are_scaled_once(framework):
    check_forward(framework, strategies.Problem(seqlens_q=(1,), seqlens_k=(700,), num_splits=5), 0.25, 3)


@pytest.mark.parametrize("framework", frameworks.ALL)
def test_what_is_kept_may_be_far_below_what_is_dropped(framework):
    """The last query keeps keys of probabilities around 1e-8, which float16 has in steps of 6e-8."""
    problem = strategies.Problem(seqlens_q=(81, 81, 193, 2), seqlens_k=(2, 0, 0, 62), num_heads_kv=3, head_dim=96,
                                 head_dim_v=96, dtype="float16", varlen=True, softmax_scale=1.0)
    check_forward(framework, problem, 0.875, 58)


def check_forward(framework, problem, p, seed):
    arrays = strategies.make(problem)
    out, lse = (framework.numpy(x) for x in pose(framework, problem, arrays, dropout_p=p, dropout_seed=seed,
                                                 return_lse=True))
    dout = np.zeros(arrays.out.shape, arrays.out.dtype)
    exact, naive = (
        reference_gradients.batch(dout, arrays.q, arrays.k, arrays.v, p_drop=p, seed=seed, sinks=arrays.sinks,
                                  naive=is_naive, **problem.formula, **arrays.lengths) for is_naive in (False, True))
    used = reference.forward(arrays.q, arrays.k, arrays.v, **problem.formula, **arrays.lengths).used
    # Where a row's largest probabilities are dropped, those that are kept may have lost half a subnormal each.
    v = arrays.v.astype(np.float64)
    largest = np.abs(v[np.isfinite(v)]).max(initial=0)
    keys = max(problem.seqlens_k, default=0)
    lost = reference.SMALLEST_SUBNORMAL[np.dtype(out.dtype)] / 2 * largest * (keys + 8 / (1 - p))
    reference.assert_close(out[used], exact.out[used], naive.out[used], out.dtype, lost)
    undropped = framework.numpy(pose(framework, problem, arrays, return_lse=True)[1])
    rows, undropped_rows = (np.moveaxis(x, -2, -1)[used] for x in (lse, undropped))
    if framework.on_gpu:  # which may choose another tile
        reference.assert_lse_close(rows, undropped_rows)
    else:
        assert rows.tobytes() == undropped_rows.tobytes()


def mask(seqlen_q, seqlen_k, *, heads=2, ratio=1, batch=1, seed=5, p=0.4, **options):
    """Which weights the forward keeps, seen through values that are unit vectors: (batch, heads, sq, sk)."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((batch, seqlen_q, heads * ratio, 8)).astype(np.float32)
    k = rng.standard_normal((batch, seqlen_k, heads, 8)).astype(np.float32)
    v = np.broadcast_to(np.eye(seqlen_k, dtype=np.float32)[None, :, None], (batch, seqlen_k, heads, seqlen_k))
    out = fa3.flash_attn_func(q, k, v, dropout_p=p, dropout_seed=seed, **options)
    return out.transpose(0, 2, 1, 3) != 0


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("options", [{}, {"num_splits": 3}, {"batch_invariant": True}, {"softcap": 2.0}])
def test_the_mask_is_that_of_the_elements(options):
    """Whatever the tile and the split."""
    kept = mask(70, 90, ratio=3, batch=2, **options)
    for b in range(2):
        assert np.array_equal(kept[b], philox.keep(0.4, 5, b, 6, 70, 90))


def test_the_mask_counts_within_the_sequence():
    """Dense and varlen, padded or not: element (b, h, i, j) is the same."""
    expected = [philox.keep(0.4, 5, b, 2, 20, 30) for b in range(2)]
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((55, 2, 8)).astype(np.float32) for _ in range(2))
    v = np.zeros((65, 2, 30), np.float32)
    cu_q, cu_k, used_q, used_k = (np.array(x, np.int32) for x in ((0, 25, 45), (0, 33, 63), (20, 20), (30, 30)))
    k = np.concatenate([k, k[:10]])
    for b in range(2):
        v[cu_k[b]:cu_k[b] + 30] = np.eye(30, dtype=np.float32)[:, None]
    out = fa3.flash_attn_varlen_func(q, k, v, cu_q, cu_k, seqused_q=used_q, seqused_k=used_k, dropout_p=0.4,
                                     dropout_seed=5)
    for b in range(2):
        assert np.array_equal(out[cu_q[b]:cu_q[b] + 20].transpose(1, 0, 2) != 0, expected[b])
    assert np.array_equal(mask(20, 30, batch=2), expected)


@pytest.mark.parametrize("dtype", ["int64", "uint64", "int32", "uint32"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_seeds_in_arrays(dtype, shape):
    value = 2**31 - 5
    expected = mask(20, 20, seed=value)
    assert np.array_equal(mask(20, 20, seed=np.full(shape, value, dtype)), expected)
    assert np.array_equal(mask(20, 20, seed=np.dtype(dtype).type(value)), expected)
    if dtype.startswith("i"):
        assert np.array_equal(mask(20, 20, seed=np.full(shape, -3, dtype)), mask(20, 20, seed=2**64 - 3))


@pytest.mark.parametrize("framework", frameworks.CPU)
def test_seeds_of_frameworks(framework):
    seed = framework.put(np.array([77], np.int32))[0]
    assert np.array_equal(mask(20, 20, seed=seed), mask(20, 20, seed=77))


def test_masks_of_two_seeds_differ():
    assert (mask(40, 40, seed=1) != mask(40, 40, seed=2)).mean() > 0.4
    assert (mask(40, 40, seed=1) != mask(40, 40, seed=1 + 2**40)).mean() > 0.4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["int64", "int32"])
def test_a_graph_reads_the_seed_when_it_is_replayed(dtype):
    torch = pytest.importorskip("torch")
    q, k, v, dout = (torch.randn(2, 70, 4, 64, device="cuda", dtype=torch.float16) for _ in range(4))
    seed = torch.tensor(-3, dtype=getattr(torch, dtype), device="cuda")

    def both(seed):
        options = dict(causal=True, dropout_p=0.3, dropout_seed=seed)
        out, lse = fa3.flash_attn_func(q, k, v, return_lse=True, **options)
        return out, *fa3.flash_attn_backward(dout, q, k, v, out, lse, deterministic=True, **options)

    both(seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = both(seed)
    for value in (-3, 5, 2**31 - 1):
        seed.fill_(value)
        graph.replay()
        for got, expected in zip(results, both(value % 2**64), strict=True):
            assert torch.equal(got, expected)


def test_dropout_means_nothing_at_zero():
    problem = Problem(seqlens_q=(9,), seqlens_k=(9,))
    arrays = strategies.make(problem)
    numpy = frameworks.Numpy()
    assert pose(numpy, problem, arrays, dropout_seed=3).tobytes() == pose(numpy, problem, arrays).tobytes()
