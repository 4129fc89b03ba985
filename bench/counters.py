"""Hardware counters of fa3's kernel, by Nsight Compute: ``python -m bench counters``.

Each row runs in a process of its own under ``ncu``, which replays one launch after a few that warm up, on a cold L2
as the timings have it. Clocks are left alone; yet single launches between replays do not bring the chip to its power
cap, so that the clock may read higher than in sustained runs: the shares of cycles are what carries over.
"""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from . import report
from .runner import import_torch, provenance

KERNEL = "forward_kernel"
WARMUP_CALLS = 5
# Names of ncu's metrics differ between chips and versions: of each figure's names the first that is known is taken.
_ACTIVE = ".avg.pct_of_peak_sustained_active"


@dataclass(frozen=True)
class Figure:
    """One figure: the metrics that give it, the best first, and what makes its unit of ncu's base unit."""

    key: str
    title: str
    metrics: tuple[str, ...]
    scale: float = 1.0
    digits: int = 1


FIGURES = (
    Figure("us", "µs", ("gpu__time_duration.sum",), 1e-3),
    Figure("clock_ghz", "GHz", ("sm__cycles_elapsed.avg.per_second", "smsp__cycles_elapsed.avg.per_second"), 1e-9, 2),
    # wgmma is counted on the hmma pipe.
    Figure("tensor_pct", "tensor %", ("sm__pipe_tensor_op_hmma_cycles_active" + _ACTIVE,
                                      "sm__pipe_tensor_cycles_active" + _ACTIVE,
                                      "sm__inst_executed_pipe_tensor_op_gmma" + _ACTIVE)),
    Figure("xu_pct", "XU %", ("sm__inst_executed_pipe_xu" + _ACTIVE, "sm__pipe_xu_cycles_active" + _ACTIVE)),
    Figure("fma_pct", "FMA %", ("sm__inst_executed_pipe_fma" + _ACTIVE, "sm__pipe_fma_cycles_active" + _ACTIVE)),
    Figure("alu_pct", "ALU %", ("sm__inst_executed_pipe_alu" + _ACTIVE, "sm__pipe_alu_cycles_active" + _ACTIVE)),
    Figure("issue_pct", "issue %", ("smsp__issue_active" + _ACTIVE, "sm__inst_issued" + _ACTIVE)),
    Figure("l2_to_sm_mb", "L2->SM MB", ("l1tex__m_xbar2l1tex_read_bytes.sum",), 1e-6, 0),
    Figure("l2_mb", "L2 MB", ("lts__t_bytes.sum",), 1e-6, 0),
    Figure("dram_mb", "DRAM MB", ("dram__bytes.sum",), 1e-6, 0),
)
_STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
STALLS = tuple(Figure(reason, reason, (_STALL.format(reason),), digits=3) for reason in (
    "barrier", "branch_resolving", "dispatch_stall", "drain", "gmma", "imc_miss", "lg_throttle", "long_scoreboard",
    "math_pipe_throttle", "membar", "mio_throttle", "misc", "no_instruction", "not_selected", "short_scoreboard",
    "sleeping", "tex_throttle", "wait"))


def prepare(_budget, commit: str):
    """What reads the counters of a row: a function from a row to its record.

    Raises
    ------
    RuntimeError
        Where there is no ncu or no GPU.
    """
    ncu = shutil.which("ncu")
    if ncu is None:
        raise RuntimeError("ncu (Nsight Compute) is not on the PATH, and the counters come from it")
    torch = import_torch()
    device = torch.cuda.get_device_name()
    profiler = Profiler(ncu)
    return lambda row: record(row, *profiler.profile(row), device, commit)


class Profiler:
    """Runs ncu, and learns which metrics it does not know; says once which figures that costs."""

    def __init__(self, ncu: str):
        self._ncu = ncu
        self._known = self._query()
        self._refused: set[str] = set()
        self._told: set[str] = set()

    def profile(self, row) -> tuple[str, dict[str, float]]:
        """The kernel's name, and the values of the metrics that were measured."""
        while True:
            metrics = self._metrics()
            done = subprocess.run(self._command(row, metrics), cwd=Path(__file__).parent.parent, capture_output=True,
                                  text=True)
            said = done.stdout + done.stderr
            refused = refused_metrics(said, metrics)
            if not refused:
                break
            self._refused |= refused
        try:
            kernel, values = parse(done.stdout)
        except ValueError as error:
            raise RuntimeError(f"{row.case}: {complaint(said) or error}") from None
        self._tell(values)
        return kernel, values

    def _command(self, row, metrics):
        return [self._ncu, "--target-processes", "all", "--clock-control", "none", "--kernel-name", f"regex:^{KERNEL}$",
                "--launch-skip", str(WARMUP_CALLS), "--launch-count", "1", "--csv", "--page", "raw", "--print-units",
                "base", "--metrics", ",".join(metrics), sys.executable, "-m", "bench.one_call", row.group, row.case,
                str(WARMUP_CALLS + 1)]

    def _metrics(self):
        chosen = (next((metric for metric in figure.metrics if self._has(metric)), None) for figure in FIGURES + STALLS)
        return [metric for metric in chosen if metric is not None]

    def _has(self, metric):
        return metric not in self._refused and (not self._known or metric.partition(".")[0] in self._known)

    def _query(self):
        """Base names of the metrics of GH100; none where ncu does not say, and then each must be tried."""
        done = subprocess.run([self._ncu, "--query-metrics", "--chip", "gh100"], capture_output=True, text=True)
        known = set(re.findall(r"^\s*(\w+__\w+)", done.stdout, re.MULTILINE))
        return known if "gpu__time_duration" in known else set()

    def _tell(self, values):
        missing = {figure.title: figure.metrics[0] for figure in FIGURES + STALLS if value_of(figure, values) is None}
        for title in missing.keys() - self._told:
            print(f"bench: this ncu does not measure {title} ({missing[title]})", file=sys.stderr)
        self._told |= missing.keys()


def refused_metrics(said: str, metrics: list[str]) -> set[str]:
    """Those of `metrics` that ncu says it cannot find; it quotes them as regular expressions."""
    complaints = "\n".join(line.replace("\\", "") for line in said.splitlines() if "Failed to find metric" in line)
    return {metric for metric in metrics if re.search(rf"{metric.partition('.')[0]}(?!\w)", complaints)}


def complaint(said: str) -> str:
    """What ncu gives as the reason of a failure, or the last line that anything printed."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("==ERROR==")]
    return (errors or lines[-1:] or [""])[0]


def parse(output: str) -> tuple[str, dict[str, float]]:
    """The kernel's name and the metrics of ncu's CSV: a raw page (a column each) or a details page (a line each).

    Raises
    ------
    ValueError
        When there is no kernel in it.
    """
    lines = output.splitlines()
    start = next((at for at, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    table = list(csv.DictReader(line for line in lines[start:] if line.startswith('"')))
    kernels = [line for line in table if line["ID"]]  # the line of units has none
    if not kernels:
        raise ValueError(f"ncu saw no kernel named {KERNEL}")
    name = kernels[0]["Kernel Name"]
    if "Metric Name" in kernels[0]:
        pairs = [(line["Metric Name"], line["Metric Value"]) for line in kernels]
    else:
        pairs = [(metric, value) for metric, value in kernels[0].items() if "__" in metric]
    return name, {metric: number for metric, value in pairs if (number := _number(value)) is not None}


def value_of(figure: Figure, values: dict[str, float]) -> float | None:
    """The figure in its own unit, or None where it was not measured."""
    return next((values[metric] * figure.scale for metric in figure.metrics if metric in values), None)


def record(row, kernel: str, values: dict[str, float], device: str, commit: str) -> dict:
    """One entry of the results file."""
    def measured(figures):
        found = {figure.key: value_of(figure, values) for figure in figures}
        return {key: None if value is None else round(value, 4) for key, value in found.items()}

    return {"group": row.group, "case": row.case, "kernel": kernel, "figures": measured(FIGURES),
            "stalls": measured(STALLS), **provenance(device, commit)}


def table(entries: list[dict]) -> str:
    """The figures as text, with each row's three main reasons why warps wait."""
    columns = {"case": [entry["case"] for entry in entries]}
    for figure in FIGURES:
        columns[figure.title] = [report.text(entry["figures"].get(figure.key), figure.digits) for entry in entries]
    columns["main stalls"] = [_main_stalls(entry) for entry in entries]
    return report.align(columns)


def summary(_entries: list[dict]) -> str:
    """How to read the stalls."""
    return "stalls: warps that wait for each instruction issued"


def _main_stalls(entry):
    measured = [(value, reason) for reason, value in entry["stalls"].items() if value is not None]
    return ", ".join(f"{reason} {value:.2f}" for value, reason in sorted(measured, reverse=True)[:3]) or "-"


def _number(text):
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None  # "n/a": known to this ncu, but not measured
