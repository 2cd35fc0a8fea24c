"""A billion samples on one machine: what the drivers, the index and the order cost, with files that stand for 100,000 shards of 10,000 rows.

A few distinct shards are made (tars of 200 MB that are holes, drawn rows of annotations of a real size, their selection) and stand in the corpus 12,500
times each, by hard links, so that every listing, footer and row is read for real, and the disk holds some MB. What is read lies in the
page cache: on an object store each file costs requests besides (tools/plan.py counts them). Each part runs in a process of its own; memory
is its peak beyond what its imports take. References are the goals:

1. ``order``: the order alone, from nothing to the first batch of worker 0, of 64 and of 1: 10 s, 1 GB.
2. ``train``: the driver of ``train selection=S``: list the corpus, match it with the selection, make the index and the order: a minute (Ray's own
   start takes 15 s, and machines that wait cost), 1 GB; and the index as it travels to the workers through Ray's object store: 100 MB.
3. ``worker``: 1 of 64, global batch 32,768: index, order, places and captions of its first window: 10 s, 1 GB. Then steps/s of the order alone, and of
   places and captions from the rows' Parquet, by one thread; no picture is read. A worker's decoder takes at most 5,000 samples/s (README, Limits), 10
   steps/s of 512: the order may take a hundredth of a core of that, places and captions a fifth.
4. ``filter``: ``raysys filter`` over 5 and 20 million rows: rows/s, memory (and that it does not grow with the rows: 1.25 times at most for 4 times as many), and the
   hours that this makes of 1e9. Goal: a working day for 1e9, 1 GB.
5. ``subset``: the sorted subset file of 10 and 50 million different uids (in 4. the shards share theirs): the same.
6. ``annotate``: the driver of ``annotate``: list, look what is done, plan the units, of nothing and of a finished corpus; and the counts at the end,
   from 100,000 footers: a minute each, 1 GB.

    python tools/bench_scale.py [--only order train worker filter subset annotate] [--shards 100000] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from benchmark import Row, finish, rate

from raysys.config import AugmentConfig, CorpusConfig, FilterConfig, LoopConfig, OrderConfig, PolicyConfig, TrainConfig

SHARDS, SHARD_ROWS, SHARD_BYTES = 100_000, 10_000, 200_000_000
DISTINCT = 8
"""Files that are really there; ext4 takes 65,000 links to one."""
WORLD, GLOBAL_BATCH = 64, 32_768
FILTER_SHARDS = (500, 2_000)
UIDS = (10_000_000, 50_000_000)
MAX_MB, INDEX_MB = 1_000.0, 100.0
FIRST_S, DRIVER_S, DAY_S = 10.0, 60.0, 8 * 3600.0
STEPS_PER_S = 10.0
"""Of a worker: its decoder takes 5,000 samples/s at most."""
GROWTH = 1.25
OLD = 1_600_000_000
"""When the shards were written, seconds since 1970."""

Measured = dict[str, float]


# ---- the files ---------------------------------------------------------------------------------------------------------


def shard_rows(seed: int) -> pa.Table:
    """Rows of a shard as ``raysys annotate`` writes them; regions, captions and errors as in bench_policy."""
    from bench_policy import annotations

    from raysys.regions.annotations import SCHEMA

    rng = np.random.default_rng(seed)
    drawn = annotations(SHARD_ROWS, seed)
    number = np.arange(SHARD_ROWS)
    columns: dict[str, Any] = {name: drawn[name] for name in drawn.column_names}
    columns |= {
        "shard": [f"{seed:06d}.tar"] * SHARD_ROWS,
        "index": number,
        "key": [f"{seed:05d}{i:04d}" for i in number.tolist()],
        "uid": [rng.bytes(16).hex() for _ in range(SHARD_ROWS)],
        "offset": number * (SHARD_BYTES // SHARD_ROWS) + 512,
        "size": rng.integers(5_000, SHARD_BYTES // SHARD_ROWS - 3_000, SHARD_ROWS),
        "width": rng.integers(200, 1_000, SHARD_ROWS),
        "height": rng.integers(200, 1_000, SHARD_ROWS),
    }
    return pa.table({field.name: pa.chunked_array([columns[field.name]]) if isinstance(columns[field.name], list) else columns[field.name]
                     for field in SCHEMA}).cast(SCHEMA)  # fmt: skip


def name_of(shard: int) -> str:
    return f"{shard:06d}.tar"


def annotations_folder(folder: Path, corpus: Path) -> Any:
    """A folder of annotations without any shard yet: its :class:`raysys.output.Output`."""
    from raysys.output import open_output

    settings = {
        "corpus": {"path": str(corpus), "sources": {}, "roots": {"": str(corpus)}},
        "ocr": {"store_score": 0.3, "recognize": True},
    }
    return open_output(str(folder), "annotate", settings, not_in_fingerprint=("corpus",))


def link(files: list[Path], folder: Path, suffix: str, shards: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        os.link(files[shard % len(files)], folder / f"{name_of(shard)}{suffix}")


def make_files(scratch: Path, shards: int) -> None:
    """``kinds`` (the distinct shards, their annotations and selection), and by links ``corpus``, ``A``, ``S``; ``A-N`` over N shards."""
    from raysys.corpus.index import SHARDS_SCHEMA, read_shards_table, write_shards_table
    from raysys.output import open_output
    from raysys.policy.select import annotations_sha256, make_selection
    from raysys.regions.annotations import AnnotationFiles, open_annotations
    from raysys.storage import identity

    start = time.perf_counter()
    kinds = scratch / "kinds"
    (kinds / "corpus").mkdir(parents=True)
    few = annotations_folder(kinds / "A", kinds / "corpus")
    files = AnnotationFiles(few.path, few.fingerprint)
    for kind in range(DISTINCT):
        tar = kinds / "corpus" / name_of(kind)
        with tar.open("wb") as file:
            file.truncate(SHARD_BYTES)
        os.utime(tar, (OLD, OLD))  # a shard that is new beside its annotations is compared by its footer
        files.write_shard(name_of(kind), shard_rows(kind), made_of=identity(str(tar)), damaged="")
    few.finish({"shards": DISTINCT, "samples": DISTINCT * SHARD_ROWS})
    make_selection(open_annotations(few.path), PolicyConfig(), str(kinds / "S"))

    tars, rows, verdicts = (sorted((kinds / name).iterdir()) for name in ("corpus", "A/shards", "S/selection"))
    link(tars, scratch / "corpus", "", shards)
    for number, name in [(shards, "A"), *((number, f"A-{number}") for number in FILTER_SHARDS)]:
        folder = annotations_folder(scratch / name, scratch / "corpus")
        link(rows, scratch / name / "shards", ".parquet", number)
        folder.finish({"shards": number, "samples": number * SHARD_ROWS})
    annotations = open_annotations(str(scratch / "A"))
    settings = {"annotations": annotations.path, "policy": {}, "annotations_fingerprint": annotations.fingerprint}
    selection = open_output(str(scratch / "S"), "filter", settings)
    link(verdicts, scratch / "S" / "selection", ".parquet", shards)
    one_each = read_shards_table(str(kinds / "S"))
    table = (
        one_each.take(np.arange(shards) % DISTINCT).set_column(0, "name", pa.array(map(name_of, range(shards)))).cast(SHARDS_SCHEMA)
    )
    write_shards_table(selection.path, table, tmp_folder=selection.join("_tmp"))
    selection.finish({"samples": shards * SHARD_ROWS, "kept": int(np.sum(table["kept"])), "reasons": {}},
                     annotations_sha256=annotations_sha256(annotations))  # fmt: skip
    per_row = [sum(file.stat().st_size for file in files) / DISTINCT / SHARD_ROWS for files in (rows, verdicts)]
    print(
        f"{shards:,} shards linked in {time.perf_counter() - start:.0f} s; annotations {per_row[0]:.0f}, selection {per_row[1]:.1f} bytes a row"
    )


def train_config(scratch: Path) -> TrainConfig:
    return TrainConfig(output=str(scratch / "R"), corpus=CorpusConfig(str(scratch / "corpus")), selection=str(scratch / "S"),
                       global_batch=GLOBAL_BATCH, train=LoopConfig(steps=10**6))  # fmt: skip


# ---- what is measured, each in a process of its own --------------------------------------------------------------------


def peak_mb() -> float:
    """Of this process. Not getrusage: its maximum outlives exec, so it would be that of the parent."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


