"""Runs rows on the GPU: inputs, the answer's check, fa3 and its peers timed side by side."""

from __future__ import annotations

import datetime
import os
import subprocess
import warnings
from pathlib import Path

import numpy as np

from fa3._progress import Progress
from fa3._reference_check import Formula, Packed, check_forward

from . import timing
from .peers import NAMES, peer_candidates

# Each row's check: sequences and KV heads that are looked at, and multiply-adds of float64 spent on them. Between 0.2
# and 0.7 s on two cores, so that a sweep of 84 rows waits for the GPU rather than for its checks.
CHECK_SAMPLE, CHECK_BUDGET = 3, 2**28
DROPOUT_SEED = 1


class WrongAnswerError(RuntimeError):
    """fa3's result of a row is not what the formula gives; such a row is not timed."""


def import_torch():
    """PyTorch with a GPU, or RuntimeError in one sentence."""
    try:
        import torch
    except ImportError:
        raise RuntimeError("PyTorch is not installed, and the peers and the clock come from it") from None
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA GPU here, nothing to time")
    return torch


def current_commit() -> str:
    """``FA3_BENCH_COMMIT``, or what git says of this checkout, or "unknown"."""
    if os.environ.get("FA3_BENCH_COMMIT"):
        return os.environ["FA3_BENCH_COMMIT"]
    try:
        answer = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=Path(__file__).parent,
                                capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answer.stdout.strip()


def run_rows(rows, run_row):
    """Run `rows` one after another; yields (row, record), or (row, exception) for one that was not timed.

    Parameters
    ----------
    rows : list of Row
    run_row : callable
        From a row to its record, as `prepare` gives it.
    """
    with Progress(rows[0].group) as progress:
        for done, row in enumerate(rows):
            progress(done, len(rows), row.case)
            try:
                yield row, run_row(row)
            except (NotImplementedError, WrongAnswerError) as error:
                yield row, error
        progress(len(rows), len(rows))


def prepare(budget: timing.Budget, commit: str):
    """What times a row beside its peers: a function from a row to its record."""
    torch = import_torch()
    clock = timing.CudaClock(torch)
    return lambda row: _run_row(torch, clock, row, budget, commit)


