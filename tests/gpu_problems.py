"""What tests of some of the GPU's kernels share: a kernel that is forced, arrays among NaN, and float64 on the GPU.

`torch` is the fixture of conftest.py.
"""

import contextlib
import math

from fa3 import _core

# Whose tile any call may be given: values are turned for some dense calls alone.
FORCIBLE = [v for v in _core.variants() if not v["has_qv"] and "_turned" not in v["name"]]


@contextlib.contextmanager
def tile(variant):
    """Calls take a kernel of this one's tile."""
    _core.use_tile(variant["tile_m"], variant["tile_n"])
    try:
        yield
    finally:
        _core.use_tile(0, 0)


def largest(dtype, head_dim, head_dim_v):
    """The kernel for these head dims with the largest tile, and of turned values where there is one."""
    fitting = [v for v in _core.variants() if v["dtype"] == dtype and not v["has_qv"]
               and v["head_dim"] >= head_dim and v["head_dim_v"] >= head_dim_v]
    return min(fitting, key=lambda v: (v["head_dim"] + v["head_dim_v"], "_turned" not in v["name"], -v["tile_m"]))


def among_nan(torch, batch, rows, heads, dim, generator, dtype=None):
    """Normal values in a larger array of NaN: other rows, heads and columns around those of the call."""
    room = torch.full((batch, rows + 2, heads + 2, dim + 32), float("nan"), device="cuda")
    inside = room[:, 1:-1, 1:-1, 16:-16]
    inside.copy_(torch.randn(inside.shape, generator=generator, device="cuda"))
    return room.to(dtype or torch.float8_e4m3fn)[:, 1:-1, 1:-1, 16:-16]


def in_pages(torch, ends, page_size, *rows):
    """The sequences that end there, in pages in any order, and the page table; rows that are nobody's are NaN."""
    lengths = ends.diff().tolist()
    most = max(-(-length // page_size) for length in lengths)
    table = torch.randperm(len(lengths) * most, generator=torch.Generator().manual_seed(0)).view(-1, most)
    pools = [torch.full((table.numel(), page_size, *x.shape[1:]), torch.nan, device="cuda").to(x.dtype) for x in rows]
    for sequence, length in enumerate(lengths):
        at = torch.arange(length)
        pages, places = table[sequence, at // page_size].cuda(), (at % page_size).cuda()
        for pool, x in zip(pools, rows, strict=True):
            bits = {1: torch.uint8, 2: torch.int16}[x.element_size()]  # fp8 cannot be indexed
            pool.view(bits)[pages, places] = x[ends[sequence]:ends[sequence] + length].view(bits)
    return *pools, table.int().cuda()


def exact(torch, q, k, v, causal):
    """Attention in float64, from the formula."""
    return exact_with_lse(torch, q, k, v, right=0 if causal else math.inf)[0]


def exact_with_lse(torch, q, k, v, left=math.inf, right=math.inf, sinks=None):
    """The same, of the keys from `left` before a query's position to `right` behind it: out (batch, row, head, dim) and
    lse (batch, head, row)."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    rows, keys = scores.shape[-2:]
    ahead = torch.arange(keys, device=q.device) - (torch.arange(rows, device=q.device)[:, None] + keys - rows)
    scores = scores.masked_fill((ahead < -left) | (ahead > right), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(*scores.shape[:3], 1)], -1)
        v = torch.cat([v, v.new_zeros(len(v), 1, *v.shape[2:])], 1)
    lse = scores.logsumexp(-1) if scores.shape[-1] else scores.new_full(scores.shape[:3], -torch.inf)
    weights = torch.exp(scores - torch.where(lse == -torch.inf, 0, lse)[..., None])
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse
