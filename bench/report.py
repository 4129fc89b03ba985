"""Result files, and the table that compares them with the peers."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from .shapes import GROUPS

FIELDS = ("group", "case", "us", "tflops", "gbs", "peers", "device", "date", "commit")


def results_path(folder: Path, device: str, group: str) -> Path:
    """``<folder>/nvidia-h200-forward.json``."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return folder / f"{slug}-{group}.json"


def save(folder: Path, results: list[dict]) -> Path:
    """Write the results of one group, keeping what the file has of rows that were not run this time."""
    group, device = results[0]["group"], results[0]["device"]
    path = results_path(folder, device, group)
    known = {entry["case"]: entry for entry in load(path)} if path.exists() else {}
    known |= {entry["case"]: entry for entry in results}
    order = {row.case: position for position, row in enumerate(GROUPS[group])}
    entries = sorted(known.values(), key=lambda entry: order.get(entry["case"], len(order)))
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(" " + json.dumps(entry, ensure_ascii=False) for entry in entries)
    path.write_text(f"[\n{lines}\n]\n")
    return path


def load(path: Path) -> list[dict]:
    """The entries of a results file.

    Raises
    ------
    ValueError
        When an entry lacks a field or has another.
    """
    entries = json.loads(path.read_text())
    for entry in entries:
        if set(entry) != set(FIELDS):
            raise ValueError(f"{path}: an entry has the fields {sorted(entry)}, needs {sorted(FIELDS)}")
    return entries


def ratios(entry: dict) -> tuple[float | None, float | None]:
    """Speed of fa3 over cuDNN's, and over the best known peer's, which is carried over by its ratio to cuDNN."""
    cudnn = entry["peers"].get("cudnn")
    if not cudnn:
        return None, None
    over_cudnn = cudnn / entry["us"]
    best = next((row.best_over_cudnn for row in GROUPS[entry["group"]] if row.case == entry["case"]), None)
    return over_cudnn, None if best is None else over_cudnn / best


def table(entries: list[dict]) -> str:
    """The results as text; the last line has the geometric means of the ratios."""
    bars = {row.case: row.bar_us for row in GROUPS[entries[0]["group"]]}
    header = ("case", "µs", "TFLOP/s", "GB/s", "cuDNN µs", "FA2 µs", "vs cuDNN", "vs best", "bar µs")
    body, over_cudnn, over_best = [], [], []
    for entry in entries:
        cudnn_ratio, best_ratio = ratios(entry)
        over_cudnn.append(cudnn_ratio)
        over_best.append(best_ratio)
        body.append((entry["case"], _text(entry["us"], 1), _text(entry["tflops"], 1), _text(entry["gbs"], 0),
                     _text(entry["peers"].get("cudnn"), 1), _text(entry["peers"].get("fa2"), 1),
                     _text(cudnn_ratio, 2), _text(best_ratio, 2), _text(bars.get(entry["case"]), 1)))
    body.append(("geometric mean", "", "", "", "", "", _text(_geometric_mean(over_cudnn), 2),
                 _text(_geometric_mean(over_best), 2), ""))
    widths = [max(len(cell) for cell in column) for column in zip(header, *body, strict=True)]
    lines = []
    for cells in (header, *body):
        first, *others = zip(cells, widths, strict=True)
        lines.append("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]))
    return "\n".join(lines)


def _geometric_mean(values):
    present = [value for value in values if value]
    return math.exp(sum(map(math.log, present)) / len(present)) if present else None


def _text(value, digits):
    return "-" if value is None else f"{value:,.{digits}f}"
