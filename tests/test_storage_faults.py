"""Object stores that fail for a while or for ever, and disks without room: what comes through is whole, what does not ends in one line."""

from __future__ import annotations

import errno
import io
import os
import pickle
import re
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import S3Server

from raysys import cli, patience
from raysys.corpus.tars import iter_spans, read_image, read_images
from raysys.evaluation.pictures import Picture
from raysys.patience import StorageDown, explained, is_final, refused
from raysys.policy.export import _copy_spans
from raysys.regions.on_ray import _row_of
from raysys.storage import (
    exists,
    find_files,
    identity,
    list_names,
    open_fs,
    read_bytes,
    reading,
    remove_file,
    remove_folder,
    write_bytes,
    write_new,
    writing,
)
from raysys.training import checkpoint
from raysys.training.lock import RunLock
from raysys.training.metrics import MetricsLog, read_metrics

MB = 1 << 20
DATA = os.urandom(3 * MB)

# ---- a server between the client and moto's ------------------------------------------------------------------------------


CODES = {
    **{"400": "RequestTimeout", "403": "AccessDenied", "404": "NoSuchKey", "412": "PreconditionFailed", "429": "TooManyRequests"},
    **{"500": "InternalError", "501": "NotImplemented", "502": "BadGateway", "503": "SlowDown", "504": "GatewayTimeout"},
}


