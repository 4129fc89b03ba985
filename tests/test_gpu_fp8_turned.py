"""fp8 values that are turned once, in front of the kernel, where many tiles see them.

A call that says how many keys each sequence uses leaves turning to the tiles: where there is a kernel of the same tile,
the same products in the same order, so the same bits.
"""

import pytest
from compiled import MINIMAL
from gpu_problems import among_nan, exact, largest, tile

import fa3
from fa3 import _core

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MINIMAL, reason="a minimal build has no fp8")]
DIMS = [256, 240, 192, 176, 128, 112, 80, 64, 48]
QUERIES = 12350  # enough for causal calls too, and no multiple of a tile


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [1, 31, 33, 95, 96, 97, 127, 128, 129, 1000, 5000])
@pytest.mark.parametrize("dim", DIMS)
def test_values_turned_once_give_the_same_bits(torch, dim, keys, causal):
    generator = torch.Generator("cuda").manual_seed(keys)
    q = among_nan(torch, 1, QUERIES, 4, dim, generator)
    k, v = (among_nan(torch, 1, keys, 2, dim, generator) for _ in range(2))
    options = {"causal": causal, "num_splits": 1, "pack_gqa": False, "return_lse": True}
    turned = largest("float8_e4m3fn", dim, dim)
    with tile(turned):  # the plan may want another for few keys, or for lengths that it does not know
        plan = _core.plan(dtype="float8_e4m3fn", batch=1, seqlen_q=QUERIES, seqlen_k=keys, num_heads=4, num_heads_kv=2,
                          head_dim=dim, head_dim_v=dim, causal=causal, num_splits=1, pack_gqa=0,
                          v_strides=v.stride()[:3])
        assert plan["copy_v"] == 2 and _core.variants()[plan["variant"]] == turned, "or this test would see nothing"
        out, lse = fa3.flash_attn_func(q, k, v, **options)
        if turned["name"].replace("_turned", "") in {other["name"] for other in _core.variants()}:
            used = torch.full((1,), keys, dtype=torch.int32, device="cuda")
            by_tiles, lse_by_tiles = fa3.flash_attn_func(q, k, v, seqused_k=used, **options)
            assert torch.equal(out, by_tiles) and torch.equal(lse, lse_by_tiles)
        else:
            assert turned["head_dim"] == 256, "the only one with more keys than a kernel that turns"
    some = slice(-1300, None)  # the last queries: causal ones see keys, or just not
    reference = exact(torch, q[:, some], k, v, causal)
    error = (out[:, some].double() - reference).square().mean().sqrt()
    assert error <= 0.06 * reference.square().mean().sqrt()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [256, 64])
def test_a_sequence_uses_some_of_its_queries(torch, dim, causal):
    """Then values are not turned before: that kernel takes lengths from the host alone."""
    generator = torch.Generator("cuda").manual_seed(3)
    q = among_nan(torch, 1, QUERIES, 4, dim, generator)
    k, v = (among_nan(torch, 1, 1000, 2, dim, generator) for _ in range(2))
    used = torch.full((1,), 9000, dtype=torch.int32, device="cuda")
    out = fa3.flash_attn_func(q, k, v, causal=causal, seqused_q=used)
    reference = exact(torch, q[:, 8600:9000], k, v, causal)
    error = (out[:, 8600:9000].double() - reference).square().mean().sqrt()
    assert error <= 0.06 * reference.square().mean().sqrt()


@pytest.mark.parametrize("shape", ["one head for all", "one sequence for all", "packed heads"])
def test_shared_values_and_heads(torch, shape):
    generator = torch.Generator("cuda").manual_seed(7)
    rows = 1600 if shape == "packed heads" else 6200
    q = among_nan(torch, 3, rows, 8, 256, generator)
    batch, heads = {"one head for all": (3, 1), "one sequence for all": (1, 4), "packed heads": (3, 2)}[shape]
    k, v = (among_nan(torch, batch, 500, heads, 256, generator) for _ in range(2))
    if shape != "packed heads":
        k, v = (x.expand(3, 500, 4, 256) for x in (k, v))
    out = fa3.flash_attn_func(q, k, v, num_splits=1, pack_gqa=shape == "packed heads")
    q, out = q[:, -400:], out[:, -400:]
    reference = exact(torch, q, k, v, False)
    assert (out.double() - reference).square().mean().sqrt() <= 0.06 * reference.square().mean().sqrt()