def _run_row(torch, clock, row, budget, commit):
    q, k, v, call = problem(torch, row)
    out = call()
    check(torch, row, q, k, v, out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a peer that refuses a problem explains itself in several warnings
        peers = peer_candidates(row, q, k, v, out.view(*q.shape[:-1], -1))
    candidates = [timing.Candidate("fa3", call), *peers]
    if row.group == "overhead":
        times = timing.measure_host(candidates, clock)
    else:
        times = timing.measure(candidates, clock, budget)
    return record(row, times, torch.cuda.get_device_name(), commit)


def record(row, times: dict[str, float], device: str, commit: str) -> dict:
    """One entry of a results file, from the µs of fa3 and of those peers that ran."""
    us = times["fa3"]
    is_host = row.group == "overhead"
    return {
        "group": row.group,
        "case": row.case,
        "us": round(us, 3),
        "tflops": None if is_host else round(row.flops / us / 1e6, 2),
        "gbs": None if is_host else round(row.bytes_moved / us / 1e3, 1),
        **({"deterministic_us": round(times["deterministic"], 3)} if "deterministic" in times else {}),
        "peers": {name: round(times[name], 3) if name in times else None for name in NAMES},
        **provenance(device, commit),
    }


def provenance(device: str, commit: str) -> dict[str, str]:
    """What every record ends with."""
    return {"device": device, "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "commit": commit}


def problem(torch, row, device="cuda"):
    """Random q, k, v of a row, and the call of fa3 on them.

    They are dense (batch, seqlen, heads, head_dim), or packed without a batch axis where lengths differ.
    """
    import fa3

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}[row.dtype]
    generator = torch.Generator(device).manual_seed(0)

    def normal(lengths, heads, head_dim):
        equal = len(set(lengths)) == 1
        shape = (len(lengths), lengths[0]) if equal else (sum(lengths),)
        values = torch.randn(*shape, heads, head_dim, generator=generator, device=device)
        return values.to(dtype)

    q = normal(row.seqlens_q, row.num_heads, row.head_dim)
    k, v = (normal(row.seqlens_k, row.num_heads_kv, head_dim) for head_dim in (row.head_dim, row.dim_v))
    options = {"causal": row.causal}
    if row.window != (-1, -1):
        options["window_size"] = row.window
    if row.dropout_p:
        options |= {"dropout_p": row.dropout_p, "dropout_seed": DROPOUT_SEED}
    if row.dtype == "fp8":
        # the factors of the cases are 1, one for each sequence and head
        sizes = {"q_descale": row.num_heads, "k_descale": row.num_heads_kv, "v_descale": row.num_heads_kv}
        options |= {name: torch.ones(len(row.seqlens_q), heads, device=device) for name, heads in sizes.items()}
    if row.latent:
        v = k[..., :row.dim_v]
    if row.group in ("decode", "mla"):
        return q, k, v, _cache_call(torch, row, q, k, v)
    if not row.varlen:
        if row.case.endswith("out="):
            options["out"] = torch.empty_like(q)
        return q, k, v, lambda: fa3.flash_attn_func(q, k, v, **options)
    ragged = [x.view(-1, *x.shape[-2:]) for x in (q, k, v)]
    lengths = ragged_lengths(torch, row, device)
    return q, k, v, lambda: fa3.flash_attn_varlen_func(*ragged, **lengths, **options)


def ragged_lengths(torch, row, device):
    """What calls want to know of sequences one after another, by name."""
    lengths = {}
    for letter, of in (("q", row.seqlens_q), ("k", row.seqlens_k)):
        ends = np.concatenate([[0], np.cumsum(of)])
        lengths[f"cu_seqlens_{letter}"] = torch.tensor(ends, dtype=torch.int32, device=device)
        lengths[f"max_seqlen_{letter}"] = max(of)
    return lengths


def _cache_call(torch, row, q, k, v):
    """A step on a cache of k and v, in pages that lie in random order where the row has pages."""
    import fa3

    options = {"causal": row.causal}
    if row.page is not None:
        order = torch.randperm(k.shape[0] * k.shape[1] // row.page, device=k.device)

        def in_pages(rows):
            pages = torch.empty_like(rows).view(-1, row.page, *rows.shape[2:])
            pages[order] = rows.view(pages.shape)
            return pages

        k, v = in_pages(k), None if row.latent else in_pages(v)
        options["page_table"] = order.to(torch.int32).view(q.shape[0], -1)
    if row.latent:
        v = k[..., :row.dim_v]
    options["cache_seqlens"] = torch.tensor(row.seqlens_k, dtype=torch.int32, device=q.device)
    return lambda: fa3.flash_attn_with_kvcache(q, k, v, **options)


def check(torch, row, q, k, v, out):
    """Compare a sample with float64 on the host, and look through all of `out` for NaN and inf on the GPU.

    Parameters
    ----------
    q, k, v : torch.Tensor
        As `problem` gives them.
    out : torch.Tensor
        fa3's result.

    Raises
    ------
    WrongAnswerError
        When the result is not what the formula gives.
    """
    if not torch.isfinite(out).all():
        raise WrongAnswerError("WRONG: not every value of out is finite")
    lens_q, lens_k = np.array(row.seqlens_q), np.array(row.seqlens_k)
    out = out.view(*q.shape[:-1], row.dim_v)
    if q.dim() == k.dim() == 4:
        sequences, kv_heads = _sample(len(lens_q)), _sample(row.num_heads_kv)
        if row.dropout_p:  # the numbers of both decide what is dropped
            sequences, kv_heads = [0], [*range(min(CHECK_SAMPLE, row.num_heads_kv))]
        ratio = row.num_heads // row.num_heads_kv
        heads = [kv_head * ratio + i for kv_head in kv_heads for i in range(ratio)]
        lens_q, lens_k = lens_q[sequences], lens_k[sequences]
        q, out = (x[sequences][:, :, heads] for x in (q, out))
        k, v = (x[sequences][:, :, kv_heads] for x in (k, v))
    packed = Packed(np.cumsum(lens_q) - lens_q, lens_q, np.cumsum(lens_k) - lens_k, lens_k)
    q, k, v, out = (_to_numpy(x) for x in (q, k, v, out))
    formula = Formula(row.head_dim ** -0.5, row.masking, dropout_p=row.dropout_p, dropout_seed=DROPOUT_SEED)
    report = check_forward(out, None, q, k, v, packed, formula, budget=CHECK_BUDGET)
    if not report.ok:
        raise WrongAnswerError(str(report))


def _sample(count):
    """The first index, the last, and a few between."""
    between = np.random.default_rng(count).integers(count, size=CHECK_SAMPLE - 2)
    return np.unique([0, count - 1, *between]).tolist()


def _to_numpy(x):
    """A tensor on the host as (tokens, heads, head_dim), bf16 and fp8 through their bits."""
    import ml_dtypes
    import torch

    x = x.reshape(-1, *x.shape[-2:])
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).cpu().numpy().view(ml_dtypes.bfloat16)
    if x.dtype == torch.float8_e4m3fn:
        return x.view(torch.uint8).cpu().numpy().view(ml_dtypes.float8_e4m3fn)
    return x.cpu().numpy()
