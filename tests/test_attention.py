"""The public functions against the float64 reference, in every framework and on every backend there is."""

import dataclasses

import frameworks
import ml_dtypes
import numpy as np
import pytest
import reference
import strategies
from hypothesis import given
from hypothesis import strategies as st
from strategies import Problem

import fa3

every_framework = pytest.mark.parametrize("framework", frameworks.ALL)
every_writable_framework = pytest.mark.parametrize("framework", frameworks.WRITABLE)
every_backend = pytest.mark.parametrize("framework", frameworks.BACKENDS)


def pose(framework, problem, arrays, **options):
    """Call the library with a problem's arrays in a framework: what it returns."""
    put = {name: framework.put(getattr(arrays, name), arrays.buffers[name][0])[0] for name in ("q", "k", "v")}
    small = {name: framework.put(array)[0] for name, array in arrays.lengths.items() if array is not None}
    if arrays.sinks is not None:
        small["sinks"] = framework.put(arrays.sinks)[0]
    small.update((name, framework.put(array)[0]) for name, array in arrays.descales.items())
    call = fa3.flash_attn_varlen_func if problem.varlen else fa3.flash_attn_func
    return call(**put, **small, **framework.options(put["q"]), softmax_scale=problem.softmax_scale,
                causal=problem.causal, window_size=problem.window, attention_chunk=problem.chunk,
                softcap=problem.softcap, **problem.how, **options)


def expected(problem, arrays):
    """The reference's Result, and the out of the naive formula in the input dtype."""
    inputs = arrays.q, arrays.k, arrays.v
    options = dict(**arrays.lengths, **arrays.descales, sinks=arrays.sinks, **problem.formula)
    naive = reference.forward(*inputs, evaluate=reference.naive, **options).out
    return reference.forward(*inputs, **options), naive


def score_error(problem, arrays):
    """What a GPU may lose of each fp8 query's scores: (…, rows, heads)."""
    return reference.forward(arrays.q, arrays.k, arrays.v, evaluate=reference.fp8_score_error, **arrays.lengths,
                             **arrays.descales, **problem.formula).out[..., 0]


def rows_in_use(problem, arrays):
    """The rows of q that belong to a query: (b, sq) or (total_q,)."""
    used = np.zeros(arrays.q.shape[:-2], bool)
    for b, length in enumerate(problem.seqlens_q):
        if problem.varlen:
            used[arrays.cu_seqlens_q[b]:arrays.cu_seqlens_q[b] + length] = True
        else:
            used[b, :length] = True
    return used


def assert_right(problem, arrays, out, lse=None):
    ref, naive = expected(problem, arrays)
    used = ref.used
    reference.assert_close(out[used], ref.out[used], naive[used], out.dtype)
    if lse is not None:
        assert lse.dtype == np.float32
        rows = np.moveaxis(lse, -2, -1), np.moveaxis(ref.lse, -2, -1)  # heads last: (…, rows, heads)
        slack = score_error(problem, arrays)[used] if problem.dtype == "float8_e4m3fn" else 0.0
        reference.assert_lse_close(*(x[used] for x in rows), dtype=arrays.q.dtype, slack=slack)


@every_framework
@given(data=st.data())
def test_forward(framework, data):
    problem = data.draw(strategies.problems(dtypes=framework.dtypes))
    arrays = strategies.make(problem)
    out, lse = (framework.numpy(x) for x in pose(framework, problem, arrays, return_lse=True))
    assert out.dtype == arrays.out.dtype and out.flags.c_contiguous
    assert out.shape == arrays.out.shape and lse.shape == arrays.lse.shape
    assert_right(problem, arrays, out, lse)


@every_writable_framework
@given(data=st.data())
def test_nothing_but_the_result_is_written(framework, data):
    problem = data.draw(strategies.problems(dtypes=framework.dtypes))
    arrays = strategies.make(problem)
    used = rows_in_use(problem, arrays)
    buffer = arrays.buffers["out"][0]
    out, flat = framework.put(arrays.out, buffer)
    assert pose(framework, problem, arrays, out=out) is out
    buffer.reshape(-1)[...] = framework.numpy(flat)
    assert np.isfinite(arrays.out[used].astype(np.float32)).all()
    arrays.assert_only_written(used)


