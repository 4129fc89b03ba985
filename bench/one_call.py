"""Calls fa3 on one row's problem a few times and does nothing else: what a profiler runs."""

from __future__ import annotations

import sys

from . import shapes
from .runner import import_torch, problem


def main(group: str, case: str, calls: str) -> None:
    """Make the problem of the row `case` of `group`, and call fa3 on it."""
    torch = import_torch()
    row = next(row for row in shapes.GROUPS[group] if row.case == case)
    *_, call = problem(torch, row)
    for _ in range(int(calls)):
        call()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
