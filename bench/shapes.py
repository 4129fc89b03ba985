"""The rows that are timed, by group, with the bars and peer ratios measured on one H200 on 2026-11-20.

A row's `case` is how results name it; it never changes, so that figures can be compared over time. Rows with a
`best_over_cudnn` are the targets; they come first in their group, and a pattern (``--rows``) picks them alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np

from fa3._reference_check import Masking

TOKENS, MODEL_DIM = 16384, 2048  # batch · seqlen and heads · head_dim of all rows that fill the machine
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp8": 1}
MASKS = ("full", "causal")


@dataclass(frozen=True)
class Row:
    """One line of a group: its name, its problem, and what it is measured against.

    Attributes
    ----------
    seqlens_q, seqlens_k : tuple of int
        One length for each sequence.
    head_dim_v : int or None
        None: head_dim.
    window : tuple of int
        As ``window_size`` of the call; -1 is no bound.
    varlen : bool
        Sequences one after another (cu_seqlens), as ``fa3 run`` has them; else a dense batch.
    best_over_cudnn : float or None
        Speed of the best known peer over cuDNN's, measured in one sitting: it carries that peer over to a run that
        times cuDNN alone. None where no peer, or no cuDNN, was measured.
    bar_us : float or None
        The time that the project asks of this row on an H200, where it names one.
    reference, bar_share : str, float or None
        A row of the same group whose TFLOP/s this row's are a share of, and the share that the project asks.
    page : int or None
        Rows of a page, where keys and values lie in a paged cache.
    dropout_p : float
        As of the call.
    """

    group: str
    case: str
    dtype: str
    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...]
    num_heads: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int | None = None
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    varlen: bool = False
    best_over_cudnn: float | None = None
    bar_us: float | None = None
    reference: str | None = None
    bar_share: float | None = None
    page: int | None = None
    dropout_p: float = 0.0

    @property
    def masking(self) -> Masking:
        return Masking(self.causal, *self.window)

    @property
    def dim_v(self) -> int:
        return self.head_dim if self.head_dim_v is None else self.head_dim_v

    @property
    def latent(self) -> bool:
        """Whether values are the first columns of the keys."""
        return self.group == "mla"

    @property
    def flops(self) -> int:
        """Products over visible pairs: one over head_dim and one over head_dim_v, in the backward three and two."""
        pairs = sum(self.masking.visible_pairs(sq, sk)
                    for sq, sk in zip(self.seqlens_q, self.seqlens_k, strict=True))
        dims = 3 * self.head_dim + 2 * self.dim_v if self.group == "backward" else self.head_dim + self.dim_v
        return 2 * pairs * self.num_heads * dims

    @property
    def bytes_moved(self) -> int:
        """q, k, v read once and out written once; the backward also reads out and dout and writes dq, dk, dv."""
        rows_q, rows_k = sum(self.seqlens_q) * self.num_heads, sum(self.seqlens_k) * self.num_heads_kv
        item, dims = ITEMSIZE[self.dtype], self.head_dim + (0 if self.latent else self.dim_v)
        if self.group == "backward":
            return 2 * (rows_q + rows_k) * dims * item
        return rows_q * (self.head_dim * item + self.dim_v * 2) + rows_k * dims * item


def _filling_row(group, prefix, dtype, dims, seqlen, mask, **more):
    """A row of max(16,384, seqlen) tokens and model dim 2,048; `dims` is head_dim, or (head_dim, head_dim_v)."""
    head_dim, head_dim_v = dims if isinstance(dims, tuple) else (dims, None)
    lengths = (seqlen,) * max(TOKENS // seqlen, 1)
    heads = max(1, MODEL_DIM // head_dim)
    return Row(group, f"{prefix} {_dims_name(dims)} s{seqlen} {mask}", dtype, lengths, lengths, heads, heads, head_dim,
               head_dim_v, causal=mask.endswith("causal"), **more)


def _dims_name(dims):
    return "d{}/{}".format(*dims) if isinstance(dims, tuple) else f"d{dims}"


def _targets(group, prefix, dtype, ratios):
    """For each head dim and seqlen a full and a causal row, and how much faster than cuDNN the best peer is."""
    return [_filling_row(group, prefix, dtype, head_dim, seqlen, mask, best_over_cudnn=ratio)
            for (head_dim, seqlen), pair in ratios.items() for mask, ratio in zip(MASKS, pair, strict=True)]


_FORWARD = _targets("forward", "bf16", "bf16", {
    (64, 1024): (1.00, 1.00), (64, 4096): (1.12, 1.06), (64, 16384): (1.20, 1.16),
    (128, 1024): (1.01, 1.09), (128, 4096): (1.09, 1.13), (128, 16384): (1.12, 1.15),
    (256, 1024): (1.01, 1.03), (256, 4096): (1.11, 1.16), (256, 16384): (1.14, 1.13),
})
_FP8 = _targets("fp8", "e4m3", "fp8", {
    (64, 4096): (1.11, 1.20), (64, 16384): (1.17, 1.16),
    (128, 4096): (1.00, 1.04), (128, 16384): (1.00, 1.04),
    (256, 4096): (1.10, 1.09), (256, 16384): (1.08, 1.17),
})
_BACKWARD = _targets("backward", "bf16", "bf16", {
    (64, 1024): (1.21, 1.28), (64, 4096): (1.18, 1.25), (64, 16384): (1.20, 1.24),
    (128, 1024): (1.22, 1.16), (128, 4096): (1.14, 1.18), (128, 16384): (1.17, 1.17),
    (256, 1024): (1.22, 1.14), (256, 4096): (1.19, 1.22), (256, 16384): (1.28, 1.21),
})


def _other_dims_rows():
    """Head dims beside the powers of two. Those that peers pad are held against the next multiple of 64."""
    next_dim = {48: 64, 80: 128, 112: 128, 160: 192}
    rows = []
    for dims in (48, 80, 96, 112, 160, 192, (192, 128)):
        for seqlen in (1024, 4096, 16384):
            for mask in MASKS:
                row = _filling_row("forward", "bf16", "bf16", dims, seqlen, mask)
                if dims in next_dim:
                    row = replace(row, reference=f"bf16 d{next_dim[dims]} s{seqlen} {mask}", bar_share=0.90)
                rows.append(row)
    bar = "bf16 d80 s4096 full"
    return [replace(row, bar_us=row.flops / 560e6) if row.case == bar else row for row in rows]  # 560 TFLOP/s


def _backward_rows():
    """What the targets leave out: other head dims, several query heads on a KV head, sequences of unequal lengths."""
    rows = [_filling_row("backward", "bf16", "bf16", dims, 4096, mask)
            for dims in (80, 96, 112, 160, 192, (192, 128)) for mask in MASKS]
    rows += [Row("backward", f"bf16 d128 s{seqlen} h16/2 {mask}", "bf16", lengths, lengths, 16, 2, 128,
                 causal=mask == "causal")
             for seqlen in (1024, 4096) for lengths in [(seqlen,) * (TOKENS // seqlen)] for mask in MASKS]
    lengths = tuple(int(n) for n in np.random.default_rng(1).integers(1, 2049, size=16))
    return rows + [Row("backward", f"bf16 d{head_dim} b16 s<=2048 h{MODEL_DIM // head_dim} {mask}", "bf16", lengths,
                       lengths, MODEL_DIM // head_dim, MODEL_DIM // head_dim, head_dim, causal=mask == "causal",
                       varlen=True)
                   for head_dim in (64, 128) for mask in MASKS]


def _dropout_rows():
    """Dropout, held against the same row without."""
    rows = []
    for head_dim in (64, 80, 128, 256):
        for seqlen in (1024, 4096):
            for mask in MASKS:
                plain = _filling_row("dropout", "bf16", "bf16", head_dim, seqlen, mask)
                rows += [plain, replace(plain, case=f"bf16 d{head_dim} s{seqlen} dropout {mask}", dropout_p=0.1,
                                        reference=plain.case, bar_share=0.85)]
    return rows


def _sweep_rows():
    """TFLOP/s by length, of both dtypes: what the README's curves are drawn from."""
    return [_filling_row("sweep", dtype, dtype, head_dim, seqlen, mask)
            for dtype in ("bf16", "fp16") for head_dim in (64, 128, 256)
            for seqlen in (512 << i for i in range(7)) for mask in MASKS]


