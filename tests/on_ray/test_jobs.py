"""Verbs as jobs of a real head with token authentication, by the functions of `tools/try_jobs.py`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import try_jobs

pytestmark = [pytest.mark.ray, pytest.mark.long]


@pytest.fixture(scope="module")
def head() -> Iterator[try_jobs.Head]:
    """One for all tests here; at its end nothing that it started is left."""
    with tempfile.TemporaryDirectory(dir=os.environ["RAY_TMPDIR"]) as path:  # pytest's own folders have names too long for sockets
        folder = Path(path)
        try_jobs.draw(folder)
        with try_jobs.running_head(folder) as head:
            yield head
            started = head.processes()
        assert len(started) > 5
        assert not [process for process in started if process.is_running()]
        assert not [process for process in psutil.process_iter() if str(folder) in surroundings(process)]


def surroundings(process: psutil.Process) -> str:
    try:
        return " ".join([*process.cmdline(), *process.environ().values()])
    except psutil.Error:
        return ""


def raysys(head: try_jobs.Head, words: list[str], token_file: Path | None) -> subprocess.CompletedProcess[str]:
    """The command line on this machine, with RAY_ADDRESS."""
    return subprocess.run(
        [sys.executable, "-m", "raysys", *words], env=try_jobs.environment(token_file) | {"RAY_ADDRESS": head.address},
        capture_output=True, text=True, timeout=try_jobs.JOB_S, check=False,
    )  # fmt: skip


def test_a_head_listens_on_loopback_alone_and_its_token_is_this_users(head: try_jobs.Head) -> None:
    listening = [c.laddr for p in head.processes() for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
    assert len(listening) > 5
    assert {address.ip for address in listening} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert head.token_file.stat().st_mode & 0o777 == 0o600
    token = head.token_file.read_text()
    assert not [p for p in head.processes() if token in " ".join(p.cmdline())]
    assert token not in (head.folder / "head.log").read_text()


def test_a_job_runs_the_code_and_the_choices_of_the_folder_that_was_sent(head: try_jobs.Head, tmp_path: Path) -> None:
    """Not those of the installed package."""
    for name in ("raysys", "conf"):
        shutil.copytree(try_jobs.REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "conf" / "policy" / "fresh.yaml").write_text("max_text_area: 0.125\n")
    (tmp_path / "raysys" / "__main__.py").write_text(
        "import sys\nfrom raysys.cli import main\nprint('by', sys.executable, flush=True)\nmain()\n"
    )
    job = try_jobs.submit(head, "fresh", ["filter", "policy=fresh", "--cfg", "job"], working_dir=tmp_path)
    assert (job.submit_status, job.exit_code) == (0, 0), job.said
    assert f"\nby {sys.executable}\n" in job.log and "\n  max_text_area: 0.125\n" in job.log


def test_a_job_fails_with_the_status_of_its_verb_and_the_reason_at_the_end_of_its_log(head: try_jobs.Head) -> None:
    """The mistake is an output inside of what Ray deletes after the job: nothing is written there."""
    relative = try_jobs.mistakes(head.folder, head.token_file)[0]
    job = try_jobs.try_it(head, relative)
    assert not relative.judge(job), job.said
    assert job.exit_code == 2
    assert job.log.splitlines()[-1].startswith("raysys annotate: output=")
    sent = list(head.folder.glob("ray/session_2*/runtime_resources/working_dir_files/*/"))
    assert any((folder / "raysys").is_dir() for folder in sent) and not any((folder / "A").exists() for folder in sent)


def test_who_does_not_know_the_token_submits_nothing_and_joins_nothing(head: try_jobs.Head) -> None:
    for stranger in try_jobs.strangers(head.folder):
        job = try_jobs.try_it(head, stranger)
        assert not stranger.judge(job), job.said
        assert not (head.folder / "X").exists()
        done = raysys(head, [*stranger.words[:-1], f"output={head.folder}/Y"], stranger.token_file)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1 and "token" in done.stderr, done.stderr


def test_every_verb_succeeds_as_a_job_and_its_log_can_be_read(head: try_jobs.Head) -> None:
    logs = {}
    for trial in try_jobs.verbs(head.folder, head.token_file):
        job = try_jobs.try_it(head, trial)
        assert not trial.judge(job), f"{trial.name}: {trial.judge(job)}\n{job.said}"
        logs[trial.name] = job.log
        assert trial.name == "report" or "\nnext:" in job.log
        assert not re.search(r"Traceback|WARNING|\bpid=", job.log), job.log
    assert re.search(r"^\d\d:\d\d:\d\d train  \d+/300 steps  .* left$", logs["train"], re.MULTILINE), logs["train"]
    assert (head.folder / "W" / "report.html").is_file()


def test_other_mistakes_have_their_status_and_write_nothing(head: try_jobs.Head) -> None:
    _, unknown, diverged = try_jobs.mistakes(head.folder, head.token_file)
    job = try_jobs.try_it(head, unknown)
    assert not unknown.judge(job), job.said
    assert job.exit_code == 2 and not (head.folder / "X").exists()
    job = try_jobs.try_it(head, diverged)
    assert not diverged.judge(job), job.said
    assert job.exit_code == 1 and job.log.splitlines()[-1].startswith("raysys train: ")


def test_the_same_words_work_as_a_job_and_with_the_address(head: try_jobs.Head) -> None:
    job = try_jobs.submit(head, "as_job", ["annotate", f"corpus.path={head.folder}/train", "ocr=scenes", f"output={head.folder}/J"])
    assert job.exit_code == 0, job.said
    done = raysys(head, ["annotate", f"corpus.path={head.folder}/train", "ocr=scenes", f"output={head.folder}/D"], head.token_file)
    assert done.returncode == 0, done.stderr
    said = done.stdout.replace(f"{head.folder}/D", f"{head.folder}/J")
    assert said and job.log.endswith(said)
