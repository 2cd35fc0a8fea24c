"""The line of progress, as a log shows it."""

from __future__ import annotations

import pytest

from raysys import progress
from raysys.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_rate_note_and_time_left(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    line = Progress("annotate", 40, "shards")
    clock[0] += 50
    line.done = 10
    line.show(5_000, 0.25, "text in 9.1%, 12 errors")
    assert (
        capsys.readouterr().err.split(" ", 1)[1] == "annotate  10/40 shards  100.0 samples/s  text in 9.1%, 12 errors  2 min left\n"
    )


def test_what_an_earlier_call_did_counts_in_the_total_and_not_in_the_rate(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    line = Progress("train", 100, "steps", already=50)
    clock[0] += 25
    line.advance(25)
    assert capsys.readouterr().err.split(" ", 1)[1] == "train  75/100 steps  1.0 steps/s  25 s left\n"


def test_on_a_terminal_what_follows_begins_a_line(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    line = Progress("annotate", 2, "shards")
    clock[0] += 1
    line.show(10, 0.5)
    line.close()
    assert capsys.readouterr().err == "\r\x1b[2Kannotate  0/2 shards  10.0 samples/s  1 s left\n"


def test_a_log_has_a_line_every_ten_seconds(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    line = Progress("filter", 100, "shards")
    for _ in range(40):
        clock[0] += 1
        line.advance()
    assert len(capsys.readouterr().err.splitlines()) == 4
