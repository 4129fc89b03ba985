"""The peers: cuDNN and FlashAttention-2 behind PyTorch's ``scaled_dot_product_attention``, cuDNN's fp8 on its own."""

from __future__ import annotations

import sys

from .cudnn_fp8 import UnavailableError, attention
from .timing import Candidate

NAMES = ("cudnn", "fa2")
# A peer that computes something else is no peer. Peers round differently, by about one bf16 rounding of values up to 4;
# cuDNN's fp8 result is rounded to e4m3, by up to 1/16 of values up to 4.
TOLERANCE = {"bf16": 0.05, "fp16": 0.05, "fp8": 0.25}


def peer_candidates(row, q, k, v, expected) -> list[Candidate]:
    """The peers that can compute `row`, each tried once and compared with `expected`.

    Parameters
    ----------
    row : Row
    q, k, v, expected : torch.Tensor
        Dense, (batch, seqlen, heads, head_dim); `expected` is fa3's result, itself checked before.

    Returns
    -------
    list of Candidate
        A peer that refuses the problem is left out: cuDNN and FA2 here take neither windows nor sequences of
        different lengths, and FA2 neither fp8 nor a head dim over 256.
    """
    if row.window != (-1, -1) or len(set(row.seqlens_q)) > 1 or len(set(row.seqlens_k)) > 1:
        return []
    if row.causal and row.seqlens_q != row.seqlens_k and set(row.seqlens_q) != {1}:
        return []  # PyTorch aligns the causal mask at the top left
    found = []
    for name in ("cudnn",) if row.dtype == "fp8" else NAMES:
        try:
            candidate = _candidate(name, row, q, k, v)
            with candidate.context():
                difference = (candidate.call().transpose(1, 2).float() - expected).abs().max().item()
        except UnavailableError as error:
            print(f"bench: {row.case}: {name} is left out, {error}", file=sys.stderr)
            continue
        except RuntimeError:
            continue
        if difference <= TOLERANCE[row.dtype]:
            found.append(candidate)
        else:
            print(f"bench: {row.case}: {name} is left out, its result differs by {difference:.2g}", file=sys.stderr)
    return found


def _candidate(name, row, q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # views: all of them take any strides
    causal = row.causal and row.seqlens_q == row.seqlens_k  # a single query sees all keys
    if row.dtype == "fp8":
        return Candidate(name, attention(q, k, v, causal))
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    backend = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}[name]
    grouped = row.num_heads != row.num_heads_kv
    return Candidate(
        name,
        lambda: scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped),
        lambda: sdpa_kernel(backend),
    )
