"""The public backward: against float64 in every framework, its arguments, its edges, and a model that learns by it."""

from dataclasses import replace

import frameworks
import ml_dtypes
import numpy as np
import philox
import pytest
import reference
import reference_gradients
import strategies
from hypothesis import given
from hypothesis import strategies as st
from strategies import Problem

import fa3

every_framework = pytest.mark.parametrize("framework", frameworks.ALL)
every_cpu_framework = pytest.mark.parametrize("framework", frameworks.CPU)
every_writable_framework = pytest.mark.parametrize("framework", frameworks.WRITABLE)


class Case:
    """A problem in a framework: its forward's result, and what the backward is called with."""

    def __init__(self, framework, problem, dropout_p=0.0, dropout_seed=None, with_dlse=False, deterministic=False):
        self.framework, self.problem = framework, problem
        self.dropout = dict(dropout_p=dropout_p, dropout_seed=dropout_seed)
        self.deterministic = deterministic
        self.arrays = arrays = strategies.make(problem)
        self.dout = strategies.make(replace(problem, head_dim=problem.head_dim_v), seed=1).q
        self.inputs = {name: framework.put(getattr(arrays, name), arrays.buffers[name][0])[0] for name in "qkv"}
        self.inputs["dout"] = framework.put(self.dout)[0]
        self.options = {name: framework.put(array)[0] for name, array in arrays.lengths.items() if array is not None}
        if arrays.sinks is not None:
            self.options["sinks"] = framework.put(arrays.sinks)[0]
        self.options |= dict(softmax_scale=problem.softmax_scale, causal=problem.causal, window_size=problem.window,
                             attention_chunk=problem.chunk, softcap=problem.softcap, **self.dropout,
                             **framework.options(self.inputs["q"]))
        q, k, v = (self.inputs[name] for name in "qkv")
        forward = fa3.flash_attn_varlen_func if problem.varlen else fa3.flash_attn_func
        self.inputs["out"], self.inputs["lse"] = forward(q, k, v, return_lse=True, **self.options)
        self.dlse = None
        if with_dlse:
            self.dlse = np.random.default_rng(2).standard_normal(arrays.lse.shape).astype(np.float32)

    def gradients(self, **more):
        if self.dlse is not None:
            more["dlse"] = self.framework.put(self.dlse)[0]
        call = fa3.flash_attn_varlen_backward if self.problem.varlen else fa3.flash_attn_backward
        return call(**self.inputs, **self.options, deterministic=self.deterministic, **more)

    def reference(self, naive=False):
        arrays, seed = self.arrays, self.dropout["dropout_seed"]
        return reference_gradients.batch(
            self.dout, arrays.q, arrays.k, arrays.v, sinks=arrays.sinks, dlse=self.dlse, naive=naive,
            p_drop=self.dropout["dropout_p"], seed=seed, **self.problem.formula, **arrays.lengths)

    def check(self, gradients):
        as_numpy = [self.framework.numpy(gradient) for gradient in gradients]
        assert len(as_numpy) == 3 + self.problem.sinks
        for name, got in zip("qkv", as_numpy, strict=False):
            like = getattr(self.arrays, name)
            assert got.shape == like.shape and got.dtype == like.dtype
        dsinks = as_numpy[3] if self.problem.sinks else None
        reference_gradients.assert_gradients_close(*as_numpy[:3], dsinks, self.reference(), self.reference(naive=True))


# The reference itself.

@pytest.mark.parametrize("p_drop", [0.0, 0.4])
@pytest.mark.parametrize("formula", [
    {}, {"causal": True}, {"window": (2, 1), "softcap": 1.5}, {"chunk": 3, "causal": True, "scale": 0.9}])
