"""What choosing a kernel by the plan costs: each compiled variant that fits is timed, the plan's choice among them.

The constants of ``src/plan.cpp`` are fitted to such a sweep. On another Hopper GPU, ``python -m bench tiles`` says
whether they still hold, and its results file has what a new fit needs.
"""

from __future__ import annotations

import contextlib
import math

from . import report, timing
from .peers import TOLERANCE
from .runner import WrongAnswerError, import_torch, problem, provenance

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp8": "float8_e4m3fn"}


def prepare(budget: timing.Budget, commit: str):
    """What times the variants of a row: a function from a row to its record.

    Raises
    ------
    RuntimeError
        Where there is no GPU, or fa3 was built without a way to force a variant.
    """
    from fa3 import _core

    if not hasattr(_core, "use_tile"):
        raise RuntimeError("this fa3 has no fa3._core.use_tile, which forces a variant; build the current one")
    torch = import_torch()
    clock = timing.CudaClock(torch)
    device = torch.cuda.get_device_name()
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count

    def run_row(row):
        times = _measure(torch, _core, clock, row, budget)
        return record(row, times, planned(_core, row, num_sms), device, commit)

    return run_row


def fitting(core, row) -> list[tuple[int, int]]:
    """(tile_m, tile_n) of the variants that the plan chooses from: those that waste least on padded head dims."""
    fits = [v for v in core.variants() if v["dtype"] == _DTYPES[row.dtype] and v["head_dim"] >= row.head_dim
            and v["head_dim_v"] >= row.dim_v and not v["has_qv"]]
    least = min((v["head_dim"] + v["head_dim_v"] for v in fits), default=0)
    if not fits:
        raise NotImplementedError(f"this build of fa3 has no kernel for {row.dtype} and head dim {row.head_dim}")
    return [(v["tile_m"], v["tile_n"]) for v in fits if v["head_dim"] + v["head_dim_v"] == least]


def planned(core, row, num_sms: int) -> str:
    """The tile that the plan chooses on a GPU of so many multiprocessors."""
    plan = core.plan(dtype=_DTYPES[row.dtype], batch=len(row.seqlens_q), seqlen_q=row.seqlens_q[0],
                     seqlen_k=row.seqlens_k[0], num_heads=row.num_heads, num_heads_kv=row.num_heads_kv,
                     head_dim=row.head_dim, head_dim_v=row.dim_v, causal=row.causal, num_sms=num_sms)
    return tile_name(plan["tile_m"], plan["tile_n"])


def tile_name(tile_m: int, tile_n: int) -> str:
    """``128x64``, as results name a variant."""
    return f"{tile_m}x{tile_n}"


def candidates(core, row, call) -> list[timing.Candidate]:
    """The same call with each variant forced."""
    @contextlib.contextmanager
    def forced(tile):
        core.use_tile(*tile)
        try:
            yield
        finally:
            core.use_tile(0, 0)  # back to the plan's choice, whatever happened

    return [timing.Candidate(tile_name(*tile), call, lambda tile=tile: forced(tile)) for tile in fitting(core, row)]


def record(row, times: dict[str, float], plan: str, device: str, commit: str) -> dict:
    """One entry of the results file: µs by variant, and what the plan's choice loses against the best."""
    return {"group": row.group, "case": row.case, "plan": plan,
            "times": {name: round(us, 3) for name, us in times.items()},
            "loss": round(times[plan] / min(times.values()) - 1, 4), **provenance(device, commit)}


def table(entries: list[dict]) -> str:
    """The results as text; the last line has the mean loss."""
    best = [min(entry["times"], key=entry["times"].get) for entry in entries]
    columns = {
        "case": [entry["case"] for entry in entries],
        "plan": [entry["plan"] for entry in entries],
        "best": best,
        "loss %": [report.text(100 * entry["loss"], 1) for entry in entries],
        "µs by variant": ["  ".join(f"{name} {us:,.1f}" for name, us in entry["times"].items()) for entry in entries],
    }
    return report.align(columns, {"case": "mean", "loss %": report.text(100 * mean_loss(entries), 1)})


def summary(entries: list[dict]) -> str:
    """The mean loss for each head dim, and the rows where the plan loses most."""
    dims = {}
    for entry in entries:
        dims.setdefault(entry["case"].split()[1], []).append(entry)
    worst = sorted((entry for entry in entries if entry["loss"] > 0), key=lambda entry: -entry["loss"])[:5]
    return "\n".join([
        "mean loss: " + ", ".join(f"{dim} {100 * mean_loss(part):.1f} %" for dim, part in dims.items()),
        "largest: " + (", ".join(f"{entry['case']} ({100 * entry['loss']:.1f} %)" for entry in worst) or "none")])


def mean_loss(entries: list[dict]) -> float:
    """Geometric mean of what the plan's choices lose, 0.01 being 1 %."""
    return math.expm1(sum(math.log1p(entry["loss"]) for entry in entries) / len(entries))


def _measure(torch, core, clock, row, budget):
    """µs by variant; their answers are compared with each other, which is cheaper than a check of each."""
    *_, call = problem(torch, row)
    choices = candidates(core, row, call)
    expected = call()
    for choice in choices:
        with choice.context():
            difference = (choice.call() - expected).abs().max().item()
        if not difference <= TOLERANCE[row.dtype]:
            raise WrongAnswerError(f"WRONG: {choice.name} differs by {difference:.2e} from the plan's choice")
    return timing.measure(choices, clock, budget)
