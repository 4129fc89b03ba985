"""What only a GPU shows: features that are not built yet, streams, graphs, threads, devices, and very large arrays."""

import dataclasses
import itertools
import threading

import frameworks
import numpy as np
import pytest
import strategies
from strategies import Problem
from test_attention import assert_right, pose

import fa3

pytestmark = pytest.mark.gpu
cuda = frameworks.TorchCuda()


def half(torch, *shape):
    return torch.zeros(shape, dtype=torch.float16, device="cuda")


def ints(torch, *values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def dense_call(torch, **changes):
    call = {"q": half(torch, 2, 5, 4, 64), "k": half(torch, 2, 7, 2, 64), "v": half(torch, 2, 7, 2, 64)}
    return fa3.flash_attn_func(**{**call, **changes})


# Not built yet: each says what.

def wide_heads(torch):
    return dense_call(torch, q=half(torch, 2, 5, 4, 264), k=half(torch, 2, 7, 2, 264))


@pytest.mark.parametrize(("call", "named"), [
    (wide_heads, "q: head_dim 264")])
def test_what_is_not_built_says_so(torch, call, named):
    with pytest.raises(NotImplementedError, match=named):
        call(torch)


def test_arrays_on_different_devices(torch):
    with pytest.raises(BufferError, match=r"^k: .*CPU.*cuda:0"):
        dense_call(torch, k=torch.zeros((2, 7, 2, 64), dtype=torch.float16))
    with pytest.raises(BufferError, match=r"^sinks: .*CPU.*cuda:0"):
        dense_call(torch, sinks=np.zeros(4, np.float32))
    with pytest.raises(BufferError, match=r"^out: .*CPU.*cuda:0"):
        dense_call(torch, out=torch.zeros((2, 5, 4, 64), dtype=torch.float16))


@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
def test_last_dimension_is_contiguous(torch, name):
    rows = 5 if name in ("q", "out") else 7
    heads = 4 if name in ("q", "out") else 2
    with pytest.raises(ValueError, match=f"^{name}: stride 2 in the last dimension, needs 1 on the GPU"):
        dense_call(torch, **{name: half(torch, 2, rows, heads, 128)[..., ::2]})


# Order of work.

def call_problem(**changes):
    problem = dataclasses.replace(
        Problem(seqlens_q=(300, 300), seqlens_k=(513, 513), num_heads_kv=2, ratio=3, head_dim=128, head_dim_v=128,
                causal=True), **changes)
    return problem, strategies.make(problem)


def test_graph_replays_with_new_values(torch):
    problem, arrays = call_problem(placement_kv="sliced")  # off 16 bytes: a workspace, too
    q, k, v = (cuda.put(getattr(arrays, name), arrays.buffers[name][0])[0] for name in ("q", "k", "v"))
    kept = q.clone()
    fa3.flash_attn_func(q, k, v, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = fa3.flash_attn_func(q, k, v, causal=True, return_lse=True)
    q.zero_()
    graph.replay()
    q.copy_(kept)
    out.fill_(float("nan"))
    graph.replay()
    assert_right(problem, arrays, cuda.numpy(out), cuda.numpy(lse))


@pytest.mark.parametrize("how", ["current", "object", "handle"])
def test_stream_is_followed(torch, how):
    problem, arrays = call_problem()
    q, k, v = (cuda.put(getattr(arrays, name))[0] for name in ("q", "k", "v"))
    late = torch.zeros_like(q)
    stream = torch.cuda.Stream()
    fa3.flash_attn_func(late, k, v, causal=True)  # the first call loads the kernel, which waits for the GPU
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # some 100 ms: what does not wait for it reads zeros
        late.copy_(q)
        if how == "current":
            out = fa3.flash_attn_func(late, k, v, causal=True)
    if how != "current":
        named = stream if how == "object" else stream.cuda_stream
        out = fa3.flash_attn_func(late, k, v, causal=True, stream=named)
    assert not stream.query(), "the call waited for the GPU"
    stream.synchronize()
    assert_right(problem, arrays, cuda.numpy(out))


def test_call_does_not_wait_for_the_gpu(torch):
    _, arrays = call_problem()
    q, k, v = (cuda.put(getattr(arrays, name))[0] for name in ("q", "k", "v"))
    cu = ints(torch, 0, 300, 600)
    cu_k = ints(torch, 0, 513, 1026)

    def call():
        fa3.flash_attn_varlen_func(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu, cu_k, return_lse=True)

    call()  # CUDA loads a kernel when it is first launched, and may wait for the GPU then
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    call()
    assert not torch.cuda.current_stream().query()
    torch.cuda.synchronize()


def ragged_call(torch, cu_seqlens_q, cu_seqlens_k, **options):
    """300 queries on 400 keys, in two sequences that the lengths may lie about; out has rows of 7 around it."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(rows, 4, 64, device="cuda", dtype=torch.float16) for rows in (300, 400, 400))
    guarded = torch.full((500, 4, 64), 7.0, device="cuda", dtype=torch.float16)
    fa3.flash_attn_varlen_func(q, k, v, ints(torch, *cu_seqlens_q), ints(torch, *cu_seqlens_k),
                               out=guarded[100:400], **options)
    torch.cuda.synchronize()
    return guarded


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [
    (0, 200, 100), (-5, 150, 2**31 - 1), (2**31 - 1, -2**31, 0), (0, 1000, 2000), (50, 50, 50)], ids=str)
def test_lengths_that_lie_stay_inside_the_arrays(torch, lengths, causal):
    guarded = ragged_call(torch, lengths, lengths, causal=causal)
    assert (guarded[:100] == 7).all() and (guarded[400:] == 7).all()
    guarded = ragged_call(torch, (0, 150, 300), lengths, causal=causal, window_size=(30, -1))
    assert (guarded[:100] == 7).all() and (guarded[400:] == 7).all()
    assert guarded[100:400].isfinite().all(), "something other than keys was read"


@pytest.mark.parametrize(("lengths", "said"), [
    ((0, 200, 100), "falls from 200 to 100"), ((5, 150, 300), "begins with 5"), ((0, 150, 301), "ends with 301")])
def test_lengths_that_lie_are_told_on_request(torch, monkeypatch, lengths, said):
    monkeypatch.setenv("FA3_CHECK", "1")
    with pytest.raises(ValueError, match=f"cu_seqlens_q: {said}"):
        ragged_call(torch, lengths, (0, 200, 400))
    guarded = ragged_call(torch, (0, 150, 300), (0, 200, 400))
    assert guarded[100:400].isfinite().all()


def test_used_lengths_that_lie_are_told_on_request(torch, monkeypatch):
    monkeypatch.setenv("FA3_CHECK", "1")
    with pytest.raises(ValueError, match="seqused_k: 8 at 1, but the sequence has 7 rows"):
        dense_call(torch, seqused_k=ints(torch, 7, 8))


def test_threads_do_not_disturb_each_other(torch):
    problems = [call_problem(head_dim=d, head_dim_v=d) for d in (64, 96, 128, 256)]
    results = [None] * len(problems)

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(5):
                out, lse = pose(cuda, *problems[i], return_lse=True)
            torch.cuda.current_stream().synchronize()
            results[i] = cuda.numpy(out), cuda.numpy(lse)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (problem, arrays), result in zip(problems, results, strict=True):
        assert_right(problem, arrays, *result)


def test_every_device_works(torch):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    problem, arrays = call_problem()
    q, k, v = (cuda.put(getattr(arrays, name))[0].to("cuda:1") for name in ("q", "k", "v"))
    out = fa3.flash_attn_func(q, k, v, causal=True)  # the current device is cuda:0
    assert out.device == q.device
    assert_right(problem, arrays, cuda.numpy(out))
    with pytest.raises(BufferError, match=r"^k: .*cuda:0.*cuda:1"):
        fa3.flash_attn_func(q, k.to("cuda:0"), v)


# Large arrays.

@pytest.mark.parametrize("axis", ["batch", "row", "head"])
def test_offsets_past_two_to_the_31(torch, axis):
    """q, k, v and out lie side by side in one buffer of some 9 GB whose strides pass 2^31 elements."""
    problem = Problem(seqlens_q=(150, 150), seqlens_k=(150, 150), num_heads_kv=3, causal=True)
    arrays = strategies.make(problem)
    shape = arrays.q.shape
    far = {"batch": 2**31 + 2**16, "row": (2**31 + 2**16) // 149 // 8 * 8 + 8, "head": 2**30 + 2**16}[axis]
    strides = [shape[1] * shape[2] * 64, shape[2] * 64, 64, 1]
    strides[("batch", "row", "head").index(axis)] = far
    if axis == "row":  # batches and heads fit between two rows
        strides[0], strides[2] = shape[2] * 64, 64
    elif axis == "head":
        strides[0], strides[1] = shape[1] * 64, 64
    span = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    assert span > 2**31
    apart = 2**18  # room for what lies between two far steps of one array
    if torch.cuda.mem_get_info()[0] < 2 * (span + 4 * apart) + 2**30:
        pytest.skip(f"needs {2 * span / 2**30:.0f} GB of GPU memory")
    buffer = torch.full((span + 4 * apart,), float("nan"), dtype=torch.float16, device="cuda")
    views = [buffer.as_strided(shape, strides, i * apart) for i in range(4)]
    for view, name in zip(views, ("q", "k", "v"), strict=False):
        view.copy_(cuda.put(getattr(arrays, name))[0])
    out = fa3.flash_attn_func(*views[:3], causal=True, out=views[3])
    assert_right(problem, arrays, cuda.numpy(out.contiguous()))
    written = 4 * views[0].numel()
    assert buffer.numel() - int(torch.isnan(buffer).sum()) == written


def test_many_rows(torch):
    """Tiles and rows by the ten thousands: one sequence of 70,000 beside empty and short ones, causal."""
    lengths = [0, 70_000, 1, 0, 129]
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn((int(ends[-1]), 1, 64), dtype=torch.float16, device="cuda", generator=generator)
               for _ in range(3))
    cu = torch.from_numpy(ends).cuda()
    out, lse = fa3.flash_attn_varlen_func(q, k, v, cu, cu, causal=True, return_lse=True)
    for start, end in itertools.pairwise(ends.tolist()):
        for row in {start, (start + end) // 2, end - 1} if end > start else ():
            s = (k[start:row + 1, 0].double() @ q[row, 0].double()) / 8
            expected = torch.softmax(s, 0) @ v[start:row + 1, 0].double()
            assert (out[row, 0].double() - expected).abs().max() < 2e-3
            assert abs(float(lse[0, row]) - float(torch.logsumexp(s, 0))) < 1e-3
