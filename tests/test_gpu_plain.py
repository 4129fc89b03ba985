"""Calls without extras have kernels of their own (PlainArgs in src/kernels/forward_args.h).

What an `out` that 16-byte stores do not fit keeps from them computes the same in the same order, so it has the same
bits; and some rows are compared with float64.
"""

import pytest
from gpu_problems import FORCIBLE, among_nan, exact, tile

import fa3
from fa3 import _core

HEADS, HEADS_KV = 6, 2
MASKS = {"full": {}, "causal": {"causal": True}, "window": {"window_size": (70, 3)}, "chunk": {"attention_chunk": 100}}
OPTIONS = {"num_splits": 1, "pack_gqa": False}


def sizes_of(variant):
    """What _core.plan() wants to know beside the lengths."""
    return {name: variant[name] for name in ("dtype", "head_dim", "head_dim_v")} | {
        "num_heads": HEADS, "num_heads_kv": HEADS_KV, "pack_gqa": 0}


def has_plain(variant):
    with tile(variant):
        plan = _core.plan(batch=1, seqlen_q=64, seqlen_k=64, has_qv=variant["has_qv"], num_splits=1,
                          **sizes_of(variant))
    return bool(plan["plain"])


PLAIN = [v for v in FORCIBLE if has_plain(v)]


def arrays(torch, variant, batch, rows_q, rows_k):
    generator = torch.Generator("cuda").manual_seed(rows_q)
    dtype = getattr(torch, variant["dtype"])
    shapes = ((rows_q, HEADS, "head_dim"), (rows_k, HEADS_KV, "head_dim"), (rows_k, HEADS_KV, "head_dim_v"))
    return [among_nan(torch, batch, rows, heads, variant[dim], generator, dtype) for rows, heads, dim in shapes]


def outs(torch, variant, shape):
    """Two arrays for the same result, the second one element away from where 16 bytes may lie; both hold NaN."""
    dtype = torch.bfloat16 if variant["dtype"] == "float8_e4m3fn" else getattr(torch, variant["dtype"])
    count = torch.Size(shape).numel()
    room = torch.full((2, count + 8), float("nan"), dtype=dtype, device="cuda")
    return [room[i, i:count + i].view(shape) for i in range(2)]


@pytest.mark.gpu
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("variant", PLAIN, ids=lambda v: v["name"])
def test_the_same_bits_as_with_extras(torch, variant, mask):
    m, n = variant["tile_m"], variant["tile_n"]
    lengths_q = [0, 1, m - 1, m, m + 1, 3 * m + 7, 5, 300]
    lengths_k = [n + 1, n, 2 * n + 1, 1, n - 1, 5 * n + 3, 0, 1000]
    ends_q, ends_k = (torch.tensor([0, *x]).cumsum(0) for x in (lengths_q, lengths_k))
    q, k, v = (x[0] for x in arrays(torch, variant, 1, sum(lengths_q), sum(lengths_k)))
    aligned, odd = outs(torch, variant, (*q.shape[:2], variant["head_dim_v"]))
    with tile(variant):
        (out, lse), (other, other_lse) = (fa3.flash_attn_varlen_func(
            q, k, v, ends_q.int().cuda(), ends_k.int().cuda(), max(lengths_q), max(lengths_k), out=room,
            return_lse=True, **MASKS[mask], **OPTIONS) for room in (aligned, odd))
    assert torch.equal(out, other) and torch.equal(lse, other_lse)
    if mask in ("full", "causal"):
        last_q, last_k = (slice(int(ends[-2]), int(ends[-1])) for ends in (ends_q, ends_k))
        reference = exact(torch, q[None, last_q], k[None, last_k], v[None, last_k], mask == "causal")
        error = (out[None, last_q].double() - reference).square().mean().sqrt()
        bound = 0.06 if variant["dtype"] == "float8_e4m3fn" else 0.01
        assert error <= bound * reference.square().mean().sqrt()


@pytest.mark.gpu
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("variant", PLAIN, ids=lambda v: v["name"])
def test_dense_batches(torch, variant, mask):
    """Some of whose rows are not used, and tiles in parts."""
    q, k, v = arrays(torch, variant, 3, 4 * variant["tile_m"] + 5, 7 * variant["tile_n"] + 3)
    used = torch.tensor([k.shape[1], 1, 2 * variant["tile_n"] + 1], dtype=torch.int32, device="cuda")
    aligned, odd = outs(torch, variant, (*q.shape[:3], variant["head_dim_v"]))
    for seqused_k, num_splits in ((None, 1), (used, 1), (used, 3)):
        options = {"seqused_k": seqused_k, "return_lse": True, **MASKS[mask], **OPTIONS, "num_splits": num_splits}
        with tile(variant):
            (out, lse), (other, other_lse) = (fa3.flash_attn_func(q, k, v, out=room, **options)
                                              for room in (aligned, odd))
        assert torch.equal(out, other) and torch.equal(lse, other_lse)


def test_which_calls_are_plain():
    """Those that use none of what such kernels leave out. Large tiles may be split."""
    assert [v["name"] for v in PLAIN] == [v["name"] for v in _core.variants()
                                          if v["head_dim"] in (48, 64, 80, 96, 128) and not v["has_qv"]
                                          and "_turned" not in v["name"]]
    for variant in PLAIN:
        call = dict(batch=2, seqlen_q=700, seqlen_k=700, **sizes_of(variant))
        plain = {"causal": True}, {"window_left": 9, "window_right": 0}, {"attention_chunk": 30}, {"ragged": True}
        extras = {"batch_invariant": True}, {"pack_gqa": 1}
        split = ({"num_splits": 2}, variant["tile_m"] > 64)
        with tile(variant):
            for more, expected in [*((m, True) for m in plain), *((m, False) for m in extras), split]:
                assert _core.plan(**call | {"num_splits": 1} | more)["plain"] == expected, (variant["name"], more)
