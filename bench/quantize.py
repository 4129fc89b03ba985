"""quantize_fp8 beside a device copy that moves as many bytes: what reads and writes memory and does nothing else."""

from __future__ import annotations

from . import report, timing
from .runner import WrongAnswerError, import_torch, provenance

ITEMSIZE = {"fp16": 2, "bf16": 2, "fp32": 4}
BAR = 0.80  # of the copy's speed
# Of a row's length after the rotation: e4m3's steps are an eighth, and errors of many dims average out.
LENGTH_ERROR = 0.05


def prepare(budget: timing.Budget, commit: str):
    """What times a row beside the copy: a function from a row to its record."""
    torch = import_torch()
    clock = timing.CudaClock(torch)
    device = torch.cuda.get_device_name()

    def run_row(row):
        x, call = problem(torch, row)
        check(torch, row, x, *call())
        candidates = [timing.Candidate("fa3", call), timing.Candidate("copy", copy(torch, row))]
        return record(row, timing.measure(candidates, clock, budget), device, commit)

    return run_row


def options(row) -> dict[str, object]:
    """The keywords of the call, from the row's name."""
    granularity, *rotated = row.case.split()[5:]
    return {"granularity": granularity, "hadamard": rotated == ["hadamard"]}


def elements(row) -> int:
    return sum(row.seqlens_q) * row.num_heads * row.head_dim


def bytes_moved(row) -> int:
    """What must move: x is read, and a byte an element written."""
    return elements(row) * (ITEMSIZE[row.dtype] + 1)


def problem(torch, row, device="cuda"):
    """A random x, and the call on it."""
    import fa3

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[row.dtype]
    shape = (len(row.seqlens_q), row.seqlens_q[0], row.num_heads, row.head_dim)
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(dtype)
    keywords = options(row)
    return x, lambda: fa3.quantize_fp8(x, **keywords)


def copy(torch, row, device="cuda"):
    """A copy that reads half of the bytes that must move, and writes the other half."""
    source = torch.zeros(bytes_moved(row) // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def check(torch, row, x, codes, descale):
    """Compare the result with PyTorch's arithmetic, or, where it is rotated, rows' lengths with those before.

    Raises
    ------
    WrongAnswerError
        When the result is not what the formula gives.
    """
    factor = descale[:, None, :, None] if descale.dim() == 2 else descale[:, None] if descale.dim() else descale
    if options(row)["hadamard"]:
        before, after = (v.float().norm(dim=-1) for v in (x, codes.float() * factor))
        worst = (after / before - 1).abs().max().item()
        if not worst <= LENGTH_ERROR * (128 / row.head_dim) ** 0.5:
            raise WrongAnswerError(f"WRONG: a rotated row's length is off by {100 * worst:.2g} %")
    elif not torch.equal(codes.view(torch.uint8), (x.float() * (1 / factor)).to(codes.dtype).view(torch.uint8)):
        raise WrongAnswerError("WRONG: codes differ from x (1 / descale) rounded by PyTorch")


def record(row, times: dict[str, float], device: str, commit: str) -> dict:
    """One entry of the results file, from the µs of fa3 and of the copy."""
    us, copy_us = times["fa3"], times["copy"]
    return {"group": row.group, "case": row.case, "us": round(us, 3), "gbs": round(bytes_moved(row) / us / 1e3, 1),
            "copy_us": round(copy_us, 3), "share": round(copy_us / us, 4), **provenance(device, commit)}


def table(entries: list[dict]) -> str:
    """The results as text; the last line has the mean share."""
    columns = {
        "case": [entry["case"] for entry in entries],
        "µs": [report.text(entry["us"], 1) for entry in entries],
        "GB/s": [report.text(entry["gbs"], 0) for entry in entries],
        "copy µs": [report.text(entry["copy_us"], 1) for entry in entries],
        "of copy": [report.text(entry["share"], 2) for entry in entries],
    }
    mean = report.geometric_mean([entry["share"] for entry in entries])
    return report.align(columns, {"case": "geometric mean", "of copy": report.text(mean, 2)})


def summary(entries: list[dict]) -> str:
    """The rows below their bar."""
    below = [f"{entry['case']} ({entry['share']:.2f})" for entry in entries if entry["share"] < BAR]
    return f"below {BAR:.0%} of a copy's speed: " + (", ".join(below) or "none")
