"""A sweep of eight short trials against the same eight runs of ``raysys train`` and ``raysys evaluate``, one by one.

2,000 embedded scenes are drawn and annotated once, 400 more are asked about, clean and with a wrong word. Eight points (policy none and paper, two
augmentation factors, two learning rates) train test_resnet-64 for 300 steps of 64. The sweep runs with the words that a user would give, rehearsal
included: trials of one worker, as many at a time as there is room for; the runs one by one have two workers each, so that both cores are theirs too.
Wall time from the command to its end. Goal: at most .8 of the runs' time, a ratio of 1.25.

    python tools/bench_sweep.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
from benchmark import Row, finish

from raysys.corpus import scenes

SCENES, STEPS = 2_000, 300
SPACE = {"policy": ["none", "paper"], "augment.factor": [1, 0], "optim.lr": [1e-3, 3e-3]}


def raysys(*words: str) -> float:
    """Seconds of the command."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "raysys", *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - began


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for path, first, count in scenes.shard_plan(str(scratch / "train"), num_samples=SCENES, samples_per_shard=500):
            scenes.write_shard(str(path), first, count, seed=0, text_share=0.5)
        scenes.write_evaluation_sets(str(scratch), seed=0)
        (scratch / "templates.txt").write_text("a photo of a {}\na {}\n")
        of_classes = [f"classes={scratch}/classes.json", f"templates={scratch}/templates.txt"]
        clean = [f"imagenet.{word}" for word in (f"path={scratch}/val", *of_classes)]
        raysys("annotate", f"corpus.path={scratch}/train", "ocr=scenes", f"output={scratch}/A")
        raysys(
            "attack",
            *clean[:2],
            "attack.classes=random",
            "attack.font_px=20",
            "attack.x_px=8",
            "attack.y_px=46",
            f"output={scratch}/O",
        )
        questions = ["evaluators=[imagenet,imagenet_attr,retrieval]", *clean, f"retrieval.path={scratch}/retrieval-00000.tar"]
        questions += [f"imagenet_attr.{word}" for word in (f"path={scratch}/O", *of_classes)]
        recipe = [
            f"corpus.path={scratch}/train",
            f"annotations={scratch}/A",
            "model=test_resnet-64",
            "global_batch=64",
            "augment=scenes",
        ]
        recipe += [f"train.steps={STEPS}", "train.decode_threads=1", "optim.grad_clip_norm=1.0"]
        space = scratch / "space.yaml"
        space.write_text("".join(f"{key}: {values}\n" for key, values in SPACE.items()))
        sweep_s = raysys("sweep", f"space={space}", *recipe, *questions, f"output={scratch}/W")
        print(f"sweep: {sweep_s:.0f} s", flush=True)
        one_by_one_s = 0.0
        for trial in pq.read_table(scratch / "W" / "results.parquet").to_pylist():
            assert trial["status"] == "finished", trial
            run = scratch / trial["trial"]
            point = [f"{key}={trial[key]}" for key in SPACE]
            spent = (
                raysys("train", *recipe, *point, "num_workers=2", f"output={run}"),
                raysys("evaluate", f"model={run}", *questions, f"output={run}-E"),
            )
            one_by_one_s += sum(spent)
            print(f"{trial['trial']}: train {spent[0]:.0f} s, evaluate {spent[1]:.0f} s", flush=True)
    finish([Row("sweep of 8 trials, one by one / sweep", sweep_s, one_by_one_s, one_by_one_s / sweep_s, 1.25, "s")])


if __name__ == "__main__":
    main()
