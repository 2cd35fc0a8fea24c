"""What a call says, and how loud: lines of what was done, one live line of progress, warnings, and the one line of a mistake.

In: texts and counts. Out, by ``verbosity``:

- ``normal``: what was done and found on stdout, where the result lies and what to run next as its last lines; on stderr one live line
  of progress a stage on a terminal, a plain line with the time now and then elsewhere (a job's log), and warnings.
- ``quiet``: on stdout only where the result lies, on stderr only what goes wrong.
- ``json``: all of ``normal`` on the same streams, each line of raysys's own one JSON object with ``time``, ``verb`` and ``event``: ``message`` and ``warning``
  (``text``), ``progress`` (``stage``, ``done``, ``total``, ``unit``, ``per_s``, ``per_s_unit``, ``seconds_left``, ``note``), ``result`` (``path``,
  ``next`` and what a verb adds), ``error`` (``text``, ``status``), ``facts`` of doctor.

One call of the command line is one process, so its verbosity is one value of this module.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

LINE_EVERY_S = 10.0
"""Between two lines of progress in a log."""
BAR_CHARS = 20
LEAST_SHARE = 0.002
"""Of the work: with less of it done nobody knows what is left."""

_verbosity = "normal"
_verb = ""
_hushed = 0
_within = 0
_live: list[Progress] = []
"""Lines that are shown on the terminal now; the newest is live, those below it wait."""
_lock = threading.RLock()
"""Whoever writes to the terminal, or changes what is live, has it: threads warn too."""


def begin(verb: str, verbosity: str) -> None:
    """A verb begins; what is said from now on is its."""
    global _verb, _verbosity
    _verb, _verbosity = verb, verbosity


def is_json() -> bool:
    return _verbosity == "json"


@contextmanager
def hushed() -> Iterator[None]:
    """What a step within another step has to say is not said; its progress and its warnings are shown."""
    global _hushed
    _hushed += 1
    try:
        yield
    finally:
        _hushed -= 1


@contextmanager
def within_another() -> Iterator[None]:
    """Verbs that are steps of another: what they do is said, where their results lie and what would come next is not."""
    global _within
    _within += 1
    try:
        yield
    finally:
        _within -= 1


def say(text: str) -> None:
    """What was done or found, one line or several."""
    if _hushed or _verbosity == "quiet":
        return
    if _verbosity == "json":
        _write_json(sys.stdout, "message", text=text)
    else:
        with _lock:
            if _live and sys.stdout.isatty():
                _live[-1].print_above(text)
            else:
                print(text, flush=True)


def warn(text: str) -> None:
    """What a user must know while the work goes on, with the time: a log keeps it."""
    if _verbosity == "json":
        _write_json(sys.stderr, "warning", text=text)
        return
    line = f"{time.strftime('%H:%M:%S')} {text}"
    with _lock:
        if _live:
            _live[-1].print_above(line)
        else:
            print(line, file=sys.stderr, flush=True)


def tell_result(path: str, *, next_words: str = "", **more: str) -> None:
    """The last lines of a verb: where its result is, and what to run next.

    :param more: further places and commands, by name; ``report`` is a page.
    """
    if _hushed or _within:
        return
    if _verbosity == "json":
        _write_json(sys.stdout, "result", path=path, **more, next=next_words)
        return
    print(f"result: {path}")
    if _verbosity == "normal":
        for name, value in more.items():
            print(f"{name + ':':7} {value}")
        if next_words:
            print(f"next:   {next_words}")
    sys.stdout.flush()


def tell_event(event: str, **fields: Any) -> None:
    """What only ``verbosity=json`` has a form for."""
    _write_json(sys.stdout, event, **fields)


def tell_error(name: str, text: str, status: int) -> None:
    """The one line of a call that ends badly.

    :param name: ``raysys VERB``.
    """
    if _verbosity == "json":
        _write_json(sys.stderr, "error", text=text, status=status)
    else:
        print(f"{name}: {text}", file=sys.stderr, flush=True)


def _write_json(stream: Any, event: str, **fields: Any) -> None:
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    print(json.dumps({"time": now, "verb": _verb, "event": event} | fields), file=stream, flush=True)


@contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Something that cannot be counted: a terminal shows that it goes on; elsewhere nothing is said."""
    if _verbosity != "normal" or _hushed or _live or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    # stderr itself may be muted within
    with open(os.dup(sys.stderr.fileno()), "w") as terminal, Console(file=terminal).status(what):
        yield


