"""Counters and parts in memory that nobody zeroes, on a GPU: used memory, graphs, streams, repeats.

tests/test_grid_model.py has the same in a model; results of drawn problems are compared in tests/test_attention.py.
"""

import dataclasses
import itertools

import frameworks
import pytest
import strategies
from compiled import MINIMAL
from strategies import Problem
from test_attention import assert_right, pose

import fa3
from fa3 import _core

pytestmark = pytest.mark.gpu
cuda = frameworks.TorchCuda()
CONTENTS = ("zeros", "ones", "random")


def plan_of(problem):
    sms = _core.device_info(0)["num_sms"]
    return _core.plan(
        dtype=problem.dtype, batch=problem.batch, seqlen_q=problem.seqlens_q[0], seqlen_k=problem.seqlens_k[0],
        num_heads=problem.num_heads, num_heads_kv=problem.num_heads_kv, head_dim=problem.head_dim,
        head_dim_v=problem.head_dim_v, causal=problem.causal, num_sms=sms, **problem.how)


class Case:
    """A call that uses its workspace in one way; `out` is its array, so that nothing but a workspace is allocated."""

    def __init__(self, problem):
        self.problem, self.arrays = problem, strategies.make(problem)
        self.q, self.k, self.v = (cuda.put(getattr(self.arrays, name))[0] for name in ("q", "k", "v"))
        self.out = self.q.new_full(self.q.shape, float("nan"))
        self.plan = plan_of(problem)
        self.bytes = self.plan["workspace"]

    def call(self):
        fa3.flash_attn_func(self.q, self.k, self.v, out=self.out, causal=self.problem.causal, **self.problem.how)

    def bits(self):
        return cuda.numpy(self.out).tobytes()

    def assert_right(self):
        assert_right(self.problem, self.arrays, cuda.numpy(self.out))


BASE = Problem(seqlens_q=(300, 300), seqlens_k=(513, 513), num_heads_kv=2, ratio=3, head_dim=128, head_dim_v=128,
               dtype="bfloat16", causal=True)
DECODE = dataclasses.replace(BASE, seqlens_q=(1, 1), seqlens_k=(2000, 2000), ratio=8, pack_gqa=True)


def counted(**changes):
    """A problem whose pieces are handed out by a counter, to as many multiprocessors as that allows."""
    sms = _core.device_info(0)["num_sms"]
    for left in (16, 8, 6, 4, 3, 2, 1):
        problem = dataclasses.replace(BASE, sm_margin=sms - left, **changes)
        if plan_of(problem)["dynamic"]:
            return Case(problem)
    pytest.fail("the plan uses no counter for unequal tiles, however few multiprocessors there are")


def counter():
    case = counted(num_splits=1)
    assert (case.plan["dynamic"], case.plan["num_splits"], case.bytes) == (1, 1, 256)
    return case


def parts(num_splits=20):
    case = Case(dataclasses.replace(DECODE, num_splits=num_splits))
    assert (case.plan["dynamic"], case.plan["num_splits"], case.plan["pack_gqa"]) == (0, num_splits, 8)
    assert case.plan["cluster"] == (num_splits if num_splits <= 16 else 1)
    return case


def parts_in_cluster():
    return parts(num_splits=7)


def counted_parts():
    case = counted(num_splits=4)
    assert case.plan["dynamic"] and case.plan["num_splits"] == 4
    return case


every_case = pytest.mark.parametrize("make", [counter, parts, parts_in_cluster, counted_parts])


def fill(block, content):
    """In place: memory for a copy would be handed out again, and be the workspace in the block's stead."""
    if content == "random":
        block.random_(0, 256)
    else:
        block.fill_(255 if content == "ones" else 0)


def next_block(torch, nbytes):
    """What PyTorch hands out next for so many bytes: the workspace of the next call, once this one is dropped."""
    return torch.empty(nbytes, dtype=torch.uint8, device="cuda")


@every_case
@pytest.mark.parametrize("content", CONTENTS)
def test_workspace_may_hold_anything(torch, make, content):
    case, bits = make(), set()
    for _ in range(4):
        block = next_block(torch, case.bytes)
        fill(block, content)
        address = block.data_ptr()
        del block
        case.out.fill_(float("nan"))
        case.call()
        assert next_block(torch, case.bytes).data_ptr() == address, "the workspace was another block"
        case.assert_right()
        bits.add(case.bits())
    assert len(bits) == 1


@every_case
def test_calls_in_a_row_share_a_workspace(torch, make):
    """Without a pause, each finds what the one before has left: the same bits every time."""
    case, outs = make(), []
    for _ in range(30):
        case.call()
        outs.append(case.out.clone())
    case.assert_right()
    assert len({cuda.numpy(out).tobytes() for out in outs}) == 1


@every_case
@pytest.mark.parametrize("refilled", [False, True])
def test_graph_replays(torch, make, refilled):
    """A graph's call has one ticket for ever. Its workspace holds what the replay before left, or anything."""
    case = make()
    case.call()  # CUDA loads the kernel
    case.assert_right()
    bits, content = case.bits(), next_block(torch, case.bytes)
    fill(content, "random")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        block = next_block(torch, case.bytes)
        address = block.data_ptr()
        if refilled:
            block.copy_(content)
        del block
        case.call()
        assert next_block(torch, case.bytes).data_ptr() == address, "the workspace was another block"
    for name in (*CONTENTS, *CONTENTS):
        fill(content, name)
        case.out.fill_(float("nan"))
        graph.replay()
        assert case.bits() == bits
        graph.replay()
        assert case.bits() == bits


