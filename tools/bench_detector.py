"""Speed of the engine ``torch``, alone and in the whole look, and where its time goes. For a bare machine with a GPU; runs on CPUs too.

Three tables: the detector's network by batch, precision and ``torch.compile``; pictures from JPEG to boxes and from a tar of JPEGs to the
verdict of the policy ``paper``; what the second of these spends its time on. Pictures are drawn (coloured noise with the spectrum of
photographs, a share of them with words; from a fixed seed), or the JPEGs of ``--pictures FOLDER``. Warm-up, with its compiling and choosing
of kernels, is not in the rates. Timers are put around the product's functions from outside. ``CUDA_VISIBLE_DEVICES=`` runs it on the CPU.

No Ray, no internet and no installation of raysys. A machine with Python 3.11 or 3.12, torch, NumPy, Pillow, OpenCV, pyarrow,
fsspec and PyYAML also needs shapely, rapidfuzz and onnx (with its protobuf, ml_dtypes and typing_extensions). Where raysys is installed:

    python tools/bench_detector.py --pack models                        # 28 MB: NAME.onnx, NAME.txt of every network it uses
    python -m pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \\
        --platform manylinux2014_x86_64 -d downloads shapely rapidfuzz onnx protobuf ml_dtypes typing_extensions

Carry ``raysys/ tools/ models/ downloads/`` (for the tests ``tests/ pyproject.toml`` as well); then there:

    python -m pip install --no-index --no-deps --target wheels downloads/*.whl      # leave out what is installed there
    PYTHONPATH=.:wheels python tools/bench_detector.py --model-dir models
    PYTHONPATH=.:wheels RAYSYS_MODEL_DIR=models python -m pytest tests/gpu

``--parts network`` and ``--parts pipeline`` are its halves, for short leases. A CPU's defaults leave ``torch.compile`` out and take half a
minute; ``--networks fp32,bf16+compile`` brings it in.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import shutil
import statistics
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the actors of raysys have one thread each

import cv2
import numpy as np
import torch
from benchmark import Row, finish, rate
from torch._dynamo.exc import BackendCompilerFailed
from torch.autograd import DeviceType

from raysys.config import LookConfig, OcrConfig, PolicyConfig
from raysys.policy.policy import judge
from raysys.regions import annotator as annotator_module
from raysys.regions import torch_engine, units
from raysys.regions.annotator import Annotator
from raysys.regions.detector import MEAN, STD, input_size
from raysys.regions.engine import Engine, open_engine
from raysys.regions.models import find_model
from raysys.regions.torch_graph import import_onnx
from raysys.regions.units import look_at_shard

SIZES = ((640, 480), (480, 640), (640, 427))
"""Width and height of the drawn pictures, in turn."""
WORDS = ("SALE", "Open", "COFFEE", "Exit", "Hotel", "2024", "Market", "STOP", "Pizza", "Street", "Menu", "PARKING")
ONE_LOOK = "PP-OCRv4_mobile_det"
MAX_DIFFERENT = 256
"""Drawn pictures that differ; more than these are repeats."""
PROFILED_BATCHES = 2
_SYNC_NAMES = ("Context Sync", "Event Sync", "Stream Sync", "Stream Wait Event")
"""What the profiler lists beside kernels and copies, though the GPU does nothing then."""


@dataclass(frozen=True)
class Variant:
    precision: str
    compile: bool

    @staticmethod
    def parse(word: str) -> Variant:
        precision, _, rest = word.partition("+")
        if precision not in ("fp32", "bf16") or rest not in ("", "compile"):
            raise argparse.ArgumentTypeError(f"{word}: fp32, bf16, fp32+compile and bf16+compile are known")
        return Variant(precision, rest == "compile")

    def __str__(self) -> str:
        return f"{self.precision} {'compiled' if self.compile else 'eager'}"


@dataclass(frozen=True)
class Figure:
    """A number without a reference; in the file it looks like a Row without one."""

    name: str
    ours: float
    unit: str


# Pictures


def drawn_picture(index: int, text_share: float) -> tuple[bytes, bool]:
    """A JPEG of about 80 KB, and whether there are words on it."""
    random = np.random.default_rng([11, index])
    width, height = SIZES[index % len(SIZES)]
    pixels = np.zeros((height, width, 3), np.float32)
    for cells in (3, 6, 12, 24, 48, 96, 192, 384):  # amplitudes fall with frequency, as in photographs; most of it is brightness
        rows, columns = max(2, cells * height // 640), max(2, cells * width // 640)
        noise = random.standard_normal((rows, columns, 1)) + 0.35 * random.standard_normal((rows, columns, 3))
        pixels += cv2.resize(noise.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC) * cells**-0.6
    pixels = 55 * pixels / pixels.std() + random.uniform(80, 160)
    pixels += random.normal(0, 5, pixels.shape)  # a camera's noise
    for _ in range(6):  # objects: smooth edges over the texture
        shape = np.zeros((height, width), np.float32)
        axes = tuple(int(v) for v in random.integers(20, 160, 2))
        center = (int(random.integers(0, width)), int(random.integers(0, height)))
        cv2.ellipse(shape, center, axes, float(random.uniform(0, 180)), 0, 360, 1.0, -1, cv2.LINE_AA)
        pixels += shape[:, :, None] * random.normal(0, 35, 3).astype(np.float32)
    image = pixels.clip(0, 255).astype(np.uint8)
    has_text = int((index + 1) * text_share + 1e-9) > int(index * text_share + 1e-9)
    for line in range(int(random.integers(1, 4)) if has_text else 0):
        words = " ".join(random.choice(WORDS, int(random.integers(1, 3))))
        scale = float(random.uniform(1.0, 2.2))
        place = (int(random.integers(10, width // 4)), int(height * (line + 1) / 4))
        for grey, thickness in ((20, round(6 * scale)), (245, round(2 * scale))):  # light letters with a dark rim
            cv2.putText(image, words, place, cv2.FONT_HERSHEY_SIMPLEX, scale, (grey, grey, grey), thickness, cv2.LINE_AA)
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes(), has_text


@dataclass
class Pictures:
    jpegs: list[bytes]
    has_text: list[bool] | None
    """None where nobody knows."""

    def times(self, number: int) -> Pictures:
        repeat = lambda items: list(itertools.islice(itertools.cycle(items), number))  # noqa: E731
        return Pictures(repeat(self.jpegs), repeat(self.has_text) if self.has_text is not None else None)

    def write_tar(self, path: Path) -> None:
        with tarfile.open(path, "w") as tar:
            for index, jpeg in enumerate(self.jpegs):
                for suffix, content in (("jpg", jpeg), ("txt", b"a picture")):
                    member = tarfile.TarInfo(f"{index:08d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def open_pictures(folder: str | None, *, number: int, text_share: float) -> Pictures:
    if folder is None:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            drawn = list(threads.map(drawn_picture, range(min(number, MAX_DIFFERENT)), itertools.repeat(text_share)))
        return Pictures([jpeg for jpeg, _ in drawn], [has_text for _, has_text in drawn]).times(number)
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[:number]
    if not files:
        raise SystemExit(f"--pictures {folder}: no .jpg or .jpeg there")
    return Pictures([path.read_bytes() for path in files], None).times(number)


# The network alone


@dataclass
class NetworkSpeed:
    pictures_per_s: float
    first_s: float
    """The first call: compiling, choosing kernels."""
    peak_mib: float | None
    """Most GPU memory that torch held during the calls."""


def input_batch(pictures: Pictures, look: LookConfig, number: int) -> torch.Tensor:
    """[N, 3, H, W], normalised: pictures at the size at which a 640 x 480 one is looked at."""
    size = input_size(*SIZES[0], enlarge=look.enlarge, max_side_px=look.max_side_px)
    images = [cv2.resize(cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR), size) for jpeg in pictures.jpegs[:32]]
    pixels = (np.stack(images).astype(np.float32) - MEAN) / STD
    return torch.from_numpy(pixels[np.arange(number) % len(pixels)].transpose(0, 3, 1, 2).copy())


def seconds_of_a_call(call: Callable[[], object], device: torch.device, *, rounds: int, min_round_s: float) -> float:
    """Median over rounds. On CUDA between two events, so gaps where the GPU waits for Python count; else by the clock."""

    def timed(calls: int) -> float:
        if device.type != "cuda":
            start_s = time.perf_counter()
            for _ in range(calls):
                call()
            return (time.perf_counter() - start_s) / calls
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / calls

    calls = max(1, min(200, round(min_round_s / max(timed(1), 1e-6))))
    return statistics.median(timed(calls) for _ in range(rounds))


@torch.inference_mode()
def network_speeds(
    onnx: str, variant: Variant, batches: dict[int, torch.Tensor], device: torch.device, *, rounds: int, min_round_s: float
) -> Iterator[tuple[int, NetworkSpeed]]:
    dtype = torch.bfloat16 if variant.precision == "bf16" else torch.float32
    # as torch_engine prepares it: channels last, one graph for all sizes
    network: Callable[[torch.Tensor], torch.Tensor] = import_onnx(onnx).to(device, dtype).to(memory_format=torch.channels_last)
    if variant.compile:
        torch._dynamo.reset()
        network = torch.compile(network, dynamic=True)
    for size, images in batches.items():
        batch = images.to(device, dtype).contiguous(memory_format=torch.channels_last)
        start_s = time.perf_counter()
        network(batch).float().sum().item()  # item() waits for the device
        first_s = time.perf_counter() - start_s
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            for _ in range(3):
                network(batch)
            torch.cuda.synchronize()
        call_s = seconds_of_a_call(lambda b=batch: network(b), device, rounds=rounds, min_round_s=min_round_s)
        peak_mib = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None
        yield size, NetworkSpeed(size / call_s, first_s, peak_mib)


# The whole look


class Clock:
    """Seconds by name, those of the main thread (wall) apart from those of other threads (CPU). A timer within another stops the outer."""

    def __init__(self) -> None:
        self.main_s: Counter[str] = Counter()
        self.others_s: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._here = threading.local()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        is_main = threading.current_thread() is threading.main_thread()
        now = time.perf_counter if is_main else time.thread_time
        outer_s, self._here.inner_s = getattr(self._here, "inner_s", 0.0), 0.0
        start = now()
        try:
            yield
        finally:
            spent = now() - start
            with self._lock:
                (self.main_s if is_main else self.others_s)[name] += spent - self._here.inner_s
            self._here.inner_s = outer_s + spent

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(name):
                return function(*args, **kwargs)

        return timed

    def around_each(self, name: str, function: Callable[..., Iterable[Any]]) -> Callable[..., Iterator[Any]]:
        """Of a generator: the time in which it makes its items."""

        def timed(items: Iterator[Any]) -> Iterator[Any]:
            while True:
                with self(name):
                    item = next(items, items)
                if item is items:
                    return
                yield item

        return lambda *args, **kwargs: timed(iter(function(*args, **kwargs)))  # called at once: prefetch begins when it is called


WAIT, NETWORK, CONTOURS, CUTTING, READING, POLICY = (
    "wait for read + decode",
    "network: stack, transfer, wait",
    "post-process (contours)",
    "line cutting",
    "recognition",
    "policy",
)
REST = "rest: resize, rows"
TAR, DECODE = "read the tar", "decode"


class _Timed:
    """A detector or recogniser with a timer around it."""

    def __init__(self, clock: Clock, inner: Any) -> None:
        if hasattr(inner, "detect"):
            self.detect = clock.around(NETWORK, inner.detect)
        else:
            self.read = clock.around(READING, inner.read)


@contextmanager
def timers(clock: Clock) -> Iterator[None]:
    """Around what an Annotator opened in this context calls."""

    def timed_engine(ocr: OcrConfig) -> Any:
        engine = open_engine(ocr)
        timed = {id(detector): _Timed(clock, detector) for detector in engine.detectors}
        return Engine(
            [timed[id(detector)] for detector in engine.detectors],  # type: ignore[misc]
            _Timed(clock, engine.recognizer) if engine.recognizer else None,  # type: ignore[arg-type]
        )

    module = annotator_module
    with ExitStack() as stack:
        for owner, name, replacement in (
            (module, "open_engine", timed_engine),
            (module, "prefetch", clock.around_each(WAIT, module.prefetch)),
            (units, "iter_samples", clock.around_each(TAR, units.iter_samples)),
            (module, "decode", clock.around(DECODE, module.decode)),
            (module, "cut_out", clock.around(CUTTING, module.cut_out)),
            (torch_engine, "boxes_of_map", clock.around(CONTOURS, torch_engine.boxes_of_map)),
        ):
            stack.enter_context(patch.object(owner, name, replacement))
        yield


@dataclass
class Shares:
    """Of the wall time of one pass."""

    main: dict[str, float]
    """What the main thread did, adds up to 1."""
    others: dict[str, float]
    """CPU seconds of the other threads by the wall's second: cores."""
    cores: float
    """CPU seconds of the whole process by the wall's second."""
    gpu_busy: float | None


