"""What a long command says of itself."""

from __future__ import annotations

import sys
import time

WIDTH = 24
EVERY_SECONDS = 60.0
"""How often a log gets a line; a terminal has one line that is written over."""


def say(text: str) -> None:
    """A line with the time of day."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


class Bar:
    """A bar with an estimate of what is left, for `total` pieces of work of which some may be done already."""

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self._what, self._total, self._first = what, total, done
        self._started = time.monotonic()
        self._said = self._started

    def show(self, done: int, note: str = "") -> None:
        """So many are done; ends the line with the last."""
        now = time.monotonic()
        last = done >= self._total
        if not last and now - self._said < (0.5 if sys.stdout.isatty() else EVERY_SECONDS):
            return
        self._said = now
        rate = (done - self._first) / max(now - self._started, 1e-6)
        left = (self._total - done) / rate if rate else 0.0
        full = WIDTH * done // max(1, self._total)
        bar = f"[{'#' * full}{'.' * (WIDTH - full)}]"
        took = f"took {(now - self._started) / 60:.1f} min" if last else f"{left / 60:.1f} min left"
        line = f"{time.strftime('%H:%M:%S')}  {self._what} {bar} {done}/{self._total}, {took}{note and ', ' + note}"
        if sys.stdout.isatty():
            print(f"\r\x1b[K{line}", end="\n" if last else "", flush=True)
        else:
            print(line, flush=True)
