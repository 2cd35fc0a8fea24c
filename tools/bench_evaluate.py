"""Evaluation speed: ``raysys evaluate`` against CLIP_benchmark's command line, the same models, pictures and prompts.

Both classify the same pictures in CLIP_benchmark's WebDataset layout (20 classes, 2 templates, so that pictures are what takes time), in fp32 with
batches of 64, with the small model test_resnet-64 and three sets of weights. Ours decodes into an empty folder each time; CLIP_benchmark
gets --num_workers as many as there are cores (its default 4 is slower here) and --no_amp. Each command runs with one model on a
few pictures, with one model on all, and with three models on all. Pictures per second of the first model: all pictures / time of the
command, start-up of Python, Ray and workers included; start-up aside: the pictures more / the time more of the second command than of the
first. Of each further model: pictures / half of what the third takes longer than the second. Goals 1.2 and 3. The accuracies of both
must agree, or the tool ends with an error.

    python tools/bench_evaluate.py [--pictures FOLDER]

FOLDER has one folder of pictures a class, ImageNet's WNIDs for example; without it pictures of 500 x 375 px are drawn.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from bench_ingest import members
from benchmark import Row, finish, rate

from raysys.models import load_model, save_open_clip_folder

NUM_PICTURES, NUM_FEW, PER_SHARD, NUM_CLASSES = 4096, 512, 256, 20
DRAWN = 256
"""Different ones; they are repeated."""
MODEL, NUM_MODELS, BATCH = "test_resnet-64", 3, 64
TEMPLATES = ["a photo of a {c}.", "a {c}"]


def pictures_of(folder: Path | None) -> list[bytes]:
    if folder is None:
        return [data for index in range(DRAWN) for name, data in members(index) if name.endswith(".jpg")]
    files = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in (".jpg", ".jpeg"))
    return [path.read_bytes() for path in files]


def write_set(root: Path, pictures: list[bytes], number: int) -> Path:
    """CLIP_benchmark's layout."""
    (root / "test").mkdir(parents=True)
    (root / "classnames.txt").write_text("\n".join(f"thing number {i}" for i in range(NUM_CLASSES)))
    (root / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))
    (root / "test" / "nshards.txt").write_text(str(number // PER_SHARD))
    for shard in range(number // PER_SHARD):
        with tarfile.open(root / "test" / f"{shard}.tar", "w") as tar:
            for index in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
                for kind, data in (("jpg", pictures[index % len(pictures)]), ("cls", str(index % NUM_CLASSES).encode())):
                    member = tarfile.TarInfo(f"{index:06d}.{kind}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return root


def timed(command: list[str], **environment: str) -> float:
    started = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment)
    if done.returncode:
        sys.exit(f"{done.stdout[-4000:]}\n{' '.join(command)} ended with status {done.returncode}")
    return time.monotonic() - started


def ours(data: Path, models: list[Path], scratch: Path) -> tuple[float, float]:
    """Seconds of the command, and the last model's acc1."""
    words = [f"models.m{i}.model=local-dir:{model}" for i, model in enumerate(models)]
    words += ["evaluators=[imagenet]", f"imagenet.path={data}", f"output={scratch / 'E'}", f"service.cache_dir={scratch / 'cache'}"]
    spent = timed([sys.executable, "-m", "raysys", "evaluate", *words, f"service.batch_size={BATCH}"])
    result = json.loads((scratch / "E" / "results" / f"imagenet_m{len(models) - 1}.json").read_text())
    return spent, result["metrics"]["acc1"]


def clip_benchmark(data: Path, models: list[Path], scratch: Path) -> tuple[float, float]:
    """As :func:`ours`."""
    words = [
        "eval",
        "--dataset",
        "wds/bench",
        "--dataset_root",
        str(data),
        "--task",
        "zeroshot_classification",
        "--no_amp",
        "--quiet",
    ]
    words += ["--model", *(f"local-dir:{model}" for model in models), "--pretrained", "", "--batch_size", str(BATCH)]
    words += ["--num_workers", str(os.cpu_count()), "--output", str(scratch / "result.json")]
    code = "from clip_benchmark.cli import main; main()"
    spent = timed([sys.executable, "-c", code, *words], HF_HUB_OFFLINE="1")
    return spent, json.loads((scratch / "result.json").read_text())["metrics"]["acc1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path)
    folder = parser.parse_args().pictures
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        pictures = pictures_of(folder)
        few, all_of_them = (write_set(scratch / f"set{n}", pictures, n) for n in (NUM_FEW, NUM_PICTURES))
        models = []
        for i in range(NUM_MODELS):
            loaded = load_model(MODEL, "random")
            models.append(scratch / f"model{i}")
            save_open_clip_folder(str(models[-1]), loaded, state_dict=loaded.model.state_dict(), card="# random\n")
        first, aside, further = {}, {}, {}
        for name, tool in (("ours", ours), ("reference", clip_benchmark)):
            seconds, accuracies = [], []
            for data, some in ((few, models[:1]), (all_of_them, models[:1]), (all_of_them, models)):
                at = Path(tempfile.mkdtemp(dir=scratch))
                spent, accuracy = tool(data, some, at)
                seconds.append(spent)
                accuracies.append(accuracy)
            print(f"{name}: {', '.join(f'{s:.1f} s' for s in seconds)}; acc1 of the last model {accuracies[-1]:.4f}", flush=True)
            if name == "ours":
                expected = accuracies
            elif accuracies != expected:
                sys.exit(f"the accuracies differ: ours {expected}, CLIP_benchmark's {accuracies}")
            first[name] = NUM_PICTURES / seconds[1]
            aside[name] = (NUM_PICTURES - NUM_FEW) / (seconds[1] - seconds[0])
            further[name] = (NUM_MODELS - 1) * NUM_PICTURES / (seconds[2] - seconds[1])
    rows: list[Row] = [
        rate("first model, start-up included", **first, unit="pictures/s"),
        rate("first model, start-up aside", **aside, unit="pictures/s", goal=1.2),
        rate("each further model", **further, unit="pictures/s", goal=3.0),
    ]
    finish(rows)


if __name__ == "__main__":
    main()
