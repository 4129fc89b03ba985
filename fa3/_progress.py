"""A progress bar on stderr, for a person who waits; silent where stderr is not a terminal."""

from __future__ import annotations

import sys
import time

_WIDTH = 30
_INTERVAL = 0.1  # seconds between two drawings


class Progress:
    """``with Progress("checking") as bar: bar(done, total)``; the line is wiped at the end."""

    def __init__(self, label: str, stream=None):
        self.label = label
        self.stream = sys.stderr if stream is None else stream
        self._shown = 0
        self._last = float("-inf")
        self._visible = self.stream.isatty()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self._shown:
            self.stream.write("\r" + " " * self._shown + "\r")
            self.stream.flush()
            self._shown = 0

    def __call__(self, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if not self._visible or (now - self._last < _INTERVAL and done < total):
            return
        self._last = now
        filled = _WIDTH * done // max(total, 1)
        line = f"{self.label} [{'#' * filled}{'.' * (_WIDTH - filled)}] {done}/{total} {note}".rstrip()
        self.stream.write("\r" + line.ljust(self._shown))
        self.stream.flush()
        self._shown = max(self._shown, len(line))
