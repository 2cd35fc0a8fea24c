"""One line of progress: live on a terminal, now and then elsewhere (a job log)."""

from __future__ import annotations

import sys
import time


class Progress:
    """``stage  done/total unit  rate  note  time left``; call :meth:`advance` as work ends and :meth:`close` at the end."""

    def __init__(self, stage: str, total: int, unit: str, *, already: int = 0) -> None:
        """:param already: done by an earlier call; it counts in done/total, not in the rate."""
        self._stage, self._total, self._unit = stage, total, unit
        self.done, self._already = already, already
        self._extra = 0
        self._started = time.monotonic()
        self._live = sys.stderr.isatty()
        self._last = 0.0 if self._live else self._started  # in a log, what is quick needs no line of its own
        self.every_s = 0.5 if self._live else 10.0
        """Seconds between two lines."""

    def advance(self, done: int = 1, *, items: int = 0, note: str = "") -> None:
        """:param items: what the rate counts where it is not the unit of the total (pictures in shards)."""
        self.done += done
        self._extra += items
        now = time.monotonic()
        if now - self._last < self.every_s and (self.done < self._total or not self._live):
            return
        self.show(self._extra, self.done / self._total, note)

    def show(self, items: int, share: float, note: str = "") -> None:
        """Print the line.

        :param items: samples so far, 0 where the unit of the total is what the rate counts.
        :param share: of the work that is done, for the time left.
        """
        self._last = time.monotonic()
        spent = max(self._last - self._started, 1e-9)
        before = self._already / max(self._total, 1)
        here = (share - before) / max(1 - before, 1e-9)  # of what this call had to do
        left = f"{duration(spent / here * (1 - here))} left" if here > 0 else ""
        here_done = items or self.done - self._already
        per_s, unit = here_done / spent, "samples" if items else self._unit
        rate = f"{per_s:.1f} {unit}/s" if per_s >= 0.1 else f"{60 * per_s:.1f} {unit}/min" if per_s else ""
        text = "  ".join(part for part in (f"{self._stage}  {self.done}/{self._total} {self._unit}", rate, note, left) if part)
        if self._live:
            print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)
        else:
            print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._live and self._last:
            print(file=sys.stderr)


def duration(seconds: float) -> str:
    """As a person says it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