class Watch:
    """Seconds since the last question, and memory beyond what was there at the start."""

    def __init__(self) -> None:
        self._imports_mb, self._last = peak_mb(), time.perf_counter()

    def seconds(self) -> float:
        now = time.perf_counter()
        spent, self._last = now - self._last, now
        return spent

    def mb(self) -> float:
        return peak_mb() - self._imports_mb


def order(scratch: Path, shards: int, world_size: int) -> Measured:
    from raysys.corpus.order import Order

    watch, cfg = Watch(), OrderConfig()
    made = Order(
        np.full(shards, SHARD_ROWS),
        np.full(shards, SHARD_BYTES),
        global_batch=GLOBAL_BATCH,
        lanes=cfg.lanes,
        block_bytes=cfg.block_mb * 1e6,
        window_bytes=cfg.window_mb * 1e6,
        seed=0,
        factor=AugmentConfig().factor,
    )
    samples, _ = made.batch(0, 0, world_size)
    assert len(np.unique(samples)) == GLOBAL_BATCH // world_size
    return {"s": watch.seconds(), "mb": watch.mb()}


def train_driver(scratch: Path, shards: int, _: int) -> Measured:
    from raysys.training.samples import check_evidence, choose_samples, order_of

    cfg, watch = train_config(scratch), Watch()
    check_evidence(cfg)
    index = choose_samples(cfg, cfg.output)
    choose_s = watch.seconds()
    order_of(cfg, index)
    measured = {"choose_s": choose_s, "order_s": watch.seconds(), "mb": watch.mb()}
    assert len(index.names) == shards
    travels = pickle.dumps(index, protocol=5)
    (scratch / "index.pickle").write_bytes(travels)
    return measured | {"index_mb": len(travels) / 1e6, "rows": index.num_samples_before, "kept": len(index)}


