"""One line of progress: live on a terminal, now and then elsewhere (a job log)."""

from __future__ import annotations

import sys
import time


class Progress:
    """``stage  done/total  rate  time left``; call :meth:`advance` as work ends and :meth:`close` at the end."""

    def __init__(self, stage: str, total: int, unit: str, *, already: int = 0) -> None:
        """:param already: done by an earlier call; it counts in done/total, not in the rate."""
        self._stage, self._total, self._unit = stage, total, unit
        self._done, self._already = already, already
        self._extra = 0
        self._started = time.monotonic()
        self._live = sys.stderr.isatty()
        self._last = 0.0 if self._live else self._started  # in a log, what is quick needs no line of its own

    def advance(self, done: int = 1, *, items: int = 0, note: str = "") -> None:
        """:param items: what the rate counts where it is not the unit of the total (pictures in shards)."""
        self._done += done
        self._extra += items
        now = time.monotonic()
        if now - self._last < (0.2 if self._live else 10) and (self._done < self._total or not self._live):
            return
        self._last = now
        spent = max(now - self._started, 1e-9)
        now_done = max(self._done - self._already, 1)
        rate = (self._extra or now_done) / spent
        left = spent / now_done * (self._total - self._done)
        unit = "samples" if self._extra else self._unit
        text = f"{self._stage}  {self._done}/{self._total} {self._unit}  {rate:.1f} {unit}/s  {left:.0f} s left"
        text += f"  {note}" if note else ""
        if self._live:
            print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)
        else:
            print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._live and self._last:
            print(file=sys.stderr)
