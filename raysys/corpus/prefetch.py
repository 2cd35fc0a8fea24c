"""Work ahead of the one who takes the results, in threads, in order. No Ray here."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def prefetch(items: Iterable[T], work: Callable[[T], U], *, threads: int, ahead: int) -> Iterator[U]:
    """``map(work, items)`` with at most ``ahead`` results waiting; begins at once, before the first is asked for.

    Items are drawn by one thread, in order, while ``threads`` work; an error of either comes where its result would have come.
    """
    source = iter(items)
    reader, workers = ThreadPoolExecutor(1, "read"), ThreadPoolExecutor(threads, "work")

    def draw() -> Future[U] | None:
        for item in source:
            return workers.submit(work, item)
        return None

    waiting: deque[Future[Future[U] | None]] = deque(reader.submit(draw) for _ in range(ahead))

    def results() -> Iterator[U]:
        try:
            while (drawn := waiting.popleft().result()) is not None:
                waiting.append(reader.submit(draw))
                yield drawn.result()
        finally:
            for future in waiting:
                future.cancel()
            reader.shutdown()
            workers.shutdown()

    return results()
