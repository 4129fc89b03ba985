"""Keys in pages of any size, on every tile: the bits of the same keys in one piece.

A page of a few rows is gathered by several warps, one of more comes in boxes (src/kernels/forward_keys.cuh). Masks by
which the warpgroups of a tile skip different blocks are those that a loader might wait forever with.
"""

import pytest
from gpu_problems import FORCIBLE, among_nan, in_pages, tile

import fa3

HEADS, HEADS_KV = 4, 2
MASKS = {"causal": {"causal": True}, "window": {"window_size": (40, 3)}, "ahead": {"window_size": (-1, 150)}}


@pytest.mark.gpu
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("page_size", [1, 4, 24, 256])
@pytest.mark.parametrize("variant", FORCIBLE, ids=lambda v: v["name"])
def test_the_same_bits_as_in_one_piece(torch, variant, page_size, mask):
    m, n = variant["tile_m"], variant["tile_n"]
    lengths_q, lengths_k = [1, m - 1, 2 * m + 7, 9, 300], [n + 1, 5 * n + 3, 3 * n, 0, 700]
    ends_q, ends_k = (torch.tensor([0, *x]).cumsum(0) for x in (lengths_q, lengths_k))
    generator = torch.Generator("cuda").manual_seed(page_size)
    q, k, v = (among_nan(torch, 1, int(ends[-1]), heads, variant[dim], generator, getattr(torch, variant["dtype"]))[0]
               for ends, heads, dim in ((ends_q, HEADS, "head_dim"), (ends_k, HEADS_KV, "head_dim"),
                                        (ends_k, HEADS_KV, "head_dim_v")))
    *pools, table = in_pages(torch, ends_k, page_size, k, v)
    ends = ends_q.int().cuda(), ends_k.int().cuda()
    options = MASKS[mask] | {"max_seqlen_q": max(lengths_q), "max_seqlen_k": max(lengths_k), "num_splits": 1,
                             "pack_gqa": False, "return_lse": True}
    with tile(variant):
        out, lse = fa3.flash_attn_varlen_func(q, k, v, *ends, **options)
        paged, paged_lse = fa3.flash_attn_varlen_func(q, *pools, *ends, page_table=table, **options)
    assert torch.isfinite(out.float()).all()
    assert torch.equal(out, paged) and torch.equal(lse, paged_lse)
