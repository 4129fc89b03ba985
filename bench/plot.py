"""Draws results files: one group of bars a row, or curves by length, fa3 beside its peers."""

from __future__ import annotations

from pathlib import Path

from .records import load
from .shapes import GROUPS, MASKS, TIMED

_SERIES = (("fa3", "fa3", "#1b7837"), ("cudnn", "cuDNN", "#636363"), ("fa2", "FlashAttention-2", "#bdbdbd"))
_BY_TIME = ("overhead", "short")  # calls too small for their TFLOP/s to say anything


def draw(path: Path) -> list[Path]:
    """Draw the results at `path` as PNGs beside it; nothing where a group has no plot.

    Returns
    -------
    list of Path
        The sweep: one figure of curves for each dtype. The other groups: bars, TFLOP/s or µs.
    """
    entries = load(path)
    if not entries:
        raise ValueError(f"{path}: no results in it")
    group = entries[0]["group"]
    if group == "accuracy":
        return [_save(_errors_figure(entries), path.with_suffix(".png"))]
    if group not in TIMED:
        return []
    if group != "sweep":
        return [_save(_bars_figure(entries), path.with_suffix(".png"))]
    rows = {row.case: row for row in GROUPS[group]}
    dtypes = dict.fromkeys(rows[entry["case"]].dtype for entry in entries)
    return [_save(_curves_figure([(rows[entry["case"]], entry) for entry in entries
                                  if rows[entry["case"]].dtype == dtype], dtype),
                  path.with_name(f"{path.stem}-{dtype}.png")) for dtype in dtypes]


def _errors_figure(entries):
    """Errors by the number of keys, a curve for each interval: values of mean 0 to the left, of mean 1 to the right."""
    rows = {row.case: row for row in GROUPS["accuracy"]}
    figure = _figure((10, 4))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, values in zip(axes, (0, 1), strict=True):
        shown = [(rows[entry["case"]].seqlens_k[0], entry["errors"]) for entry in entries
                 if entry["case"].endswith(f"mean{values}") and not entry["times"]]
        for name in entries[0]["errors"]:
            axis.plot([keys for keys, _ in shown], [errors[name] for _, errors in shown], marker="o", markersize=3.5,
                      label=name if name == "none" else f"every {name} keys")
        axis.set_title(f"values of mean {values}", loc="left", fontsize=10)
        axis.set_xlabel("keys")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.grid(axis="y", color="#e5e5e5", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("relative error (RMS)")
    axes[1].legend(frameon=False, title="sums move on to fp32")
    _title(figure, entries, "Errors of fp8")
    return figure


def _figure(size):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure, target):
    figure.savefig(target, dpi=120)
    return target


def _bars_figure(entries):
    """Full and causal rows side by side where the names say so, each row with a bar for fa3 and for each peer."""
    panels = [(title, rows) for title, rows in _panels(entries) if rows]
    most = max(len(rows) for _, rows in panels)
    figure = _figure((9 if len(panels) == 1 else 13, 1.5 + 0.42 * most))
    axes = figure.subplots(1, len(panels), squeeze=False, sharex=True)[0]
    by_time = entries[0]["group"] in _BY_TIME
    for axis, (title, rows) in zip(axes, panels, strict=True):
        _bars(axis, rows, by_time, by_mask=bool(title))
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("µs a call (shorter is better)" if by_time else "TFLOP/s (longer is better)")
    _legend(figure, axes[0])
    _title(figure, entries, entries[0]["group"])
    return figure


def _panels(entries):
    """(title, entries): full and causal apart where both have the same rows."""
    if not all(entry["case"].endswith(MASKS) for entry in entries):
        return [("", entries)]
    panels = [(mask, [entry for entry in entries if entry["case"].endswith(mask)]) for mask in MASKS]
    same = [[_name(entry) for entry in rows] for _, rows in panels if rows]
    return panels if all(names == same[0] for names in same) else [("", entries)]


def _name(entry):
    return entry["case"].removesuffix(" full").removesuffix(" causal")


def _bars(axis, entries, by_time, by_mask):
    width = 0.8 / len(_SERIES)
    for position, (name, label, color) in enumerate(_SERIES):
        values = [_value(entry, name, by_time) for entry in entries]
        at = [row + (position - (len(_SERIES) - 1) / 2) * width for row in range(len(entries))]
        axis.barh(at, [value or 0 for value in values], width, color=color, label=label)
        for y, value in zip(at, values, strict=True):
            if value:
                axis.annotate(f"{value:,.{0 if value >= 100 else 1}f}", (value, y), (3, 0),
                              textcoords="offset points", va="center", fontsize=6)
    names = [_name(entry) if by_mask else entry["case"] for entry in entries]
    axis.set_yticks(range(len(entries)), names, fontsize=8)
    axis.set_ylim(len(entries) - 0.5, -0.5)
    axis.margins(x=0.1)
    axis.spines[["top", "right"]].set_visible(False)


def _curves_figure(pairs, dtype):
    """TFLOP/s by length: a column of panels for each head dim, full above and causal below."""
    dims = list(dict.fromkeys(row.head_dim for row, _ in pairs))
    masks = [mask for mask in MASKS if any(row.causal == (mask == "causal") for row, _ in pairs)]
    figure = _figure((1 + 3.6 * len(dims), 0.9 + 2.8 * len(masks)))
    axes = figure.subplots(len(masks), len(dims), squeeze=False, sharex=True, sharey=True)
    for mask, line in zip(masks, axes, strict=True):
        for head_dim, axis in zip(dims, line, strict=True):
            shown = [(row, entry) for row, entry in pairs
                     if row.head_dim == head_dim and row.causal == (mask == "causal")]
            _curves(axis, shown)
            axis.set_title(f"head dim {head_dim}, {mask}", loc="left", fontsize=10)
        line[0].set_ylabel("TFLOP/s")
    lengths = sorted({row.seqlens_q[0] for row, _ in pairs})
    axes[0, 0].set_xscale("log", base=2)
    axes[0, 0].set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
    axes[0, 0].set_ylim(bottom=0)
    for axis in axes[-1]:
        axis.set_xlabel("sequence length")
    _legend(figure, axes[0, 0])
    _title(figure, [entry for _, entry in pairs], f"Forward, {dtype},")
    return figure


def _curves(axis, pairs):
    for name, label, color in reversed(_SERIES):  # fa3 on top
        points = [(row.seqlens_q[0], value) for row, entry in pairs
                  if (value := _value(entry, name, by_time=False)) is not None]
        axis.plot(*zip(*points, strict=True) if points else ([], []), color=color, label=label, marker="o",
                  markersize=3.5, linewidth=2 if name == "fa3" else 1.5)
    axis.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.minorticks_off()
    axis.spines[["top", "right"]].set_visible(False)


def _legend(figure, axis):
    """One for all panels, fa3 first."""
    named = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    labels = [label for _, label, _ in _SERIES]
    figure.legend([named[label] for label in labels], labels, loc="outside lower left", ncols=len(labels),
                  frameon=False)


def _title(figure, entries, what):
    dates, commits = ({entry[name] for entry in entries} for name in ("date", "commit"))
    figure.suptitle(f"{what} on {entries[0]['device']}, {', '.join(sorted(dates))}, {', '.join(sorted(commits))}",
                    x=0.01, ha="left", fontsize=11)


def _value(entry, name, by_time):
    """µs or TFLOP/s of fa3 or of a peer; the same products in another time."""
    us = entry["us"] if name == "fa3" else entry["peers"].get(name)
    if us is None or by_time:
        return us
    return None if entry["tflops"] is None else entry["tflops"] * entry["us"] / us
