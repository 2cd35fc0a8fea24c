"""What is tried in a process of its own, so that what hangs, kills its process or raises whatever it likes is a line and not the end.

    python -m raysys.doctor.trial import torch numpy      {"module": "torch", ...} for each that can be imported, up to the first that cannot
    python -m raysys.doctor.trial engine onnx             {"opened_s", "looked_s", "texts"}
    python -m raysys.doctor.trial files                   {"models": {name: {"path", "sha256"} or {"error"}}, "font": path or null}

In: those words. Out: a JSON line an answer (:func:`attempt` reads them), and what goes wrong as the last line of stderr. No Ray here.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from typing import Any

from raysys.errors import UserError

TRIAL_S = 180.0
"""What a trial may take: PaddleOCR's import alone takes 10 s, and the machine may be busy."""
WORDS = "SUMMER SALE"
"""They stand on the picture that an engine must read."""
_MARK = "raysys-trial "
"""Before every answer: libraries print too."""


def attempt(*words: str, limit_s: float = TRIAL_S) -> tuple[list[dict[str, Any]], str | None]:
    """Run a trial in a child of this process. :returns: its answers, and why it ended badly."""
    path = os.pathsep.join(place or os.getcwd() for place in sys.path)  # a Ray worker finds the code of its job there
    environment = os.environ | {"PYTHONPATH": path, "PADDLE_PDX_DISABLE_MODEL_SOURCE_CHECK": "True"}
    environment["OMP_NUM_THREADS"] = "1"  # as an OCR actor has it
    command = [sys.executable, "-P", "-m", "raysys.doctor.trial", *words]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return [], f"not done in {limit_s:.0f} s"
    answers = [json.loads(line.removeprefix(_MARK)) for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode == 0:
        return answers, None
    if done.returncode < 0:
        return answers, f"its process was ended by {signal.Signals(-done.returncode).name}"
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return answers, said[-1][:300] if said else f"its process ended with status {done.returncode}"


def attempt_imports(modules: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Import them in one process, and in another one after each that cannot be.

    :returns: module -> what it says of itself, and module -> why it cannot be imported.
    """
    details: dict[str, Any] = {}
    errors: dict[str, str] = {}
    left = list(modules)
    while left:
        answers, error = attempt("import", *left)
        details |= {answer["module"]: answer["detail"] for answer in answers}
        left = left[len(answers) :]
        if left:
            errors[left.pop(0)] = error or "its import ended the process"
    return details, errors


def _import(modules: list[str]) -> None:
    for name in modules:
        module = importlib.import_module(name)
        detail = _devices(module) if name == "torch" else module.get_available_providers() if name == "onnxruntime" else None
        _answer({"module": name, "detail": detail})


def _devices(torch: Any) -> dict[str, Any]:
    """GPUs as torch sees them; each has to add two numbers."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        there = torch.cuda.is_available()  # of a driver that is too old it only warns
    why = str(caught[0].message).split(". ")[0] if caught else None
    return {
        "built_for": torch.version.cuda or torch.version.hip,
        "gpus": [_gpu(torch, n) for n in range(torch.cuda.device_count() if there else 0)],
        "why_none": why,
    }


def _gpu(torch: Any, number: int) -> dict[str, Any]:
    """Memory in bytes."""
    free = total = 0
    error = None
    try:
        free, total = torch.cuda.mem_get_info(number)
        torch.ones(2, device=f"cuda:{number}").sum().item()
    except RuntimeError as broken:  # no kernels for it, no memory, in exclusive use
        error = str(broken).splitlines()[0]
    return {"name": torch.cuda.get_device_name(number), "free": free, "total": total, "error": error}


def _engine(engine: str) -> None:
    """All looks of the default preset at one picture, its text read."""
    from raysys.config import OcrConfig
    from raysys.regions.annotator import Annotator

    started = time.monotonic()
    try:
        annotator = Annotator(OcrConfig(engine=engine, sure_text_score=1.0))
    except UserError as error:
        sys.exit(str(error.__cause__ or error))
    opened = time.monotonic()
    look = annotator.look(_picture())
    texts = [region["text"] for region in look.regions]
    _answer({"opened_s": opened - started, "looked_s": time.monotonic() - opened, "texts": texts})


def _picture() -> bytes:
    """A JPEG of 480 x 320 px with :data:`WORDS` on it."""
    from PIL import Image, ImageDraw, ImageFont

    picture, file = Image.new("RGB", (480, 320), (240, 240, 230)), io.BytesIO()
    ImageDraw.Draw(picture).text((60, 130), WORDS, fill=(20, 20, 60), font=ImageFont.load_default(48))
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()


def _files() -> None:
    from raysys.attack.drawing import default_font_file
    from raysys.regions.models import find_model, names_in_wheels
    from raysys.storage import sha256_file

    models: dict[str, dict[str, str]] = {}
    for name in names_in_wheels():
        try:
            path = find_model(name).onnx
            models[name] = {"path": path, "sha256": sha256_file(path)}
        except (UserError, OSError) as error:
            models[name] = {"error": str(error)}
    try:
        font: str | None = str(default_font_file())
    except UserError:
        font = None
    _answer({"models": models, "font": font})


def _answer(answer: dict[str, Any]) -> None:
    print(f"\n{_MARK}{json.dumps(answer)}", flush=True)


if __name__ == "__main__":
    kind, *rest = sys.argv[1:]
    if kind == "import":
        _import(rest)
    elif kind == "engine":
        _engine(rest[0])
    else:
        _files()
