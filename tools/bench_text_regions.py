"""Quality and price of "has a text region": the presets of conf/ocr and their rivals, on real pictures.

    python tools/bench_text_regions.py --data FOLDER [--only default,fast] [--engine openvino]

FOLDER holds ``imagenet/val/WNID/*.JPEG``, ``flickr8k/*.tar`` and ``icdar2015/{images,gt}``; without it the tool says so and ends well.
ICDAR pictures have text where a word of the ground truth is readable. tools/text_labels.csv has the labels of 569 photographs (249 of
ImageNet, 320 of Flickr8k at 224 px), each given by two who looked at it alone: ``text``; ``tiny`` (all of it under 2 % of the long
side); ``doubtful`` (one could not read two letters, or the two did not agree; counted nowhere); ``none``. A picture has text where the
default policy counts a region. CPU time is the process's, decode to verdict, one thread, second of two passes over 40 pictures for warmth.
"""

from __future__ import annotations

import argparse
import csv
import json
import tarfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from raysys.config import LookConfig, OcrConfig, PolicyConfig, config_dir
from raysys.regions.annotator import Annotator, Look, letters

V4, V5, V6T, V6S = "PP-OCRv4_mobile_det", "PP-OCRv5_mobile_det", "PP-OCRv6_tiny_det", "PP-OCRv6_small_det"
WARM_UP = 20


@dataclass
class Labelled:
    group: str
    """``icdar``, ``imagenet``, ``flickr8k``"""
    label: str
    data: bytes


def pictures(data: Path) -> list[Labelled]:
    found = []
    for truth in sorted((data / "icdar2015" / "gt").glob("*.txt")):
        words = [line.split(",", 8)[8] for line in truth.read_text("utf-8-sig").splitlines() if line.strip()]
        image = data / "icdar2015" / "images" / f"{truth.stem.removeprefix('gt_')}.jpg"
        found.append(Labelled("icdar", "text" if any(word != "###" for word in words) else "doubtful", image.read_bytes()))
    with (Path(__file__).parent / "text_labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    photos = {path.name: path for path in (data / "imagenet" / "val").glob("*/*.JPEG")}
    by_tar: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        if row["set"] == "imagenet":
            found.append(Labelled("imagenet", row["label"], photos[row["file"]].read_bytes()))
        else:
            by_tar[row["file"].partition("/")[0]].append(row)
    for name, members in by_tar.items():
        with tarfile.open(data / "flickr8k" / name) as tar:
            for row in members:
                content = tar.extractfile(row["file"].partition("/")[2]).read()  # type: ignore[union-attr]
                found.append(Labelled("flickr8k", row["label"], content))
    return found


def settings() -> dict[str, OcrConfig]:
    """The presets, and what they were chosen from."""
    named = {}
    for name in ("fast", "default", "thorough"):
        chosen = yaml.safe_load(Path(config_dir(), "ocr", f"{name}.yaml").read_text())
        looks = [LookConfig(**look) for look in chosen.get("looks", [])]
        named[name] = OcrConfig(looks=looks) if looks else OcrConfig()
    for short, detector in (("v4", V4), ("v5", V5), ("v6 tiny", V6T), ("v6 small", V6S)):
        for enlarge in (1.0, 2.0):
            named[f"{short} x{enlarge:.0f}"] = OcrConfig(looks=[LookConfig(detector, enlarge, 960)])
    named["v4 x1, v4 rec"] = OcrConfig(looks=[LookConfig(V4, 1.0, 960)], recognizer="PP-OCRv4_mobile_rec")
    named["v4 x2, v6 tiny rec"] = OcrConfig(looks=[LookConfig(V4, 2.0, 960)], recognizer="PP-OCRv6_tiny_rec")
    named["v4 x3 to 1280"] = OcrConfig(looks=[LookConfig(V4, 3.0, 1280)])
    named["v6 tiny x1, v4 x2 to 800"] = OcrConfig(looks=[LookConfig(V6T), LookConfig(V4, 2.0, 800)])
    named["v6 tiny x2, v4 x4"] = OcrConfig(looks=[LookConfig(V6T, 2.0), LookConfig(V4, 4.0)])
    named["default, v4 x3 to 1280"] = OcrConfig(looks=[LookConfig(V6T), LookConfig(V4, 2.0), LookConfig(V4, 3.0, 1280)])
    return named


def has_text(look: Look, policy: PolicyConfig) -> bool:
    return any(
        float(r["score"]) >= policy.min_score  # type: ignore[arg-type]
        and float(r["text_score"]) >= policy.min_text_score  # type: ignore[arg-type]
        and letters(str(r["text"])) >= policy.min_text_chars
        for r in look.regions
    )


def measure(ocr: OcrConfig, labelled: list[Labelled]) -> dict[str, float]:
    annotator, policy = Annotator(ocr), PolicyConfig()
    for picture in labelled[:WARM_UP]:
        annotator.look(picture.data)
    verdicts: dict[tuple[str, str], list[bool]] = defaultdict(list)
    spent: dict[str, list[float]] = defaultdict(list)
    for picture in labelled:
        start = time.process_time()
        look = annotator.look(picture.data)
        spent[picture.group].append(time.process_time() - start)
        verdicts[picture.group, picture.label].append(has_text(look, policy))

    def share(*keys: tuple[str, str]) -> float:
        return float(np.mean([verdict for key in keys for verdict in verdicts[key]]))

    hits = sum(sum(v) for (_, label), v in verdicts.items() if label in ("text", "tiny"))
    false = sum(sum(v) for (_, label), v in verdicts.items() if label == "none")
    return {
        "icdar recall": share(("icdar", "text")),
        "imagenet recall": share(("imagenet", "text"), ("imagenet", "tiny")),
        "of it tiny": share(("imagenet", "tiny")),
        "flickr recall": share(("flickr8k", "text"), ("flickr8k", "tiny")),
        "false positives": share(("imagenet", "none"), ("flickr8k", "none")),
        "precision": hits / max(hits + false, 1),
        "ms imagenet": 1000 * float(np.mean(spent["imagenet"])),
        "ms icdar": 1000 * float(np.mean(spent["icdar"])),
        "ms flickr": 1000 * float(np.mean(spent["flickr8k"])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--only", help="comma-separated names of rows", default="fast,default,thorough")
    parser.add_argument("--engine", default="onnx")
    parser.add_argument("--precision", default="fp32")
    words = parser.parse_args()
    if not (words.data / "icdar2015").is_dir():
        print(f"skipped: no pictures in {words.data}; say where with --data FOLDER (see --help)")
        return
    named = settings()
    only = list(named) if words.only == "all" else words.only.split(",")
    labelled = pictures(words.data)
    counts = defaultdict(int)
    for picture in labelled:
        counts[f"{picture.group} {picture.label}"] += 1
    print(", ".join(f"{number} {name}" for name, number in sorted(counts.items())))
    table = {}
    for name in only:
        ocr = named[name]
        ocr.engine, ocr.precision = words.engine, words.precision
        table[name] = row = measure(ocr, labelled)
        if len(table) == 1:
            print(f"\n{'':26}" + "".join(f"{key:>16}" for key in row))
        print(
            f"{name:26}" + "".join(f"{value:16.0f}" if key.startswith("ms") else f"{value:16.3f}" for key, value in row.items()),
            flush=True,
        )
    path = Path("outputs/bench/text_regions.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=2) + "\n")
    print(f"\nresult: {path}")


if __name__ == "__main__":
    main()
