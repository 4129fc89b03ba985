"""Result files: one JSON file a group and device, which keeps every figure, and the same as CSV beside it."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

from .shapes import GROUPS

_TIMED = ("group", "case", "us", "tflops", "gbs", "peers", "device", "date", "commit")
_FIELDS = {
    "backward": (*_TIMED[:5], "deterministic_us", *_TIMED[5:]),
    "tiles": ("group", "case", "plan", "times", "loss", "device", "date", "commit"),
    "quantize": ("group", "case", "us", "gbs", "copy_us", "share", "device", "date", "commit"),
    "accuracy": ("group", "case", "errors", "times", "device", "date", "commit"),
    "counters": ("group", "case", "kernel", "figures", "stalls", "device", "date", "commit"),
}
# How a CSV column is called that holds one value of a field with several.
_COLUMN = {"peers": "{}_us", "times": "{}_us", "errors": "error_{}", "figures": "{}", "stalls": "stall_{}"}


def fields(group: str) -> tuple[str, ...]:
    """The fields of an entry of this group, in their order."""
    return _FIELDS.get(group, _TIMED)


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
    write_csv(path, entries)
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
        needed = fields(entry.get("group", ""))
        if set(entry) != set(needed):
            raise ValueError(f"{path}: an entry has the fields {sorted(entry)}, needs {sorted(needed)}")
    return entries


def write_csv(path: Path, entries: list[dict]) -> Path:
    """The entries as a table beside the JSON file at `path`, each with the sizes of its problem."""
    problems = {row.case: _problem(row) for row in GROUPS[entries[0]["group"]]}
    lines = [_flat(entry, problems.get(entry["case"], {})) for entry in entries]
    columns = list(dict.fromkeys(column for line in lines for column in line))
    target = path.with_suffix(".csv")
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return target


def _problem(row):
    return {"dtype": row.dtype, "batch": len(row.seqlens_q), "max_seqlen_q": max(row.seqlens_q),
            "max_seqlen_k": max(row.seqlens_k), "num_heads": row.num_heads, "num_heads_kv": row.num_heads_kv,
            "head_dim": row.head_dim, "head_dim_v": row.dim_v, "causal": int(row.causal),
            "window_left": row.window[0], "window_right": row.window[1]}


def _flat(entry, problem):
    line = {}
    for name in fields(entry["group"]):
        value = entry[name]
        line |= {_COLUMN[name].format(key): each for key, each in value.items()} if name in _COLUMN else {name: value}
        if name == "case":
            line |= problem
    return line
