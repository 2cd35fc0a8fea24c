"""Speed of the look against PaddleOCR and RapidOCR, and of ``raysys annotate`` against bare processes.

1. From the bytes of a JPEG to regions that are read, pictures per CPU second on one thread: raysys on ONNX Runtime and on OpenVINO
   (fp32, bf16) against PaddleOCR's own ``predict`` on both its backends: the same PP-OCRv4 networks, the same long side (960 px, never
   enlarged), thresholds and pictures. Every engine sees all pictures twice in turns of 20; the second pass counts.
2. The same, detector alone.
3. ``raysys annotate`` with two actors on two CPUs against two bare processes that loop over the same Annotator: samples per second in the
   steady state, which is from the second shard of each to the last.

    python tools/bench_annotate.py [--pictures FOLDER] [--soak 20000]

Without FOLDER the pictures are embedded scenes at 448 px. ``--soak N`` looks at N pictures in one process and prints its memory.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
from benchmark import Row, finish, rate
from PIL import Image

from raysys.config import LookConfig, OcrConfig
from raysys.corpus.scenes import draw_scene, write_corpus
from raysys.regions.annotator import Annotator
from raysys.regions.models import find_model, paddle_folder
from raysys.regions.units import look_at_shard

TURN = 20
SIDE_PX = 960
DET, REC = "PP-OCRv4_mobile_det", "PP-OCRv4_mobile_rec"
Look = Callable[[bytes], object]


def scenes(number: int, side_px: int) -> list[bytes]:
    found = []
    for index in range(number):
        buffer = io.BytesIO()
        Image.fromarray(draw_scene(0, index).image).resize((side_px, side_px), Image.Resampling.BICUBIC).save(
            buffer, "JPEG", quality=90
        )
        found.append(buffer.getvalue())
    return found


def raysys(recognize: bool, **engine: Any) -> Look:
    look = LookConfig(DET, enlarge=1.0, max_side_px=SIDE_PX)
    return Annotator(OcrConfig(looks=[look], recognizer=REC, recognize=recognize, **engine)).look


def stock_folder(name: str, static: bool) -> str:
    """The network with PaddleOCR's own recipe: lines padded to 320 px."""
    source = Path(paddle_folder(find_model(name), None, static=static))
    folder = Path(tempfile.mkdtemp(prefix="raysys-bench-"))
    for file in source.iterdir():
        if file.name == "inference.yml":
            (folder / file.name).write_text(file.read_text().replace("- 48\n      - 48", "- 48\n      - 320"))
        elif not file.name.startswith("."):
            (folder / file.name).symlink_to(file.resolve())
    return str(folder)


def paddleocr(recognize: bool, backend: str) -> Look:
    """PaddleOCR 3.7: its pipeline, or its detector alone, as its documentation calls them."""
    from paddleocr import PaddleOCR, TextDetection

    static = backend == "paddle_static"
    options: dict[str, Any] = {
        "device": "cpu",
        "engine": backend,
        "engine_config": {"cpu_threads": 1} if static else {"intra_op_num_threads": 1},
    }
    engine: Any
    if recognize:
        engine = PaddleOCR(
            text_detection_model_name=DET,
            text_detection_model_dir=stock_folder(DET, static),
            text_recognition_model_name=REC,
            text_recognition_model_dir=stock_folder(REC, static),
            use_doc_orientation_classify=False,
            use_doc_unwarping=False,
            use_textline_orientation=False,
            text_det_limit_side_len=SIDE_PX,
            text_det_limit_type="max",
            text_det_thresh=0.3,
            text_det_box_thresh=0.3,
            text_det_unclip_ratio=1.5,
            text_rec_score_thresh=0.0,
            **options,
        )
    else:
        engine = TextDetection(
            model_name=DET,
            model_dir=stock_folder(DET, static),
            limit_side_len=SIDE_PX,
            limit_type="max",
            thresh=0.3,
            box_thresh=0.3,
            unclip_ratio=1.5,
            **options,
        )
    return lambda data: list(engine.predict(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)))


def per_cpu_second(looks: dict[str, Look], pictures: list[bytes]) -> dict[str, float]:
    spent = dict.fromkeys(looks, 0.0)
    for counted, first in itertools.product((False, True), range(0, len(pictures), TURN)):
        for name, look in looks.items():
            start = time.process_time()
            for picture in pictures[first : first + TURN]:
                look(picture)
            spent[name] += (time.process_time() - start) * counted
    return {name: len(pictures) / seconds for name, seconds in spent.items()}


