"""Few queries on many keys have a kernel of their own (src/kernels/forward_decode.cuh): held against float64, with NaN
around all arrays and behind each sequence's last key."""

import math
import re

import pytest
from compiled import MINIMAL
from gpu_problems import FORCIBLE, among_nan, exact_with_lse, in_pages, tile

import fa3
from fa3 import _core

HEADS_KV = 2
# Queries of a sequence, query heads on a KV head: one row, some of a warp's, all of a tile's.
QUERIES = [(1, 1), (1, 6), (3, 4), (2, 8), (16, 4)]
SPLITS = [1, 2, 3, 5, 8, 16]
MASKS = {"full": (math.inf, math.inf), "causal": (math.inf, 0), "window": (70, 0), "both": (30, 20)}


def decodes(variant):
    with tile(variant):
        plan = _core.plan(batch=1, seqlen_q=1, seqlen_k=64, num_heads=2, num_heads_kv=2,
                          **{name: variant[name] for name in ("dtype", "head_dim", "head_dim_v")})
    return plan["decode"]


DECODING = [v for v in FORCIBLE if decodes(v)]


def near(torch, out, lse, expected, expected_lse):
    assert (out.double() - expected).abs().max() <= 0.02 * max(float(expected.abs().max()), 1)
    seen = expected_lse > -torch.inf
    assert torch.equal(lse == -torch.inf, ~seen)
    assert ((lse.double() - expected_lse)[seen].abs() <= 0.01).all()


def lines(capfd):
    """What FA3_LOG=plan said of each call: whether it was one for decoding, splits, thread blocks of a cluster."""
    said = re.findall(r"fa3 forward.*: \S+(.*), tile .* (\d+) splits .* in clusters of (\d+)", capfd.readouterr().err)
    return [(kind == " (decode)", int(splits), int(cluster)) for kind, splits, cluster in said]


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [None, 8, 48, 256])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("variant", DECODING, ids=lambda v: v["name"])
def test_against_float64(torch, monkeypatch, capfd, variant, mask, page_size):
    n, less = variant["tile_n"], 8 if mask == "both" else 0  # than the columns that the tile has
    dim, dim_v = variant["head_dim"] - less, variant["head_dim_v"] - less
    lengths = [0, 1, n - 1, n, n + 1, 5 * n + 3, 16 * n, 17 * n + 1]
    generator = torch.Generator("cuda").manual_seed(n + len(mask))
    dtype = getattr(torch, variant["dtype"])
    ends = torch.tensor([0, *lengths]).cumsum(0)
    k, v = (among_nan(torch, 1, int(ends[-1]), HEADS_KV, d, generator, dtype)[0] for d in (dim, dim_v))
    if page_size:
        *caches, table = in_pages(torch, ends, page_size, k, v)
    else:
        caches, table = [], None
        for x in (k, v):
            cache = among_nan(torch, len(lengths), max(lengths) + 2, HEADS_KV, x.shape[-1], generator, dtype)
            cache.fill_(torch.nan)
            for sequence, length in enumerate(lengths):
                cache[sequence, :length] = x[ends[sequence]:ends[sequence] + length]
            caches.append(cache)
    left, right = MASKS[mask]
    options = {"cache_seqlens": torch.tensor(lengths, dtype=torch.int32, device="cuda"), "page_table": table,
               "causal": mask == "causal", "return_lse": True}
    if mask not in ("full", "causal"):
        options["window_size"] = (left, right)
    monkeypatch.setenv("FA3_LOG", "plan")
    for seqlen_q, ratio in QUERIES:
        q = among_nan(torch, len(lengths), seqlen_q, ratio * HEADS_KV, dim, generator, dtype)
        sinks = torch.randn(ratio * HEADS_KV, generator=generator, device="cuda") if seqlen_q == 2 else None
        # A lone query stands at the last key, whatever lies right of it.
        window = (left, math.inf if seqlen_q == 1 else right)
        expected = [exact_with_lse(torch, q[b:b + 1], *(x[None, ends[b]:ends[b + 1]] for x in (k, v)), *window, sinks)
                    for b in range(len(lengths))]
        for num_splits in SPLITS:
            with tile(variant):
                out, lse = fa3.flash_attn_with_kvcache(q, *caches, num_splits=num_splits, sinks=sinks, **options)
            for b, (one, one_lse) in enumerate(expected):
                near(torch, out[b], lse[b], one[0], one_lse[0])
    said = lines(capfd)
    assert len(said) == len(QUERIES) * len(SPLITS)
    assert sum(decode for decode, *_ in said) >= len(said) // 3
    assert all(splits == 1 or cluster == splits for decode, splits, cluster in said if decode)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", DECODING, ids=lambda v: v["name"])