def test_graph_of_several_calls(torch):
    """Calls of different kinds that follow each other in one memory, replayed."""
    cases = [make() for make in (counter, parts, parts_in_cluster, counted_parts, counter, parts)]
    for case in cases:
        case.call()
        case.assert_right()
    bits = [case.bits() for case in cases]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for case in cases:
            case.call()
    for _ in range(5):
        for case in cases:
            case.out.fill_(float("nan"))
        graph.replay()
        assert [case.bits() for case in cases] == bits


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations_with_replacement(
    [counter, parts, parts_in_cluster, counted_parts], 2)), ids=lambda make: make.__name__)
def test_two_streams_at_once(torch, one, other):
    """Each call has a workspace of its own, whatever runs beside it."""
    cases = one(), other()
    streams = [torch.cuda.Stream() for _ in cases]
    outs = [[], []]
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(5_000_000)  # both begin with a queue behind them
    for _ in range(20):
        for case, stream, kept in zip(cases, streams, outs, strict=True):
            with torch.cuda.stream(stream):
                case.call()
                kept.append(case.out.clone())
    torch.cuda.synchronize()
    for case, kept in zip(cases, outs, strict=True):
        case.assert_right()
        assert {cuda.numpy(out).tobytes() for out in kept} == {case.bits()}


@pytest.mark.parametrize("num_splits", [2, 3, 5, 8, 13, 16])
@pytest.mark.parametrize("dims", [{}, {"head_dim": 256, "head_dim_v": 256}], ids=["one warpgroup", "two warpgroups"])
@pytest.mark.parametrize("seqlen_q", [1, 8, 9])
def test_clusters_of_every_size(torch, num_splits, dims, seqlen_q):
    """Some rows, and all; sizes that are no powers of two; a warpgroup without rows; lse too."""
    if dims and MINIMAL:
        pytest.skip("a minimal build has one head dim")
    problem = dataclasses.replace(DECODE, seqlens_q=(seqlen_q,) * 2, num_splits=num_splits, sinks=True, **dims)
    assert plan_of(problem)["cluster"] == num_splits
    arrays = strategies.make(problem)
    out, lse = (cuda.numpy(x) for x in pose(cuda, problem, arrays, return_lse=True))
    assert_right(problem, arrays, out, lse)


@pytest.mark.parametrize("pack_gqa", [False, True])
@pytest.mark.parametrize("ratio", [3, 5, 6, 7, 12])
@pytest.mark.parametrize("num_splits", [0, 1, 3, 1000])
def test_repeats_bit_for_bit(torch, ratio, pack_gqa, num_splits):
    """Whoever is last joins the parts, in order: bits do not depend on who that is. On few multiprocessors and many."""
    problem = dataclasses.replace(BASE, seqlens_q=(70, 70), ratio=ratio, pack_gqa=pack_gqa, num_splits=num_splits)
    arrays = strategies.make(problem)
    results = [[cuda.numpy(x).tobytes() for x in pose(cuda, problem, arrays, return_lse=True)] for _ in range(5)]
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("pack_gqa", [False, True, None])
@pytest.mark.parametrize("ratio", [1, 3, 7, 12])
def test_batch_invariant_packing(torch, ratio, pack_gqa):
    """The same sequence alone, beside 40 others, and beside one that is much longer: the same bits."""
    lengths = [(70,), (70,) * 41, (70, 900)]
    results = []
    alone = Problem(seqlens_q=(70,), seqlens_k=(300,), num_heads_kv=2, ratio=ratio, varlen=True, causal=True)
    first = strategies.make(alone)
    for seqlens in lengths:
        problem = dataclasses.replace(alone, seqlens_q=seqlens, seqlens_k=(300,) * len(seqlens), pack_gqa=pack_gqa)
        arrays = strategies.make(problem)
        for name, rows in (("q", 70), ("k", 300), ("v", 300)):
            getattr(arrays, name)[:rows] = getattr(first, name)
        out = cuda.numpy(pose(cuda, problem, arrays, batch_invariant=True))
        assert_right(problem, arrays, out)
        results.append(out[:70].tobytes())
    assert len(set(results)) == 1


def test_very_many_parts_of_long_keys(torch):
    """One query on 200,000 keys, in as many parts as the plan likes, and in one: the same to rounding."""
    torch.manual_seed(0)
    q = torch.randn(1, 1, 12, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, 200_000, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    scores = torch.einsum("hd,khd->hk", q[0, 0].double(), k[0].double().repeat_interleave(6, 1)) / 128**0.5
    expected = torch.einsum("hk,khd->hd", scores.softmax(-1), v[0].double().repeat_interleave(6, 1))
    for num_splits, pack_gqa in itertools.product((0, 1, 64, 5000), (False, True)):
        out, lse = fa3.flash_attn_func(q, k, v, num_splits=num_splits, pack_gqa=pack_gqa, return_lse=True)
        assert (out[0, 0].double() - expected).abs().max() < 2e-4
        assert (lse[0, :, 0].double() - scores.logsumexp(-1)).abs().max() < 1e-3