@every_backend
@given(data=st.data())
def test_result_is_bitwise_repeatable(framework, data):
    problem = data.draw(strategies.problems(dtypes=framework.dtypes))
    # Rows of no sequence are not written: they have no bits to compare.
    longest = max(problem.seqlens_q, default=0)
    problem = dataclasses.replace(problem, padding_q=None, seqlens_q=(longest,) * problem.batch)
    arrays = strategies.make(problem)
    first, second = (pose(framework, problem, arrays, return_lse=True) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert framework.numpy(one).tobytes() == framework.numpy(other).tobytes()


@every_backend
@given(data=st.data())
def test_batch_invariant_sequence_does_not_depend_on_the_others(framework, data):
    problem = data.draw(strategies.problems(dtypes=framework.dtypes).filter(lambda p: p.batch > 1))
    problem = dataclasses.replace(problem, varlen=True, padding_q=None, padding_k=None)
    arrays = strategies.make(problem)
    out, lse = (framework.numpy(x) for x in pose(framework, problem, arrays, return_lse=True, batch_invariant=True))
    b = data.draw(st.integers(0, problem.batch - 1))
    rows = slice(*arrays.cu_seqlens_q[b:b + 2])
    keys = slice(*arrays.cu_seqlens_k[b:b + 2])
    of_one = {name: array[b:b + 1] for name, array in arrays.descales.items() if array.ndim == 2}
    alone = dataclasses.replace(
        arrays, **of_one, q=arrays.q[rows], k=arrays.k[keys], v=arrays.v[keys],
        cu_seqlens_q=np.array([0, problem.seqlens_q[b]], np.int32),
        cu_seqlens_k=np.array([0, problem.seqlens_k[b]], np.int32))
    out_alone, lse_alone = (
        framework.numpy(x) for x in pose(framework, problem, alone, return_lse=True, batch_invariant=True))
    assert out[rows].tobytes() == out_alone.tobytes()
    assert lse[:, rows].tobytes() == lse_alone.tobytes()


@every_backend
@given(data=st.data())
def test_nan_stays_where_it_is_seen(framework, data):
    problem = data.draw(strategies.problems(dtypes=framework.dtypes).filter(
        lambda p: p.batch and max(p.seqlens_k) and p.placement_kv != "broadcast"))
    problem = dataclasses.replace(problem, varlen=True, padding_q=None, padding_k=None, sinks=False)
    arrays = strategies.make(problem)
    ref, naive = expected(problem, arrays)
    b = max(range(problem.batch), key=lambda i: problem.seqlens_k[i])
    key = data.draw(st.integers(0, problem.seqlens_k[b] - 1))
    head = data.draw(st.integers(0, problem.num_heads_kv - 1))
    name = data.draw(st.sampled_from(["k", "v"]))
    getattr(arrays, name)[arrays.cu_seqlens_k[b] + key, head, 0] = np.nan
    out = framework.numpy(pose(framework, problem, arrays))
    sees = reference.visible(problem.seqlens_q[b], problem.seqlens_k[b], problem.causal, problem.window, problem.chunk)
    touched = np.zeros(out.shape[:2], bool)
    group = touched[arrays.cu_seqlens_q[b]:arrays.cu_seqlens_q[b + 1], head * problem.ratio:(head + 1) * problem.ratio]
    group[...] = sees[:, key, None]
    assert np.isnan(out[touched][..., slice(None) if name == "k" else 0].astype(np.float32)).all()
    if name == "v" and framework.on_gpu:  # a hidden key's probability is 0 there, but 0 times NaN is NaN
        group[...] = True
    reference.assert_close(out[~touched], ref.out[~touched], naive[~touched], out.dtype)


# Packed heads and parts of the keys: the same result, whatever is asked for.

@every_backend
@pytest.mark.parametrize("pack_gqa", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("ratio", [3, 5, 6, 7, 12, 65])
def test_heads_that_do_not_fill_a_tile(framework, ratio, num_splits, pack_gqa):
    """Rows that stand idle, tiles that end within a sequence, and sequences without queries or keys."""
    problem = Problem(seqlens_q=(0, 70, 1, 9, 3), seqlens_k=(50, 270, 300, 0, 64), num_heads_kv=2, ratio=ratio,
                      head_dim=128, head_dim_v=128, dtype="bfloat16", varlen=True, causal=True, num_splits=num_splits,
                      pack_gqa=pack_gqa)
    arrays = strategies.make(problem)
    out, lse = (framework.numpy(x) for x in pose(framework, problem, arrays, return_lse=True))
    assert_right(problem, arrays, out, lse)


@every_backend
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("num_splits", [2, 5, 64, 100_000])
@pytest.mark.parametrize("mask", [
    {"window": (5, 0)}, {"window": (-1, 3)}, {"chunk": 64}, {"causal": True}, {"padding_k": 640}], ids=str)
def test_parts_without_a_key(framework, mask, num_splits, sinks):
    """Parts of which some rows, or all, see nothing, and more parts than there are keys."""
    problem = Problem(seqlens_q=(260, 260), seqlens_k=(200, 200), ratio=2, sinks=sinks, num_splits=num_splits, **mask)
    arrays = strategies.make(problem)
    out, lse = (framework.numpy(x) for x in pose(framework, problem, arrays, return_lse=True))
    assert_right(problem, arrays, out, lse)
    blind = ~reference.visible(260, 200, problem.causal, problem.window, problem.chunk).any(axis=1)
    assert (out[:, blind] == 0).all()


@every_backend
def test_batch_invariance_comes_before_splits(framework):
    """Parts would make bits depend on who asks for them; 1 and n give the same bits then."""
    problem = Problem(seqlens_q=(70,), seqlens_k=(500,), ratio=3)
    arrays = strategies.make(problem)
    results = [framework.numpy(pose(framework, dataclasses.replace(problem, num_splits=num_splits), arrays,
                                    batch_invariant=True)).tobytes() for num_splits in (0, 1, 4)]
    assert len(set(results)) == 1


# Joining parts, and fp8.

@pytest.mark.parametrize("framework", frameworks.CPU)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_combine_joins_parts_of_the_keys(framework, dtype):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, rows, 2, 16)).astype(np.float32) for rows in (5, 30, 30))
    whole, lse_whole = fa3.flash_attn_func(q, k, v, return_lse=True)
    parts = [fa3.flash_attn_func(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in ((0, 7), (7, 7), (7, 30))]
    out_partial = framework.put(np.stack([out for out, _ in parts]))[0]
    lse_partial = framework.put(np.stack([lse.swapaxes(1, 2) for _, lse in parts]))[0]
    out, lse = (framework.numpy(x) for x in fa3.flash_attn_combine(out_partial, lse_partial, out_dtype=dtype))
    assert out.dtype == strategies.DTYPES[dtype]
    np.testing.assert_allclose(out.astype(np.float32), whole, rtol=1e-5 if dtype == "float32" else 1e-2, atol=1e-2)
    np.testing.assert_allclose(lse, lse_whole.swapaxes(1, 2), rtol=1e-5)


@pytest.mark.parametrize("framework", [parameter for parameter in frameworks.WRITABLE if parameter.id != "jax"])
@pytest.mark.parametrize("q_heads", [2, 4])
def test_fp8_with_descales(framework, q_heads):
    problem = Problem(seqlens_q=(20, 3), seqlens_k=(40, 50), num_heads_kv=2, ratio=2, dtype="float8_e4m3fn",
                      varlen=True)
    arrays = strategies.make(problem)
    rng = np.random.default_rng(1)
    descales = {"q_descale": rng.uniform(0.5, 2, (2, q_heads)), "k_descale": rng.uniform(0.5, 2, 2),
                "v_descale": np.array(1.5)}
    descales = {name: value.astype(np.float32) for name, value in descales.items()}
    put = {name: framework.put(value)[0] for name, value in descales.items()}
    for out_dtype in ("bfloat16", "float16"):
        out = framework.numpy(pose(framework, problem, arrays, out_dtype=out_dtype, **put))
        assert out.dtype == strategies.DTYPES[out_dtype]
        inputs = (arrays.q, arrays.k, arrays.v)
        ref = reference.forward(*inputs, **arrays.lengths, **descales)
        naive = reference.forward(*inputs, evaluate=reference.naive, **arrays.lengths, **descales)
        reference.assert_close(out, ref.out, naive.out, out.dtype)


@pytest.mark.parametrize("framework", [parameter for parameter in frameworks.WRITABLE if parameter.id != "jax"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("varlen", [False, True])
def test_fp8_keys_under_queries_of_16_bits(framework, dtype, varlen):
    """The same bits as of q quantised by the caller, in q's dtype."""
    if framework.on_gpu and dtype == "bfloat16" and type(framework).__name__ == "CuPy":
        pytest.skip("CuPy has no bfloat16, and dtype= speaks of the keys")
    seqlens_q = (20, 3) if varlen else (20, 20)
    problem = Problem(seqlens_q=seqlens_q, seqlens_k=(40, 50) if varlen else (50, 50), num_heads_kv=2, ratio=2,
                      dtype="float8_e4m3fn", varlen=varlen, causal=True)
    arrays = strategies.make(problem)
    wide = (np.random.default_rng(2).standard_normal(arrays.q.shape) * 7).astype(strategies.DTYPES[dtype])
    q, k, v = (framework.put(x)[0] for x in (wide, arrays.k, arrays.v))
    cu = {name: framework.put(array)[0] for name, array in arrays.lengths.items() if array is not None}
    call = fa3.flash_attn_varlen_func if varlen else fa3.flash_attn_func
    said = framework.options(k)
    scales = {"cu_seqlens": cu["cu_seqlens_q"]} if varlen else {}
    codes, descale = fa3.quantize_fp8(q, granularity="batch_head", **scales)
    expected = call(codes, k, v, **cu, causal=True, q_descale=descale, out_dtype=dtype, **said)
    out = call(q, k, v, **cu, causal=True, **said)
    assert framework.numpy(out).dtype == strategies.DTYPES[dtype]
    assert framework.numpy(out).tobytes() == framework.numpy(expected).tobytes()
    with pytest.raises(ValueError, match="q_descale: needs q of dtype float8_e4m3fn, but q has"):
        call(q, k, v, **cu, q_descale=descale, **said)


# Nothing to see.

@every_framework
@pytest.mark.parametrize("problem", strategies.EMPTY_PROBLEMS, ids=str)
def test_empty(framework, problem):
    arrays = strategies.make(problem)
    out, lse = (framework.numpy(x) for x in pose(framework, problem, arrays, return_lse=True))
    assert out.shape == arrays.out.shape and lse.shape == arrays.lse.shape
    assert (out == 0).all()
    assert (lse == (arrays.sinks[:, None] if problem.sinks else -np.inf)).all()


@every_backend
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "mask"), [
    (200, 70, {"causal": True}), (300, 1, {"causal": True}), (130, 130, {"window": (0, 0)}),
    (260, 130, {"window": (3, -1), "causal": True}), (257, 300, {"chunk": 1, "causal": True}),
    (150, 40, {"window": (2, -1)}), (50, 200, {"window": (-1, 0), "chunk": 64})])
@pytest.mark.parametrize("sinks", [False, True])
def test_queries_that_see_little_or_nothing(framework, dtype, seqlen_q, seqlen_k, mask, sinks):
    problem = Problem(seqlens_q=(seqlen_q,), seqlens_k=(seqlen_k,), num_heads_kv=1, ratio=3, dtype=dtype, sinks=sinks,
                      **mask)
    arrays = strategies.make(problem)
    out, lse = (framework.numpy(x) for x in pose(framework, problem, arrays, return_lse=True))
    assert_right(problem, arrays, out, lse)
    blind = ~reference.visible(seqlen_q, seqlen_k, problem.causal, problem.window, problem.chunk).any(axis=1)
    assert (out[0, blind] == 0).all()
    assert (lse[0][:, blind] == (arrays.sinks[:, None] if sinks else -np.inf)).all()


@every_backend
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_padding_holds_anything(framework, value):
    problem = Problem(seqlens_q=(3, 70), seqlens_k=(5, 130), num_heads_kv=2, ratio=2, padding_q=60, padding_k=60,
                      causal=True)
    arrays = strategies.make(problem)
    for name, lengths in (("q", arrays.seqused_q), ("k", arrays.seqused_k), ("v", arrays.seqused_k)):
        for b, length in enumerate(lengths):
            getattr(arrays, name)[b, length:] = value
    assert_right(problem, arrays, framework.numpy(pose(framework, problem, arrays)))


# Large values, odd layouts.

@every_backend
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("amplitude", [1e-3, 8.0, 60.0])
@pytest.mark.parametrize("num_splits", [1, 4])
def test_amplitudes(framework, dtype, amplitude, num_splits):
    """Scores from almost nothing to thousands, rising and falling along the keys: the softmax's rare branches."""
    problem = Problem(seqlens_q=(130,), seqlens_k=(700,), num_heads_kv=1, ratio=2, dtype=dtype, num_splits=num_splits)
    arrays = strategies.make(problem, amplitude=amplitude)
    arrays.k[0] *= np.linspace(0, 1, 700)[:, None, None].astype(arrays.k.dtype)
    assert_right(problem, arrays, *(framework.numpy(x) for x in pose(framework, problem, arrays, return_lse=True)))


@pytest.mark.parametrize("framework", [frameworks.CPU[0], frameworks.CUPY])
def test_negative_strides(framework):
    problem = Problem(seqlens_q=(40, 40), seqlens_k=(90, 90), num_heads_kv=2, ratio=2)
    arrays = strategies.make(problem)
    forward = framework.numpy(pose(framework, problem, arrays))

    def reversed_view(name):
        array = getattr(arrays, name)
        flat = framework.flat(np.ascontiguousarray(array[::-1, ::-1]))
        strides = [stride // array.itemsize for stride in array.strides]
        return framework.view(flat, array.shape, [-strides[0], -strides[1], *strides[2:]],
                              array.size - strides[1])

    q, k, v = (reversed_view(name) for name in ("q", "k", "v"))
    out = fa3.flash_attn_func(q, k, v, **framework.options(q))
    assert framework.numpy(out).tobytes() == forward.tobytes()


def test_mixed_frameworks_follow_the_queries():
    torch = pytest.importorskip("torch")
    problem = Problem(seqlens_q=(5,), seqlens_k=(7,), dtype="bfloat16", sinks=True)
    arrays = strategies.make(problem)
    tensors = [frameworks.Torch().put(x)[0] for x in (arrays.q, arrays.k, arrays.v)]
    out = fa3.flash_attn_func(tensors[0], arrays.k, tensors[2], sinks=arrays.sinks)
    assert isinstance(out, torch.Tensor) and out.dtype == torch.bfloat16
    out = fa3.flash_attn_func(arrays.q, tensors[1], arrays.v, sinks=arrays.sinks)
    assert isinstance(out, np.ndarray) and out.dtype == ml_dtypes.bfloat16
    assert_right(problem, arrays, out)


def test_dtype_names_what_bytes_are():
    problem = Problem(seqlens_q=(5,), seqlens_k=(7,), dtype="float8_e4m3fn")
    arrays = strategies.make(problem)
    out = fa3.flash_attn_func(*(x.view(np.uint8) for x in (arrays.q, arrays.k, arrays.v)), dtype="float8_e4m3fn")
    expected_out = fa3.flash_attn_func(arrays.q, arrays.k, arrays.v)
    assert out.tobytes() == expected_out.tobytes()


@pytest.mark.parametrize("number", [float, np.float32, np.float64, lambda x: int(2 * x)])
def test_descales_that_are_numbers(number):
    arrays = strategies.make(Problem(seqlens_q=(5,), seqlens_k=(7,), dtype="float8_e4m3fn"))
    values = {"q_descale": number(0.5), "k_descale": number(2.5), "v_descale": number(3)}
    out, expected = (fa3.flash_attn_func(arrays.q, arrays.k, arrays.v, **descales)
                     for descales in (values, {name: np.array(x, "f") for name, x in values.items()}))
    assert out.tobytes() == expected.tobytes()


@every_backend
@pytest.mark.parametrize(("rows", "num_splits"), [(3, 1), (400, 3)])
def test_a_row_that_sees_only_nan_is_nan(framework, rows, num_splits):
    """A maximum skips NaN: row 0, which sees one key, must not pass for one that sees none and gives 0."""
    q, k, v = (np.ones((1, rows, 2, 64), np.float16) for _ in range(3))
    k[:, 0] = np.nan
    out, lse = fa3.flash_attn_func(*(framework.put(x)[0] for x in (q, k, v)), causal=True, return_lse=True,
                                   num_splits=num_splits)
    assert np.isnan(framework.numpy(out)).all() and np.isnan(framework.numpy(lse)).all()


@every_backend
@pytest.mark.parametrize("varlen", [False, True])
def test_no_keys_in_an_odd_layout(framework, varlen):
    """Strides that no tensor map can hold do not matter where there is no row to load."""
    problem = Problem(seqlens_q=(1, 1, 1), seqlens_k=(0, 0, 0), varlen=varlen, placement_kv="sliced")
    out, lse = pose(framework, problem, strategies.make(problem), return_lse=True)
    assert not framework.numpy(out).any()
    assert np.isneginf(framework.numpy(lse)).all()


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_infinite_sink_takes_all(dtype, num_splits):
    """On the CPU. The other head is as it would be without."""
    q, k, v, dout = np.random.default_rng(0).standard_normal((4, 1, 600, 2, 16)).astype(dtype)
    sinks = np.array([np.inf, 0.5], np.float32)
    out, lse = fa3.flash_attn_func(q, k, v, sinks=sinks, num_splits=num_splits, return_lse=True)
    assert not out[:, :, 0].any() and (lse[:, 0] == np.inf).all() and np.isfinite(lse[:, 1]).all()
    *gradients, dsinks = fa3.flash_attn_backward(dout, q, k, v, out, lse, sinks=sinks, dlse=np.ones_like(lse))
    assert not any(x[:, :, 0].any() for x in gradients) and all(np.isfinite(x).all() for x in gradients)
    assert dsinks[0] == 600 and np.isfinite(dsinks[1])


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn"])
def test_no_heads(dtype):
    """Results are empty, and new keys go into the cache all the same."""
    dtype = strategies.DTYPES[dtype]
    q, cache, new = np.zeros((2, 3, 0, 16), dtype), np.zeros((2, 8, 2, 16), dtype), np.ones((2, 2, 2, 16), dtype)
    keys, values = cache.copy(), cache.copy()
    out, lse = fa3.flash_attn_with_kvcache(q, keys, values, k=new, v=new, cache_seqlens=3, return_lse=True,
                                           sinks=np.zeros(0, np.float32))
    assert out.shape == q.shape and lse.shape == (2, 0, 3)
    cache[:, 3:5] = 1
    assert keys.tobytes() == values.tobytes() == cache.tobytes()
    assert fa3.flash_attn_func(q, keys, values).shape == q.shape