def worker(scratch: Path, shards: int, _: int) -> Measured:
    from raysys.corpus.index import BlockReader
    from raysys.training.samples import order_of

    watch = Watch()
    index = pickle.loads((scratch / "index.pickle").read_bytes())
    made = order_of(train_config(scratch), index)
    [part] = made.parts(0, WORLD)
    reader = BlockReader(index)

    def read(window: int) -> tuple[int, int]:
        samples = np.sort(part.window(0, window))
        spans = reader.ranges(samples)
        return sum(len(reader.places(*span)) for span in spans), len(spans)

    read(0)
    measured = {"first_s": watch.seconds()}
    for step in range(1, 1_001):
        made.batch(step, 0, WORLD)
    measured["order_steps_per_s"] = 1_000 / watch.seconds()
    windows = [read(window) for window in range(1, 101)]
    rows, blocks = (sum(found) for found in zip(*windows, strict=True))
    spent_s = watch.seconds()
    return measured | {"rows_per_s": rows / spent_s, "steps_per_s": rows / spent_s / part.slots, "blocks": blocks, "mb": watch.mb()}


def filter_driver(scratch: Path, shards: int, number: int) -> Measured:
    from raysys.policy.select import filter_annotations

    watch = Watch()
    output = str(scratch / f"S-{number}")
    filter_annotations(FilterConfig(output=output, annotations=str(scratch / f"A-{number}")))
    return {"rows_per_s": number * SHARD_ROWS / watch.seconds(), "mb": watch.mb()}


