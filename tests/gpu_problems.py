"""What tests of some of the GPU's kernels share: a kernel that is forced, arrays among NaN, and float64 on the GPU.

`torch` is the fixture of conftest.py.
"""

import contextlib

from fa3 import _core


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


def exact(torch, q, k, v, causal):
    """Attention in float64, from the formula."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    if causal:
        rows, keys = scores.shape[-2:]
        hidden = torch.ones((rows, keys), device=q.device, dtype=torch.bool).triu(keys - rows + 1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, -1).nan_to_num(0), v)
