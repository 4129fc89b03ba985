"""Thread blocks in pairs, which share keys and values of 8 bits that many tiles see (src/kernels/forward_pair.cuh).

On an odd number of multiprocessors there are none: the same products in the same order, so the same bits.
"""

import pytest
from compiled import MINIMAL
from gpu_problems import among_nan, exact, largest, tile

import fa3
from fa3 import _core

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MINIMAL, reason="a minimal build has no fp8")]
TILE = 128


def inputs(torch, batch, rows, keys, heads, heads_kv, dim=256):
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = ((rows, heads), (keys, heads_kv), (keys, heads_kv))
    return [among_nan(torch, batch, *size, dim, generator) for size in sizes]


def plan_of(q, k, v, **options):
    return _core.plan(dtype="float8_e4m3fn", batch=q.shape[0], seqlen_q=q.shape[1], seqlen_k=k.shape[1],
                      num_heads=q.shape[2], num_heads_kv=k.shape[2], head_dim=q.shape[3], head_dim_v=v.shape[3],
                      **options)


def check_pairs(torch, q, k, v, **options):
    """That pairs change no bit, and that some rows are as in float64."""
    with tile(largest("float8_e4m3fn", q.shape[3], v.shape[3])):
        plan = plan_of(q, k, v, **options)
        assert plan["paired"] and plan["cluster"] == 2, "or this test would see nothing"
        out, lse = fa3.flash_attn_func(q, k, v, return_lse=True, **options)
        alone, lse_alone = fa3.flash_attn_func(q, k, v, return_lse=True, sm_margin=1, **options)
    if plan["num_splits"] == 1:  # joined parts have other bits
        assert torch.equal(out, alone) and torch.equal(lse, lse_alone)
    ratio = q.shape[2] // k.shape[2]
    some, heads = slice(-300, None), 2  # of k
    reference = exact(torch, q[:1, some, : heads * ratio], k[:1, :, :heads], v[:1, :, :heads],
                      options.get("causal", False))
    error = (out[:1, some, : heads * ratio].double() - reference).square().mean().sqrt()
    assert error <= 0.06 * reference.square().mean().sqrt()
    return plan


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [4096, 4097, 4191, 4224, 6000])
@pytest.mark.parametrize("dim", [256, 240, 192, 176, 128, 112])
def test_pairs_give_the_same_bits(torch, dim, keys, causal):
    check_pairs(torch, *inputs(torch, 1, 96 * TILE, keys, 4, 2, dim), causal=causal, num_splits=1, pack_gqa=False)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [34 * TILE, 34 * TILE - 1, 33 * TILE + 1, 34 * TILE - 65])
def test_the_last_tile_may_have_few_rows(torch, rows, causal):
    """As few as one, so that one thread block of the pair has rows that nobody asked for."""
    check_pairs(torch, *inputs(torch, 2, rows, 4100, 8, 8), causal=causal, num_splits=1)


def test_rows_that_see_nothing(torch):
    """Causal, with more queries than keys: the first tiles have no block of keys, those of others begin in a pair."""
    q, k, v = inputs(torch, 1, 96 * TILE, 4096 + 70, 8, 4)
    check_pairs(torch, q, k, v, causal=True, pack_gqa=False, num_splits=1)
    out = fa3.flash_attn_func(q, k, v, causal=True)
    assert not out[:, : 96 * TILE - 4096 - 70].any()


@pytest.mark.parametrize("causal", [False, True])
def test_packed_heads(torch, causal):
    check_pairs(torch, *inputs(torch, 2, 9 * TILE, 4096, 16, 2), causal=causal, pack_gqa=True, num_splits=1)


def test_the_last_round_is_split(torch):
    """Its tiles' parts lie in memory, though thread blocks are clusters."""
    plan = check_pairs(torch, *inputs(torch, 1, 18 * TILE, 4096 + 33, 8, 8))
    assert plan["num_splits"] > 1 and plan["whole_tiles"] == 132


def test_a_graph_is_replayed(torch):
    """The pairs' barriers and counter are made anew in each launch."""
    q, k, v = inputs(torch, 1, 36 * TILE, 8192, 8, 8)
    assert plan_of(q, k, v, causal=True)["dynamic"] and plan_of(q, k, v, causal=True)["paired"]
    expected = fa3.flash_attn_func(q, k, v, causal=True)
    out = torch.empty_like(expected)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        fa3.flash_attn_func(q, k, v, causal=True, out=out)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            fa3.flash_attn_func(q, k, v, causal=True, out=out)
    for _ in range(20):
        out.fill_(float("nan"))
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)
