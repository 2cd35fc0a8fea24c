"""Work ahead in threads; the decoder that hangs is a real one."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from raysys.corpus.prefetch import prefetch


def becomes(condition: Callable[[], bool], limit_s: float = 10) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_keeps_order_and_stays_ahead_by_so_many() -> None:
    drawn: list[int] = []

    def source() -> Iterator[int]:
        for number in range(20):
            drawn.append(number)
            yield number

    results = prefetch(source(), lambda number: number * number, threads=3, ahead=5)
    assert becomes(lambda: len(drawn) == 5)  # begins before the first result is asked for
    time.sleep(0.05)
    assert drawn == list(range(5))
    assert next(results) == 0 and becomes(lambda: len(drawn) == 6)
    time.sleep(0.05)
    assert len(drawn) == 6
    assert list(results) == [number * number for number in range(1, 20)]


def test_raises_where_the_result_would_have_come() -> None:
    def work(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number

    results = prefetch(range(9), work, threads=2, ahead=4)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)


def test_an_error_of_the_source_comes_after_its_items() -> None:
    def source() -> Iterator[int]:
        yield from range(3)
        raise OSError("unplugged")

    results = prefetch(source(), str, threads=2, ahead=4)
    assert [next(results) for _ in range(3)] == ["0", "1", "2"]
    with pytest.raises(OSError, match="unplugged"):
        next(results)


def test_an_empty_source_gives_nothing() -> None:
    assert list(prefetch([], str, threads=2, ahead=2)) == []


@pytest.mark.parametrize("limit_s", [None, 5.0])
@pytest.mark.parametrize("taken", [0, 1, 50])
def test_all_threads_have_ended_when_the_iterator_is_closed_or_dropped_early(taken: int, limit_s: float | None) -> None:
    before = threading.active_count()
    results = prefetch(range(50), str, threads=3, ahead=4, limit_s=limit_s, late=str if limit_s else None)
    for number in range(taken):
        assert next(results) == str(number)
    assert threading.active_count() > before
    results.close()  # type: ignore[attr-defined]
    del results
    gc.collect()
    assert threading.active_count() == before


def test_one_that_hangs_is_late_in_its_place_and_as_many_threads_go_on() -> None:
    before, gate, both_work = threading.active_count(), threading.Event(), threading.Barrier(2)

    def work(number: int) -> str:
        if number in (1, 2):
            gate.wait(30)
        if number in (3, 4):
            both_work.wait(30)  # one thread alone would not get through
        return f"{number} in time"

    results = prefetch(range(7), work, threads=2, ahead=3, limit_s=0.5, late=lambda number: f"{number} late")
    assert [next(results) for _ in range(4)] == ["0 in time", "1 late", "2 late", "3 in time"]
    gate.set()  # what the two give now is nobody's
    assert list(results) == ["4 in time", "5 in time", "6 in time"]
    assert becomes(lambda: threading.active_count() == before)


def test_threads_are_replaced_though_nobody_asks_for_results() -> None:
    gate, seen = threading.Event(), list[int]()

    def work(number: int) -> str:
        seen.append(number)
        if number < 3:
            gate.wait(30)
        return "in time"

    results = prefetch(range(6), work, threads=1, ahead=6, limit_s=0.1, late=lambda number: "late")
    assert becomes(lambda: len(seen) == 6)
    assert list(results) == 3 * ["late"] + 3 * ["in time"]
    gate.set()


def test_neither_waiting_for_a_thread_nor_for_the_taker_makes_late() -> None:
    def work(number: int) -> int:
        time.sleep(0.2)
        return number

    results = prefetch(range(8), work, threads=1, ahead=8, limit_s=0.8, late=lambda number: -1)  # the last waits for 1.4 s
    time.sleep(2.5)  # all are done for long
    assert list(results) == list(range(8))


def test_an_error_of_late_comes_where_its_result_would_have_come() -> None:
    def late(number: int) -> str:
        raise LookupError(f"no result for {number}")

    gate = threading.Event()
    results = prefetch(range(3), lambda number: str(gate.wait(30)), threads=1, ahead=2, limit_s=0.05, late=late)
    with pytest.raises(LookupError, match="no result for 0"):
        next(results)
    gate.set()


def run(program: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True)


def test_a_pause_of_the_process_makes_nothing_late() -> None:
    child = run(
        """
import time
from raysys.corpus.prefetch import prefetch
def work(item):
    print("works", flush=True)
    time.sleep(0.5)
    return "in time"
print(*prefetch([0], work, threads=1, ahead=1, limit_s=1.0, late=lambda item: "late"))
"""
    )
    assert child.stdout and child.stdout.readline() == "works\n"
    child.send_signal(signal.SIGSTOP)
    time.sleep(2)
    child.send_signal(signal.SIGCONT)
    assert child.communicate(timeout=30)[0] == "in time\n"


def test_a_picture_that_hangs_libjpeg_holds_up_neither_the_others_nor_the_exit() -> None:
    child = run(
        """
import threading
from conftest import hanging_jpeg, noise_jpeg
from raysys.corpus.images import TIMEOUT, decode
from raysys.corpus.prefetch import prefetch
hangs, good = hanging_jpeg(), noise_jpeg(1)
assert len(hangs) < 400_000
width = lambda data: decode(data, min_long_side_px=1440).width
print(*prefetch([good, hangs, hangs, *20 * [good]], width, threads=2, ahead=8, limit_s=1.0, late=lambda data: TIMEOUT))
print(threading.active_count(), flush=True)
"""
    )
    assert child.stdout
    assert child.stdout.readline().split() == ["64", "timeout", "timeout", *20 * ["64"]]
    assert child.stdout.readline() == "3\n"  # both still decode
    assert child.wait(timeout=5) == 0
