"""Which compiler torch.compile calls, and whether this machine has it. No torch here."""

from __future__ import annotations

import os
import shutil


def find_compiler(device_type: str) -> tuple[str | None, str]:
    """$CXX or g++ for CPUs; Triton calls $CC, gcc or clang for GPUs.

    :param device_type: ``cpu`` or ``cuda``.
    :returns: its file, None where it is not there, and what was looked for.
    """
    said, usual = ("CXX", ["g++"]) if device_type == "cpu" else ("CC", ["gcc", "clang"])
    names = [os.environ[said]] if said in os.environ else usual
    found = next(filter(None, map(shutil.which, names)), None)
    return found, f"{said}={names[0]}" if said in os.environ else " or ".join(names)
