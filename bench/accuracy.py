"""What fp8's sums lose, by how often they move on to fp32: errors against float64 by the number of keys, and the time.

Of fp8 products tensor cores keep 13 bits below the largest of what they add. So a long sum loses more, and most where
all values have one sign: rows come with values of mean 0 and of mean 1.
"""

from __future__ import annotations

from . import report, timing
from .runner import import_torch, provenance

INTERVALS = (128, 256, 512, 1024, 2048)  # keys; of head dims above 128 each means every block
TIMED_QUERIES = 4096  # rows with fewer do not fill the machine: their time says nothing


def prepare(budget: timing.Budget, commit: str):
    """What compares the intervals on a row: a function from a row to its record."""
    torch = import_torch()
    clock = timing.CudaClock(torch)
    device = torch.cuda.get_device_name()

    def run_row(row):
        arrays = problem(torch, row)
        choices = candidates(*arrays)
        expected = exact(torch, *arrays)
        errors = {choice.name: relative_error(torch, choice.call(), expected) for choice in choices}
        times = timing.measure(choices, clock, budget) if row.seqlens_q[0] >= TIMED_QUERIES else {}
        return record(row, errors, times, device, commit)

    return run_row


def mean(row) -> int:
    """Of the row's values, from its name."""
    return int(row.case.rpartition("mean")[2])


def problem(torch, row, device="cuda"):
    """Random q, k, v in fp8; v has the row's mean."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(lengths, heads, offset=0):
        shape = (len(lengths), lengths[0], heads, row.head_dim)
        return (torch.randn(shape, generator=generator, device=device) + offset).to(torch.float8_e4m3fn)

    return normal(row.seqlens_q, row.num_heads), normal(row.seqlens_k, row.num_heads), normal(
        row.seqlens_k, row.num_heads, mean(row))


def candidates(q, k, v) -> list[timing.Candidate]:
    """The plan's kernel, whose sums move on to fp32 after so many keys, or never."""
    import fa3

    # Parts along the keys would be shorter sums, each of them exact to fp32.
    return [timing.Candidate(name, lambda n=n: fa3.flash_attn_func(q, k, v, fp8_accumulate=n, num_splits=1))
            for name, n in {"none": 0, **{str(keys): keys for keys in INTERVALS}}.items()]


def exact(torch, q, k, v):
    """The first sequence's attention in float64: (queries, heads, dim)."""
    heads = []
    for head in range(q.shape[2]):
        one_q, one_k, one_v = (x[0, :, head].double() for x in (q, k, v))
        parts = [torch.softmax(rows @ one_k.T * q.shape[-1] ** -0.5, dim=1) @ one_v for rows in one_q.split(256)]
        heads.append(torch.cat(parts))
    return torch.stack(heads, dim=1)


def relative_error(torch, out, expected) -> float:
    """Root mean square of the first sequence's error, over that of the result."""
    return float((out[0].double() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def record(row, errors: dict[str, float], times: dict[str, float], device: str, commit: str) -> dict:
    """One entry of the results file."""
    return {"group": row.group, "case": row.case, "errors": {name: float(f"{e:.3g}") for name, e in errors.items()},
            "times": {name: round(us, 3) for name, us in times.items()}, **provenance(device, commit)}


def table(entries: list[dict]) -> str:
    """Errors and times by interval."""
    names = list(entries[0]["errors"])
    columns = {"case": [entry["case"] for entry in entries]}
    columns |= {name: [f"{entry['errors'][name]:.1e}" for entry in entries] for name in names}
    columns |= {f"{name} µs": [report.text(entry["times"].get(name), 1) for entry in entries] for name in names}
    return report.align(columns)


def summary(entries: list[dict]) -> str:
    """What each interval costs on the rows that fill the machine."""
    timed = [entry["times"] for entry in entries if entry["times"]]
    costs = {name: report.geometric_mean([times[name] / times["none"] for times in timed])
             for name in entries[0]["errors"]} if timed else {}
    return "time against none: " + (", ".join(f"{name} {cost:.3f}" for name, cost in costs.items()) or "not measured")
