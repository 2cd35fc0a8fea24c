"""The page: what is there, what is missing, and for each verb whether it can work.

In: facts, nodes and problems. Out: text of at most :data:`WIDTH` columns, but for what can be copied.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Sequence

from raysys.config import OcrConfig
from raysys.doctor.facts import EngineTrial, Facts
from raysys.doctor.judge import Node, Problem, differences, gigabytes, lacking, missing_extras, reads

WIDTH = 100
MAX_NODES = 16
"""Lines of nodes; those with problems come first."""
_INDENT = 10
_SHOWN = ("ray", "torch", "torchvision", "open-clip-torch", "onnxruntime", "onnx", "pyarrow", "numpy")
"""Packages whose versions stand on the page; the JSON has all."""


def render(facts: Facts, ray: str, nodes: Sequence[Node], problems: Sequence[Problem]) -> str:
    """:param ray: how Ray was reached, or that it was not. :param problems: the needed ones first; verbs name them by number."""
    lines = [*_machine(facts), *_software(facts), *_ocr(facts), *_rest(facts), *_line("Ray", ray), *_nodes(facts, nodes), ""]
    for heading, needed in (("Missing:", True), ("Not needed, but better:", False)):
        some = [line for number, p in enumerate(problems, 1) if p.needed == needed for line in _problem(number, p)]
        lines += [heading, *some] if some else []
    return "\n".join([*lines, "Verbs:", *_verbs(nodes, problems)])


def _line(label: str, text: str, indent: int = _INDENT) -> list[str]:
    """A paragraph with its label before it."""
    first = f"{label:{indent}}" if len(label) < indent else f"{label} "
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )


def _machine(facts: Facts) -> Iterator[str]:
    limit = f", {facts.cpu_limit:g} of them for this container" if facts.cpu_limit else ""
    flags = ", ".join(flag.upper() for flag in facts.cpu_flags) or "no AMX, no AVX512_BF16: bfloat16 is slow here"
    yield from _line("machine", f"{facts.host}: {facts.cpu}, {facts.cores} cores{limit} ({flags})")
    memory = f"{gigabytes(facts.memory_free or 0)} of {gigabytes(facts.memory_total)} free" if facts.memory_total else "not known"
    shm = f"/dev/shm {gigabytes(facts.shm_free)} free" if facts.shm_free is not None else "no /dev/shm"
    yield from _line("memory", f"{memory}; {shm}; {facts.open_files} open files a process")
    uses: dict[str, list[str]] = {}
    for disk in facts.disks:
        uses.setdefault(f"{gigabytes(disk.free)} of {gigabytes(disk.total)} free in {disk.path}", []).append(disk.use)
    yield from _line("disk", "; ".join(f"{room} ({', '.join(of)})" for room, of in uses.items()))
    gpus = [f"{gpu['name']} with {gigabytes(gpu['free'])} of {gigabytes(gpu['total'])} free" for gpu in facts.gpus]
    built = f"torch is built for {f'CUDA {facts.torch_built_for}' if facts.torch_built_for else 'CPUs only'}"
    seen = f", CUDA_VISIBLE_DEVICES='{facts.cuda_visible}'" if facts.cuda_visible is not None else ""
    yield from _line("GPU", f"{'; '.join(gpus) or 'none'} ({built}{seen})")


def _software(facts: Facts) -> Iterator[str]:
    yield from _line("Python", f"{facts.versions['Python']}, {facts.executable}")
    versions = ", ".join(f"{name} {facts.versions.get(name, 'missing')}" for name in ("raysys", *_SHOWN))
    yield from _line("packages", versions)
    needed = [p for p in facts.packages if p.extra is None]
    good = sum(p.fits and p.error is None for p in needed)
    extras = {p.extra for p in facts.packages if p.extra} - set(missing_extras(facts.packages))
    yield from _line("", f"{good} of {len(needed)} required ones are there and work; extras: {', '.join(sorted(extras)) or 'none'}")


def _ocr(facts: Facts) -> Iterator[str]:
    ocr = OcrConfig()
    for number, trial in enumerate(facts.engines):
        name = f"{trial.name} (default)" if trial.name == ocr.engine else trial.name
        yield from _line("" if number else "engines", f"{name:15} {_tried(trial)}")
    used = dict.fromkeys([*(look.detector for look in ocr.looks), ocr.recognizer])
    there = {name: model for name, model in facts.models.items() if "path" in model}
    folder = os.path.commonpath([model["path"] for model in there.values()]) if there else ""
    yield from _line("models", f"{folder or facts.files_error or 'none'}, first digits of their sha256:")
    for name in used:
        if name in there:
            path = os.path.relpath(there[name]["path"], folder)
            yield " " * _INDENT + f"{name:20} {there[name]['sha256'][:12]}  {path}"
        else:
            yield from _line("", f"{name:20} {facts.models.get(name, {}).get('error', 'not found')}")
    yield from _line("", f"also {', '.join(name for name in there if name not in used) or 'no others'}")


def _tried(trial: EngineTrial) -> str:
    if not trial.installed:
        return "not installed"
    if trial.error is not None:
        return trial.error
    verdict = "reads a picture" if reads(trial) else "does not read what stands on a picture"
    return f"{verdict} in {trial.looked_s:.1f} s (opened in {trial.opened_s:.0f} s)"


def _rest(facts: Facts) -> Iterator[str]:
    yield from _line("fonts", f"Arial Unicode {facts.arial or 'not found'}; DejaVu Sans {facts.font or 'not found'}")
    for label, protocol, package in (("storage", "s3", "s3fs"), ("", "gs", "gcsfs")):
        seen = ", ".join(facts.credentials[protocol]) or "none seen (an instance's role is not looked for)"
        version = facts.versions.get(package)
        yield from _line(label, f"{protocol}:// {f'by {package} {version}; credentials: {seen}' if version else 'not usable'}")
    compilers = ", ".join(f"{file or 'none'} for {device}" for device, file in facts.compilers.items())
    yield from _line("compiler", f"{compilers} (train.compile=true)")
    yield from _line("weights", "pretrained=TAG needs the network, which is not tried here; pretrained=FILE does not")


def _nodes(facts: Facts, nodes: Sequence[Node]) -> Iterator[str]:
    if not nodes:
        return
    yield f"{'':{_INDENT}}{'node':20} {'CPUs free':>10} {'GPUs free':>10} {'memory free':>12} {'disk free':>10}  versions"
    badly_first = sorted(nodes, key=lambda node: (node.error is None, not differences(facts.versions, node.versions)))
    for node in badly_first[:MAX_NODES]:
        seen = node.facts or (facts if node.error is None else None)
        counts = [f"{node.free.get(kind, 0):g}/{node.total.get(kind, 0):g}" for kind in ("CPU", "GPU")]
        memory = gigabytes(seen.memory_free) if seen and seen.memory_free is not None else "?"
        disk = gigabytes(seen.disks[-1].free) if seen else "?"
        other = ", ".join(name for name, *_ in differences(facts.versions, node.versions))
        said = "no answer" if node.error else f"other: {other}" if other else "the driver's"
        yield f"{'':{_INDENT}}{node.address:20} {counts[0]:>10} {counts[1]:>10} {memory:>12} {disk:>10}  {said}"
    if len(nodes) > MAX_NODES:
        yield f"{'':{_INDENT}}and {len(nodes) - MAX_NODES} more"


def _problem(number: int, problem: Problem) -> list[str]:
    verbs = "" if problem.needed else f" ({', '.join(problem.verbs)})"  # else it stands beside the verb
    return _line(f"{number:3}", f"{problem.what}{verbs}" + (f" -> {problem.mend}" if problem.mend else ""), indent=4)


def _verbs(nodes: Sequence[Node], problems: Sequence[Problem]) -> Iterator[str]:
    cpus, gpus = (sum(node.total.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    device = f"on {gpus:g} GPUs (use_gpu=true)" if gpus else f"on {cpus:g} CPUs; no GPU for use_gpu=true"
    remarks = {
        "annotate": f"ocr.engine={OcrConfig().engine} on {cpus:g} CPUs",
        **dict.fromkeys(("train", "sweep"), device),
        "evaluate": f"on {gpus:g} GPUs (service.num_gpus_per_actor=1)" if gpus else f"on {cpus:g} CPUs",
        "demo": f"on {cpus:g} CPUs",
    }
    for verb, missing in lacking(problems).items():
        lacks = ", ".join(str(number) for number, p in enumerate(problems, 1) if p in missing)
        yield f"  {verb:10}" + (f"LACKS {lacks}" if lacks else f"ready {remarks.get(verb, '')}".rstrip())