def test_the_reference_against_finite_differences(formula, p_drop):
    rng = np.random.default_rng(0)
    x = {name: rng.standard_normal(shape) for name, shape in (
        ("q", (5, 4, 3)), ("k", (7, 2, 3)), ("v", (7, 2, 4)), ("sinks", (4,)))}
    dout, dlse = rng.standard_normal((5, 4, 4)), rng.standard_normal((4, 5))
    keep = philox.keep(p_drop, 3, 0, 4, 5, 7)

    def result(**changes):
        a = x | changes
        return reference_gradients.evaluate(dout, a["q"], a["k"], a["v"], sinks=a["sinks"], dlse=dlse, keep=keep,
                                            p_drop=p_drop, **{"scale": 0.5, **formula})

    def value(**changes):
        one = result(**changes)
        return (one.out * dout).sum() + (one.lse * dlse).sum()

    gradients = result()
    for name, array in x.items():
        for index in np.ndindex(array.shape):
            step = np.zeros(array.shape)
            step[index] = 1e-5
            numeric = (value(**{name: array + step}) - value(**{name: array - step})) / 2e-5
            assert abs(numeric - getattr(gradients, f"d{name}")[index]) < 1e-8
    forward = reference.attention(x["q"], x["k"], x["v"], sinks=x["sinks"], **{"scale": 0.5, **formula})
    np.testing.assert_allclose(gradients.lse, forward[1], atol=1e-12)
    if p_drop == 0:
        np.testing.assert_allclose(gradients.out, forward[0], atol=1e-12)


# Every framework.

@every_framework
@given(data=st.data())
def test_gradients(framework, data):
    if framework.on_gpu:
        drawn = strategies.problems(dtypes=framework.dtypes[:2], total_work=2**21)
    else:
        drawn = strategies.problems(dtypes=(*framework.dtypes[:2], "float32"), total_work=2**20)
    problem = data.draw(drawn)
    dropout_p = data.draw(st.sampled_from([0.0, 0.2]))
    case = Case(framework, problem, dropout_p, 9, data.draw(st.booleans()), data.draw(st.booleans()))
    case.check(case.gradients())


@every_writable_framework
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("varlen", [False, True])
def test_gradients_are_written_where_asked(framework, dtype, varlen):
    if dtype not in framework.dtypes:
        pytest.skip(f"not on the GPU: {dtype}")
    problem = Problem(seqlens_q=(9, 9), seqlens_k=(12, 12), num_heads_kv=2, ratio=3, dtype=dtype, varlen=varlen,
                      sinks=True)
    case = Case(framework, problem)
    flats, given_arrays = [], {}
    for name in "qkv":
        like = getattr(case.arrays, name)
        buffer, view = strategies.place(np.full(like.shape, np.nan, like.dtype), "sliced")
        given_arrays[f"d{name}"], flat = framework.put(view, buffer)
        flats.append((view, buffer, flat))
    gradients = case.gradients(**given_arrays)
    assert all(got is given_arrays[name] for got, name in zip(gradients, ("dq", "dk", "dv"), strict=False))
    case.check(gradients)
    for view, buffer, flat in flats:  # around each there is still NaN
        buffer.reshape(-1)[...] = framework.numpy(flat)
        assert np.isfinite(view.astype(np.float32)).all()
        view[...] = np.nan
        assert np.isnan(buffer.astype(np.float32)).all()


def test_gradients_into_a_packed_array():
    """q, k and v as parts of one array, and so their gradients: memory that interleaves, and does not overlap."""
    qkv = np.random.default_rng(0).standard_normal((2, 10, 3, 4, 16)).astype(np.float32)
    q, k, v = (qkv[:, :, i] for i in range(3))
    out, lse = fa3.flash_attn_func(q, k, v, return_lse=True)
    packed = np.full_like(qkv, np.nan)
    fa3.flash_attn_backward(out, q, k, v, out, lse, **{f"d{n}": packed[:, :, i] for i, n in enumerate("qkv")})
    for i, gradient in enumerate(fa3.flash_attn_backward(out, q, k, v, out, lse)):
        assert np.array_equal(packed[:, :, i], gradient)


def test_arrays_of_jax_are_not_written():
    jax = pytest.importorskip("jax")
    case = Case(frameworks.Jax(), Problem(seqlens_q=(3,), seqlens_k=(3,)))
    with pytest.raises(BufferError, match=r"dk: this .* is read-only"):
        case.gradients(dk=jax.numpy.zeros(case.arrays.k.shape, "float16"))


