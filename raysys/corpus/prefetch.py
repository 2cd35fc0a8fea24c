"""Work ahead of the one who takes the results, in threads, in order. No Ray here.

In: items and what to do with each. Out: the results. Python cannot end a thread, so one that hangs is given up and replaced; it burns its
core until its work ends, if ever.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")

_TICKS = 10
"""Time is measured in so many ticks of a thread to a limit: while the whole process stands still there are none, and no work is late."""


@dataclass(eq=False)
class _Job(Generic[T, U]):
    item: T
    result: Future[U]
    ticks: int = 0
    """So often seen at work."""


def prefetch(
    items: Iterable[T],
    work: Callable[[T], U],
    *,
    threads: int,
    ahead: int,
    limit_s: float | None = None,
    late: Callable[[T], U] | None = None,
) -> Generator[U, None, None]:
    """``map(work, items)`` with at most ``ahead`` results waiting; begins at once, before the first is asked for.

    Items are drawn by one thread, in order, while ``threads`` work; an error of either comes where its result would have come.
    Closing the iterator waits for the threads, with ``limit_s`` no longer than that.

    :param limit_s: the wall time that one call of ``work`` may take, give or take a tenth, on a machine however busy: be generous.
        Waiting, for a thread before it or for the taker after it, does not count.
    :param late: gives the result of an item that took longer.
    """
    assert threads >= 1 and ahead >= 1
    assert (limit_s is None) == (late is None), "limit_s and late go together"
    source = iter(items)
    room = threading.Semaphore(ahead)
    in_order: SimpleQueue[Future[U] | None] = SimpleQueue()  # None: no more
    to_do: SimpleQueue[_Job[T, U] | None] = SimpleQueue()  # None: no more, for every worker
    at_work: list[_Job[T, U] | None] = [None] * threads
    closed = threading.Event()

    # What the threads do over and over, until it returns False.

    def draw() -> bool:
        room.acquire()
        if closed.is_set():
            return False
        result: Future[U] = Future()
        try:
            job = _Job(next(source), result)
        except StopIteration:
            in_order.put(None)
            return False
        except BaseException as error:
            result.set_exception(error)
            in_order.put(result)
            return False
        in_order.put(result)
        to_do.put(job)
        return True

    def serve(place: int) -> bool:
        job = to_do.get()
        if job is None or closed.is_set():
            to_do.put(None)
            return False
        at_work[place] = job
        if not _settle(job.result, partial(work, job.item)):
            return False  # given up, another thread has the place
        at_work[place] = None
        return True

    def tick(tick_s: float, late: Callable[[T], U]) -> bool:
        if closed.wait(tick_s):
            return False
        for place, job in enumerate(at_work):
            if job is None or job.result.done():
                continue
            job.ticks += 1
            if job.ticks > _TICKS and _settle(job.result, partial(late, job.item)):
                workers[place] = _start(partial(serve, place))
        return True

    workers = [_start(partial(serve, place)) for place in range(threads)]
    others = [_start(draw)]
    if limit_s is not None and late is not None:
        others.append(_start(partial(tick, limit_s / _TICKS, late)))

    def close() -> None:
        closed.set()
        room.release()
        to_do.put(None)
        end = None if limit_s is None else time.monotonic() + limit_s
        for thread in [*others, *workers]:
            if thread is not threading.current_thread():  # the garbage collector closes from any thread
                thread.join(None if end is None else max(0, end - time.monotonic()))

    def take() -> Generator[U, None, None]:
        try:
            while (result := in_order.get()) is not None:
                room.release()
                yield result.result()
        finally:
            close_once()

    results = take()
    close_once = weakref.finalize(results, close)  # also where nothing was ever taken, and before the process ends
    return results


def _start(step: Callable[[], bool]) -> threading.Thread:
    """A thread that keeps no process from ending, as those of concurrent.futures do."""

    def run() -> None:
        while step():
            pass

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def _settle(result: Future[U], call: Callable[[], U]) -> bool:
    """Whether the result is what this call gave: the first to come with one wins."""
    try:
        try:
            value = call()
        except BaseException as error:
            result.set_exception(error)
        else:
            result.set_result(value)
    except InvalidStateError:
        return False
    return True
