"""What a run leaves while it goes on: its lock, its checkpoints and its log, in a local folder and on a real S3 server alike."""

from __future__ import annotations

import errno
import json
import math
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import S3Server

from raysys.errors import UserError
from raysys.storage import exists, identity, join, list_names, open_fs, read_bytes, read_json, remove_folder, write_bytes
from raysys.training import checkpoint, lock, metrics
from raysys.training.checkpoint import CheckpointWriter, load, load_newest, steps_there
from raysys.training.lock import LostLock, RunLock
from raysys.training.metrics import MetricsLog, Window, read_metrics


@pytest.fixture(params=["local", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new run's folder."""
    return str(tmp_path / "run") if request.param == "local" else join(request.getfixturevalue("s3").new_bucket(), "run")


def another_call(old: RunLock) -> RunLock:
    return RunLock.take(old.run).attempt()


def another_group(old: RunLock) -> RunLock:
    return old.attempt()


takeovers = pytest.mark.parametrize("take_over", [another_call, another_group])


def writer_of(owner: RunLock, *, keep: int = 2, keep_best: bool = False) -> CheckpointWriter:
    return CheckpointWriter(owner.run, owner, keep=keep, keep_best=keep_best)


def save(writer: CheckpointWriter, step: int, *, loss: float = 1.0, weight: float | None = None) -> None:
    """Save and wait; without ``weight`` it is the step."""
    writer.save(step, {"step": step, "weight": torch.full((3,), step if weight is None else weight)}, loss=loss)
    writer.wait()


def folders(run: str) -> set[str]:
    return set(list_names(join(run, "checkpoints")))


def info(run: str, step: int) -> dict[str, Any]:
    return read_json(join(run, "checkpoints", f"step-{step}", "info.json"))


class Gate:
    """Stands at the edge, in torch.save's place: it writes only when it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._save, self.reached, self._open = torch.save, threading.Event(), threading.Event()
        monkeypatch.setattr(torch, "save", self._wait_and_save)

    def _wait_and_save(self, *args: Any) -> None:
        self.reached.set()
        assert self._open.wait(30)
        self._save(*args)

    def open(self) -> None:
        self._open.set()


# ---- the lock ---------------------------------------------------------------------------------------------------------


def test_the_newest_call_has_the_run_and_says_who_it_is(run: str) -> None:
    old = RunLock.take(run)
    old_worker = old.attempt()
    for holder in (old, old_worker):
        holder.check()
    new = RunLock.take(run)
    new_worker = pickle.loads(pickle.dumps(new)).attempt()
    for holder in (new, new_worker):
        holder.check()
    for asks in (old.check, old.attempt, old_worker.check, old_worker.attempt):
        with pytest.raises(LostLock, match=rf"another call has taken over .*/run: process {psutil.Process().pid} on"):
            asks()
    new_worker.check()


def test_the_newest_group_of_a_call_has_the_run(run: str) -> None:
    driver = RunLock.take(run)
    first, second = driver.attempt(), driver.attempt()
    with pytest.raises(LostLock, match="another group of workers"):
        first.check()
    for holder in (second, driver):
        holder.check()


def test_a_late_group_of_an_old_call_takes_nothing_from_the_new_one(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old group has seen its own driver's token; before it writes its own, another call takes the run."""
    old, write, new = RunLock.take(run), lock._write, []

    def late(file: str, token: str) -> None:
        monkeypatch.undo()
        new.append(RunLock.take(run).attempt())
        write(file, token)

    monkeypatch.setattr(lock, "_write", late)
    old_worker = old.attempt()
    new[0].check()
    with pytest.raises(LostLock):
        old_worker.check()


def test_a_run_whose_folder_is_gone_is_lost(run: str) -> None:
    owner = RunLock.take(run).attempt()
    remove_folder(run)
    with pytest.raises(LostLock, match=r"driver\.json is gone"):
        owner.check()


# ---- what a checkpoint holds ------------------------------------------------------------------------------------------


def trained_state() -> tuple[torch.nn.Module, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW([{"params": model[0].parameters(), "lr": 0.1}, {"params": model[1].parameters()}])
    train(model, optimizer)
    return model, optimizer


def train(model: torch.nn.Module, optimizer: torch.optim.AdamW) -> None:
    model(torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    optimizer.step()


def tensors_of(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    items = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else []
    return [tensor for item in items for tensor in tensors_of(item)]


def test_a_run_goes_on_from_the_state_at_the_time_of_the_call_exactly(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained_state()
    writer, gate = writer_of(RunLock.take(run).attempt()), Gate(monkeypatch)
    writer.save(1, {"step": 1, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}, loss=2.5)
    assert gate.reached.wait(30)
    assert steps_there(run) == []  # save has returned, and nothing is written
    train(model, optimizer)  # in place, while the thread writes
    gate.open()
    writer.close()

    assert steps_there(run) == [1] and {"step": 1, "loss": 2.5}.items() <= info(run, 1).items()
    state = load_newest(run)
    assert state is not None and state["step"] == 1
    again, its_optimizer = trained_state()
    saved = tensors_of([again.state_dict(), its_optimizer.state_dict()])
    loaded = tensors_of([state["state_dict"], state["optimizer"]])
    assert len(saved) == len(loaded) == 7 + 4 * 3
    for a, b in zip(saved, loaded, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype
    again.load_state_dict(state["state_dict"])
    its_optimizer.load_state_dict(state["optimizer"])
    train(again, its_optimizer)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is false: no CUDA device here")
def test_tensors_of_a_gpu_are_those_at_the_time_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, gate = writer_of(RunLock.take(str(tmp_path)).attempt()), Gate(monkeypatch)
    weights = [torch.full((4096, 4096), float(i), device="cuda") for i in range(8)]
    writer.save(1, {"weights": weights, "count": torch.tensor(3, device="cuda")}, loss=1.0)
    for weight in weights:
        weight.fill_(-1)
    gate.open()
    writer.close()
    state = load(str(tmp_path), 1)
    assert [w.unique().tolist() for w in state["weights"]] == [[float(i)] for i in range(8)]
    assert state["count"].item() == 3 and state["count"].device.type == "cpu"


def test_a_view_is_saved_without_the_rest_of_its_storage(run: str) -> None:
    writer = writer_of(RunLock.take(run).attempt())
    writer.save(1, {"row": torch.zeros(1_000_000)[:10]}, loss=1.0)
    writer.close()
    assert len(read_bytes(join(run, "checkpoints", "step-1", "state.pt"))) < 10_000


@pytest.mark.parametrize("value", [np.float64(1), np.zeros(2), {1, 2}, Path("x")])
def test_what_could_not_be_loaded_again_is_refused_when_it_is_saved(tmp_path: Path, value: Any) -> None:
    writer = writer_of(RunLock.take(str(tmp_path)).attempt())
    with pytest.raises(TypeError, match=type(value).__name__):
        writer.save(1, {"state_dict": {"a": [torch.zeros(1), value]}}, loss=1.0)


def broken_files() -> dict[str, bytes]:
    """Contents of a state.pt that are none."""
    return {"empty": b"", "text": b"hello world", "zeros": bytes(5000), "pickle": pickle.dumps(Path("x"))}


@pytest.mark.parametrize("name", [*broken_files(), "cut", "cut in half"])
def test_a_newest_checkpoint_that_cannot_be_read_is_named_and_no_older_one_taken(run: str, name: str) -> None:
    writer = writer_of(RunLock.take(run).attempt())
    for step in (1, 2):
        save(writer, step)
    file = join(run, "checkpoints", "step-2", "state.pt")
    whole = read_bytes(file)
    write_bytes(file, {"cut": whole[:-10], "cut in half": whole[: len(whole) // 2], **broken_files()}[name])
    with pytest.raises(UserError, match=r"step-2/state\.pt: cannot be read .*remove the folder step-2"):
        load_newest(run)
    remove_folder(join(run, "checkpoints", "step-2"))
    state = load_newest(run)
    assert state is not None and state["step"] == 1


def test_a_checkpoint_removed_before_it_was_read_gives_way_to_the_newest(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = writer_of(RunLock.take(run).attempt(), keep=1)
    for step in (1, 2):
        save(writer, step)
    there = steps_there

    def seen_long_ago(run: str) -> list[int]:
        monkeypatch.undo()
        return [1]

    monkeypatch.setattr(checkpoint, "steps_there", seen_long_ago)
    state = load_newest(run)
    assert state is not None and state["step"] == 2 and there(run) == [2]


def test_a_run_without_checkpoints_has_none(run: str) -> None:
    assert steps_there(run) == [] and load_newest(run) is None


# ---- which stay -------------------------------------------------------------------------------------------------------

LOSSES = [3.0, 1.0, 2.0, math.nan, 1.0, 4.0, 9.0]
"""Of the steps 1, 2, ..."""


@pytest.mark.parametrize(
    ("keep", "keep_best", "there"),
    [
        (1, False, [[1], [2], [3], [4], [5], [6], [7]]),
        (2, False, [[1], [1, 2], [2, 3], [3, 4], [4, 5], [5, 6], [6, 7]]),
        # 2 is the best until 5 has as low a loss
        (2, True, [[1], [1, 2], [2, 3], [2, 3, 4], [4, 5], [5, 6], [5, 6, 7]]),
        (1, True, [[1], [2], [2, 3], [2, 4], [5], [5, 6], [5, 7]]),
    ],
)
def test_the_newest_and_the_best_stay(tmp_path: Path, keep: int, keep_best: bool, there: list[list[int]]) -> None:
    run = str(tmp_path)
    writer = writer_of(RunLock.take(run).attempt(), keep=keep, keep_best=keep_best)
    for step, loss in enumerate(LOSSES, start=1):
        save(writer, step, loss=loss)
        assert steps_there(run) == there[step - 1]
        assert folders(run) == {f"step-{s}" for s in there[step - 1]}


def test_a_best_one_of_no_numbers_is_none(tmp_path: Path) -> None:
    writer = writer_of(RunLock.take(str(tmp_path)).attempt(), keep=1, keep_best=True)
    for step in (1, 2, 3):
        save(writer, step, loss=math.nan)
    assert steps_there(str(tmp_path)) == [3]


def test_the_best_is_that_of_the_validation_where_there_is_one(tmp_path: Path) -> None:
    """Losses fall all the time; scores come a step late, and a checkpoint stays while its score is awaited."""
    run, scores = str(tmp_path), dict[int, float | None]()
    owner = RunLock.take(run).attempt()
    writer = CheckpointWriter(run, owner, keep=1, keep_best=True, scores=scores)
    there, answers = [], [0.3, 0.1, 0.5, 0.2]
    for step in range(1, 5):
        save(writer, step, loss=1 / step)
        there.append(steps_there(run))
        scores |= {step - 1: answers[step - 2], step: None} if step > 1 else {step: None}
    assert there == [[1], [1, 2], [1, 2, 3], [1, 3, 4]]  # 2 is worse than 1; 3 was asked about when 4 came
    scores[3], scores[4] = 0.5, 0.2
    writer.close()
    assert steps_there(run) == [3, 4]


def test_what_killed_writers_left_is_no_checkpoint_and_goes_when_it_is_older_than_the_newest(run: str) -> None:
    for step, name in ((2, "state.pt"), (3, "info.json"), (9, "state.pt")):  # 3: killed while it was removed
        write_bytes(join(run, "checkpoints", f"step-{step}", name), b"{}")
    write_bytes(join(run, "checkpoints", "notes", "x"), b"")
    assert steps_there(run) == [] and load_newest(run) is None
    writer = writer_of(RunLock.take(run).attempt())
    save(writer, 5)
    assert steps_there(run) == [5]
    assert folders(run) == {"notes", "step-5", "step-9"}
    save(writer, 9, weight=7)
    state = load_newest(run)
    assert state is not None and state["weight"].tolist() == [7, 7, 7]


def test_one_that_is_being_removed_is_no_checkpoint_from_the_first_moment(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = writer_of(RunLock.take(run).attempt(), keep=1)
    save(writer, 1)

    def killed(path: str) -> None:
        raise OSError(errno.EIO, "killed")

    monkeypatch.setattr(checkpoint, "remove_folder", killed)
    with pytest.raises(OSError, match="killed"):
        save(writer, 2)
    assert exists(join(run, "checkpoints", "step-1", "state.pt"))
    assert steps_there(run) == [2]


# ---- zombies ----------------------------------------------------------------------------------------------------------


@takeovers
def test_a_zombie_neither_saves_nor_removes(run: str, take_over: Callable[[RunLock], RunLock]) -> None:
    old = RunLock.take(run).attempt()
    zombie = writer_of(old, keep=1)
    save(zombie, 1)
    new = take_over(old)
    with pytest.raises(LostLock):
        save(zombie, 2)
    assert folders(run) == {"step-1"} and steps_there(run) == [1]
    owner = writer_of(new, keep=3)
    for step in (2, 3):
        save(owner, step)
    with pytest.raises(LostLock):
        zombie._remove_old()
    assert steps_there(run) == [1, 2, 3]


@takeovers
def test_a_write_under_way_when_another_takes_over_leaves_nothing(
    run: str, take_over: Callable[[RunLock], RunLock], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = RunLock.take(run).attempt()
    zombie = writer_of(old, keep=1)
    save(zombie, 1)
    with monkeypatch.context() as patch:
        gate = Gate(patch)
        zombie.save(2, {"step": 2}, loss=1.0)
        assert gate.reached.wait(30)
        take_over(old)
        gate.open()
        with pytest.raises(LostLock):
            zombie.wait()
    assert steps_there(run) == [1]
    assert list_names(join(run, "checkpoints", "step-2")) == []
    with pytest.raises(LostLock):
        zombie.save(3, {"step": 3}, loss=1.0)
    zombie.close()


def test_an_upload_under_way_when_another_takes_over_completes_no_checkpoint(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    zombie, writing = writer_of(RunLock.take(run).attempt()), checkpoint.writing

    @contextmanager
    def slow(path: str) -> Iterator[Any]:
        with writing(path) as file:
            yield file
        RunLock.take(run)

    monkeypatch.setattr(checkpoint, "writing", slow)
    with pytest.raises(LostLock):
        save(zombie, 1)
    assert list_names(join(run, "checkpoints", "step-1")) == ["state.pt"] and steps_there(run) == []


def test_a_complete_checkpoint_is_never_written_again(run: str) -> None:
    save(writer_of(RunLock.take(run).attempt()), 3, loss=5.0)
    before = [identity(join(run, "checkpoints", "step-3", name)) for name in ("state.pt", "info.json")]
    save(writer_of(RunLock.take(run).attempt()), 3, loss=4.0, weight=4)
    assert [identity(join(run, "checkpoints", "step-3", name)) for name in ("state.pt", "info.json")] == before
    assert info(run, 3)["loss"] == 5.0 and load(run, 3)["weight"].tolist() == [3, 3, 3]


def test_two_writers_of_one_step_leave_one_whole_checkpoint(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest window: the first has asked for the lock for the last time and its state is there; then the other does it all."""
    first, write_new_json = writer_of(RunLock.take(run).attempt(), keep=1), checkpoint.write_new_json
    save(first, 1)

    def late(path: str, value: Any) -> bool:
        monkeypatch.undo()
        save(writer_of(RunLock.take(run).attempt(), keep=2), 2, loss=4.0, weight=8)
        return write_new_json(path, value)

    monkeypatch.setattr(checkpoint, "write_new_json", late)
    with pytest.raises(LostLock):  # it may not remove step 1 either
        save(first, 2, loss=5.0)
    assert steps_there(run) == [1, 2]
    assert info(run, 2)["loss"] == 4.0 and load(run, 2)["weight"].tolist() == [8, 8, 8]


@pytest.mark.parametrize("call", [lambda w: w.save(3, {"step": 3}, loss=1.0), CheckpointWriter.wait, CheckpointWriter.close])
def test_an_error_of_the_thread_is_raised_by_the_next_call_and_leaves_no_file(
    run: str, call: Callable[[CheckpointWriter], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = RunLock.take(run).attempt()
    writer = writer_of(owner)
    save(writer, 1)

    def full(state: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        writer.save(2, {"step": 2}, loss=1.0)
        with pytest.raises(OSError, match="No space left"):
            call(writer)
    assert steps_there(run) == [1] and list_names(join(run, "checkpoints", "step-2")) == []
    save(writer_of(owner), 2)
    assert steps_there(run) == [1, 2]


# ---- the log ----------------------------------------------------------------------------------------------------------


def board_of(run: str, folder: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's own reading of a run: tag -> (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fs, inner = open_fs(join(run, "tensorboard"))
    fs.get(inner, str(folder), recursive=True)
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_run_taken_up_drops_what_was_logged_later_and_a_cut_line(run: str, tmp_path: Path) -> None:
    log = MetricsLog(run, RunLock.take(run).attempt(), first_step=0)
    for step in (1, 2, 3):
        log.write(step, {"loss": float(step), "lr": 0.5})
    log.close()
    write_bytes(join(run, "metrics.jsonl"), read_bytes(join(run, "metrics.jsonl")) + b'{"step": 4, "lo')
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3]
    log = MetricsLog(run, RunLock.take(run).attempt(), first_step=2)
    assert read_bytes(join(run, "metrics.jsonl")).count(b"\n") == 2
    log.write(3, {"loss": 9.0, "lr": 0.5})
    log.close()
    losses = [(1, 1.0), (2, 2.0), (3, 9.0)]
    assert [(line["step"], line["loss"]) for line in read_metrics(run)] == losses
    assert board_of(run, tmp_path / "board") == {"train/loss": losses, "train/lr": [(1, 0.5), (2, 0.5), (3, 0.5)]}


def test_what_is_flushed_is_there_for_all_readers(run: str, tmp_path: Path) -> None:
    log = MetricsLog(run, RunLock.take(run).attempt(), first_step=0)
    names = [f"number_{i}" for i in range(2000)]
    log.write(1, dict.fromkeys(names, 2.0))
    log.flush()
    assert read_metrics(run) == [{"step": 1, **dict.fromkeys(names, 2.0)}]
    assert board_of(run, tmp_path / "board") == {f"train/{name}": [(1, 2.0)] for name in names}


@takeovers
def test_a_zombie_logs_nothing(run: str, take_over: Callable[[RunLock], RunLock]) -> None:
    old = RunLock.take(run).attempt()
    zombie = MetricsLog(run, old, first_step=0)
    zombie.write(1, {"loss": 1.0})
    zombie.flush()
    new = take_over(old)
    before = read_bytes(join(run, "metrics.jsonl"))
    with pytest.raises(LostLock):
        zombie.write(2, {"loss": 2.0})
        zombie.flush()
    with pytest.raises(LostLock):
        MetricsLog(run, old, first_step=0)
    assert read_bytes(join(run, "metrics.jsonl")) == before
    owner = MetricsLog(run, new, first_step=1)
    owner.write(2, {"loss": 3.0})
    owner.close()
    assert [line["loss"] for line in read_metrics(run)] == [1.0, 3.0]


def test_a_local_line_is_there_at_once(tmp_path: Path) -> None:
    log = MetricsLog(str(tmp_path), RunLock.take(str(tmp_path)).attempt(), first_step=0)
    log.write(1, {"loss": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'


class Clock:
    """In perf_counter's place: it goes on by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(metrics, "perf_counter", lambda: self.now)

    def after(self, seconds: float) -> None:
        self.now += seconds


def test_on_an_object_store_the_whole_log_is_written_seldom_and_its_writes_take_a_hundredth_of_the_time(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, clock, write = s3.new_bucket(), Clock(monkeypatch), metrics.write_bytes
    log = MetricsLog(run, RunLock.take(run).attempt(), first_step=0)

    def write_in_half_a_second(path: str, data: bytes) -> None:
        write(path, data)
        clock.after(0.5)

    monkeypatch.setattr(metrics, "write_bytes", write_in_half_a_second)
    there = []
    for step in range(1, 5):
        clock.after([9.5, 1, 49, 2][step - 1])  # 10.5 s since the log began at the second; 50 s after that write at the fourth
        log.write(step, {"loss": 0.0})
        there.append(len(read_metrics(run)))
    assert there == [0, 2, 2, 4]
    log.write(5, {"loss": 0.0})
    assert len(read_metrics(run)) == 4
    log.flush()
    assert len(read_metrics(run)) == 5
    log.close()


# ---- what a worker measures -------------------------------------------------------------------------------------------


def test_a_window_measures_steps_and_waits_and_leaves_checkpoints_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    window = Window(global_batch=32)
    for wait_s, step_s in ((0.5, 1.5), (1.5, 4.5)):
        window.wait_for_data()
        clock.after(wait_s)
        window.got_data(bytes_read=6_000_000, bytes_used=4_000_000)
        clock.after(step_s)
        window.stepped()
        with window.paused():
            clock.after(100)
    numbers = window.read()
    memory = {"rss_mb", "gpu_memory_mb"}
    assert {k: v for k, v in numbers.items() if k not in memory} == {
        "step_s": 4.0,
        "data_wait_s": 1.0,
        "data_wait_share": 0.25,
        "samples_per_s": 8.0,
        "bytes_read": 12_000_000,
        "bytes_used": 8_000_000,
        "read_mb_per_s": 1.5,
        "checkpoint_s": 200.0,
    }
    clock.after(2)
    window.stepped()
    again = window.read()
    assert again["step_s"] == 2.0 and again["bytes_read"] == 0 and "checkpoint_s" not in again
    assert json.loads(json.dumps(again)) == again


def test_memory_is_that_of_the_process() -> None:
    window = Window(1)
    window.stepped()
    assert window.read()["rss_mb"] == pytest.approx(psutil.Process().memory_info().rss / 1e6, rel=0.05)
