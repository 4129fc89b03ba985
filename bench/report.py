"""What results mean: the table that compares them with the peers, and which rows miss what is asked of them."""

from __future__ import annotations

import math

from .shapes import GROUPS

# What a row's reference is, as a column's title.
_REFERENCE = {"window": "of full", "forward": "of next dim", "decode": "of contiguous", "mla": "of contiguous",
              "dropout": "of none"}
# What sums in one order may take of the time of those in any.
_IN_ORDER = 1.15


def ratios(entry: dict) -> tuple[float | None, float | None]:
    """Speed of fa3 over cuDNN's, and over the best known peer's, which is carried over by its ratio to cuDNN."""
    cudnn = entry["peers"].get("cudnn")
    if not cudnn:
        return None, None
    over_cudnn = cudnn / entry["us"]
    row = _row(entry)
    best = None if row is None else row.best_over_cudnn
    return over_cudnn, None if best is None else over_cudnn / best


def share(entry: dict, entries: list[dict]) -> float | None:
    """TFLOP/s over those of the row's reference, where `entries` have it."""
    row = _row(entry)
    if row is None or row.reference is None:
        return None
    reference = next((other for other in entries if other["case"] == row.reference), None)
    return None if reference is None else entry["tflops"] / reference["tflops"]


def table(entries: list[dict]) -> str:
    """The results of a timed group as text; the last line has the geometric means of the ratios."""
    columns = {
        "case": [entry["case"] for entry in entries],
        "µs": [text(entry["us"], 1) for entry in entries],
        "TFLOP/s": [text(entry["tflops"], 1) for entry in entries],
        "GB/s": [text(entry["gbs"], 0) for entry in entries],
        "cuDNN µs": [text(entry["peers"].get("cudnn"), 1) for entry in entries],
        "FA2 µs": [text(entry["peers"].get("fa2"), 1) for entry in entries],
    }
    over_cudnn, over_best = zip(*map(ratios, entries), strict=True)
    means = {"case": "geometric mean"}
    for title, values in (("vs cuDNN", over_cudnn), ("vs best", over_best)):
        columns[title] = [text(value, 2) for value in values]
        means[title] = text(geometric_mean(values), 2)
    if entries[0]["group"] in _REFERENCE:
        columns[_REFERENCE[entries[0]["group"]]] = [text(share(entry, entries), 2) for entry in entries]
    if "deterministic_us" in entries[0]:
        columns["in order"] = [text(entry["deterministic_us"] / entry["us"], 2) for entry in entries]
    columns["bar µs"] = [text(row and row.bar_us, 1) for row in map(_row, entries)]
    return align(columns, means)


def summary(entries: list[dict]) -> str:
    """The geometric means over the rows of the targets, and the rows below cuDNN, the best peer or their bar."""
    of_targets = [(entry, *ratios(entry)) for entry in entries if ratios(entry)[1] is not None]
    lines = []
    if of_targets:
        _, over_cudnn, over_best = zip(*of_targets, strict=True)
        lines.append(f"{len(of_targets)} rows of the targets: {geometric_mean(over_cudnn):.2f} times as fast as cuDNN, "
                     f"{geometric_mean(over_best):.2f} times as fast as the best peer, in the geometric mean")
        lines.append("of these slower than the best peer: " + _listed(
            f"{entry['case']} ({best:.3f})" for entry, _, best in of_targets if best < 1))
    over_cudnn = [(entry, ratios(entry)[0]) for entry in entries]
    if any(ratio is not None for _, ratio in over_cudnn):
        lines.append("slower than cuDNN: " + _listed(
            f"{entry['case']} ({ratio:.3f})" for entry, ratio in over_cudnn if ratio is not None and ratio < 1))
    misses = [miss for entry in entries for miss in _misses(entry, entries)]
    if "deterministic_us" in entries[0] or any(
            row is not None and (row.bar_us or row.bar_share) for row in map(_row, entries)):
        lines.append("below their bar: " + _listed(misses))
    return "\n".join(lines)


def align(columns: dict[str, list[str]], last: dict[str, str] | None = None) -> str:
    """Columns under their titles, the first to the left and the others to the right, and perhaps a last line."""
    lines = [tuple(columns), *zip(*columns.values(), strict=True)]
    if last is not None:
        lines.append(tuple(last.get(title, "") for title in columns))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0]),
                                *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))])
                     for line in lines)


def geometric_mean(values) -> float | None:
    """Of the values that are there; None of none."""
    present = [value for value in values if value]
    return math.exp(sum(map(math.log, present)) / len(present)) if present else None


def text(value: float | None, digits: int) -> str:
    """A number for a column."""
    return "-" if value is None else f"{value:,.{digits}f}"


def _misses(entry, entries):
    """What the row asks and does not get."""
    row = _row(entry)
    if row is None:
        return
    if row.bar_us is not None and entry["us"] > row.bar_us:
        yield f"{entry['case']} ({entry['us']:,.1f} µs for {row.bar_us:,.1f})"
    got = share(entry, entries)
    if got is not None and row.bar_share is not None and got < row.bar_share:
        yield f"{entry['case']} ({got:.3f} {_REFERENCE[entry['group']]} for {row.bar_share:.2f})"
    in_order = entry.get("deterministic_us", 0) / entry["us"]
    if in_order > _IN_ORDER:
        yield f"{entry['case']} ({in_order:.3f} of the time in one order for {_IN_ORDER:.2f})"


def _row(entry):
    return next((row for row in GROUPS[entry["group"]] if row.case == entry["case"]), None)


def _listed(items):
    return ", ".join(items) or "none"