def _window_rows():
    """A window of 1,024 keys, held against the full row, which has sixteen times the work to hide its costs in."""
    rows = []
    for head_dim in (64, 128, 256):
        def row(mask, head_dim=head_dim, **more):
            return _filling_row("window", "bf16", "bf16", head_dim, TOKENS, mask, **more)

        full = row("full")
        rows += [full, row("causal", reference=full.case),
                 row("window1024 causal", window=(1024, 0), reference=full.case, bar_share=0.80)]
    return rows


def _short_rows():
    """Many short sequences, grids of less than one wave, and few queries on many keys."""
    def row(batch, heads, heads_kv, head_dim, seqlen_q, seqlen_k, mask):
        lengths = f"s{seqlen_q}" if seqlen_q == seqlen_k else f"q{seqlen_q} k{seqlen_k}"
        shared = "" if heads == heads_kv else f"/{heads_kv}"
        return Row("short", f"bf16 b{batch} {lengths} h{heads}{shared} d{head_dim} {mask}", "bf16",
                   (seqlen_q,) * batch, (seqlen_k,) * batch, heads, heads_kv, head_dim, causal=mask == "causal")

    batches = ((84, 64, 16), (32, 128, 16), (16, 512, 16), (1, 2048, 16), (1, 512, 8), (4, 4096, 4))
    rows = [row(batch, heads, heads, head_dim, seqlen, seqlen, mask)
            for batch, seqlen, heads in batches for head_dim in (80, 128) for mask in MASKS]
    return rows + [row(1, heads, heads_kv, 128, seqlen_q, 4096, mask)
                   for heads, heads_kv in ((32, 4), (64, 8)) for seqlen_q in (1, 4, 16, 64) for mask in MASKS]