def test_dtype_names_what_bytes_are():
    problem = Problem(seqlens_q=(5,), seqlens_k=(7,), dtype="bfloat16")
    case = Case(frameworks.Numpy(), problem)
    expected = case.gradients()
    case.inputs = {name: x if name == "lse" else x.view(np.uint16) for name, x in case.inputs.items()}
    for got, wanted in zip(case.gradients(dtype="bfloat16"), expected, strict=True):
        assert got.tobytes() == wanted.tobytes() and wanted.dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_autograd_of_torch(softcap):
    """Bound to PyTorch's autograd in float64, lse as a second result: its own finite differences agree."""
    torch = pytest.importorskip("torch")
    options = dict(causal=True, softcap=softcap, dropout_p=0.3, dropout_seed=torch.tensor([4]))

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            out, lse = fa3.flash_attn_func(q, k, v, return_lse=True, **options)
            ctx.save_for_backward(q, k, v, out, lse)
            return out, lse

        @staticmethod
        def backward(ctx, dout, dlse):
            q, k, v, out, lse = ctx.saved_tensors
            return fa3.flash_attn_backward(dout, q, k, v, out, lse, dlse=dlse, **options)

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
               for shape in ((1, 4, 2, 3), (1, 6, 1, 3), (1, 6, 1, 2)))
    assert torch.autograd.gradcheck(lambda *x: Attention.apply(*x)[0], (q, k, v))
    total = (Attention.apply(q, k, v)[1] * 2).sum()  # lse is float32, too coarse for gradcheck's steps
    s = torch.einsum("bihd,bjkd->bhij", q, k) * 3 ** -0.5
    s = softcap * torch.tanh(s / softcap) if softcap else s
    s = s.masked_fill(~torch.ones(4, 6).tril(2).bool(), -torch.inf)
    expected = torch.autograd.grad(2 * s.logsumexp(-1).sum(), (q, k))
    for got, wanted in zip(torch.autograd.grad(total, (q, k)), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


# On the GPU: tiles of every kind, and sums in one order.

@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head_dims", [(64, 64), (96, 96), (128, 128), (160, 160), (192, 128), (192, 192), (256, 256)])
@pytest.mark.parametrize("how", [
    {}, {"causal": True}, {"window": (100, 30)}, {"chunk": 150, "causal": True}, {"softcap": 3.0}])
@pytest.mark.parametrize(("deterministic", "dropout_p"), [(False, 0.0), (True, 0.0), (False, 0.3)])
def test_tiles_of_the_gpu(dtype, head_dims, how, deterministic, dropout_p):
    problem = Problem(seqlens_q=(300, 128, 1), seqlens_k=(400, 128, 70), num_heads_kv=2, ratio=3, dtype=dtype,
                      head_dim=head_dims[0], head_dim_v=head_dims[1], varlen=True, **how)
    case = Case(frameworks.TorchCuda(), problem, dropout_p, 2**33 + 1, deterministic=deterministic)
    case.check(case.gradients())


@pytest.mark.gpu
@pytest.mark.parametrize("head_dims", [(192, 128), (152, 160), (256, 256)])
@pytest.mark.parametrize("how", [{}, {"causal": True}, {"window": (70, 20)}])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_pairs_of_thread_blocks(head_dims, how, deterministic, dropout_p):
    """Keys that end in a pair's first block, between its two, and in the second; and nothing at all."""
    problem = Problem(seqlens_q=(70, 65, 1, 64, 129, 2, 128, 0, 200), seqlens_k=(0, 1, 63, 64, 65, 127, 128, 129, 193),
                      num_heads_kv=2, ratio=2, dtype="bfloat16", head_dim=head_dims[0], head_dim_v=head_dims[1],
                      varlen=True, **how)
    case = Case(frameworks.TorchCuda(), problem, dropout_p, 5, deterministic=deterministic)
    case.check(case.gradients())


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_deterministic_gradients_repeat_their_bits(head_dim, causal):
    problem = Problem(seqlens_q=(2000, 2000), seqlens_k=(2000, 2000), num_heads_kv=8, ratio=2, head_dim=head_dim,
                      head_dim_v=head_dim, causal=causal)
    case = Case(frameworks.TorchCuda(), problem, deterministic=True)
    first = [case.framework.numpy(x).tobytes() for x in case.gradients()]
    for _ in range(10):
        assert [case.framework.numpy(x).tobytes() for x in case.gradients()] == first


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_gradients_of_a_captured_call(head_dim):
    """A graph's kernels begin as early as the call's own, and do the same with other values."""
    torch = pytest.importorskip("torch")

    def draw():
        return [torch.randn(2, 1500, heads, head_dim, device="cuda").bfloat16() for heads in (16, 8, 8, 16)]

    q, k, v, dout = arrays = draw()
    out, lse = fa3.flash_attn_func(q, k, v, return_lse=True)

    def call():
        return fa3.flash_attn_backward(dout, q, k, v, out, lse, deterministic=True)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(3):
        others = draw()
        results = fa3.flash_attn_func(*others[:3], return_lse=True)
        for array, other in zip((*arrays, out, lse), (*others, *results), strict=True):
            array.copy_(other)
        graph.replay()
        for got, expected in zip(captured, call(), strict=True):
            assert torch.equal(got, expected)


# Nothing to see.

@every_framework
@pytest.mark.parametrize("problem", strategies.EMPTY_PROBLEMS, ids=str)
def test_empty(framework, problem):
    case = Case(framework, problem)
    gradients = [framework.numpy(x) for x in case.gradients()]
    assert [x.shape for x in gradients] == [case.arrays.q.shape, case.arrays.k.shape, case.arrays.v.shape,
                                            (4,)][:3 + problem.sinks]
    assert all((x == 0).all() for x in gradients)


def test_an_lse_that_is_the_sink_hands_its_gradient_on():
    """Queries 0 to 2 see no key: their lse is the sink, and nothing else."""
    q, k = np.ones((1, 5, 2, 4), np.float32), np.ones((1, 2, 2, 4), np.float32)
    sinks = np.array([0.5, -1], np.float32)
    out, lse = fa3.flash_attn_func(q, k, k, causal=True, sinks=sinks, return_lse=True)
    dlse = np.zeros_like(lse)
    dlse[0, :, :3] = [[1, 2, 4], [0, 0, 8]]
    *gradients, dsinks = fa3.flash_attn_backward(np.zeros_like(out), q, k, k, out, lse, causal=True, sinks=sinks,
                                                 dlse=dlse)
    assert all((x == 0).all() for x in gradients) and dsinks.tolist() == [7, 8]


@every_framework
@pytest.mark.parametrize("softcap", [0.0, 1.0])
def test_scores_that_a_scale_of_zero_makes_equal(framework, softcap):
    case = Case(framework, Problem(seqlens_q=(129,), seqlens_k=(5,), softmax_scale=0.0, softcap=softcap))
    case.check(case.gradients())


# The cases of every day.

@every_framework
@pytest.mark.parametrize(("shape", "causal"), [
    ((1, 512, 8, 64), True),
    *(((batch, seqlen, heads, dim), causal) for batch, seqlen, heads, dim in
      ((1, 32, 4, 16), (1, 64, 8, 32), (2, 128, 8, 32)) for causal in (False, True))])
def test_case_7(framework, shape, causal):
    """fp16, forward and backward with dropout 0.1."""
    batch, seqlen, heads, dim = shape
    problem = Problem(seqlens_q=(seqlen,) * batch, seqlens_k=(seqlen,) * batch, num_heads_kv=heads, head_dim=dim,
                      head_dim_v=dim, causal=causal)
    case = Case(framework, problem, 0.1, 2**40 + 17)
    exact, naive = case.reference(), case.reference(naive=True)
    out = framework.numpy(case.inputs["out"])
    reference.assert_close(out, exact.out, naive.out, np.float16)
    reference.assert_lse_close(framework.numpy(case.inputs["lse"]), exact.lse)
    gradients = [framework.numpy(x) for x in case.gradients()]
    reference_gradients.assert_gradients_close(*gradients, None, exact, naive)


def test_no_heads():
    q, k = np.zeros((2, 3, 0, 16), np.float32), np.ones((2, 8, 2, 16), np.float32)
    gradients = fa3.flash_attn_backward(q, q, k, k, q, np.zeros((2, 0, 3), np.float32), sinks=np.zeros(0, np.float32))
    assert [x.shape for x in gradients] == [q.shape, k.shape, k.shape, (0,)]
    assert not any(x.any() for x in gradients)