def warm_up(annotator: Annotator, ocr: OcrConfig, pictures: Pictures) -> None:
    """The same batches as will be timed where something is compiled or chosen for their shapes, else a picture of each size."""
    by_shape = ocr.compile or ocr.num_gpus_per_actor > 0
    for _ in annotator.look_all(enumerate(pictures.jpegs if by_shape else pictures.jpegs[: len(SIZES)])):
        pass


def boxes_per_s(ocr: OcrConfig, pictures: Pictures) -> tuple[float, int]:
    """Pictures a second from JPEG bytes to boxes, and how many pictures had one."""
    annotator = Annotator(replace(ocr, recognize=False))
    warm_up(annotator, ocr, pictures)
    start_s = time.perf_counter()
    found = sum(bool(look.regions) for _, look in annotator.look_all(enumerate(pictures.jpegs)))
    return len(pictures.jpegs) / (time.perf_counter() - start_s), found


def verdicts_per_s(ocr: OcrConfig, pictures: Pictures, folder: Path) -> tuple[float, list[bool], Shares]:
    """Pictures a second from a tar (in the page cache) to the policy's verdict, which pictures have text, and where the time went."""
    clock = Clock()
    shard = folder / "pictures.tar"
    pictures.write_tar(shard)

    def verdicts(path: Path) -> list[bool]:
        table, _, _ = look_at_shard(str(path), path.name, None, annotator)
        with clock(POLICY):
            return [not keep for keep in judge(table, PolicyConfig())["keep"].to_pylist()]

    with timers(clock):
        annotator = Annotator(ocr)
        warm_up(annotator, ocr, pictures)
        clock.main_s.clear()
        clock.others_s.clear()
        cpu_s, start_s = time.process_time(), time.perf_counter()
        dropped = verdicts(shard)
        wall_s, cpu_s = time.perf_counter() - start_s, time.process_time() - cpu_s
        main = {name: clock.main_s[name] / wall_s for name in (WAIT, NETWORK, CONTOURS, CUTTING, READING, POLICY)}
        others = {name: seconds / wall_s for name, seconds in clock.others_s.items()}
        main[REST] = 1 - sum(main.values())
        gpu_busy = None
        if ocr.num_gpus_per_actor > 0:
            few = Pictures(pictures.jpegs[: PROFILED_BATCHES * ocr.batch], None)
            few_shard = folder / "few.tar"
            few.write_tar(few_shard)
            busy_s = gpu_busy_s(lambda: verdicts(few_shard))
            gpu_busy = busy_s / len(few.jpegs) * len(pictures.jpegs) / wall_s
    return len(pictures.jpegs) / wall_s, dropped, Shares(main, others, cpu_s / wall_s, gpu_busy)