def _fp8_rows():
    """What the targets leave out: shorter sequences, head dims that are not powers of two, and small grids."""
    def row(batch, seqlen, heads, head_dim, mask):
        lengths = (seqlen,) * batch
        return Row("fp8", f"e4m3 d{head_dim} b{batch} s{seqlen} h{heads} {mask}", "fp8", lengths, lengths, heads, heads,
                   head_dim, causal=mask == "causal")

    filling = [_filling_row("fp8", "e4m3", "fp8", head_dim, seqlen, mask)
               for head_dim, seqlen in ((64, 1024), (80, 4096), (128, 1024), (192, 4096), (256, 1024))
               for mask in MASKS]
    return filling + [row(batch, seqlen, 16, head_dim, mask) for batch, seqlen in ((84, 64), (16, 512), (1, 2048))
                      for head_dim in (64, 128) for mask in MASKS]


def _tile_rows():
    """What the plan's constants are fitted to: grids that fill the machine many times over, and small ones."""
    def row(batch, seqlen, heads, head_dim, mask, dtype="bf16"):
        lengths = (seqlen,) * batch
        return Row("tiles", f"{dtype} d{head_dim} b{batch} s{seqlen} h{heads} {mask}", dtype, lengths, lengths, heads,
                   heads, head_dim, causal=mask == "causal")

    rows = []
    for head_dim in (64, 80, 128, 192, 256):
        rows += [row(TOKENS // seqlen, seqlen, MODEL_DIM // head_dim, head_dim, mask)
                 for seqlen in (64 << i for i in range(9)) for mask in MASKS]
        rows += [row(1, seqlen, 8, head_dim, mask) for seqlen in (512 << i for i in range(5)) for mask in MASKS]
    rows += [row(batch, seqlen, 16, head_dim, "full", "fp8")
             for head_dim in (64, 80, 128) for batch, seqlen in ((84, 64), (16, 512), (3, 1680))]
    return rows + [row(TOKENS // seqlen, seqlen, MODEL_DIM // head_dim, head_dim, mask, "fp8")
                   for head_dim in (64, 128) for seqlen in (1024, 4096) for mask in MASKS]


def _accuracy_rows():
    """Few queries on many keys for what sums lose, and rows that fill the machine for what promotion costs."""
    def row(batch, queries, keys, heads, values, head_dim=128):
        name = f"e4m3 d{head_dim} b{batch} q{queries} k{keys} h{heads} mean{values}"
        return Row("accuracy", name, "fp8", (queries,) * batch, (keys,) * batch, heads, heads, head_dim)

    rows = [row(1, 128, 1024 << i, 4, values) for values in (0, 1) for i in range(9)]
    filling = [row(4, 4096, 4096, 2048 // head_dim, 0, head_dim) for head_dim in (64, 128, 256)]
    return [*rows, *filling, row(1, 16384, 16384, 16, 0)]


def _counter_rows():
    """The leading rows of the forward, for Nsight Compute."""
    leading = re.compile(r"d(64|128|256) s(4096|16384) |d80 s4096 ")
    return [replace(row, group="counters", reference=None, bar_us=None, best_over_cudnn=None, bar_share=None)
            for row in _FORWARD + _other_dims_rows() if leading.search(row.case)]


def _seed_rows():
    """The cases that must always run: small, of odd head dims, of unequal lengths."""
    case_1r = tuple(int(n) for n in np.random.default_rng(0).integers(1, 1681, size=3))
    case_5 = ((64,) * 21 + (48,) * 7) * 3

    def row(case, dtype, seqlens, heads_kv, head_dim, **more):
        return Row("seed", case, dtype, seqlens, more.pop("seqlens_k", seqlens), 16, heads_kv, head_dim,
                   varlen=more.pop("varlen", True), **more)

    return [
        row("1 fp8 b3 s1680 h16 d80", "fp8", (1680,) * 3, 16, 80, bar_us=78),
        row("1r fp8 b3 s<=1680 h16 d80", "fp8", case_1r, 16, 80),
        row("1h fp16 b3 s1680 h16 d80", "fp16", (1680,) * 3, 16, 80, best_over_cudnn=1.40, bar_us=90),
        row("2 fp8 b84 s64 h16 d80", "fp8", (64,) * 84, 16, 80, bar_us=16),
        row("2h fp16 b84 s64 h16 d80", "fp16", (64,) * 84, 16, 80, best_over_cudnn=1.00, bar_us=20),
        row("3 fp16 b1 s1285 h16/2 d80 causal", "fp16", (1285,), 2, 80, causal=True, best_over_cudnn=1.21, bar_us=21),
        row("5 fp8 b84 t5040 h16 d128", "fp8", case_5, 16, 128, bar_us=20),
        row("4 fp16 decode k2048 h16/2 d80", "fp16", (1,), 2, 80, seqlens_k=(2048,), causal=True, varlen=False,
            best_over_cudnn=1.00, bar_us=6.5),
    ]


def _decode_rows():
    """One query for each sequence, on a contiguous or a paged cache; cuDNN is the best peer where it can."""
    bars = {(1, 4096): 11, (1, 65536): 68}
    rows = []
    for batch, context in ((1, 512), (1, 4096), (1, 65536), (4, 1024), (16, 4096), (16, 32768), (128, 2048),
                           (128, 8192)):
        def row(page, batch=batch, context=context, **more):
            return Row("decode", f"bf16 b{batch} ctx{context} h64/8 d128 page{page}", "bf16", (1,) * batch,
                       (context,) * batch, 64, 8, 128, causal=True, page=page, **more)

        contiguous = row(None, best_over_cudnn=1.00, bar_us=bars.get((batch, context)))
        rows += [contiguous, row(1, reference=contiguous.case),
                 *(row(page, reference=contiguous.case, bar_share=0.96) for page in (16, 64, 256))]
    return rows


def _latent_rows():
    """Absorbed latent attention: decoding, on a contiguous or a paged cache of rows of 576, and a prefill. What counts
    is GB/s of the cache, up to 64 heads; more are bound by products."""
    def row(dtype, case, batch, seqlen_q, seqlen_k, heads, **more):
        prefix = "e4m3" if dtype == "fp8" else dtype
        return Row("mla", f"{prefix} {case} h{heads}", dtype, (seqlen_q,) * batch, (seqlen_k,) * batch, heads, 1, 576,
                   512, causal=True, **more)

    def decoding(dtype, batch, context, heads):
        contiguous = row(dtype, f"b{batch} ctx{context} pageNone", batch, 1, context, heads)
        return [contiguous, row(dtype, f"b{batch} ctx{context} page64", batch, 1, context, heads, page=64,
                                reference=contiguous.case, bar_share=0.96)]

    rows = []
    for batch, context in ((1, 4096), (1, 32768), (16, 4096), (16, 32768), (128, 4096), (128, 8192)):
        for heads in (16, 64, 128):
            rows += decoding("bf16", batch, context, heads)
    for batch, context in ((1, 32768), (16, 32768), (128, 8192)):
        for heads in (16, 64, 128):
            rows += decoding("fp8", batch, context, heads)
    return rows + [row(dtype, "s4096 causal", 1, 4096, 4096, heads) for dtype in ("bf16", "fp8") for heads in (16, 128)]


def _overhead_rows():
    """The host's part of a call: a problem so small that the GPU is never waited for."""
    return [Row("overhead", case, "bf16", (128,), (128,), 8, 8, 64, bar_us=bar)
            for case, bar in (("PyTorch arrays in and out", 10), ("PyTorch arrays in, out=", 7))]


def _quantize_rows():
    """quantize_fp8 of one array: by granularity on the largest operand of the forward, with and without the rotation;
    then other head dims, short sequences, more than L2 and shared memory hold, and fp32. Keys are of no account."""
    def row(dtype, batch, seqlen, heads, head_dim, how):
        lengths = (seqlen,) * batch
        return Row("quantize", f"{dtype} b{batch} s{seqlen} h{heads} d{head_dim} {how}", dtype, lengths, lengths, heads,
                   heads, head_dim)

    granularities = ("tensor", "head", "batch_head")
    rows = [row("fp16", 1, TOKENS, 16, 128, granularity + rotated)
            for rotated in ("", " hadamard") for granularity in granularities]
    rows += [row("bf16", 4, 4096, MODEL_DIM // head_dim, head_dim, how)
             for head_dim in (64, 80, 128, 256) for how in ("head", "head hadamard")]
    rows += [row("fp16", 84, 64, 16, 80, "batch_head" + rotated) for rotated in ("", " hadamard")]
    rows += [row("fp16", 16, 8192, 16, 128, how) for how in (*granularities, "batch_head hadamard")]
    return [*rows, row("fp32", 1, TOKENS, 16, 128, "head")]


GROUPS: dict[str, list[Row]] = {
    "forward": _FORWARD + _other_dims_rows(),
    "sweep": _sweep_rows(),
    "window": _window_rows(),
    "short": _short_rows(),
    "fp8": _FP8 + _fp8_rows(),
    "seed": _seed_rows(),
    "overhead": _overhead_rows(),
    "decode": _decode_rows(),
    "mla": _latent_rows(),
    "backward": _BACKWARD + _backward_rows(),
    "dropout": _dropout_rows(),
    "tiles": _tile_rows(),
    "quantize": _quantize_rows(),
    "accuracy": _accuracy_rows(),
    "counters": _counter_rows(),
}
# What is timed beside peers.
TIMED = ("forward", "sweep", "window", "short", "fp8", "seed", "overhead", "decode", "mla", "backward", "dropout")


def rows(group: str, pattern: str = "") -> list[Row]:
    """The rows of `group` whose case matches the regular expression `pattern`.

    Raises
    ------
    ValueError
        For a group that there is not, naming those that there are.
    """
    if group not in GROUPS:
        raise ValueError(f"group {group!r} is unknown; there are: {', '.join(GROUPS)}")
    return [row for row in GROUPS[group] if re.search(pattern, row.case)]
