"""What every ``tools/bench_X.py`` shares: rows, the table, and ``outputs/bench/X.json``."""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path


def _machine() -> str:
    cpu = next(
        (line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")),
        "?",
    )
    return f"{os.cpu_count()} x {cpu}, {platform.system()}, Python {platform.python_version()}"


@dataclass
class Row:
    """One comparison. A higher ratio is always the better one."""

    name: str
    ours: float
    reference: float
    ratio: float
    goal: float | None
    unit: str
    command: str = field(default_factory=lambda: f"python tools/{Path(sys.argv[0]).name}")
    machine: str = field(default_factory=_machine)


def rate(name: str, *, ours: float, reference: float, unit: str, goal: float | None = None) -> Row:
    """A rate: more is better."""
    return Row(name, ours, reference, ours / reference, goal, unit)


def finish(rows: list[Row]) -> None:
    """Print the table and write the file that programs read."""
    print(f"\n{'':44}{'ours':>10}{'reference':>12}{'ratio':>8}{'goal':>7}  unit")
    for row in rows:
        print(f"{row.name:44}{row.ours:>10.1f}{row.reference:>12.1f}{row.ratio:>8.2f}{row.goal or '-':>7}  {row.unit}")
    path = Path("outputs/bench") / f"{Path(sys.argv[0]).stem.removeprefix('bench_')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    print(f"\n{rows[0].machine}\nresult: {path}")