def gpu_busy_s(work: Callable[[], object]) -> float:
    """Seconds in which a kernel or copy ran on the GPU, by torch.profiler: the union of their spans, so idle gaps between kernels do not
    count (they would between CUDA events). Profiling slows the host down, not the kernels, so only this sum is taken from such a pass."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation and event.name not in _SYNC_NAMES
    )
    busy_us, until = 0.0, float("-inf")
    for start, end in spans:
        busy_us += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy_us / 1e6


# The program


def pack(folder: str, names: Iterable[str]) -> None:
    """Copy NAME.onnx, and a recogniser's characters where they are no part of it, from the wheels."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        model = find_model(name)
        shutil.copyfile(model.onnx, target / f"{name}.onnx")
        if model.dictionary is not None:
            shutil.copyfile(model.dictionary, target / f"{name}.txt")
    size_mb = sum(file.stat().st_size for file in target.iterdir()) / 1e6
    print(f"{folder}: {', '.join(sorted(file.name for file in target.iterdir()))}; {size_mb:.0f} MB")


def machine_of(device: torch.device) -> str:
    kind = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}" if device.type == "cuda" else "no GPU"
    return f"{kind}, torch {torch.__version__}, {torch.get_num_threads()} torch thread(s)"


def looks_of(preset: str, side_px: int) -> list[LookConfig]:
    return OcrConfig().looks if preset == "default" else [LookConfig(ONE_LOOK, enlarge=1.0, max_side_px=side_px)]


