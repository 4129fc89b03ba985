"""Thread blocks in pairs, which share keys and values where those are wide and many (src/kernels/forward_pair.cuh).

On an odd number of multiprocessors there are none: the same products in the same order, so the same bits.
"""

import pytest
from gpu_problems import among_nan, exact, largest, tile

import fa3
from fa3 import _core

MINIMAL = max(v["head_dim"] for v in _core.variants() if v["dtype"] == "bfloat16" and v["tile_m"] == 128) < 256
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MINIMAL, reason="a minimal build has no wide head dims")]
TILE = 128
WIDE = [(256, 256), (232, 240), (192, 192), (192, 128), (160, 160), (152, 144)]


def inputs(torch, dtype, batch, rows, keys, heads, heads_kv, dims, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    sizes = ((rows, heads, dims[0]), (keys, heads_kv, dims[0]), (keys, heads_kv, dims[1]))
    return [among_nan(torch, batch, *size, generator, dtype) for size in sizes]


def plan_of(q, k, v, **options):
    dtype = str(q.dtype).removeprefix("torch.")
    return _core.plan(dtype=dtype, batch=q.shape[0], seqlen_q=q.shape[1], seqlen_k=k.shape[1], num_heads=q.shape[2],
                      num_heads_kv=k.shape[2], head_dim=q.shape[3], head_dim_v=v.shape[3], **options)


def check_pairs(torch, q, k, v, reference_heads=2, **options):
    """That pairs change no bit, and that some rows are as in float64."""
    with tile(largest(str(q.dtype).removeprefix("torch."), q.shape[3], v.shape[3])):
        plan = plan_of(q, k, v, **{name: options[name] for name in ("causal", "pack_gqa") if name in options})
        assert plan["paired"] and plan["cluster"] == 2, "or this test would see nothing"
        out, lse = fa3.flash_attn_func(q, k, v, return_lse=True, **options)
        alone, lse_alone = fa3.flash_attn_func(q, k, v, return_lse=True, sm_margin=1, **options)
    if plan["num_splits"] == 1:  # joined parts have other bits
        assert torch.equal(out, alone) and torch.equal(lse, lse_alone)
    ratio = q.shape[2] // k.shape[2]
    some, first = slice(-300, None), slice(reference_heads)
    reference = exact(torch, q[:1, some, : reference_heads * ratio], k[:1, :, first], v[:1, :, first],
                      options.get("causal", False))
    error = (out[:1, some, : reference_heads * ratio].double() - reference).square().mean().sqrt()
    bound = 0.06 if q.dtype.itemsize == 1 else 0.006
    assert error <= bound * reference.square().mean().sqrt()
    return plan


@pytest.mark.parametrize("keys", [4096, 4097, 4159, 4161, 4224, 5000])
@pytest.mark.parametrize(("dims", "causal"), [(dims, causal) for dims in WIDE for causal in (False, True)
                                              if causal or dims[0] <= 192], ids=str)
def test_pairs_give_the_same_bits(torch, dims, keys, causal):
    check_pairs(torch, *inputs(torch, torch.bfloat16, 2, 18 * TILE, keys, 8, 8, dims), causal=causal, num_splits=1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [2 * TILE, 2 * TILE - 1, TILE + 1, 4 * TILE - 65])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_last_tile_may_have_few_rows(torch, dtype, rows, causal):
    """As few as one, so that one thread block of the pair has rows that nobody asked for."""
    dims = (256, 256) if causal else (192, 192)
    q, k, v = inputs(torch, getattr(torch, dtype), 7, rows, 4100, 20, 20, dims)
    check_pairs(torch, q, k, v, causal=causal, num_splits=1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [4096, 4191, 6000])
@pytest.mark.parametrize("dim", [256, 240, 192, 176, 128, 112])
def test_eight_bits(torch, dim, keys, causal):
    check_pairs(torch, *inputs(torch, torch.float8_e4m3fn, 1, 96 * TILE, keys, 4, 2, (dim, dim)), causal=causal,
                num_splits=1, pack_gqa=False)


def test_rows_that_see_nothing(torch):
    """Causal, with more queries than keys: the first tiles have no block of keys, those of others begin in a pair."""
    q, k, v = inputs(torch, torch.bfloat16, 1, 64 * TILE, 4096 + 70, 8, 4, (256, 256))
    check_pairs(torch, q, k, v, causal=True, pack_gqa=False, num_splits=1)
    out = fa3.flash_attn_func(q, k, v, causal=True)
    assert not out[:, : 64 * TILE - 4096 - 70].any()


@pytest.mark.parametrize("causal", [False, True])
def test_packed_heads(torch, causal):
    check_pairs(torch, *inputs(torch, torch.bfloat16, 2, 9 * TILE, 4096, 16, 2, (192, 192)), causal=causal,
                pack_gqa=True, num_splits=1)


def test_the_last_round_is_split(torch):
    """Its tiles' parts lie in memory, though thread blocks are clusters."""
    plan = check_pairs(torch, *inputs(torch, torch.bfloat16, 1, 18 * TILE, 4096 + 33, 8, 8, (192, 192)))
    assert plan["num_splits"] > 1 and plan["whole_tiles"] == 132


def test_dropout(torch):
    q, k, v = inputs(torch, torch.float16, 1, 18 * TILE, 4096, 8, 8, (256, 256))
    options = {"dropout_p": 0.2, "dropout_seed": 5, "causal": True}
    assert plan_of(q, k, v, causal=True)["paired"]
    assert torch.equal(fa3.flash_attn_func(q, k, v, **options),
                       fa3.flash_attn_func(q, k, v, sm_margin=1, **options))


def test_a_graph_is_replayed(torch):
    """The pairs' barriers and counter are made anew in each launch."""
    q, k, v = inputs(torch, torch.bfloat16, 1, 36 * TILE, 8192, 8, 8, (256, 256))
    assert plan_of(q, k, v, causal=True)["dynamic"] and plan_of(q, k, v, causal=True)["paired"]
    expected, out = fa3.flash_attn_func(q, k, v, causal=True), torch.empty(q.shape, dtype=q.dtype, device="cuda")
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
