"""A progress bar on stderr, for people: nothing where stderr is no terminal."""

from __future__ import annotations

import sys
import time

_WIDTH = 24


class Bar:
    """bar(done, total): draws at most ten times a second, and the time that is left. `what` may be changed on the way."""

    def __init__(self, what: str, *, quiet: bool = False) -> None:
        self.what = what
        self._on = not quiet and sys.stderr.isatty()
        self._started = self._drawn = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if not self._on or (now - self._drawn < 0.1 and done < total):
            return
        self._drawn = now
        filled = _WIDTH * done // max(total, 1)
        left = (now - self._started) * (total - done) / done if done else 0
        text = f"[{'#' * filled:.<{_WIDTH}}] {done}/{total} {self.what}" + (f", {left:.0f} s left" if done < total else "")
        print(f"\r{text}\x1b[K", end="\n" if done >= total else "", file=sys.stderr, flush=True)
