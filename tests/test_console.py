"""What a log, a terminal and a program see of a call."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from raysys import console
from raysys.console import Progress, begin, hushed, say, tell_error, tell_result, warn, within_another

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_a_log_line_has_the_time_rate_note_and_time_left(clock: list[float], capsys: Captured) -> None:
    line = Progress("annotate", 40, "shards")
    clock[0] += 50
    line.done = 10
    line.show(5_000, 0.25, "text in 9.1%, 12 errors")
    text = capsys.readouterr().err
    assert re.match(r"\d\d:\d\d:\d\d ", text)
    assert text[9:] == "annotate  10/40 shards  100.0 samples/s  text in 9.1%, 12 errors  2 min left\n"


def test_what_an_earlier_call_did_counts_in_the_total_and_not_in_the_rate(clock: list[float], capsys: Captured) -> None:
    line = Progress("train", 100, "steps", already=50)
    clock[0] += 25
    line.advance(25)
    assert capsys.readouterr().err[9:] == "train  75/100 steps  1.0 steps/s  25 s left\n"


def test_what_came_before_the_first_step_is_in_no_rate_and_not_in_the_time_left(clock: list[float], capsys: Captured) -> None:
    line = Progress("train", 101, "steps")
    clock[0] += 60  # imports, workers that start
    line.advance()
    clock[0] += 10
    line.advance(20)
    assert capsys.readouterr().err.splitlines()[1][9:] == "train  21/101 steps  2.0 steps/s  40 s left"


def test_a_log_has_a_line_every_ten_seconds_and_one_at_the_end(clock: list[float], capsys: Captured) -> None:
    with Progress("filter", 100, "shards") as line:
        for _ in range(45):
            clock[0] += 1
            line.advance()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5 and lines[-1][9:] == "filter  45/100 shards  1.0 shards/s  took 45 s"


def test_what_is_quick_has_no_line_in_a_log(clock: list[float], capsys: Captured) -> None:
    with Progress("filter", 2, "shards") as line:
        clock[0] += 3
        line.advance(2)
    assert capsys.readouterr() == ("", "")


def test_quiet_says_where_the_result_is_and_what_goes_wrong(clock: list[float], capsys: Captured) -> None:
    begin("filter", "quiet")
    say("filter: 4 dropped")
    with Progress("filter", 2, "shards") as line:
        clock[0] += 60
        line.advance(2)
    warn("a node is gone")
    tell_result("/S", next_words="raysys train")
    tell_error("raysys filter", "no room", 1)
    out, err = capsys.readouterr()
    assert out == "result: /S\n"
    assert [part[9:] if part[2] == ":" else part for part in err.splitlines()] == ["a node is gone", "raysys filter: no room"]


def test_json_is_an_object_a_line_on_the_same_streams(clock: list[float], capsys: Captured) -> None:
    begin("annotate", "json")
    say("annotate: 3 samples\nin 1 shard")
    with Progress("annotate", 40, "shards") as line:
        clock[0] += 50
        line.done = 10
        line.show(5_000, 0.25, "12 errors")
    warn("a node is gone")
    tell_result("/A", next_words="raysys filter", report="/A/report.html")
    tell_error("raysys annotate", "no room", 1)
    out, err = (list(map(json.loads, text.splitlines())) for text in capsys.readouterr())
    assert all(entry.pop("verb") == "annotate" and re.match(r"\d{4}-\d\d-\d\dT", entry.pop("time")) for entry in out + err)
    assert out == [
        {"event": "message", "text": "annotate: 3 samples\nin 1 shard"},
        {"event": "result", "path": "/A", "report": "/A/report.html", "next": "raysys filter"},
    ]
    progress = {"event": "progress", "stage": "annotate", "done": 10, "total": 40, "unit": "shards", "per_s": 100.0}
    progress |= {"per_s_unit": "samples", "seconds_left": 150.0, "note": "12 errors"}
    assert err[0] == progress and err[1]["event"] == "progress"
    assert err[2:] == [{"event": "warning", "text": "a node is gone"}, {"event": "error", "text": "no room", "status": 1}]


def test_a_step_of_another_verb_keeps_its_result_and_a_hushed_one_all_but_its_warnings(capsys: Captured) -> None:
    with within_another():
        say("filter: 4 dropped")
        tell_result("/S")
    with hushed():
        say("filter: 5 dropped")
        tell_result("/S")
        warn("slow storage")
    out, err = capsys.readouterr()
    assert out == "filter: 4 dropped\n" and err[9:] == "slow storage\n"


PROGRAM = """
import sys, time
from raysys.console import Progress, say, warn
with Progress("annotate", 4, "shards") as line:
    for i in range(4):
        time.sleep(.3)
        line.advance(items=1000, note="text in [red] 9.1%, 12 errors")
        if i == 1:
            say("x" * 100 + " said on stdout")
            warn("a warning")
print("the end")
"""


def on_a_terminal(program: str, columns: int, out: Path | None = None) -> str:
    """What a terminal gets of a program; its stdout may go to a file."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "FORCE_COLOR")}
    with contextlib.ExitStack() as stack:
        stdout = slave if out is None else stack.enter_context(out.open("wb"))
        words = [sys.executable, "-c", program]
        process = subprocess.Popen(words, stdin=slave, stdout=stdout, stderr=slave, env=environment | {"TERM": "xterm"})
    os.close(slave)
    seen = io.BytesIO()
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        seen.write(data)
    os.close(master)
    assert process.wait() == 0, seen.getvalue().decode()
    return seen.getvalue().decode()


def without_codes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_terminal_has_one_live_line_and_what_is_said_stands_above_it_in_one_piece() -> None:
    seen = on_a_terminal(PROGRAM, 120)
    lines = without_codes(seen).replace("\r\n", "\n").split("\n")
    assert "x" * 100 + " said on stdout" in [line.split("\r")[-1] for line in lines]
    last = [line.split("\r")[-1] for line in lines if "took" in line][-1]
    assert re.search(r"annotate .* 4/4 shards  \S+ samples/s  text in \[red\] 9.1%, 12 errors  took \d s", last)
    assert seen.index("a warning") < seen.index("took") < seen.index("the end")
    assert "\x1b[?25l" in seen and seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")  # the cursor is back
    assert max(len(line.split("\r")[-1]) for line in lines if "shards" in line) <= 120


def test_a_narrow_terminal_cuts_the_line_and_a_file_gets_stdout_alone(tmp_path: Path) -> None:
    seen = without_codes(on_a_terminal(PROGRAM, 40, tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "x" * 100 + " said on stdout\nthe end\n"
    assert "said on stdout" not in seen
    assert all(len(line) <= 40 for line in re.split(r"[\r\n]+", seen) if "annotate" in line)
