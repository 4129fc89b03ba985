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
        A peer that refuses the problem is left out: cuDNN and FA2 here take no windows, and FA2 neither fp8 nor a
        head dim over 256. Dropout of theirs drops something else; forward rows of unequal lengths have no peer.
    """
    if row.window != (-1, -1) or len(set(row.seqlens_q)) > 1 or len(set(row.seqlens_k)) > 1 or row.dropout_p:
        return []
    if row.causal and row.seqlens_q != row.seqlens_k and set(row.seqlens_q) != {1}:
        return []  # PyTorch aligns the causal mask at the top left
    found = []
    for name in ("cudnn",) if row.dtype == "fp8" else NAMES:
        try:
            candidate = attention_candidate(name, row, q, k, v)
            with candidate.context():
                difference = (candidate.call().float() - expected).abs().max().item()
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


def attention_candidate(name, row, q, k, v) -> Candidate:
    """A peer's attention, whose result has q's layout: dense, or (tokens, heads, head_dim) of sequences in a row."""
    ragged = q.dim() == 3
    if ragged:
        q, k, v = (_nested(x, lengths) for x, lengths in ((q, row.seqlens_q), (k, row.seqlens_k), (v, row.seqlens_k)))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # views: all of them take any strides
    causal = row.causal and row.seqlens_q == row.seqlens_k  # a single query sees all keys
    if row.dtype == "fp8":
        compute = attention(q, k, v, causal)
        return Candidate(name, lambda: compute().transpose(1, 2))
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    backend = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}[name]
    grouped = row.num_heads != row.num_heads_kv

    def call():
        out = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped).transpose(1, 2)
        return out.values() if ragged else out

    return Candidate(name, call, lambda: sdpa_kernel(backend))


def _nested(x, lengths):
    """A view of sequences in a row as PyTorch's nested tensor."""
    import torch

    offsets = torch.tensor([0, *lengths], device=x.device).cumsum(0)
    return torch.nested.nested_tensor_from_jagged(x, offsets, min_seqlen=min(lengths), max_seqlen=max(lengths))
