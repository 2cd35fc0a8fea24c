"""Training input: how fast, how many bytes, how long a step waits for it (and a billion samples: bench_scale.py).

1. ``ingest``: samples per second from tars on disk (in the page cache) to batches of 256 in the main process, which only takes them: raysys's
   BatchReader with decode threads in one process against open_clip's own pipeline (``open_clip_train.data.get_wds_dataset`` on webdataset,
   ``image_transform(224, is_train=True)``) with as many worker processes. Both read the same shards, decode, crop .9 to 1 of the picture to
   224 px, shuffle and tokenise, on the same cores: one for each thread or worker. The reference gives normalised float32; ours gives uint8, which the
   training step normalises on its device (part of the design), so one row has ours normalise on the CPU too. open_clip's shuffle buffer
   holds its initial 1,000 samples from the start (it would fill up to 5,000, reading twice as fast as it gives). The first batches do not count.
   Then 10 s in turns; medians of three.
2. ``bytes``: bytes of the pictures / bytes read from the tars for one pass over all samples, all workers together, with all samples kept and
   with a random half. Goals: 1.2 and 2.2 bytes read for each byte used.
3. ``training``: a short ``raysys train`` on CPUs; the share of the time in which its steps do not wait for data.

    python tools/bench_ingest.py [--only ingest bytes training] [--data 'GLOB']

GLOB names WebDataset tars. Without it 2,000 pictures of 500 x 375 px are drawn (noise with a spectrum of photographs, 50 KB each, tars
as img2dataset writes them), and stand in the corpus ten times.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import logging
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from benchmark import Row, finish, rate

from raysys.config import CorpusConfig, LoopConfig, TrainConfig
from raysys.corpus.index import BlockReader, SampleIndex
from raysys.corpus.order import Order, Places
from raysys.training.metrics import read_metrics

if TYPE_CHECKING:  # --help needs no torch
    import torch

    Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]

WIDTH_PX, HEIGHT_PX = 500, 375
PICTURES, PER_SHARD, TIMES = 2_000, 500, 10
WORDS = "a the of in on with and two red blue white old man woman child dog horse street river snow playing".split()  # noqa: SIM905

BATCH, SIDE_PX = 256, 224
SKIP, TIMED_S, TURNS = 4, 10.0, 3
MODEL = "ViT-B-32"
"""Whose tokenizer and normalisation both take."""


# ---- pictures ----------------------------------------------------------------------------------------------------------


def photo_like(rng: np.random.Generator) -> bytes:
    """JPEG of noise whose amplitude falls with the frequency, as in photographs, with weak colours and some grain."""
    picture = np.full((HEIGHT_PX, WIDTH_PX, 3), 128, dtype=np.float32)
    for octave in range(1, 8):
        shape = (3 * 2**octave // 4 + 1, 2**octave + 1)
        grey, colour = rng.standard_normal((*shape, 1), np.float32), rng.standard_normal((*shape, 3), np.float32)
        picture += cv2.resize((grey + 0.3 * colour) * 90 / 2**octave, (WIDTH_PX, HEIGHT_PX), interpolation=cv2.INTER_CUBIC)
    picture += 7 * rng.standard_normal((HEIGHT_PX, WIDTH_PX, 1), np.float32)
    return cv2.imencode(".jpg", picture.clip(0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 88])[1].tobytes()


def members(number: int) -> list[tuple[str, bytes]]:
    """Files of a sample as img2dataset writes them."""
    rng = np.random.default_rng(number)
    picture, caption, key = photo_like(rng), " ".join(rng.choice(WORDS, rng.integers(8, 13))), f"{number:09d}"
    info = {
        "caption": caption,
        "url": f"https://pictures.example/{key}/{rng.integers(1 << 62):x}.jpg",
        "key": key,
        "status": "success",
    }
    info |= {
        "error_message": None,
        "width": WIDTH_PX,
        "height": HEIGHT_PX,
        "original_width": WIDTH_PX,
        "original_height": HEIGHT_PX,
    }
    info |= {"exif": "{}", "sha256": rng.bytes(32).hex()}
    return [(f"{key}.jpg", picture), (f"{key}.txt", caption.encode()), (f"{key}.json", json.dumps(info, indent=4).encode())]


def draw_corpus(folder: Path) -> None:
    folder.mkdir()
    with ThreadPoolExecutor() as pool:
        for shard in range(PICTURES // PER_SHARD):
            path = folder / f"{shard:05d}.tar"
            with tarfile.open(path, "w") as tar:
                for files in pool.map(members, range(shard * PER_SHARD, (shard + 1) * PER_SHARD)):
                    for name, data in files:
                        member = tarfile.TarInfo(name)
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
            for again in range(1, TIMES):
                os.link(path, folder / f"{again * PICTURES // PER_SHARD + shard:05d}.tar")


# ---- 1. ingest ---------------------------------------------------------------------------------------------------------


def ours(cfg: TrainConfig, index: SampleIndex, threads: int) -> Batches:
    """uint8 pictures, texts."""
    import open_clip

    from raysys.training.ingest import BatchReader
    from raysys.training.samples import order_of

    reader = BatchReader(
        index,
        order_of(cfg, index),
        cfg.augment,
        open_clip.get_tokenizer(MODEL),
        size_px=SIDE_PX,
        num_steps=cfg.num_steps,
        rank=0,
        world_size=1,
        read_threads=cfg.train.read_threads,
        decode_threads=threads,
        prefetch=cfg.train.prefetch_batches,
        pin_memory=False,
    )
    with closing(reader.batches(0, cfg.num_steps)) as batches:  # type: ignore[type-var]
        for batch in batches:
            yield batch.images, batch.texts


def normalised(batches: Batches) -> Batches:
    import open_clip
    import torch

    mean, std = (
        torch.tensor(values).view(1, 3, 1, 1) * 255 for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    with closing(batches):  # type: ignore[type-var]
        for images, texts in batches:
            yield images.float().sub_(mean).div_(std), texts


def reference(shards: list[str], workers: int) -> Batches:
    """float32 pictures, texts."""
    import open_clip
    import open_clip_train.data as theirs

    theirs._SAMPLE_SHUFFLE_SIZE = theirs._SAMPLE_SHUFFLE_INITIAL
    args = Namespace(
        train_data=shards,
        train_num_samples=10**8,
        train_data_upsampling_factors=None,
        seed=0,
        workers=workers,
        world_size=1,
        batch_size=BATCH,
    )
    transform = open_clip.image_transform(SIDE_PX, is_train=True)
    data = theirs.get_wds_dataset(args, transform, is_train=True, tokenizer=open_clip.get_tokenizer(MODEL))
    yield from data.dataloader


def samples_per_s(batches: Batches, cores: list[int]) -> float:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # threads and processes that start from here inherit it
    with closing(batches):  # type: ignore[type-var]
        for _ in range(SKIP):
            images, texts = next(batches)
        assert images.shape == (BATCH, 3, SIDE_PX, SIDE_PX) and len(texts) == BATCH
        start, timed, spent = time.perf_counter(), 0, 0.0
        while spent < TIMED_S or timed % len(cores):  # workers take turns, so all give the same number
            next(batches)
            timed, spent = timed + 1, time.perf_counter() - start
    os.sched_setaffinity(0, before)
    gc.collect()  # ends the reference's workers
    return timed * BATCH / spent


def ingest(cfg: TrainConfig, index: SampleIndex, shards: list[str]) -> list[Row]:
    cores = sorted(os.sched_getaffinity(0))[:2]
    rows = []
    for number in range(len(cores), 0, -1):
        ways: dict[str, Callable[[], Batches]] = {
            "ours": lambda number=number: ours(cfg, index, number),
            "reference": lambda number=number: reference(shards, number),
        }
        if number == len(cores):
            ways["ours, normalised"] = lambda number=number: normalised(ours(cfg, index, number))
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(TURNS):
            for name, make in ways.items():
                rates[name].append(samples_per_s(make(), cores[:number]))
                print(f"{number} x {name}: {rates[name][-1]:.0f} samples/s", flush=True)
        median = {name: statistics.median(found) for name, found in rates.items()}
        for name, measured in median.items():
            if name != "reference":
                goal = 1.2 if number == len(cores) and name == "ours" else None
                what = f"ingest, cores: {number}, {name}"
                rows.append(rate(what, ours=measured, reference=median["reference"], unit="samples/s", goal=goal))
    return rows


# ---- 2. bytes ----------------------------------------------------------------------------------------------------------


def half_of(index: SampleIndex, folder: Path) -> SampleIndex:
    """The index with a random half of the samples."""
    rng = np.random.default_rng(0)
    kept = []
    for name, rows in zip(index.names.to_pylist(), index.kept.tolist(), strict=True):
        keep = rng.random(rows) < 0.5
        kept.append(int(keep.sum()))
        file = folder / f"{name}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"keep": keep}), file)
    return replace(index, kept=np.array(kept), keep_folder=str(folder))


def bytes_of_a_pass(index: SampleIndex, order: Order, world_size: int) -> tuple[int, int]:
    """Bytes of pictures and bytes read, all workers together, as BatchReader reads: window after window of every part of a lane."""
    samples = used = read = 0
    for rank in range(world_size):
        reader = BlockReader(index)
        for part in order.parts(rank, world_size):
            number, window = 0, 0
            while number == 0:
                for first, end in reader.ranges(np.sort(part.window(number, window))):
                    block = reader.read(first, end)
                    samples += len(block)
                    used += sum(len(picture) for picture in block.pictures)
                    read += block.bytes_read
                number, window = part.after(Places(part, number, window, np.empty(0, np.int64)))
    assert samples == len(index)
    return used, read


def bytes_read(cfg: TrainConfig, index: SampleIndex, scratch: Path) -> list[Row]:
    from raysys.training.samples import order_of

    rows = []
    for what, kept, most in (("all", index, 1.2), ("a half", half_of(index, scratch / "keep"), 2.2)):
        for world_size in (1, 8, 64):
            used, read = bytes_of_a_pass(kept, order_of(cfg, kept), world_size)
            name = f"bytes used / read, {what} kept, {world_size} workers"
            rows.append(rate(name, ours=used / 1e6, reference=read / 1e6, unit="MB a pass", goal=round(1 / most, 2)))
    return rows


# ---- 3. training -------------------------------------------------------------------------------------------------------


def training(corpus: str, run: Path) -> Row:
    words = [f"corpus.path={corpus}", f"output={run}", "model=resnet10t-112", "global_batch=128", "train.steps=30"]
    words += ["train.decode_threads=1", "train.log_every=5", "train.checkpoint_every=1000"]
    subprocess.run([sys.executable, "-m", "raysys", "train", *words], check=True, stdout=subprocess.DEVNULL)
    lines = [line for line in read_metrics(str(run)) if line["step"] > 10]
    step_s, wait_s = (sum(line[key] for line in lines) for key in ("step_s", "data_wait_s"))
    print(f"train: {len(lines)} windows, {statistics.median(line['samples_per_s'] for line in lines):.0f} samples/s", flush=True)
    return rate("train on CPUs, time not waiting for data", ours=100 * (1 - wait_s / step_s), reference=100.0, unit="%", goal=0.95)


# ---- all ---------------------------------------------------------------------------------------------------------------


def main() -> None:
    parts = ("ingest", "bytes", "training")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--data", help="glob of WebDataset tars")
    words = parser.parse_args()
    logging.disable(logging.WARNING)  # open_clip's
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        corpus = words.data or str(scratch / "corpus")
        if not words.data:
            draw_corpus(scratch / "corpus")
        if {"ingest", "bytes"} & set(words.only):
            from raysys.training.samples import choose_samples

            cfg = TrainConfig(
                output=str(scratch / "index"), corpus=CorpusConfig(corpus), global_batch=BATCH, train=LoopConfig(steps=10**6)
            )
            index = choose_samples(cfg, cfg.output)
            shards = [f"{index.roots['']}/{name}" for name in index.names.to_pylist()]
            print(f"{len(index)} samples in {len(shards)} shards of {index.size.sum() / 1e6:.0f} MB together", flush=True)
        if "ingest" in words.only:
            rows += ingest(cfg, index, shards)
        if "bytes" in words.only:
            rows += bytes_read(cfg, index, scratch)
        if "training" in words.only:
            rows.append(training(corpus, scratch / "run"))
    finish(rows)


if __name__ == "__main__":
    main()
