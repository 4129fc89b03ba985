"""Draws a results file: one group of bars a row, fa3 beside its peers."""

from __future__ import annotations

from pathlib import Path

from .report import load

_SERIES = (("fa3", "fa3", "#1b7837"), ("cudnn", "cuDNN", "#7b7b7b"), ("fa2", "FlashAttention-2", "#c9c9c9"))
_PANEL_ENDINGS = ("full", "causal")


def draw(path: Path) -> Path:
    """Draw the results at `path` as a PNG beside it: TFLOP/s, or µs where a group has none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    entries = load(path)
    if not entries:
        raise ValueError(f"{path}: no results in it")
    panels = [panel for panel in _panels(entries) if panel[1]]
    height = 1.2 + sum(0.5 + 0.45 * len(rows) for _, rows in panels)
    figure = Figure(figsize=(9, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True,
                           height_ratios=[len(rows) for _, rows in panels])[:, 0]
    by_time = all(entry["tflops"] is None for entry in entries)
    for axis, (title, rows) in zip(axes, panels, strict=True):
        _bars(axis, rows, by_time)
        axis.set_title(title, loc="left", fontsize=10)
    axes[-1].set_xlabel("µs a call (shorter is better)" if by_time else "TFLOP/s (longer is better)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=len(labels), frameon=False)
    dates, commits = ({entry[name] for entry in entries} for name in ("date", "commit"))
    figure.suptitle(f"{entries[0]['group']} on {entries[0]['device']}, {', '.join(sorted(dates))}, "
                    f"{', '.join(sorted(commits))}", x=0.01, ha="left", fontsize=11)
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=120)
    return target


def _panels(entries):
    """(title, entries): full and causal apart where the names say so."""
    if all(entry["case"].endswith(_PANEL_ENDINGS) for entry in entries):
        return [(ending, [entry for entry in entries if entry["case"].endswith(ending)]) for ending in _PANEL_ENDINGS]
    return [("", entries)]


def _bars(axis, entries, by_time):
    width = 0.8 / len(_SERIES)
    for position, (name, label, color) in enumerate(_SERIES):
        values = [_value(entry, name, by_time) for entry in entries]
        at = [row + (position - (len(_SERIES) - 1) / 2) * width for row in range(len(entries))]
        axis.barh(at, [value or 0 for value in values], width, color=color, label=label)
        for y, value in zip(at, values, strict=True):
            if value:
                axis.annotate(f"{value:,.{0 if value >= 100 else 1}f}", (value, y), (3, 0),
                              textcoords="offset points", va="center", fontsize=7)
    names = [entry["case"].removesuffix(" full").removesuffix(" causal") for entry in entries]
    axis.set_yticks(range(len(entries)), names, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.08, y=0.02)
    axis.spines[["top", "right"]].set_visible(False)


def _value(entry, name, by_time):
    """µs or TFLOP/s of fa3 or of a peer; the same products in another time."""
    us = entry["us"] if name == "fa3" else entry["peers"].get(name)
    if us is None or by_time:
        return us
    return None if entry["tflops"] is None else entry["tflops"] * entry["us"] / us
