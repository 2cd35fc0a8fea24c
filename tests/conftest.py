"""What several tests share: tars of small pictures, and one Ray for those tests that ask for it (never autouse)."""

from __future__ import annotations

import atexit
import io
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from raysys import console
from raysys.regions.detector import Boxes
from raysys.regions.engine import Engine
from raysys.regions.recognizer import Reading

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Decoded evaluation sets lie in the system's temporary folder: what an earlier run left there must not answer for this one's code.
_TEMPORARY = tempfile.gettempdir()
for _key in ("RAY_TMPDIR", "PYTEST_DEBUG_TEMPROOT"):
    os.environ.setdefault(_key, _TEMPORARY)
os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="raysys-tests-")
atexit.register(shutil.rmtree, tempfile.tempdir, ignore_errors=True)

TINY_VIT = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
Members = list[tuple[str, bytes]]


def jpeg(image: np.ndarray | Image.Image) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def noise_jpeg(seed: int, side: int = 64) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return jpeg(Image.fromarray(small).resize((side, side)))


def text_jpeg(text: str, size: tuple[int, int] = (320, 160), font_px: int = 40) -> bytes:
    image = Image.new("RGB", size, (240, 240, 230))
    ImageDraw.Draw(image).text((20, size[1] // 3), text, fill=(20, 20, 60), font=ImageFont.load_default(font_px))
    return jpeg(image)


def hanging_jpeg(side_px: int = 4000, scans: int = 8000) -> bytes:
    """A small gray progressive JPEG that libjpeg decodes for most of a minute, at any DCT scale: each scan goes over all coefficients.

    ITU-T T.81: a scan here refines AC 1..63 and is but zero bits, of which 15 say that the next 2**14 blocks are unchanged (EOB14).
    """

    def segment(marker: int, body: bytes) -> bytes:
        return b"\xff" + bytes([marker]) + (len(body) + 2).to_bytes(2, "big") + body

    side, runs = side_px.to_bytes(2, "big"), math.ceil(math.ceil(side_px / 8) ** 2 / 2**14)
    quantisation = segment(0xDB, bytes([0] + 64 * [16]))
    frame = segment(0xC2, bytes([8, *side, *side, 1, 1, 0x11, 0]))
    huffman = segment(0xC4, bytes([0x10, 1, *15 * [0], 0xE0]))  # the one code, a zero bit, is EOB14
    scan = segment(0xDA, bytes([1, 1, 0, 1, 63, 0x10])) + bytes(math.ceil(runs * 15 / 8))
    return b"\xff\xd8" + quantisation + frame + huffman + scans * scan + b"\xff\xd9"


def write_tar(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, image: bytes | None, caption: str | None = "a thing", captions: list[str] | None = None) -> Members:
    members: Members = [] if image is None else [(f"{key}.jpg", image)]
    if caption is not None:
        members.append((f"{key}.txt", caption.encode()))
    if captions is not None:
        members.append((f"{key}.json", json.dumps({"captions": captions}).encode()))
    return members


@pytest.fixture(autouse=True)
def normal_verbosity() -> Iterator[None]:
    """It is one value of the process: a call that was quiet must not hush the next test's."""
    yield
    console.begin("", "normal")


@pytest.fixture
def tiny_model(tmp_path: Path) -> str:
    """A ViT without dropout and batch norm: any number of workers trains it alike."""
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(TINY_VIT))
    return str(file)


@pytest.fixture
def plain_corpus(tmp_path: Path) -> Path:
    """Two shards of 20 pictures without text."""
    for shard in range(2):
        members: Members = []
        for i in range(20):
            caption = f"picture {shard} {i}"
            members += sample(f"{shard}{i:03d}", noise_jpeg(shard * 50 + i), caption, [caption, f"no. {i}"])
        write_tar(tmp_path / "plain" / f"{shard}.tar", members)
    return tmp_path / "plain"


@pytest.fixture
def small_corpus(tmp_path: Path) -> Path:
    """Two shards of 12 plain pictures, two with text and one that is broken."""
    for shard in range(2):
        members: Members = []
        for i in range(12):
            members += sample(f"{shard}{i:03d}", noise_jpeg(shard * 100 + i), f"picture {shard} {i}")
        members += sample(f"{shard}900", text_jpeg("BIG SALE"), "a big sale")
        members += sample(f"{shard}901", text_jpeg("HELLO WORLD"), "a landscape")
        members += sample(f"{shard}902", b"<html>not found</html>", "a broken link")
        write_tar(tmp_path / "corpus" / f"train-{shard:05d}.tar", members)
    return tmp_path / "corpus"


class _BrightPicturesHaveText:
    """A detector and a recogniser for tests of what stands around them: one box in a bright picture, and it reads SALE."""

    def detect(self, pictures: Sequence[np.ndarray]) -> list[Boxes]:
        box = np.array([[[4, 4], [28, 4], [28, 16], [4, 16]]], np.float32)
        return [Boxes(box, np.array([0.9], np.float32)) if p.mean() > 200 else Boxes.none() for p in pictures]

    def read(self, lines: Sequence[np.ndarray]) -> list[Reading]:
        return [Reading("SALE", 0.99) for _ in lines]


@pytest.fixture
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = _BrightPicturesHaveText()
    monkeypatch.setattr("raysys.regions.annotator.open_engine", lambda ocr: Engine([fake] * len(ocr.looks), fake))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray for all tests that ask for it."""
    import ray

    from raysys.cluster import ray_session
    from raysys.config import RayConfig

    with ray_session(RayConfig(num_cpus=2)):
        assert ray.is_initialized()
        yield


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Call the command line in this process: (status, stdout, stderr)."""
    from raysys import cli

    def call(*words: str) -> tuple[int, str, str]:
        old = sys.argv
        sys.argv = ["raysys", *words]
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        finally:
            sys.argv = old
        out, err = capsys.readouterr()
        return status, out, err

    return call


def start_cli(words: list[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """The command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "raysys", *words],
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=os.environ | environment,
    )


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[bytes], log: Path, limit_s: float = 180) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert process.poll() is None, f"ended before it could be killed:\n{log.read_text()}"
        assert time.monotonic() < end, f"nothing to kill after {limit_s} s:\n{log.read_text()}"
        time.sleep(0.05)


# ---- an object store --------------------------------------------------------------------------------------------------


@dataclass
class S3Server:
    """A real S3 server (moto's) in a process of its own."""

    endpoint: str
    log: Path

    def new_bucket(self) -> str:
        """URL of an empty one."""
        import s3fs

        name = f"bucket-{uuid.uuid4().hex[:12]}"
        s3fs.S3FileSystem(use_listings_cache=False).mkdir(name)
        return f"s3://{name}"

    def requests(self) -> list[str]:
        """``METHOD /bucket/key?query`` of every request so far."""
        return re.findall(r'"(?:\x1b\[[\d;]*m)*((?:GET|PUT|HEAD|POST|DELETE) \S+)', self.log.read_text())


def start_server(words: list[str], port: int, log: Path) -> subprocess.Popen[bytes]:
    """A server in a process of its own that answers on the port."""
    process = subprocess.Popen([sys.executable, "-m", *words], stdout=log.open("wb"), stderr=subprocess.STDOUT)
    wait_for(lambda: _answers(port), process, log, limit_s=30)
    return process


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The environment names it, so that processes started later use it; a Ray that is up already does not know of it."""
    import s3fs

    port, log = free_port(), tmp_path_factory.mktemp("s3") / "log"
    process = start_server(["moto.server", "-H", "127.0.0.1", "-p", str(port)], port, log)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test-key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test/secret")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        try:
            yield S3Server(f"http://127.0.0.1:{port}", log)
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
            process.terminate()
            process.wait()