@dataclass
class FaultyProxy:
    """Passes requests on to an S3 server, or does to them what ``faults`` says, the next first."""

    upstream: tuple[str, int]
    faults: list[str] = field(default_factory=list)
    """``503``, ``500``, ``429``, ``403`` ...: the answer; ``reset``: none at all; ``lost``: the request is done, its answer lost; ``half``: half
    of the body of an answer that has one of 1 kB at least (other requests pass and leave the fault for the next)."""
    for_ever: str | None = None
    requests: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    """Faults that came."""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self.open(0)

    def open(self, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """One request, then the connection ends."""
        with client:
            request = _read_message(client)
            if not request:
                return
            method, path = request.split(b" ", 2)[:2]
            with self._lock:
                part = re.search(rb"\r\nrange: (\S+)", request, re.IGNORECASE)
                self.requests.append(b" ".join([method, path, *(part.groups() if part else ())]).decode())
                fault = self.for_ever or (self.faults[0] if self.faults else None)
            if fault == "half":
                answer = self._ask(request)
                head, _, body = answer.partition(b"\r\n\r\n")
                if len(body) < 1000 and self.for_ever is None:
                    client.sendall(answer)
                    return
                client.sendall(head + b"\r\n\r\n" + body[: len(body) // 2])
            elif fault == "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif fault == "lost":
                self._ask(request)
            elif fault is None:
                client.sendall(self._ask(request))
                return
            else:
                body = f"<Error><Code>{CODES[fault]}</Code><Message>so says the store</Message></Error>".encode() * (
                    method != b"HEAD"
                )
                client.sendall(
                    b"HTTP/1.1 %s Error\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (fault.encode(), len(body))
                )
                client.sendall(body)
            with self._lock:
                self.broken.append(fault)
                if self.for_ever is None:
                    self.faults.pop(0)

    def _ask(self, request: bytes) -> bytes:
        head, _, body = request.partition(b"\r\n\r\n")
        lines = [line for line in head.split(b"\r\n") if not line.lower().startswith((b"connection:", b"expect:"))]
        with socket.create_connection(self.upstream) as server:
            server.sendall(b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n" + body)
            answer = bytearray()
            while part := server.recv(1 << 16):
                answer += part
        return bytes(answer)


def _read_message(client: socket.socket) -> bytes:
    """A whole request; its body is of the length that it says, or in chunks."""
    got = bytearray()
    while b"\r\n\r\n" not in got:
        part = client.recv(1 << 16)
        if not part:
            return b""
        got += part
    head_size = got.index(b"\r\n\r\n") + 4
    head = bytes(got[:head_size]).lower()
    if b"expect: 100-continue" in head:
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: (\d+)", head)
    chunked = b"transfer-encoding: chunked" in head
    while (chunked and not got.endswith(b"0\r\n\r\n")) or (length and len(got) < head_size + int(length[1])):
        got += client.recv(1 << 16)
    return bytes(got)


@pytest.fixture(scope="module")
def proxy(s3: S3Server) -> Iterator[FaultyProxy]:
    """All connections of this process go through it."""
    import s3fs

    host, port = s3.endpoint.removeprefix("http://").split(":")
    proxy = FaultyProxy((host, int(port)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")  # what botocore tries again never reaches what is tested
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy
        s3fs.S3FileSystem.clear_instance_cache()
    proxy.close()


@pytest.fixture
def bucket(s3: S3Server, proxy: FaultyProxy) -> str:
    return s3.new_bucket()


@pytest.fixture
def faulty(bucket: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """The proxy, before it has seen anything."""
    monkeypatch.setattr(patience, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(patience, "RETRY_S", 20.0)
    proxy.requests.clear()
    proxy.broken.clear()
    yield proxy
    proxy.faults.clear()
    proxy.for_ever = None


def put(bucket: str, s3: S3Server, name: str, data: bytes) -> str:
    """Past the proxy."""
    import s3fs

    s3fs.S3FileSystem(endpoint_url=s3.endpoint).pipe_file(f"{bucket[5:]}/{name}", data)
    return f"{bucket}/{name}"


def stored(s3: S3Server, url: str) -> bytes:
    """Past the proxy."""
    import s3fs

    return s3fs.S3FileSystem(endpoint_url=s3.endpoint, use_listings_cache=False).cat_file(url)


def stream(url: str) -> bytes:
    with reading(url, ahead_bytes=256 << 10) as file:
        return b"".join(iter(lambda: file.read(100_000), b""))


def upload(url: str) -> None:
    with writing(url) as file:
        file.write(DATA)


def ranges(url: str) -> list[bytes]:
    import numpy as np

    pictures, _ = read_images(url, np.array([2 * MB, 10, 500_000]), np.array([1000, 20, 300_000]))
    return [bytes(picture) for picture in pictures]


CALLS: dict[str, tuple[Callable[[str], Any], Any]] = {
    "whole": (read_bytes, DATA),
    "ranged": (ranges, [DATA[2 * MB : 2 * MB + 1000], DATA[10:30], DATA[500_000:800_000]]),
    "streaming": (stream, DATA),
    "names": (lambda url: list_names(os.path.dirname(url)), ["0.tar"]),
    "find": (lambda url: [file.path for file in find_files(os.path.dirname(url), (".tar",))[1]], ["0.tar"]),
    "glob": (lambda url: [file.path for file in find_files(f"{os.path.dirname(url)}/*.tar", (".tar",))[1]], ["0.tar"]),
    "glob over folders": (lambda url: [f.path for f in find_files(f"{url.rsplit('/', 2)[0]}/*/*.tar", (".tar",))[1]], ["0.tar"]),
    "exists": (exists, True),
    "identity": (lambda url: identity(url).split(":")[0], str(len(DATA))),
}
WRITES: dict[str, Callable[[str], Any]] = {
    "write": lambda url: write_bytes(url, DATA),
    "upload": upload,
    "create": lambda url: write_new(url, DATA),
}
FAULTS = [["503", "500", "reset", "429"], ["reset", "reset", "502", "504"]]


@pytest.mark.parametrize("faults", FAULTS, ids=" ".join)
@pytest.mark.parametrize("name", CALLS)
def test_what_is_read_through_faults_is_whole(s3: S3Server, bucket: str, faulty: FaultyProxy, name: str, faults: list[str]) -> None:
    call, expected = CALLS[name]
    url = put(bucket, s3, "c/0.tar", DATA)
    faulty.faults += faults
    assert call(url) == expected
    assert faulty.broken == faults


@pytest.mark.parametrize("name", ["whole", "ranged", "streaming"])
def test_a_body_that_breaks_off_is_read_again_without_a_byte_lost_or_twice(
    s3: S3Server, bucket: str, faulty: FaultyProxy, name: str
) -> None:
    call, expected = CALLS[name]
    url = put(bucket, s3, "c/0.tar", DATA)
    faulty.faults += ["half", "503", "half"]
    assert call(url) == expected
    assert faulty.broken == ["half", "503", "half"]


def test_a_request_that_the_store_waited_too_long_for_is_sent_again(s3: S3Server, bucket: str, faulty: FaultyProxy) -> None:
    faulty.faults += ["400"]  # RequestTimeout
    write_bytes(f"{bucket}/0", b"x")
    assert faulty.broken == ["400"] and stored(s3, f"{bucket}/0") == b"x"


def test_a_stream_goes_on_where_it_broke_off(s3: S3Server, bucket: str, faulty: FaultyProxy) -> None:
    url = put(bucket, s3, "c/0.tar", DATA)
    with reading(url, ahead_bytes=256 << 10) as file:
        assert file.read(MB) == DATA[:MB]
        asked = len(faulty.requests)
        faulty.faults += ["half", "503", "reset"]
        assert file.read() == DATA[MB:]
    rest = f"GET {url[4:]} bytes={MB + (256 << 10)}-{3 * MB - 1}"
    assert faulty.requests[asked:] == [rest] * 4


def test_an_object_that_changes_between_two_tries_is_noticed(s3: S3Server, bucket: str, faulty: FaultyProxy) -> None:
    url = put(bucket, s3, "c/0.tar", DATA)
    with pytest.raises(FileNotFoundError, match="changed while it was read"), reading(url, ahead_bytes=256 << 10) as file:
        assert file.read(1000) == DATA[:1000]
        faulty.faults += ["503"]
        put(bucket, s3, "c/0.tar", bytes(3 * MB))
        file.read()
    assert faulty.broken == ["503"]


@pytest.mark.parametrize("faults", [*FAULTS, ["lost", "503", "lost"]], ids=" ".join)
@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_through_faults_is_there_once_and_whole(
    s3: S3Server, bucket: str, faulty: FaultyProxy, name: str, faults: list[str]
) -> None:
    faulty.faults += faults
    assert WRITES[name](f"{bucket}/c/0.bin") in (None, True)
    assert faulty.broken == faults
    assert stored(s3, f"{bucket}/c/0.bin") == DATA
    assert list_names(f"{bucket}/c") == ["0.bin"]


def test_another_who_is_first_is_first_through_faults_too(s3: S3Server, bucket: str, faulty: FaultyProxy) -> None:
    put(bucket, s3, "a", b"another's")
    faulty.faults += ["503", "reset", "lost", "503"]
    assert write_new(f"{bucket}/a", b"mine") is False
    assert faulty.broken == ["503", "reset", "lost", "503"] and stored(s3, f"{bucket}/a") == b"another's"


@pytest.mark.parametrize("faults", [*FAULTS, ["lost", "lost"]], ids=" ".join)
def test_what_is_removed_through_faults_is_gone(s3: S3Server, bucket: str, faulty: FaultyProxy, faults: list[str]) -> None:
    for remove, name in ((remove_file, "f/0"), (remove_folder, "f")):
        put(bucket, s3, "f/0", b"x")
        faulty.faults += faults
        remove(f"{bucket}/{name}")
        assert faulty.faults == [] and list_names(f"{bucket}/f") == []


@pytest.mark.parametrize(
    ("name", "fault"),
    [("whole", "half"), ("streaming", "503"), ("streaming", "half"), ("names", "reset"), ("upload", "503"), ("create", "500")],
)
def test_faults_without_end_end_in_one_line_and_leave_nothing(
    s3: S3Server, bucket: str, faulty: FaultyProxy, monkeypatch: pytest.MonkeyPatch, name: str, fault: str
) -> None:
    url = put(bucket, s3, "c/0.tar", DATA)
    target = url if name in CALLS else f"{bucket}/d/new"
    monkeypatch.setattr(patience, "RETRY_S", 1.2)
    before, begun = set(os.listdir(os.environ["TMPDIR"])), time.monotonic()
    faulty.for_ever = fault
    with pytest.raises(StorageDown) as caught:
        (CALLS[name][0] if name in CALLS else WRITES[name])(target)
    assert len(faulty.requests) > 2 and time.monotonic() - begun < 15
    error = pickle.loads(pickle.dumps(caught.value))  # over Ray
    assert is_final(error) and type(error) is StorageDown
    line = str(explained(error))
    assert (
        line.startswith(f"{bucket}/") and line.endswith("run the same words again later: what is done stays") and "\n" not in line
    )
    said = {
        "503": "Service Unavailable|so says the store",
        "500": "so says the store",
        "reset": "endpoint URL",
        "half": "payload is not",
    }
    assert re.search(rf"({said[fault]}).* \(tried for \d+ s\)", line)
    faulty.for_ever = None
    assert list_names(f"{bucket}/d") == [] and set(os.listdir(os.environ["TMPDIR"])) == before


def test_a_store_that_starts_again_is_waited_for(s3: S3Server, bucket: str, faulty: FaultyProxy) -> None:
    """Its port is closed meanwhile."""
    url = put(bucket, s3, "0.tar", DATA)
    faulty.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patience, "_last_said", -1e9)
        patch.setattr("sys.stderr", _Opens(faulty))  # when it is said that storage is waited for
        assert read_bytes(url) == DATA


class _Opens:
    """A stream; what is written there lets the server start."""

    def __init__(self, proxy: FaultyProxy) -> None:
        self._proxy, self.text = proxy, ""

    def write(self, text: str) -> int:
        if not self.text:
            self._proxy.open(self._proxy.port)
        self.text += text
        return len(text)

    def flush(self) -> None:
        assert "Could not connect" in self.text


@pytest.mark.parametrize("fault", ["403", "404", "412", "501"])
def test_what_no_waiting_mends_is_asked_once(s3: S3Server, bucket: str, faulty: FaultyProxy, fault: str) -> None:
    faulty.for_ever = fault
    with pytest.raises(OSError) as caught:
        open_fs(f"{bucket}/a")[0].cat_file(f"{bucket[5:]}/a", start=0, end=3)
    assert len(faulty.requests) == 1 and not is_final(caught.value)


def test_waiting_is_said_once_and_a_verb_that_storage_fails_ends_in_one_line_with_status_1(
    s3: S3Server, bucket: str, faulty: FaultyProxy, monkeypatch: pytest.MonkeyPatch, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    monkeypatch.setattr(patience, "RETRY_S", 0.3)
    monkeypatch.setattr(patience, "_last_said", -1e9)
    faulty.for_ever = "503"
    status, _, err = run_cli("filter", f"annotations={bucket}/A", f"output={bucket}/S")
    waiting, end = err.splitlines()
    assert status == 1
    assert re.fullmatch(rf"\d\d:\d\d:\d\d {bucket}/\S+: .*; trying again for up to 0 s", waiting)
    assert re.fullmatch(
        rf"raysys filter: {bucket}/\S+: .* \(tried for 0 s\); run the same words again later: what is done stays", end
    )


@pytest.mark.parametrize(
    "kind", [FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, ConnectionError, TimeoutError]
)
def test_an_error_that_names_no_file_is_no_mistake_in_the_words(kind: type[OSError]) -> None:
    assert refused(kind("of a bug")) is None and refused(kind(errno.EIO, "of a bug")) is None
    assert str(refused(kind(errno.EIO, "so it says", "s3://b/a"))).startswith("s3://b/a: so it says; ")
    with pytest.raises(kind):
        _row_of(kind("of a bug"))  # of an actor of annotate


def test_a_bug_that_raises_an_error_of_files_ends_with_its_traceback(
    monkeypatch: pytest.MonkeyPatch, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    def run(argv: list[str]) -> None:
        raise PermissionError("of a bug")

    monkeypatch.setattr(cli, "run", run)
    with pytest.raises(PermissionError, match="of a bug"):
        run_cli("filter")


@pytest.mark.parametrize("fault", ["403", "404"])
def test_what_a_store_refuses_is_named_whatever_asked(s3: S3Server, bucket: str, faulty: FaultyProxy, fault: str) -> None:
    url = put(bucket, s3, "c/0.tar", DATA)
    faulty.for_ever = fault
    asks: dict[str, Callable[[], object]] = {
        "picture": lambda: read_image(url, index=0, offset=0, size=3),
        "spans": lambda: next(iter_spans(url)),
        "copy": lambda: _copy_spans(url, np.ones(1, bool), io.BytesIO()),
        "set": lambda: Picture("0", url, offset=0, size=3).read(),
    }
    for name, ask in asks.items():
        with pytest.raises((FileNotFoundError, PermissionError)) as caught:
            ask()
        assert str(refused(caught.value)).startswith(f"{url}: "), name


# ---- disks without room --------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no filesystem can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def used(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def fill(disk: Path, *, leave: int) -> Path:
    """Take all room but so many bytes."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
    (disk / "ballast").write_bytes(bytes(free - leave))
    return disk / "ballast"


def piecewise(path: str) -> None:
    with writing(path) as file:
        for _ in range(20):
            file.write(bytes(100_000))


LOCAL_WRITES: dict[str, Callable[[str], Any]] = {
    "bytes": lambda path: write_bytes(path, bytes(2 * MB)),
    "not durable": lambda path: write_bytes(path, bytes(2 * MB), durable=False),
    "pieces": piecewise,
    "new": lambda path: write_new(path, bytes(2 * MB)),
    "torch": lambda path: _save_torch(path),
    "parquet": lambda path: _save_parquet(path),
}


def _save_torch(path: str) -> None:
    with writing(path) as file:
        torch.save({"w": torch.rand(1_000_000)}, file)  # says RuntimeError


def _save_parquet(path: str) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    with writing(path) as file:
        pq.write_table(pa.table({"x": np.random.default_rng(0).random(400_000)}), file)


def check_full(error: OSError, path: str) -> None:
    error = pickle.loads(pickle.dumps(error))
    assert is_final(error) and error.errno == errno.ENOSPC
    expected = f"no space left on the device of {path}; make room and run the same words again: what is done stays"
    assert str(explained(error)) == expected


@pytest.mark.parametrize("name", LOCAL_WRITES)
def test_a_full_disk_is_named_and_nothing_of_the_file_stays(small_disk: Path, name: str) -> None:
    path = str(small_disk / "out" / "file")
    with pytest.raises(OSError) as caught:
        LOCAL_WRITES[name](path)
    check_full(caught.value, path)
    assert used(small_disk) == []
    write_bytes(path, b"room again")
    assert used(small_disk) == ["out/file"]


def test_without_links_a_full_disk_leaves_no_new_file_that_looks_finished(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        os.unlink(ballast)
        fill(small_disk, leave=600_000)  # for the unfinished file only
        raise OSError(errno.EPERM, "no links here")

    ballast = fill(small_disk, leave=400_000)
    monkeypatch.setattr("os.link", no_links)
    with pytest.raises(OSError) as caught:
        write_new(str(small_disk / "file"), bytes(300_000 + 100_000))
    check_full(caught.value, str(small_disk / "file"))
    assert used(small_disk) == ["ballast"]


def test_a_checkpoint_on_a_full_disk_is_none_and_with_room_it_is_one(small_disk: Path) -> None:
    run = str(small_disk / "R")
    lock = RunLock.take(run).attempt()
    before = used(small_disk)
    ballast = fill(small_disk, leave=100_000)
    writer = checkpoint.CheckpointWriter(run, lock, keep=1, keep_best=False)
    state = {"step": 3, "w": torch.arange(100_000)}
    writer.save(3, state, loss=1.0)
    with pytest.raises(OSError) as caught:
        writer.close()
    check_full(caught.value, f"{run}/checkpoints/step-3/state.pt")
    assert checkpoint.steps_there(run) == [] and used(small_disk) == sorted([*before, "ballast"])
    ballast.unlink()
    writer = checkpoint.CheckpointWriter(run, lock, keep=1, keep_best=False)
    writer.save(3, state, loss=1.0)
    writer.close()
    newest = checkpoint.load_newest(run)
    assert newest is not None and torch.equal(newest["w"], state["w"])


def test_a_checkpoint_for_an_object_store_names_the_full_tmpdir(
    bucket: str, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    with pytest.raises(OSError) as caught:
        _save_torch(f"{bucket}/R/state.pt")
    check_full(caught.value, f"TMPDIR={small_disk}")
    assert used(small_disk) == [] and list_names(f"{bucket}/R") == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
def test_a_log_on_a_full_disk_has_whole_lines_only_and_goes_on_with_room(small_disk: Path) -> None:
    run = str(small_disk / "R")
    lock = RunLock.take(run).attempt()
    log = MetricsLog(run, lock, first_step=0)
    log.write(1, {"loss": 1.0})
    log.flush()
    ballast = fill(small_disk, leave=0)
    written = 1
    with pytest.raises(OSError) as caught:
        for step in range(2, 1000):
            log.write(step, {"loss": 1.0, **{f"number {i}": 0.1 for i in range(20)}})
            written = step
    assert is_final(caught.value) and caught.value.filename.startswith(run)
    text = (small_disk / "R" / "metrics.jsonl").read_bytes()
    assert text.endswith(b"}\n") and text.count(b"\n") == written
    ballast.unlink()
    again = MetricsLog(run, lock, first_step=written)
    again.write(written + 1, {"loss": 0.5})
    again.close()
    assert [line["step"] for line in read_metrics(run)] == list(range(1, written + 2))


def test_a_verb_on_a_full_disk_ends_in_one_line_with_status_1(
    small_disk: Path, run_cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "run", lambda argv: write_bytes(str(small_disk / "x"), bytes(2 * MB)))
    status, _, err = run_cli("train")
    assert status == 1
    assert err == (
        f"raysys train: no space left on the device of {small_disk}/x; make room and run the same words again: what is done stays\n"
    )


@pytest.mark.parametrize(
    ("number", "says"), [(errno.EDQUOT, "the disk quota is used up at /x"), (errno.EROFS, "/x is on a read-only")]
)
def test_no_quota_and_no_writing_are_final_and_explained(number: int, says: str) -> None:
    error = OSError(number, os.strerror(number), "/x")
    assert is_final(error) and str(explained(error)).startswith(says)


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "broken", "/x"), OSError(errno.ESTALE, "stale"), FileNotFoundError(2, "no"), ValueError()]
)
def test_what_may_be_better_elsewhere_or_is_a_bug_is_not_final(error: Exception) -> None:
    assert not is_final(error)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, run_cli: Callable[..., tuple[int, str, str]]) -> None:
    def bug(argv: list[str]) -> None:
        raise OSError(errno.EBADF, "a file that we closed")

    monkeypatch.setattr(cli, "run", bug)
    with pytest.raises(OSError, match="we closed"):
        run_cli("train")