def test_long_pieces(torch, variant):
    """Hundreds of blocks one after the other, in as few places; whole sequences begin before their length is known."""
    lengths = [200 * variant["tile_n"] + 1, 0, 131 * variant["tile_n"]]
    generator = torch.Generator("cuda").manual_seed(5)
    dtype = getattr(torch, variant["dtype"])
    q = among_nan(torch, len(lengths), 2, 8, variant["head_dim"], generator, dtype)
    k, v = (among_nan(torch, len(lengths), max(lengths), 2, variant[d], generator, dtype)
            for d in ("head_dim", "head_dim_v"))
    for b, length in enumerate(lengths):
        k[b, length:] = v[b, length:] = torch.nan
    used = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    for num_splits in (1, 2):
        with tile(variant):
            out, lse = fa3.flash_attn_with_kvcache(q, k, v, cache_seqlens=used, num_splits=num_splits, return_lse=True)
        for b, length in enumerate(lengths):
            near(torch, out[b], lse[b], *(x[0] for x in exact_with_lse(torch, q[b:b + 1], *(x[b:b + 1, :length]
                                                                                            for x in (k, v)))))


@pytest.mark.gpu
@pytest.mark.parametrize("variant", DECODING, ids=lambda v: v["name"])
def test_bits_do_not_depend_on_who_is_first(torch, variant):
    """Parts are joined in one order, so that a call has the same bits each time, and in any batch of other sequences
    with as many parts."""
    generator = torch.Generator("cuda").manual_seed(3)
    dtype = getattr(torch, variant["dtype"])
    q = among_nan(torch, 2, 1, 8, variant["head_dim"], generator, dtype)
    k, v = (among_nan(torch, 2, 1500, 2, variant[d], generator, dtype) for d in ("head_dim", "head_dim_v"))
    with tile(variant):
        first, *others = (fa3.flash_attn_with_kvcache(q, k, v, cache_seqlens=1500, num_splits=8) for _ in range(50))
        alone = fa3.flash_attn_with_kvcache(q[1:], k[1:], v[1:], cache_seqlens=1500, num_splits=8)
    assert all(torch.equal(first, other) for other in others)
    assert torch.equal(first[1:], alone)


@pytest.mark.gpu
@pytest.mark.parametrize("factor", [1e-4, 30.0, 300.0], ids=["flat", "steep", "one key each"])
@pytest.mark.parametrize("variant", DECODING, ids=lambda v: v["name"])
def test_scores_of_any_size(torch, variant, factor):
    """Exponents begin relative to 0, which large scores and very negative ones must not spoil."""
    generator = torch.Generator("cuda").manual_seed(4)
    dtype = getattr(torch, variant["dtype"])
    q = among_nan(torch, 1, 1, 8, variant["head_dim"], generator, dtype)
    k, v = (among_nan(torch, 1, 777, 2, variant[d], generator, dtype) for d in ("head_dim", "head_dim_v"))
    for scaled in (q * factor, q.abs() * -factor):
        keys = k.abs() if (scaled <= 0).all() else k
        out, lse = fa3.flash_attn_with_kvcache(scaled, keys, v, cache_seqlens=777, return_lse=True)
        expected, expected_lse = exact_with_lse(torch, scaled, keys, v)
        assert (out.double() - expected).abs().max() <= 0.02
        assert ((lse.double() - expected_lse).abs() <= 0.01 + 2e-6 * expected_lse.abs()).all()


@pytest.mark.skipif(MINIMAL, reason="a minimal build has one head dim")
def test_which_calls_decode():
    """Calls of one query tile for each sequence and group of heads, on 16-bit arrays, with a piece of work for each
    multiprocessor at most; parts are joined in a cluster, and none of what such kernels leave out is asked for."""
    assert {(v["dtype"], v["head_dim"]) for v in DECODING} == {
        (dtype, dim) for dtype in ("float16", "bfloat16") for dim in (48, 64, 80, 96, 128)}
    call = dict(batch=1, seqlen_q=1, seqlen_k=2048, num_heads=16, num_heads_kv=2, dtype="float16", head_dim=80,
                head_dim_v=80, num_sms=132)
    for more, expected in (({}, True), ({"num_splits": 1}, True), ({"num_splits": 40}, False),
                           ({"batch": 200}, False), ({"batch_invariant": True}, False), ({"seqlen_q": 2000}, False),
                           ({"head_dim": 256, "head_dim_v": 256}, False), ({"dtype": "float8_e4m3fn"}, False),
                           ({"seqlen_k": 100_000, "num_splits": 1}, True), ({"attention_chunk": 512}, False)):
        assert _core.plan(**call | more)["decode"] == expected, more