def bench_networks(
    args: argparse.Namespace, device: torch.device, pictures: Pictures, rows: list[Row], figures: list[Figure]
) -> None:
    for look in looks_of(args.preset, args.side):
        size = input_size(*SIZES[0], enlarge=look.enlarge, max_side_px=look.max_side_px)
        title = f"{look.detector} {size[0]}x{size[1]}"
        print(f"\n{title}, network alone: pictures/s (seconds of the first call, peak GPU MiB)")
        speeds: dict[tuple[Variant, int], float] = {}
        onnx = find_model(look.detector, args.model_dir).onnx
        for variant in args.networks:
            batches = {number: input_batch(pictures, look, number) for number in args.batches}
            try:
                for number, speed in network_speeds(
                    onnx, variant, batches, device, rounds=args.rounds, min_round_s=args.min_round_s
                ):
                    speeds[variant, number] = speed.pictures_per_s
                    peak = f", {speed.peak_mib:.0f} MiB" if speed.peak_mib else ""
                    print(
                        f"    {variant!s:16} batch {number:4}{speed.pictures_per_s:11.1f} ({speed.first_s:.1f} s{peak})", flush=True
                    )
                    name = f"network {title}, batch {number}, {variant}"
                    figures.append(Figure(name, speed.pictures_per_s, "pictures/s"))
                    figures.append(Figure(f"{name}: first call", speed.first_s, "s"))
                    if speed.peak_mib:
                        figures.append(Figure(f"{name}: peak", speed.peak_mib, "MiB"))
            except BackendCompilerFailed as error:
                print(f"    {variant!s:16} torch.compile failed here: {str(error).splitlines()[0]}", flush=True)
        ours, reference = args.networks[-1], args.networks[0]
        for number in args.batches:
            if ours != reference and {(ours, number), (reference, number)} <= speeds.keys():
                unit = f"pictures/s, {ours} : {reference}"
                rows.append(
                    rate(f"{title}, batch {number}", ours=speeds[ours, number], reference=speeds[reference, number], unit=unit)
                )


