"""The rows that are timed, by group, with the bars and peer ratios measured on one H200 on 2026-11-20.

A row's `case` is how results name it; it never changes, so that figures can be compared over time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fa3._reference_check import Masking

TOKENS, MODEL_DIM = 16384, 2048  # batch · seqlen and heads · head_dim of the forward, fp8 and backward rows
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp8": 1}


@dataclass(frozen=True)
class Row:
    """One line of a group: its name, its problem, and what it is measured against.

    Attributes
    ----------
    seqlens_q, seqlens_k : tuple of int
        One length for each sequence.
    varlen : bool
        Sequences one after another (cu_seqlens), as ``fa3 run`` has them; else a dense batch.
    best_over_cudnn : float or None
        Speed of the best known peer over cuDNN's, measured in one sitting: it carries that peer over to a run that
        times cuDNN alone. None where no peer, or no cuDNN, was measured.
    bar_us : float or None
        The time that the project asks of this row on an H200, where it names one.
    """

    group: str
    case: str
    dtype: str
    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...]
    num_heads: int
    num_heads_kv: int
    head_dim: int
    causal: bool = False
    varlen: bool = False
    best_over_cudnn: float | None = None
    bar_us: float | None = None

    @property
    def masking(self) -> Masking:
        return Masking(causal=self.causal)

    @property
    def flops(self) -> int:
        """Products over visible pairs: two in the forward, five in the backward."""
        pairs = sum(self.masking.visible_pairs(sq, sk)
                    for sq, sk in zip(self.seqlens_q, self.seqlens_k, strict=True))
        forward = 4 * pairs * self.num_heads * self.head_dim
        return forward * 5 // 2 if self.group == "backward" else forward

    @property
    def bytes_moved(self) -> int:
        """q, k, v read once and out written once; the backward also reads out and dout and writes dq, dk, dv."""
        rows_q, rows_k = sum(self.seqlens_q) * self.num_heads, sum(self.seqlens_k) * self.num_heads_kv
        item = ITEMSIZE[self.dtype]
        if self.group == "backward":
            return (4 * rows_q + 4 * rows_k) * self.head_dim * item
        return (rows_q * (item + 2) + 2 * rows_k * item) * self.head_dim


def _square(group, prefix, dtype, ratios):
    """Rows of 16,384 tokens and model dim 2,048: for each head dim and seqlen a full and a causal one."""
    rows = []
    for (head_dim, seqlen), pair in ratios.items():
        for mask, ratio in zip(("full", "causal"), pair, strict=True):
            lengths = (seqlen,) * (TOKENS // seqlen)
            heads = MODEL_DIM // head_dim
            rows.append(Row(group, f"{prefix} d{head_dim} s{seqlen} {mask}", dtype, lengths, lengths, heads, heads,
                            head_dim, causal=mask == "causal", best_over_cudnn=ratio))
    return rows


_FORWARD = _square("forward", "bf16", "bf16", {
    (64, 1024): (1.00, 1.00), (64, 4096): (1.12, 1.06), (64, 16384): (1.20, 1.16),
    (128, 1024): (1.01, 1.09), (128, 4096): (1.09, 1.13), (128, 16384): (1.12, 1.15),
    (256, 1024): (1.01, 1.03), (256, 4096): (1.11, 1.16), (256, 16384): (1.14, 1.13),
})
_FP8 = _square("fp8", "e4m3", "fp8", {
    (64, 4096): (1.11, 1.20), (64, 16384): (1.17, 1.16),
    (128, 4096): (1.00, 1.04), (128, 16384): (1.00, 1.04),
    (256, 4096): (1.10, 1.09), (256, 16384): (1.08, 1.17),
})
_BACKWARD = _square("backward", "bf16", "bf16", {
    (64, 1024): (1.21, 1.28), (64, 4096): (1.18, 1.25), (64, 16384): (1.20, 1.24),
    (128, 1024): (1.22, 1.16), (128, 4096): (1.14, 1.18), (128, 16384): (1.17, 1.17),
    (256, 1024): (1.22, 1.14), (256, 4096): (1.19, 1.22), (256, 16384): (1.28, 1.21),
})


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
    return [Row("decode", f"bf16 b{batch} ctx{context} h64/8 d128 page{page}", "bf16", (1,) * batch,
                (context,) * batch, 64, 8, 128, causal=True, best_over_cudnn=1.00 if page is None else None,
                bar_us=bars.get((batch, context)) if page is None else None)
            for batch, context in ((1, 4096), (1, 65536), (16, 4096), (16, 32768), (128, 2048), (128, 8192))
            for page in (None, 16, 64, 256)]


def _overhead_rows():
    """The host's part of a call: a problem so small that the GPU is never waited for."""
    return [Row("overhead", case, "bf16", (128,), (128,), 8, 8, 64, bar_us=bar)
            for case, bar in (("PyTorch arrays in and out", 10), ("PyTorch arrays in, out=", 7))]


GROUPS: dict[str, list[Row]] = {
    "forward": _FORWARD,
    "fp8": _FP8,
    "backward": _BACKWARD,
    "seed": _seed_rows(),
    "decode": _decode_rows(),
    "overhead": _overhead_rows(),
}
# What `python -m bench` can time today; the other groups wait for the kernels that they time.
BUILT = ("forward", "seed", "overhead")


def rows(group: str, pattern: str = "") -> list[Row]:
    """The rows of `group` whose case matches the regular expression `pattern`.

    Raises
    ------
    ValueError
        For a group that cannot be timed, naming those that can.
    """
    import re

    if group not in BUILT:
        state = "is not built yet" if group in GROUPS else "is unknown"
        raise ValueError(f"group {group!r} {state}; there are: {', '.join(BUILT)}")
    return [row for row in GROUPS[group] if re.search(pattern, row.case)]
