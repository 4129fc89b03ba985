"""Draws results files: one group of bars a row, or curves by length, fa3 beside its peers."""

from __future__ import annotations

from pathlib import Path

from .records import load
from .shapes import GROUPS, MASKS, TIMED

_SERIES = (("fa3", "fa3", "#1b7837"), ("cudnn", "cuDNN", "#636363"), ("fa2", "FlashAttention-2", "#bdbdbd"))
# What bars show, where it is not TFLOP/s: calls too small for these to say anything, and those that only read memory.
_METRICS = {"overhead": "us", "short": "us", "mla": "gbs"}
_LABELS = {"us": "µs a call (shorter is better)", "tflops": "TFLOP/s (longer is better)",
           "gbs": "GB/s (longer is better)"}
_COPY_GBS = 4293  # read and written, of a large copy on an H200
_PAGES = ((None, "fa3", "#1b7837"), (256, "pages of 256", "#5aae61"), (64, "of 64", "#a6dba0"),
          (16, "of 16", "#c2a5cf"), (1, "of 1", "#9970ab"))


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
    if group == "decode":
        return [_save(_decode_figure(entries), path.with_suffix(".png"))]
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
    metric = _METRICS.get(entries[0]["group"], "tflops")
    if metric == "gbs":  # who has more than a query reads little for what is computed
        rows = {row.case: row for row in GROUPS[entries[0]["group"]]}
        entries = [entry for entry in entries if max(rows[entry["case"]].seqlens_q) == 1] or entries
    panels = [(title, rows) for title, rows in _panels(entries) if rows]
    most = max(len(rows) for _, rows in panels)
    figure = _figure((9 if len(panels) == 1 else 13, 1.5 + 0.42 * most))
    axes = figure.subplots(1, len(panels), squeeze=False, sharex=True)[0]
    for axis, (title, rows) in zip(axes, panels, strict=True):
        _bars(axis, rows, metric, by_mask=bool(title))
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel(_LABELS[metric])
    _legend(figure, axes[0])
    _title(figure, entries, entries[0]["group"])
    return figure


def _decode_figure(entries):
    """By batch and length of the contexts: how long a step takes, and at what rate it reads its cache. fa3 on a cache
    in one piece and in pages, cuDNN on one in one piece."""
    rows = {row.case: row for row in GROUPS["decode"]}
    found = {(_context(rows[entry["case"]]), rows[entry["case"]].page): entry for entry in entries}
    contexts = list(dict.fromkeys(context for context, _ in found))
    series = [(label, color, [found.get((context, page)) for context in contexts], "fa3")
              for page, label, color in _PAGES]
    peer, label, color = _SERIES[1]
    series.insert(1, (label, color, series[0][2], peer))
    figure = _figure((12, 1.2 + 0.85 * len(contexts)))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, metric in zip(axes, ("us", "gbs"), strict=True):
        for position, (label, color, shown, name) in enumerate(series):
            values = [_value(entry, name, metric) if entry else None for entry in shown]
            _row_of_bars(axis, values, position, len(series), label, color)
        axis.set_xlabel(_LABELS[metric])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_xscale("log")
    for axis in axes:
        axis.margins(x=0.12)
    axes[1].axvline(_COPY_GBS, color="#636363", linewidth=0.8, linestyle="--", label="a copy, read and written")
    axes[0].set_yticks(range(len(contexts)), [f"{batch} x {keys:,} keys" for batch, keys in contexts], fontsize=8)
    axes[0].set_ylim(len(contexts) - 0.5, -0.5)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower left", ncols=len(series) + 1, frameon=False)
    _title(figure, entries, "A step of decoding, 64 heads on 8, head dim 128, bf16,")
    return figure


def _context(row):
    return len(row.seqlens_k), row.seqlens_k[0]


def _panels(entries):
    """(title, entries): full and causal apart where both have the same rows."""
    if not all(entry["case"].endswith(MASKS) for entry in entries):
        return [("", entries)]
    panels = [(mask, [entry for entry in entries if entry["case"].endswith(mask)]) for mask in MASKS]
    same = [[_name(entry) for entry in rows] for _, rows in panels if rows]
    return panels if all(names == same[0] for names in same) else [("", entries)]


def _name(entry):
    return entry["case"].removesuffix(" full").removesuffix(" causal")


def _row_of_bars(axis, values, position, count, label, color):
    """A series' bar beside those of the others, `count` in all, in each place; None where it has none."""
    width = 0.8 / count
    at = [place + (position - (count - 1) / 2) * width for place in range(len(values))]
    axis.barh(at, [value or 0 for value in values], width, color=color, label=label)
    for y, value in zip(at, values, strict=True):
        if value:
            axis.annotate(f"{value:,.{0 if value >= 100 else 1}f}", (value, y), (3, 0),
                          textcoords="offset points", va="center", fontsize=6)


def _bars(axis, entries, metric, by_mask):
    series = [(label, color, [_value(entry, name, metric) for entry in entries]) for name, label, color in _SERIES]
    series = [one for one in series if any(one[2])]
    for position, (label, color, values) in enumerate(series):
        _row_of_bars(axis, values, position, len(series), label, color)
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
                  if (value := _value(entry, name, "tflops")) is not None]
        axis.plot(*zip(*points, strict=True) if points else ([], []), color=color, label=label, marker="o",
                  markersize=3.5, linewidth=2 if name == "fa3" else 1.5)
    axis.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.minorticks_off()
    axis.spines[["top", "right"]].set_visible(False)


def _legend(figure, axis):
    """One for all panels, fa3 first."""
    named = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    labels = [label for _, label, _ in _SERIES if label in named]
    figure.legend([named[label] for label in labels], labels, loc="outside lower left", ncols=len(labels),
                  frameon=False)


def _title(figure, entries, what):
    dates, commits = ({entry[name] for entry in entries} for name in ("date", "commit"))
    figure.suptitle(f"{what} on {entries[0]['device']}, {', '.join(sorted(dates))}, {', '.join(sorted(commits))}",
                    x=0.01, ha="left", fontsize=11)


def _value(entry, name, metric):
    """µs, TFLOP/s or GB/s of fa3 or of a peer; the same products and bytes in another time."""
    us = entry["us"] if name == "fa3" else entry["peers"].get(name)
    if us is None or metric == "us":
        return us
    return None if entry[metric] is None else entry[metric] * entry["us"] / us