def bench_pipelines(
    args: argparse.Namespace, device: torch.device, pictures: Pictures, rows: list[Row], figures: list[Figure]
) -> None:
    for threads in args.decode_threads:
        speeds: dict[str, dict[Variant, float]] = {"JPEG to boxes": {}, "tar to verdict": {}}
        for variant in args.pipelines:
            ocr = OcrConfig(
                engine="torch",
                precision=variant.precision,
                compile=variant.compile,
                model_dir=args.model_dir,
                looks=looks_of(args.preset, args.side),
                num_gpus_per_actor=1.0 if device.type == "cuda" else 0.0,
                batch=args.engine_batch,
                decode_threads=threads,
            )
            title = f"{variant}, {threads} decode thread(s)"
            boxes, with_boxes = boxes_per_s(ocr, pictures)
            print(f"\n{title}: JPEG to boxes {boxes:.1f} pictures/s ({with_boxes} of {len(pictures.jpegs)} with boxes)", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                verdicts, dropped, shares = verdicts_per_s(ocr, pictures, Path(folder))
            print(f"{title}: tar to verdict {verdicts:.1f} pictures/s; {described(dropped, pictures.has_text)}", flush=True)
            speeds["JPEG to boxes"][variant], speeds["tar to verdict"][variant] = boxes, verdicts
            figures += [Figure(f"{path}, {title}", speed[variant], "pictures/s") for path, speed in speeds.items()]
            figures += shares_shown(shares, title)
        ours, reference = args.pipelines[-1], args.pipelines[0]
        if ours != reference:
            unit = f"pictures/s, {ours} : {reference}"
            rows += [
                rate(f"{path}, {threads} decode thread(s)", ours=speed[ours], reference=speed[reference], unit=unit)
                for path, speed in speeds.items()
            ]


def described(dropped: Sequence[bool], has_text: Sequence[bool] | None) -> str:
    """How the verdicts stand to what was drawn, so that speed is not bought with blindness."""
    if has_text is None:
        return f"{sum(dropped)} of {len(dropped)} dropped"
    of_text = sum(d and t for d, t in zip(dropped, has_text, strict=True))
    return f"dropped {of_text} of {sum(has_text)} with text, {sum(dropped) - of_text} of {len(dropped) - sum(has_text)} without"


def shares_shown(shares: Shares, title: str) -> list[Figure]:
    parts = [(f"main thread, {name}", 100 * share, "% of the wall time") for name, share in shares.main.items()]
    parts += [(f"other threads, {name}", cores, "cores (CPU s / wall s)") for name, cores in shares.others.items()]
    parts.append(("whole process", shares.cores, "cores (CPU s / wall s)"))
    if shares.gpu_busy is not None:
        parts.append(("GPU busy (torch.profiler, kernels and copies)", 100 * shares.gpu_busy, "% of the wall time"))
    for name, value, unit in parts:
        print(f"    {name:48}{value:8.2f}  {unit}")
    return [Figure(f"tar to verdict, {title}: {name}", value, unit) for name, value, unit in parts]


def save(rows: list[Row], figures: list[Figure], device: torch.device) -> None:
    """The ratios through ``finish``, and the other figures into the same file."""
    command = f"python tools/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip()
    machine = f"{Row('', 0, 0, 0, None, '').machine}; {machine_of(device)}"
    path = Path("outputs/bench/detector.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    stated = [replace(row, command=command, machine=machine) for row in rows]
    if stated:
        finish(stated)
    plain = [Row(figure.name, figure.ours, 0, 0, None, figure.unit, command, machine) for figure in figures]
    like_rows = [asdict(row) | {"reference": None, "ratio": None} for row in plain]
    path.write_text(json.dumps([*map(asdict, stated), *like_rows], indent=2) + "\n")
    print(f"{len(like_rows)} other figures: {path}")


def numbers(words: str) -> list[int]:
    return [int(word) for word in words.split(",")]


def variants(words: str) -> list[Variant]:
    return [Variant.parse(word) for word in words.split(",")]


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies in bf16; CPUs that don't are many times slower with it."""
    return device.type == "cuda" or any(flag in Path("/proc/cpuinfo").read_text() for flag in ("avx512_bf16", "amx_bf16"))


def arguments(on_gpu: bool, bf16: bool) -> argparse.Namespace:
    networks = "fp32,bf16,fp32+compile,bf16+compile" if on_gpu else "fp32,bf16" if bf16 else "fp32"
    pipelines = "fp32,bf16+compile" if on_gpu else "fp32,bf16" if bf16 else "fp32"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--pack", metavar="FOLDER", help="copy the networks' files from the installed wheels there, and stop")
    parser.add_argument(
        "--model-dir", metavar="FOLDER", help="ocr.model_dir: folder with NAME.onnx; without it the installed wheels"
    )
    parser.add_argument("--parts", choices=("all", "network", "pipeline"), default="all")
    parser.add_argument(
        "--preset", choices=("one_look", "default"), default="one_look", help=f"{ONE_LOOK} once, or OcrConfig's looks"
    )
    parser.add_argument("--side", type=int, default=640, help="max_side_px of one_look")
    parser.add_argument("--pictures", metavar="FOLDER", help="JPEGs instead of drawn pictures")
    parser.add_argument("--num-pictures", type=int, default=2048 if on_gpu else 40)
    parser.add_argument("--text-share", type=float, default=0.3, help="share of the drawn pictures with words")
    parser.add_argument(
        "--networks",
        type=variants,
        default=networks,
        help="the last is compared with the first; a graph takes a CPU a minute and more to compile",
    )
    parser.add_argument("--batches", type=numbers, default="1,8,32,64,128" if on_gpu else "1,4", help="of the network alone")
    parser.add_argument("--rounds", type=int, default=5 if on_gpu else 3)
    parser.add_argument("--min-round-s", type=float, default=0.3)
    parser.add_argument("--pipelines", type=variants, default=pipelines, help="the last is compared with the first")
    parser.add_argument("--engine-batch", type=int, default=256 if on_gpu else OcrConfig().batch, help="ocr.batch")
    parser.add_argument("--decode-threads", type=numbers, default=str(os.cpu_count()) if on_gpu else "1", help="ocr.decode_threads")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    return parser.parse_args()


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args = arguments(on_gpu=device.type == "cuda", bf16=has_bf16(device))
    if args.pack:
        names = {look.detector for preset in ("one_look", "default") for look in looks_of(preset, args.side)}
        pack(args.pack, sorted({*names, OcrConfig().recognizer}))
        return
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(1)
    if device.type == "cuda":
        tf32 = "on" if torch.backends.cudnn.allow_tf32 else "off"
        print(f"{machine_of(device)}; TF32 in fp32 convolutions {tf32}, as torch starts")
    else:
        print(f"ON THE CPU ({machine_of(device)}): no figure below says anything about a GPU")
    pictures = open_pictures(args.pictures, number=args.num_pictures, text_share=args.text_share)
    kilobytes = sum(map(len, pictures.jpegs)) / len(pictures.jpegs) / 1000
    print(
        f"{len(pictures.jpegs)} pictures, {len(set(pictures.jpegs))} of them different, {kilobytes:.0f} KB on average", flush=True
    )
    rows: list[Row] = []
    figures: list[Figure] = []
    try:
        for part, bench in (("network", bench_networks), ("pipeline", bench_pipelines)):
            if args.parts in ("all", part):
                bench(args, device, pictures, rows, figures)
    finally:  # what was measured before a failure is worth its minutes
        save(rows, figures, device)


if __name__ == "__main__":
    main()