class Progress:
    """``stage  done/total unit  rate  note  time left``; call :meth:`advance` as work ends. A context manager: at its end the line stays."""

    def __init__(self, stage: str, total: int, unit: str, *, already: int = 0) -> None:
        """:param already: done by an earlier call; it counts in done/total, not in the rate."""
        self._stage, self._total, self._unit = stage, total, unit
        self.done, self._already = already, already
        self._items, self._note, self._share = 0, "", already / max(total, 1)
        self._started = self._last = time.monotonic()
        self._first: tuple[float, int, float] | None = None
        """When the first work was reported, how much, and its share: what came before (imports, actors that start) is in no rate."""
        self._shown = False
        self._silent = _verbosity == "quiet"
        live = not self._silent and _verbosity == "normal" and sys.stderr.isatty()
        self._rich = _rich_progress(self) if live else None
        self.every_s = 0.5 if live else LINE_EVERY_S
        """Seconds between two looks that are worth it."""
        if self._rich is not None:
            with _lock:
                for below in _live[-1:]:
                    below._pause()
                _live.append(self)
                self._resume()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def advance(self, done: int = 1, *, items: int = 0, note: str = "") -> None:
        """:param items: what the rate counts where it is not the unit of the total (pictures in shards)."""
        self.done += done
        self._items += items
        self._share, self._note = self.done / max(self._total, 1), note
        self._mark_first()
        # a terminal is drawn four times a second, however often it is told
        if self._rich is not None or time.monotonic() - self._last >= self.every_s:
            self._show()

    def show(self, items: int, share: float, note: str = "") -> None:
        """The state as a whole, where :attr:`done` is set by hand.

        :param items: samples so far, 0 where the unit of the total is what the rate counts.
        :param share: of the work that is done, for the time left.
        """
        self._items, self._share, self._note = items, share, note
        self._mark_first()
        self._show()

    def close(self) -> None:
        """The last state stays on the screen; in a log it is a line where the work took long enough to have had one."""
        if self._rich is not None:
            with _lock:
                _live.remove(self)
                self._rich.update(self._task, completed=self._share, total=1, words=self._words(ended=True))
                self._rich.stop()
                self._rich = None
                for below in _live[-1:]:
                    below._resume()
        elif self._shown:
            self._show(ended=True)
        self._silent = True  # a second call says nothing

    def print_above(self, text: str) -> None:
        from rich.text import Text

        assert self._rich is not None
        self._rich.console.print(Text(text), soft_wrap=True)  # to the letter, and not broken into lines: people copy it

    def _pause(self) -> None:
        if self._rich is not None:
            self._rich.stop()

    def _resume(self) -> None:
        if self._rich is not None:
            self._rich.start()
            self._rich.console.show_cursor(True)  # who is killed leaves it as it is

    def _show(self, *, ended: bool = False) -> None:
        self._last = time.monotonic()
        if self._silent:
            return
        self._shown = True
        if (rich := self._rich) is not None:
            rich.update(rich.task_ids[0], completed=self._share, total=1, words=self._words())
        elif _verbosity == "json":
            state = {"stage": self._stage, "done": self.done, "total": self._total, "unit": self._unit}
            per_s, unit = self._rate()
            left_s = None if self._seconds_left() is None else round(self._seconds_left() or 0.0, 1)
            rate = {"per_s": float(f"{per_s:.4g}"), "per_s_unit": unit, "seconds_left": left_s, "note": self._note}
            _write_json(sys.stderr, "progress", **state, **rate)
        else:
            print(f"{time.strftime('%H:%M:%S')} {self._stage}  {self._words(ended=ended)}", file=sys.stderr, flush=True)

    def _mark_first(self) -> None:
        if self._first is None and self._reported():
            self._first = time.monotonic(), self._reported(), self._share

    def _reported(self) -> int:
        """What the rate counts, of this call."""
        return self._items or self.done - self._already

    def _rate(self, *, ended: bool = False) -> tuple[float, str]:
        """A second, and of what: since the first work was reported, or over all where that is all there is."""
        since, before, _ = self._first or (self._started, 0, 0.0)
        if ended or self._reported() <= before:
            since, before = self._started, 0
        return (self._reported() - before) / max(time.monotonic() - since, 1e-9), "samples" if self._items else self._unit

    def _seconds_left(self) -> float | None:
        since, _, before = self._first or (self._started, 0, 0.0)
        if self._share <= before:
            since, before = self._started, self._already / max(self._total, 1)
        here = self._share - before
        return (time.monotonic() - since) / here * max(1 - self._share, 0.0) if here > LEAST_SHARE else None

    def _words(self, *, ended: bool = False) -> str:
        per_s, unit = self._rate(ended=ended)
        rate = f"{per_s:,.1f} {unit}/s" if per_s >= 0.1 else f"{60 * per_s:.1f} {unit}/min" if per_s else ""
        left = self._seconds_left()
        when = f"{duration(left)} left" if left is not None else ""
        if ended:
            when = f"took {duration(time.monotonic() - self._started)}"
        return "  ".join(part for part in (f"{self.done:,}/{self._total:,} {self._unit}", rate, self._note, when) if part)

    @property
    def _task(self) -> Any:
        assert self._rich is not None
        return self._rich.task_ids[0]


def _rich_progress(line: Progress) -> RichProgress:
    """The live line: it is cut at the terminal's width, never broken."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as RichProgress
    from rich.table import Column

    stage = TextColumn("[bold]{task.description}", markup=True, table_column=Column(no_wrap=True))
    words = TextColumn("{task.fields[words]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
    rich = RichProgress(
        stage,
        BarColumn(BAR_CHARS),
        words,
        console=Console(file=sys.stderr),
        redirect_stdout=False,
        refresh_per_second=4,
        expand=True,
    )  # no redirect: stdout may be a file
    task = rich.add_task(line._stage.replace("[", "\\["), total=1, words=line._words())
    rich.update(task, completed=line._share)
    return rich


def duration(seconds: float) -> str:
    """As a person says it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
