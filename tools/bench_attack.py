"""Building ImageNet-Attr: ``raysys attack`` with two processes against one.

2,000 pictures are attacked by the authors' recipe (``attack=authors``, a random wrong class) and written as JPEG, by one process and by two in
turns, all in one Ray session, after both have drawn some. Pictures per second of the steady state: of the pictures' modification times, between the
first tenth and the last, so that neither start-up counts nor the end, where one process waits for the other. Of five turns the one with the median
ratio counts. Goal 1.6.

    python tools/bench_attack.py [--pictures FOLDER]

FOLDER holds a folder of pictures for each WNID; they stand in the set again and again until it has 2,000. Without it 200 pictures are drawn,
500 x 375 px, as in bench_ingest.py.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import tempfile
from pathlib import Path

import numpy as np
from bench_ingest import photo_like
from benchmark import finish, rate

from raysys.attack.on_ray import attack
from raysys.cluster import ray_session
from raysys.config import AttackConfig, AttackSettings, ClassSetConfig, RayConfig

PICTURES, DRAWN, CLASSES, TURNS = 2_000, 200, 10, 5


def draw_pictures(folder: Path) -> list[Path]:
    """JPEGs in class folders."""
    files = [folder / f"c{i % CLASSES}" / f"{i}.jpg" for i in range(DRAWN)]
    for i, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(photo_like(np.random.default_rng(i)))
    (folder / "classes.json").write_text(json.dumps({f"c{i}": f"class number {i}" for i in range(CLASSES)}))
    return files


def repeat(files: list[Path], folder: Path, count: int) -> Path:
    """``count`` names for the files, in their class folders."""
    for i in range(count):
        file = files[i % len(files)]
        (folder / file.parent.name).mkdir(parents=True, exist_ok=True)
        os.symlink(file.resolve(), folder / file.parent.name / f"{i // len(files)}_{file.name}")
    return folder


def pictures_per_s(pictures: ClassSetConfig, output: Path, count: int, actors: int) -> float:
    cfg = AttackConfig(str(output), pictures, AttackSettings(classes="random"), num_actors=actors)
    with contextlib.redirect_stdout(io.StringIO()):
        attack(cfg)
    written = sorted(file.stat().st_mtime for file in output.glob("*/*"))
    first, last = count // 10, count - count // 10
    return (last - first) / (written[last] - written[first])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", help="folder with a folder of pictures for each WNID")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch_folder:
        scratch = Path(scratch_folder)
        if words.pictures:
            files, classes = sorted(file for file in Path(words.pictures).glob("*/*") if file.is_file()), None
        else:
            files, classes = draw_pictures(scratch / "drawn"), str(scratch / "drawn" / "classes.json")
        few = ClassSetConfig(str(repeat(files, scratch / "few", 256)), classes=classes)
        many = ClassSetConfig(str(repeat(files, scratch / "many", PICTURES)), classes=classes)
        rates: dict[int, list[float]] = {1: [], 2: []}
        with ray_session(RayConfig(num_cpus=2)):
            pictures_per_s(few, scratch / "warm", 256, 2)
            for turn in range(TURNS):
                for actors, found in rates.items():
                    found.append(pictures_per_s(many, scratch / f"{turn}-{actors}", PICTURES, actors))
                    print(f"processes: {actors}, {found[-1]:.0f} pictures/s", flush=True)
    turns = sorted(zip(rates[1], rates[2], strict=True), key=lambda turn: turn[1] / turn[0])
    one, two = turns[TURNS // 2]
    finish([rate("attack, two processes against one", ours=two, reference=one, unit="pictures/s", goal=1.6)])


if __name__ == "__main__":
    main()
