"""Multi-head latent attention, with qv and absorbed, against the float64 reference on every backend there is."""

import dataclasses

import frameworks
import numpy as np
import pytest
import reference
import strategies
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import Problem
from test_kvcache import in_pages

import fa3

every_backend = pytest.mark.parametrize("framework", frameworks.BACKENDS)
NATIVE = ((64, 512), (64, 256))
HEAD_DIMS = (*NATIVE, (64, 512), (32, 128), (8, 264), (40, 504))
RATIOS = (1, 2, 3, 5, 16, 64, 65)


def dtypes_of(framework):
    return tuple(name for name in framework.dtypes if name in ("float16", "bfloat16", "float8_e4m3fn"))


def latent_problems(framework, head_dims=HEAD_DIMS):
    """Wide rows, so few of them: one KV head where many query heads share it, and little padding."""
    def few(problem):
        return dataclasses.replace(
            problem, num_heads_kv=1 if problem.ratio > 3 else problem.num_heads_kv,
            padding_q=problem.padding_q and min(problem.padding_q, 3),
            padding_k=problem.padding_k and min(problem.padding_k, 66))

    return strategies.problems(dtypes=dtypes_of(framework), head_dims=head_dims, ratios=RATIOS, max_batch=3,
                               total_work=strategies.TOTAL_WORK // 4).map(few)


def make(problem, seed=0):
    """The problem's arrays; qv in a buffer of its own; and k and v in one, as a cache of latent rows has them."""
    arrays = strategies.make(problem, seed)
    wide = dataclasses.replace(problem, head_dim=problem.head_dim_v, placement_q="contiguous")
    qv = strategies.make(wide, seed + 1).q
    buffer, rows = strategies.place(np.concatenate([arrays.v, arrays.k], axis=-1), problem.placement_kv)
    return arrays, qv, buffer, rows


def columns(problem, rows):
    """(k, v) of an array, of any framework, whose rows hold both."""
    return rows[..., problem.head_dim_v:], rows[..., :problem.head_dim_v]


def call_of(problem):
    return fa3.flash_attn_varlen_func if problem.varlen else fa3.flash_attn_func


def options_of(framework, problem, arrays):
    small = {name: framework.put(array)[0] for name, array in arrays.lengths.items() if array is not None}
    if arrays.sinks is not None:
        small["sinks"] = framework.put(arrays.sinks)[0]
    small.update((name, framework.put(array)[0]) for name, array in arrays.descales.items())
    return dict(small, causal=problem.causal, window_size=problem.window, attention_chunk=problem.chunk,
                softcap=problem.softcap, **problem.how)


def assert_right(problem, arrays, qv, k, v, out, lse, scale):
    """As test_attention's, with qv."""
    formula = dict(problem.formula, scale=scale, qv=qv, **arrays.lengths, **arrays.descales)
    ref = reference.forward(arrays.q, k, v, sinks=arrays.sinks, **formula)
    naive = reference.forward(arrays.q, k, v, sinks=arrays.sinks, evaluate=reference.naive, **formula).out
    used, slack = ref.used, 0.0
    reference.assert_close(out[used], ref.out[used], naive[used], out.dtype)
    rows = np.moveaxis(lse, -2, -1), np.moveaxis(ref.lse, -2, -1)
    if problem.dtype == "float8_e4m3fn":
        slack = reference.forward(arrays.q, k, v, evaluate=reference.fp8_score_error, **formula).out[used][..., 0]
    reference.assert_lse_close(*(x[used] for x in rows), dtype=arrays.q.dtype, slack=slack)


@every_backend
@given(data=st.data())
def test_qv(framework, data):
    problem = data.draw(latent_problems(framework))
    one_cache = problem.placement_kv != "broadcast" and data.draw(st.booleans())
    arrays, qv, buffer, rows = make(problem)
    put_q, put_k, put_v = (framework.put(getattr(arrays, name), arrays.buffers[name][0])[0] for name in "qkv")
    if one_cache:
        put_k, put_v = columns(problem, framework.put(rows, buffer)[0])
    out, lse = call_of(problem)(put_q, put_k, put_v, qv=framework.put(qv)[0], softmax_scale=problem.softmax_scale,
                                return_lse=True, **options_of(framework, problem, arrays))
    scale = problem.softmax_scale
    if scale is None:
        scale = (problem.head_dim + problem.head_dim_v) ** -0.5
    assert_right(problem, arrays, qv, arrays.k, arrays.v, framework.numpy(out), framework.numpy(lse), scale)


@pytest.mark.parametrize("framework", frameworks.ALL)
def test_qv_of_every_framework(framework):
    rng = np.random.default_rng(0)
    dtype = np.float16 if framework.on_gpu else np.float32
    q, k, v, qv = (rng.standard_normal(shape).astype(dtype)
                   for shape in ((1, 5, 4, 64), (1, 20, 1, 64), (1, 20, 1, 512), (1, 5, 4, 512)))
    out = framework.numpy(fa3.flash_attn_func(*(framework.put(x)[0] for x in (q, k, v)), qv=framework.put(qv)[0]))
    call = dict(q=q[0], k=k[0], v=v[0], qv=qv[0])
    reference.assert_close(out[0], reference.attention(**call)[0], reference.naive(**call), dtype)


@every_backend
@given(data=st.data())
def test_absorbed(framework, data):
    """One array of rows is k, and its first columns are v."""
    problem = data.draw(latent_problems(framework, head_dims=[(576, 512)]))
    arrays = strategies.make(problem)
    put_q, put_k = (framework.put(getattr(arrays, name), arrays.buffers[name][0])[0] for name in "qk")
    out, lse = call_of(problem)(put_q, put_k, put_k[..., :512], softmax_scale=problem.softmax_scale, return_lse=True,
                                **options_of(framework, problem, arrays))
    assert_right(problem, arrays, None, arrays.k, arrays.k[..., :512], framework.numpy(out), framework.numpy(lse),
                 problem.scale)


@every_backend
@given(data=st.data())
@example(data=None)
def test_absorbed_decoding_on_pages(framework, data):
    """A few queries a sequence, of any lengths, on pages of latent rows around which everything is NaN."""
    def draw(strategy, otherwise):
        return data.draw(strategy) if data else otherwise

    problem = draw(latent_problems(framework, head_dims=[(576, 512)]), Problem(
        seqlens_q=(2, 2, 2), seqlens_k=(190, 0, 65), ratio=16, head_dim=576, head_dim_v=512, dtype="float16",
        causal=True))
    seqlen_q = draw(st.integers(1, 4), 2)
    problem = dataclasses.replace(problem, varlen=False, padding_q=None, padding_k=0,
                                  seqlens_q=(seqlen_q,) * problem.batch, placement_kv="contiguous")
    page_size = draw(st.sampled_from([64, 16, 1, 3, 128]), 64)
    placement = draw(st.sampled_from(["contiguous", "sliced"]), "contiguous")
    arrays = strategies.make(problem)
    used = [-(-length // page_size) for length in problem.seqlens_k]
    table = np.full((problem.batch, max(used, default=0) + 1), 2**31 - 1, np.int32)
    for b, count in enumerate(used):
        table[b, :count] = sum(used[:b]) + np.arange(count)[::-1]
    pages, buffer = in_pages(arrays.k, problem.seqlens_k, page_size, table, sum(used) + 1, placement)
    k = framework.put(pages, buffer)[0]
    options = options_of(framework, problem, arrays)
    lengths = options.pop("seqused_k")
    out, lse = fa3.flash_attn_with_kvcache(
        framework.put(arrays.q, arrays.buffers["q"][0])[0], k, k[..., :512], cache_seqlens=lengths,
        page_table=framework.put(table)[0], softmax_scale=problem.softmax_scale, return_lse=True, **options)
    assert_right(problem, arrays, None, arrays.k, arrays.k[..., :512], framework.numpy(out), framework.numpy(lse),
                 problem.scale)


@every_backend
@pytest.mark.parametrize("absorbed", [False, True], ids=["qv", "absorbed"])
@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn"])
def test_new_rows_of_a_latent_cache(framework, dtype, absorbed):
    """Rows are appended to what k and v share, and seen."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape).astype(strategies.DTYPES[dtype])

    cache, new, q, qv = normal(2, 40, 1, 576), normal(2, 3, 1, 576), normal(2, 3, 16, 64), normal(2, 3, 16, 512)
    cached = np.array([30, 0], np.int32)
    whole = [np.concatenate([cache[b, :cached[b]], new[b]]) for b in range(2)]
    put_cache, put_new, lengths = (framework.put(x)[0] for x in (cache, new, cached))
    first = 0 if absorbed else 512
    queries = {"qv": framework.put(qv)[0]} if not absorbed else {}
    put_q = framework.put(np.concatenate([qv, q], axis=-1) if absorbed else q)[0]
    out = fa3.flash_attn_with_kvcache(
        put_q, put_cache[..., first:], put_cache[..., :512], k=put_new[..., first:], v=put_new[..., :512],
        cache_seqlens=lengths, causal=True, **queries)
    out, cache = framework.numpy(out), framework.numpy(put_cache)
    for b, rows in enumerate(whole):
        assert cache[b, :len(rows)].tobytes() == rows.tobytes()
        call = dict(q=q[b], k=rows[..., 512:], v=rows[..., :512], qv=qv[b], causal=True, scale=576**-0.5)
        reference.assert_close(out[b], reference.attention(**call)[0], reference.naive(**call), out.dtype)


@every_backend
def test_descales_of_both_parts(framework):
    """Without a descale of 1 anywhere: of qv and q it is q's, of the values in the scores and in the output v's. One of
    0 takes its part away, and signs count."""
    rng = np.random.default_rng(0)
    q, k, v, qv = (rng.standard_normal(shape).astype(strategies.DTYPES["float8_e4m3fn"])
                   for shape in ((1, 5, 4, 64), (1, 70, 2, 64), (1, 70, 2, 512), (1, 5, 4, 512)))
    put = {name: framework.put(x)[0] for name, x in dict(q=q, k=k, v=v, qv=qv).items()}
    for of_k, of_v in (([2.0, -0.5], [0.25, 3.0]), ([0.0, 0.0], [0.5, -1.5]), ([1.5, 4.0], [0.0, 0.0])):
        factors = dict(q_descale=np.array([0.5, -1.0, 2.0, 1.5], np.float32), k_descale=np.array(of_k, np.float32),
                       v_descale=np.array(of_v, np.float32))
        out, lse = fa3.flash_attn_func(**put, return_lse=True, causal=True,
                                       **{name: framework.put(x)[0] for name, x in factors.items()})
        call = dict(q=q[0], k=k[0], v=v[0], qv=qv[0], causal=True, **factors)
        (ref, ref_lse), out = reference.attention(**call), framework.numpy(out)
        reference.assert_close(out[0], ref, reference.naive(**call), out.dtype)
        reference.assert_lse_close(framework.numpy(lse)[0].T, ref_lse.T, dtype=q.dtype,
                                   slack=reference.fp8_score_error(**call)[..., 0])


@every_backend
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_absorbed_queries_of_16_bits_on_an_fp8_cache(framework, dtype):
    """The same bits as of q quantised by the caller."""
    rng = np.random.default_rng(0)
    q = framework.put(rng.standard_normal((2, 3, 16, 576)).astype(strategies.DTYPES[dtype]))[0]
    k = framework.put(rng.standard_normal((2, 100, 1, 576)).astype(strategies.DTYPES["float8_e4m3fn"]))[0]
    options = dict(cache_seqlens=framework.put(np.array([100, 65], np.int32))[0], causal=True)
    codes, descale = fa3.quantize_fp8(q, granularity="batch_head")
    expected = fa3.flash_attn_with_kvcache(codes, k, k[..., :512], q_descale=descale, out_dtype=dtype, **options)
    out = framework.numpy(fa3.flash_attn_with_kvcache(q, k, k[..., :512], **options))
    assert out.dtype == strategies.DTYPES[dtype] and np.isfinite(out.astype(np.float32)).all()
    assert out.tobytes() == framework.numpy(expected).tobytes()


@every_backend
def test_a_sequence_does_not_depend_on_the_others(framework):
    problem = Problem(seqlens_q=(3, 40, 1), seqlens_k=(300, 200, 65), ratio=16, head_dim=576, head_dim_v=512,
                      varlen=True, causal=True)
    arrays = strategies.make(problem)
    k = framework.put(arrays.k)[0]
    options = options_of(framework, problem, arrays)
    out = framework.numpy(fa3.flash_attn_varlen_func(framework.put(arrays.q)[0], k, k[..., :512], batch_invariant=True,
                                                     **options))
    for b in range(3):
        rows, keys = (slice(*ends[b:b + 2]) for ends in (arrays.cu_seqlens_q, arrays.cu_seqlens_k))
        one = framework.put(arrays.k[keys][None])[0]
        alone = fa3.flash_attn_func(framework.put(arrays.q[rows][None])[0], one, one[..., :512], causal=True,
                                    batch_invariant=True)
        assert framework.numpy(alone)[0].tobytes() == out[rows].tobytes()


@every_backend
@pytest.mark.parametrize(("batch", "seqlen_q", "seqlen_k"), [(0, 5, 5), (2, 0, 5), (2, 5, 0)])
@pytest.mark.parametrize("absorbed", [False, True], ids=["qv", "absorbed"])
def test_empty(framework, batch, seqlen_q, seqlen_k, absorbed):
    put = {name: framework.put(np.zeros((batch, rows, heads, dim), np.float16))[0] for name, rows, heads, dim in (
        ("q", seqlen_q, 4, 576 if absorbed else 64), ("k", seqlen_k, 1, 576), ("qv", seqlen_q, 4, 512))}
    k = put["k"][..., 0 if absorbed else 512:]
    queries = {} if absorbed else {"qv": put["qv"]}
    out, lse = fa3.flash_attn_func(put["q"], k, put["k"][..., :512], return_lse=True, **queries)
    assert tuple(out.shape) == (batch, seqlen_q, 4, 512)
    assert not framework.numpy(out).any() and np.isneginf(framework.numpy(lse)).all()


# What the GPU asks for.

@pytest.mark.gpu
@pytest.mark.parametrize(("change", "error", "message"), [
    ({"v": (1, 9, 1, 512)}, NotImplementedError, "v: memory of its own, .* must be k's first 512 columns"),
    ({"rotary_cos": (16, 16), "rotary_sin": (16, 16)}, NotImplementedError, "rotary_cos: given, .* give qv")], ids=str)
def test_what_absorbed_calls_need(change, error, message):
    torch = pytest.importorskip("torch")
    given = {name: torch.zeros(shape, dtype=torch.float16, device="cuda") for name, shape in change.items()}
    q, k, new = (torch.zeros(1, rows, 1, 576, dtype=torch.float16, device="cuda") for rows in (1, 9, 1))
    v = given.pop("v", k[..., :512])
    with pytest.raises(error, match=message):
        fa3.flash_attn_with_kvcache(q, k, v, k=new, v=new[..., :512], cache_seqlens=4, **given)


@pytest.mark.gpu
def test_what_is_missing_says_so():
    torch = pytest.importorskip("torch")
    q, qv, k = (torch.zeros(1, rows, 1, dim, dtype=torch.float16, device="cuda")
                for rows, dim in ((1, 64), (1, 512), (9, 576)))
    with pytest.raises(NotImplementedError, match=r"dropout_p: 0.1, but with qv"):
        fa3.flash_attn_func(q, k[..., 512:], k[..., :512], qv=qv, dropout_p=0.1, dropout_seed=1)