def against_paddleocr(pictures: list[bytes]) -> list[Row]:
    rows = []
    for recognize, what in ((True, "JPEG to read regions"), (False, "JPEG to boxes")):
        ours = {
            "onnx": raysys(recognize, engine="onnx"),
            "openvino fp32": raysys(recognize, engine="openvino"),
            "openvino bf16": raysys(recognize, engine="openvino", precision="bf16"),
        }
        theirs = {
            "PaddleOCR, onnxruntime": paddleocr(recognize, "onnxruntime"),
            "PaddleOCR, paddle 3.2.2": paddleocr(recognize, "paddle_static"),
        }
        rates = per_cpu_second({**ours, **theirs}, pictures)
        for mine, other in itertools.product(ours, theirs):
            rows.append(
                rate(f"{what}: {mine} / {other}", ours=rates[mine], reference=rates[other], unit="pictures/CPU s", goal=2.0)
            )
    return rows


# ---- the verb ----------------------------------------------------------------------------------------------------------


def steady(times: list[list[tuple[float, int]]]) -> float:
    """Samples per second of all workers together: what each finished after its first shard, from the first of these starts on."""
    begin = max(worker[0][0] for worker in times)
    end = min(worker[-1][0] for worker in times)
    done = sum(samples for worker in times for when, samples in worker if begin < when <= end)
    return done / (end - begin)


def bare(shards: list[Path]) -> Iterator[tuple[float, int]]:
    annotator = Annotator(OcrConfig())
    for shard in shards:
        table, _, _ = look_at_shard(str(shard), shard.name, None, annotator)
        yield time.time(), table.num_rows


def annotate_against_bare_processes() -> Row:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        corpus, out = Path(scratch, "corpus"), Path(scratch, "annotations")
        write_corpus(corpus, seed=0, num_samples=3200, samples_per_shard=100)
        shards = sorted(corpus.glob("*.tar"))
        for_each = [shards[0::2], shards[1::2]]
        command = [sys.executable, __file__, "--bare"]
        loops = [
            subprocess.Popen([*command, *map(str, mine)], env=environment, stdout=subprocess.PIPE, text=True) for mine in for_each
        ]
        reference = []
        for loop in loops:
            printed, _ = loop.communicate()
            reference.append([(float(when), int(samples)) for when, samples in map(str.split, printed.splitlines())])
        words = ["annotate", f"corpus.path={corpus}", f"output={out}", "ocr.num_actors=2"]
        subprocess.run([sys.executable, "-m", "raysys", *words], env=environment, check=True, stdout=subprocess.DEVNULL)
        finished = sorted(file.stat().st_mtime for file in (out / "shards").iterdir())
    # Who did which shard is not written down; two actors that take turns are close enough for a rate.
    ours = [[(when, 100) for when in finished[first::2]] for first in (0, 1)]
    return rate(
        "raysys annotate, 2 actors / 2 bare processes", ours=steady(ours), reference=steady(reference), unit="samples/s", goal=0.9
    )


def soak(number: int, pictures: list[bytes]) -> None:
    """Memory of one annotator that never stops."""
    annotator, process = Annotator(OcrConfig()), psutil.Process()
    endless = ((None, data) for data in itertools.islice(itertools.cycle(pictures), number))
    early = 0
    for done, _ in enumerate(annotator.look_all(endless), start=1):
        if done == 1000:
            early = process.memory_info().rss
        if done % 1000 == 0:
            now = process.memory_info().rss
            print(f"{done} pictures: {now >> 20} MiB, {now / early:.3f} of that after 1,000", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, help="folder of JPEGs (searched to the bottom)")
    parser.add_argument("--soak", type=int, default=0)
    parser.add_argument("--bare", nargs="*", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.bare is not None:
        for when, samples in bare([Path(shard) for shard in words.bare]):
            print(when, samples, flush=True)
        return
    files = sorted(p for p in words.pictures.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg")) if words.pictures else []
    if words.soak:
        soak(words.soak, [file.read_bytes() for file in files] or scenes(500, 448))
        return
    pictures = [file.read_bytes() for file in files[:: max(1, len(files) // 100)]] or scenes(100, 448)
    finish([annotate_against_bare_processes(), *against_paddleocr(pictures)])


if __name__ == "__main__":
    main()
