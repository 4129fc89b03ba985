"""``python -m bench GROUP`` times a group of rows; ``python -m bench plot`` draws what was recorded."""

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
        return plot(args) if args.group == "plot" else bench(args)
    except (ImportError, OSError, RuntimeError, ValueError, re.error) as error:
        print(f"bench: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def bench(args) -> int:
    """Time one group, write its results, draw and print them."""
    from . import report, runner, shapes, timing

    rows = shapes.rows(args.group, args.rows)
    if not rows:
        raise ValueError(f"--rows {args.rows!r}: no row of {args.group} matches")
    budget = timing.QUICK if args.quick else timing.Budget()
    commit = args.commit or runner.current_commit()
    results, wrong, path = [], False, None
    for row, outcome in runner.run_rows(rows, budget, commit):
        if isinstance(outcome, Exception):
            wrong = wrong or isinstance(outcome, runner.WrongAnswerError)
            print(f"not timed: {row.case}: {outcome}", file=sys.stderr)
            continue
        results.append(outcome)
        path = report.save(args.output, results)  # after each row: what is measured stays, whatever comes next
    if results:
        print(report.table(results))
        print(path)
        _draw(path)
    return 1 if wrong else 0


def plot(args) -> int:
    """Draw every results file of the folder."""
    from .plot import draw

    paths = sorted(args.output.glob("*.json"))
    if not paths:
        raise ValueError(f"{args.output}: no results there")
    for path in paths:
        print(draw(path))
    return 0


def _draw(path):
    """Draw if matplotlib is here; where it is not, ``python -m bench plot`` can do it elsewhere, later."""
    from .plot import draw

    try:
        print(draw(path))
    except ImportError:
        print("bench: no matplotlib, no plot; `python -m bench plot` draws it later", file=sys.stderr)


def _parser():
    parser = argparse.ArgumentParser(prog="python -m bench", description="Time fa3 beside cuDNN and FlashAttention-2.")
    parser.add_argument("group", help="forward, seed or overhead; or plot, to draw the recorded results")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="folder of the results")
    parser.add_argument("--rows", default="", metavar="REGEX", help="only the rows whose name matches")
    parser.add_argument("--quick", action="store_true", help="a short look: one round, 20 ms of launches")
    parser.add_argument("--commit", default="", metavar="ID", help="what the figures belong to, where git cannot say")
    return parser


if __name__ == "__main__":
    sys.exit(main())
