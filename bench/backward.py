"""The backward beside what PyTorch brings along, with sums in any order and in one order."""

from __future__ import annotations

import sys

import numpy as np

from fa3._gradient_check import check_backward
from fa3._reference_check import Formula, Packed

from . import peers, runner, timing

# A peer that computes something else is no peer: relative to the largest gradient.
TOLERANCE = 0.02


def prepare(budget: timing.Budget, commit: str):
    """What times a row beside its peers: a function from a row to its record."""
    torch = runner.import_torch()
    clock = timing.CudaClock(torch)

    def run_row(row):
        inputs, call = problem(torch, row)
        gradients = call()
        check(row, inputs, gradients)
        in_order = timing.Candidate("deterministic", lambda: call(deterministic=True))
        candidates = [timing.Candidate("fa3", call), in_order, *_peers(torch, row, inputs, gradients)]
        times = timing.measure(candidates, clock, budget)
        return runner.record(row, times, torch.cuda.get_device_name(), commit)

    return run_row


def problem(torch, row, device="cuda"):
    """What the backward is given, by name, and the call on it."""
    import fa3

    q, k, v, _ = runner.problem(torch, row, device)
    forward, backward, lengths = fa3.flash_attn_func, fa3.flash_attn_backward, {}
    if row.varlen:
        forward, backward = fa3.flash_attn_varlen_func, fa3.flash_attn_varlen_backward
        lengths = runner.ragged_lengths(torch, row, device)
    out, lse = forward(q, k, v, **lengths, causal=row.causal, return_lse=True)
    generator = torch.Generator(device).manual_seed(1)
    dout = torch.randn(out.shape, generator=generator, device=device).to(out.dtype)
    inputs = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "lse": lse}
    return inputs, lambda **more: backward(**inputs, **lengths, causal=row.causal, **more)


def check(row, inputs, gradients):
    """Compare the first and the last KV head's part of the last sequence with float64 on the host.

    Raises
    ------
    WrongAnswerError
        When a gradient is not what the formula gives.
    """
    ratio = row.num_heads // row.num_heads_kv
    heads = {"q": [*range(ratio), *range(row.num_heads - ratio, row.num_heads)], "k": [0, row.num_heads_kv - 1]}

    def some(x, name):
        letter, rows = ("k", row.seqlens_k[-1]) if name[-1] in "kv" else ("q", row.seqlens_q[-1])
        return runner._to_numpy(x.reshape(-1, *x.shape[-2:])[-rows:, heads[letter]])

    arrays = {name: some(x, name) for name, x in inputs.items() if name != "lse"}
    lse = inputs["lse"] if row.varlen else inputs["lse"][-1]
    arrays["lse"] = lse[heads["q"], -row.seqlens_q[-1]:].cpu().numpy()
    got = [some(x, name) for name, x in zip(("dq", "dk", "dv"), gradients, strict=True)]
    packed = Packed(*(np.array([x]) for x in (0, row.seqlens_q[-1], 0, row.seqlens_k[-1])))
    report = check_backward(got, **arrays, packed=packed, formula=Formula(row.head_dim ** -0.5, row.masking),
                            budget=runner.CHECK_BUDGET)
    if not report.ok:
        raise runner.WrongAnswerError(str(report))


def _peers(torch, row, inputs, gradients):
    """The peers whose gradients are fa3's, up to rounding. A peer that refuses the problem is left out."""
    found = []
    for name in peers.NAMES:
        leaves = [inputs[x].detach().requires_grad_() for x in "qkv"]
        forward = peers.attention_candidate(name, row, *leaves)
        try:
            with forward.context():
                out = forward.call()

            def call(out=out, leaves=leaves):
                return torch.autograd.grad(out, leaves, inputs["dout"], retain_graph=True)

            difference = max(((a - b).abs().max() / b.abs().max()).item()
                             for a, b in zip(call(), gradients, strict=True))
        except RuntimeError:
            continue
        if difference <= TOLERANCE:
            found.append(timing.Candidate(name, call))
        else:
            print(f"bench: {row.case}: {name} is left out, its gradients differ by {difference:.2g}", file=sys.stderr)
    return found
