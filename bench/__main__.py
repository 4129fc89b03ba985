"""``python -m bench GROUP`` runs a group of rows; ``report`` and ``plot`` show what was recorded.

The modules are imported where they are needed, within `main`, so that an fa3 that cannot be imported is one line too.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main(argv=None) -> int:
    """Run the command: 0, or 1 when an answer was wrong, 2 when the run could not be done."""
    args = _parser().parse_args(argv)
    try:
        return {"plot": plot, "report": show}.get(args.group, bench)(args)
    except (ImportError, OSError, RuntimeError, ValueError, re.error) as error:
        print(f"bench: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def bench(args) -> int:
    """Run one group, write its results, print and draw them."""
    from . import accuracy, backward, counters, quantize, records, runner, shapes, tiles, timing

    rows = shapes.rows(args.group, args.rows)
    if not rows:
        raise ValueError(f"--rows {args.rows!r}: no row of {args.group} matches")
    budgets = {"sweep": timing.SWEEP, "tiles": timing.TILES}
    budget = timing.QUICK if args.quick else budgets.get(args.group, timing.Budget())
    prepares = {"backward": backward.prepare, "tiles": tiles.prepare, "quantize": quantize.prepare,
                "accuracy": accuracy.prepare, "counters": counters.prepare}
    prepare = prepares.get(args.group, runner.prepare)
    run_row = prepare(budget, args.commit or runner.current_commit())
    results, wrong, path = [], False, None
    for row, outcome in runner.run_rows(rows, run_row):
        if isinstance(outcome, Exception):
            wrong = wrong or isinstance(outcome, runner.WrongAnswerError)
            print(f"not timed: {row.case}: {outcome}", file=sys.stderr)
            continue
        results.append(outcome)
        path = records.save(args.output, results)  # after each row: what is measured stays, whatever comes next
    if results:
        print(_described(results))
        print(path)
        _draw(path)
    return 1 if wrong else 0


def show(args) -> int:
    """Print every results file of the folder, and write it as CSV beside it."""
    from . import records

    for path in _recorded(args.output):
        entries = records.load(path)
        print(f"{path}\n{_described(entries)}\n{records.write_csv(path, entries)}\n")
    return 0


def plot(args) -> int:
    """Draw every results file of the folder that has a plot."""
    from .plot import draw

    for path in _recorded(args.output):
        for target in draw(path):
            print(target)
    return 0


def _recorded(folder):
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise ValueError(f"{folder}: no results there")
    return paths


def _described(entries):
    """The table of a group, and below it what stands out."""
    from . import accuracy, counters, quantize, report, tiles

    modules = {"tiles": tiles, "quantize": quantize, "accuracy": accuracy, "counters": counters}
    module = modules.get(entries[0]["group"], report)
    return f"{module.table(entries)}\n{module.summary(entries)}".rstrip()


def _draw(path):
    """Draw if matplotlib is here; where it is not, ``python -m bench plot`` can do it elsewhere, later."""
    from .plot import draw

    try:
        for target in draw(path):
            print(target)
    except ImportError:
        print("bench: no matplotlib, no plot; `python -m bench plot` draws it later", file=sys.stderr)


def _parser():
    parser = argparse.ArgumentParser(prog="python -m bench", description="Time fa3 beside cuDNN and FlashAttention-2.")
    parser.add_argument("group", help="forward, sweep, window, short, fp8, seed, overhead, decode, mla, backward, "
                                      "dropout, tiles, quantize, accuracy or counters; or report or plot, to show what "
                                      "is recorded")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="folder of the results")
    parser.add_argument("--rows", default="", metavar="REGEX", help="only the rows whose name matches")
    parser.add_argument("--quick", action="store_true", help="a short look: one round, 20 ms of launches")
    parser.add_argument("--commit", default="", metavar="ID", help="what the figures belong to, where git cannot say")
    return parser


if __name__ == "__main__":
    sys.exit(main())