def subset(scratch: Path, shards: int, number: int) -> Measured:
    from raysys.policy.subset import UID, SortedUids

    rng, watch = np.random.default_rng(0), Watch()
    with SortedUids(str(scratch / "subset-parts")) as uids:
        for _ in range(number // SHARD_ROWS):
            uids.add(rng.integers(0, 1 << 64, (SHARD_ROWS, 2), np.uint64).view(UID)[:, 0])
        uids.write(str(scratch / "subset.npy"), tmp_folder=str(scratch / "_tmp"))
    spent_s, mb = watch.seconds(), watch.mb()
    assert len(np.load(scratch / "subset.npy", mmap_mode="r")) == number
    (scratch / "subset.npy").unlink()
    return {"rows_per_s": number / spent_s, "mb": mb}


def annotate_driver(scratch: Path, shards: int, _: int) -> Measured:
    from raysys.config import OcrConfig
    from raysys.corpus.shards import open_corpus
    from raysys.regions.annotations import AnnotationFiles
    from raysys.regions.on_ray import Done, counts_of, shards_to_do
    from raysys.regions.units import large_shards, plan_units, unit_bytes

    watch = Watch()
    corpus = open_corpus(CorpusConfig(str(scratch / "corpus")))
    measured = {"list_s": watch.seconds()}
    new = annotations_folder(scratch / "A-new", scratch / "corpus")
    todo, _changed = shards_to_do(corpus, new)
    assert len(todo) == shards
    limit = unit_bytes(todo, actors=1_000, unit_mb=OcrConfig().unit_mb)
    assert not large_shards(todo, limit)
    units = sum(1 for unit in plan_units(todo, {}, AnnotationFiles(new.path, new.fingerprint), limit) if unit.to_json())
    measured |= {"plan_s": watch.seconds(), "units": units, "plan_mb": watch.mb()}
    old = annotations_folder(scratch / "A", scratch / "corpus")
    todo, _changed = shards_to_do(corpus, old)
    assert not todo
    measured |= {"again_s": watch.seconds()}
    counts = counts_of(AnnotationFiles(old.path, old.fingerprint), Done())
    assert counts["samples"] == shards * SHARD_ROWS
    return measured | {"counts_s": watch.seconds(), "mb": watch.mb()}


PARTS: dict[str, tuple[Callable[[Path, int, int], Measured], tuple[int, ...]]] = {
    "order": (order, (64, 1)),
    "train": (train_driver, (0,)),
    "worker": (worker, (0,)),
    "filter": (filter_driver, FILTER_SHARDS),
    "subset": (subset, UIDS),
    "annotate": (annotate_driver, (0,)),
}


# ---- all ---------------------------------------------------------------------------------------------------------------


def less(name: str, measured: float, most: float, unit: str) -> Row:
    return Row(name, measured, most, most / max(measured, 0.01), 1.0, f"{unit}, less is better")


def rows_of(part: str, found: dict[int, Measured]) -> list[Row]:
    """The comparisons of a part, from what its processes measured at each size."""
    one = next(iter(found.values()))
    if part == "order":
        return [row for world_size, m in found.items() for row in (
            less(f"order of 1e9, first batch, 1 of {world_size}", m["s"], FIRST_S, "s"),
            less(f"order of 1e9, memory, 1 of {world_size}", m["mb"], MAX_MB, "MB"),
        )]  # fmt: skip
    if part == "train":
        return [
            less("train driver, 1e9 rows: list, match, order", one["choose_s"] + one["order_s"], DRIVER_S, "s"),
            less("train driver: memory", one["mb"], MAX_MB, "MB"),
            less("the index on its way to workers", one["index_mb"], INDEX_MB, "MB"),
        ]
    if part == "worker":
        return [
            less(f"worker 1 of {WORLD}: places of the first window", one["first_s"], FIRST_S, "s"),
            rate("worker: order alone", ours=one["order_steps_per_s"], reference=100 * STEPS_PER_S, unit="steps/s", goal=1.0),
            rate(
                "worker: places and captions, 1 thread",
                ours=one["steps_per_s"],
                reference=5 * STEPS_PER_S,
                unit="steps/s",
                goal=1.0,
            ),
            less("worker: memory", one["mb"], MAX_MB, "MB"),
        ]
    if part == "annotate":
        return [
            less("annotate driver: list 100,000 shards", one["list_s"], DRIVER_S, "s"),
            less("annotate driver: plan, nothing done", one["plan_s"], DRIVER_S, "s"),
            less("annotate driver: plan, all done", one["again_s"], DRIVER_S, "s"),
            less("annotate driver: counts of 100,000 footers", one["counts_s"], DRIVER_S, "s"),
            less("annotate driver: memory", one["mb"], MAX_MB, "MB"),
        ]
    few, many = found.values()
    size = max(found)
    rows = f"{size * (SHARD_ROWS if part == 'filter' else 1) / 1e6:.0f}M"
    unit = "rows/s" if part == "filter" else "uids/s"
    print(f"{part}: 1e9 rows take {1e9 / many['rows_per_s'] / 3600:.2f} h at that rate", flush=True)
    return [
        rate(f"{part}, {rows} rows", ours=many["rows_per_s"], reference=1e9 / DAY_S, unit=unit, goal=1.0),
        less(f"{part}, {rows} rows: memory", many["mb"], MAX_MB, "MB"),
        less(f"{part}: memory of {rows} / of {size // min(found)} times fewer", many["mb"] / few["mb"], GROWTH, "times"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shards", type=int, default=SHARDS)
    parser.add_argument("--folder", help="where the files are made, and removed at the end; default: the system's temporary folder")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.shards < max(FILTER_SHARDS):
        parser.error(f"--shards={words.shards}: give {max(FILTER_SHARDS)} or more")
    if words.part:
        part, size = words.part
        print("\n" + json.dumps(PARTS[part][0](Path(words.folder), words.shards, int(size))))
        return
    if "worker" in words.only and "train" not in words.only:
        words.only.insert(0, "train")  # makes the index
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=words.folder) as folder:
        make_files(Path(folder), words.shards)
        for part in PARTS:
            if part not in words.only:
                continue
            found: dict[int, Measured] = {}
            for size in PARTS[part][1]:
                command = [sys.executable, __file__, "--folder", folder, "--shards", str(words.shards), "--part", part, str(size)]
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
                found[size] = json.loads(out)
                print(part, size or "", {name: round(value, 2) for name, value in found[size].items()}, flush=True)
            rows += rows_of(part, found)
    finish(rows)


if __name__ == "__main__":
    main()
