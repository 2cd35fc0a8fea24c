"""Training speed: ``raysys train`` against open_clip's own trainer on a CPU, and the training step alone on a GPU.

``--part verb`` (the default without CUDA): samples per second of ``raysys train`` and of ``python -m open_clip_train.main`` with webdataset
0.2.86 in the steady state, on all cores, in bf16 and in fp32. Both train resnet10t-112 of conf/models with batches of 128 from the same tars,
crop .9 to 1 of each picture and tokenise. Ours has its defaults: one worker with a torch thread a core, 2 decode threads, channels_last, fused
AdamW. open_clip has --workers 2 (processes that decode), a torch thread a core, its foreach AdamW, and a shuffle buffer that holds its initial
1,000 samples from the start (it would fill up to 5,000, reading twice as fast as it gives). Of 30 steps the first 6 do not count (start), nor
the last 6 (their batches are decoded by then, so nothing competes with the step). Turns alternate; before each is printed what other
processes take of the cores. The number is the median of all windows of 2 steps. Goal 1.2, must 1.0.

``--part step`` (the default with CUDA; no Ray): raysys's TrainStep in bf16 on one GPU, eager and compiled, with pictures (uint8) and
texts that lie on the GPU. The reference is the loop of open_clip_train.main with the same batch, eager and with its --torchcompile:
open_clip's model and ClipLoss, autocast, contiguous, foreach AdamW, TF32 and cuDNN's autotuner, float32 pictures that are normalised before
and lie on the GPU. Median of 3 windows of ``--steps`` steps, after 10 steps that do not count. Then ours, compiled, fed by BatchReader from
tars, against the same with data on the GPU. A batch that does not fit is halved for all. MFU: FLOPs of the model, forward and backward, per
second / the card's dense bf16 peak; goal 45 % for the compiled ViT-B-16 on an H100.

    python tools/bench_train.py [--part verb] [--data 'GLOB']
    python tools/bench_train.py --part step [--models ViT-B-16=1024 ViT-B-32=2048] [--data 'GLOB'] [--open-clip FOLDER]
    python tools/bench_train.py --part step --device cpu --models tiny=64 --steps 2     # does it run?

GLOB names WebDataset tars; without it they are drawn as in bench_ingest.py. FOLDER goes on sys.path, for a machine with torch but without
open_clip and raysys. Where pip finds packages (30 MB; shapely and rapidfuzz are for the fed line only, which is left out without):

    pip install --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 \\
        --platform manylinux_2_17_x86_64 --constraint constraints.txt --target build/site open_clip_torch ftfy wcwidth shapely rapidfuzz

and there, in a copy of the repository with that folder: ``PYTHONPATH=. python3 tools/bench_train.py --open-clip build/site``. Expected there:
numpy, Pillow, regex, torch, torchvision, tqdm; for the fed line also fsspec, OpenCV, pyarrow.
"""

from __future__ import annotations

import argparse
import gc
import glob
import importlib.util
import itertools
import logging
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmark import Row, finish, rate
from torch import nn

from raysys.config import AugmentConfig, CorpusConfig, LoopConfig, OptimConfig, TrainConfig, config_dir
from raysys.training.flops import flops_per_sample, peak_tflops
from raysys.training.group import Group
from raysys.training.step import TrainStep

MODEL, BATCH = "resnet10t-112", 128
STEPS, SKIP_FIRST, SKIP_LAST, WINDOW, TURNS = 30, 6, 6, 2, 2
GOAL = 1.2

WARM_STEPS, WINDOWS = 10, 3
MFU_GOAL = {("ViT-B-16", "compiled"): 0.45}
ENDLESS = 10**6
"""Steps of a run that nobody waits for."""
TOKENIZER = "ViT-B-32"
TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}

Tensors = tuple[torch.Tensor, torch.Tensor]
"""Pictures [B, 3, S, S] and texts [B, context]."""
Step = Callable[[torch.Tensor, torch.Tensor], object]


# ---- the verb ----------------------------------------------------------------------------------------------------------


def raysys_train(corpus: str, precision: str, run: Path) -> list[float]:
    """Samples per second of each window in the steady state."""
    from raysys.training.metrics import read_metrics

    words = [f"corpus.path={corpus}", f"output={run}", f"model={MODEL}", f"global_batch={BATCH}", f"train.steps={STEPS}"]
    words += [f"train.precision={precision}", f"train.log_every={WINDOW}"]
    run_quietly([sys.executable, "-m", "raysys", "train", *words])
    return [line["samples_per_s"] for line in read_metrics(str(run)) if SKIP_FIRST < line["step"] <= STEPS - SKIP_LAST]


def open_clip_train(shards: list[str], precision: str, logs: Path) -> list[float]:
    """As :func:`raysys_train`."""
    words = ["--dataset-type", "webdataset", "--train-data", "::".join(shards), "--train-num-samples", str(STEPS * BATCH)]
    words += ["--batch-size", str(BATCH), "--model", MODEL, "--precision", precision, "--device", "cpu", "--workers", "2"]
    words += ["--epochs", "1", "--log-every-n-steps", str(WINDOW), "--logs", str(logs), "--name", "run"]
    run_quietly([sys.executable, __file__, "--open-clip-train", *words])
    # Seconds a step, mean of the steps since the line before. The rate beside it is that of the last step alone.
    lines = re.findall(r"\[ *(\d+)/.* Batch \(t\): ([\d.]+)", (logs / "run" / "out.log").read_text())
    return [BATCH / float(step_s) for samples, step_s in lines if SKIP_FIRST < int(samples) / BATCH <= STEPS - SKIP_LAST]


def run_quietly(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout[-4000:]}\n{' '.join(command)} ended with status {done.returncode}")


def run_open_clip_train(words: list[str]) -> None:
    """What ``python -m open_clip_train.main`` does, with the models of conf/models."""
    import open_clip
    import open_clip_train.data
    import open_clip_train.main

    open_clip.add_model_config(Path(config_dir(), "models"))
    open_clip_train.data._SAMPLE_SHUFFLE_SIZE = open_clip_train.data._SAMPLE_SHUFFLE_INITIAL
    open_clip_train.main.main(words)


def verb(data: str | None, scratch: Path) -> list[Row]:
    import psutil

    corpus = corpus_of(data, scratch)
    shards = sorted(glob.glob(data or f"{corpus}/*.tar"))
    rows = []
    for precision in ("amp_bf16", "fp32"):
        ways = {"ours": partial(raysys_train, corpus), "reference": partial(open_clip_train, shards)}
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for turn, (name, train) in itertools.product(range(TURNS), ways.items()):
            others = psutil.cpu_percent(interval=2.0)
            windows = train(precision, scratch / f"{name}-{precision}-{turn}")
            rates[name] += windows
            print(
                f"{precision}, {name}: {statistics.median(windows):.0f} samples/s ({min(windows):.0f} to {max(windows):.0f}); "
                f"other processes took {others:.0f} % of the cores before",
                flush=True,
            )
        ours, reference = (statistics.median(rates[name]) for name in ways)
        rows.append(rate(f"train on CPUs, {precision} (must 1.0)", ours=ours, reference=reference, unit="samples/s", goal=GOAL))
    return rows


def corpus_of(data: str | None, scratch: Path) -> str:
    """What ``corpus.path`` takes."""
    from bench_ingest import draw_corpus

    folder = scratch / "corpus"
    if data is None and not folder.exists():
        draw_corpus(folder)
    return data or str(folder)


# ---- the step ----------------------------------------------------------------------------------------------------------


def make_model(config: dict[str, Any]) -> nn.Module:
    from open_clip.model import CLIP

    torch.manual_seed(0)
    model: nn.Module = CLIP(**config, output_dict=True)
    return model


def raysys_step(model: nn.Module, batch: int, device: torch.device, *, compiled: bool) -> Step:
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    step_fn = TrainStep(
        model,
        loss="clip",
        mean=OPENAI_DATASET_MEAN,
        std=OPENAI_DATASET_STD,
        loop=LoopConfig(precision="amp_bf16", compile=compiled),
        optim=OptimConfig(),
        freeze_bn_stats=False,
        device=device,
        group=Group(0, (batch,)),
        steps=ENDLESS,
    )
    steps = itertools.count()
    return lambda images, texts: step_fn(images, texts, step=next(steps), measure=False)


def open_clip_step(model: nn.Module, batch: int, device: torch.device, *, compiled: bool) -> Step:
    """The loop of open_clip_train/train.py and the optimiser of its main.py."""
    from open_clip import ClipLoss

    model = model.to(device).train()
    optim, groups = OptimConfig(), ([], [])
    for name, p in model.named_parameters():
        groups[p.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))].append(p)
    optimizer = torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": 0.0}, {"params": groups[False], "weight_decay": optim.weight_decay}],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
    )
    loss_fn = ClipLoss(cache_labels=True)
    forward = torch.compile(model) if compiled else model

    def step(images: torch.Tensor, texts: torch.Tensor) -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = sum(loss_fn(**forward(images, texts), output_dict=True).values())
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))

    return step


def step_s(step: Step, batches: Iterator[Tensors], device: torch.device, steps: int) -> tuple[float, float]:
    """Seconds a step, and the most memory of the GPU that tensors took, GB."""

    def run(number: int) -> float:
        start = time.perf_counter()
        for _ in range(number):
            step(*next(batches))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / number

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    run(WARM_STEPS)
    median = statistics.median(run(steps) for _ in range(WINDOWS))
    return median, torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else math.nan


def resident(config: dict[str, Any], batch: int, device: torch.device, *, as_uint8: bool) -> Generator[Tensors, None, None]:
    """The same batch again and again: pictures as BatchReader gives them, or as open_clip's transform does."""
    side_px, text = config["vision_cfg"]["image_size"], config["text_cfg"]
    images = torch.randint(256, (batch, side_px, side_px, 3), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    if not as_uint8:
        images = images.contiguous().float().div_(255).sub_(0.45).div_(0.27)
    texts = torch.randint(text["vocab_size"], (batch, text["context_length"]), device=device)
    while True:
        yield images, texts


def from_tars(
    config: dict[str, Any], batch: int, corpus: str, scratch: Path, *, pin_memory: bool
) -> Generator[Tensors, None, None]:
    import open_clip

    from raysys.training.ingest import BatchReader
    from raysys.training.samples import choose_samples, order_of

    cfg = TrainConfig(
        output=str(scratch / "index"), corpus=CorpusConfig(corpus), global_batch=batch, train=LoopConfig(steps=ENDLESS)
    )
    index = choose_samples(cfg, cfg.output)
    reader = BatchReader(
        index,
        order_of(cfg, index),
        AugmentConfig(),
        open_clip.get_tokenizer(TOKENIZER),
        size_px=config["vision_cfg"]["image_size"],
        num_steps=ENDLESS,
        rank=0,
        world_size=1,
        read_threads=cfg.train.read_threads,
        decode_threads=len(os.sched_getaffinity(0)),
        prefetch=cfg.train.prefetch_batches,
        pin_memory=pin_memory,
    )
    with closing(reader.batches(0, ENDLESS)) as made:
        for one in made:
            yield one.images, one.texts


def at_batch(name: str, batch: int, device: torch.device, steps: int, data: str | None, scratch: Path) -> list[Row]:
    """:raises torch.OutOfMemoryError: where the batch does not fit."""
    import open_clip

    config = TINY if name == "tiny" else open_clip.get_model_config(name)
    flops = flops_per_sample(make_model(config), config["vision_cfg"]["image_size"], config["text_cfg"]["context_length"])
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    peak = peak_tflops(card)

    def measure(what: str, make: Callable[..., Step], batches: Generator[Tensors, None, None], *, compiled: bool) -> float:
        """Samples per second."""
        free_memory()
        model = make_model(config)
        with closing(batches):
            spent_s, memory_gb = step_s(make(model, batch, device, compiled=compiled), batches, device, steps)
        assert all(p.isfinite().all() for p in model.parameters()), f"{name}, {what}: weights are no numbers"
        mfu = f"{100 * batch / spent_s * flops / (peak * 1e12):.1f} % MFU, " if peak else ""
        print(
            f"{name}, batch {batch}, {what}: {batch / spent_s:.0f} samples/s, {1000 * spent_s:.1f} ms a step, {mfu}{memory_gb:.1f} GB",
            flush=True,
        )
        return batch / spent_s

    print(f"{name}: {flops / 1e9:.3g} GFLOP a sample, forward and backward", flush=True)
    rows = []
    for mode in ("eager", "compiled"):
        compiled = mode == "compiled"
        normalised, pictures = (resident(config, batch, device, as_uint8=as_uint8) for as_uint8 in (False, True))
        theirs = measure(f"open_clip, {mode}", open_clip_step, normalised, compiled=compiled)
        ours = measure(f"ours, {mode}", raysys_step, pictures, compiled=compiled)
        rows.append(rate(f"{name}, batch {batch}, {mode}", ours=ours, reference=theirs, unit="samples/s"))
        if peak:
            mfu, goal = 100 * ours * flops / (peak * 1e12), MFU_GOAL.get((name, mode))
            rows.append(rate(f"{name}, batch {batch}, {mode}, MFU", ours=mfu, reference=100.0, unit="% of the peak", goal=goal))
    needed = ("cv2", "fsspec", "PIL", "pyarrow", "rapidfuzz", "shapely")
    missing = [module for module in needed if importlib.util.find_spec(module) is None]
    if missing:
        print(f"{name}: not fed from tars, as {', '.join(missing)} cannot be imported here", flush=True)
    else:
        tars = from_tars(config, batch, corpus_of(data, scratch), scratch, pin_memory=device.type == "cuda")
        fed = measure("ours, compiled, fed", raysys_step, tars, compiled=True)
        rows.append(rate(f"{name}, batch {batch}, fed / data on the GPU", ours=fed, reference=ours, unit="samples/s"))
    machine = f"{card}, torch {torch.__version__}, {rows[0].machine}"
    return [replace(row, machine=machine) for row in rows]


def free_memory() -> None:
    """Of the model before; compiled code holds on to it."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def step(models: list[str], device: torch.device, steps: int, data: str | None, scratch: Path) -> list[Row]:
    if device.type == "cuda":  # for both, as both trainers do it
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    rows: list[Row] = []
    for name, _, batch in (model.partition("=") for model in models):
        size, of_model = int(batch), None
        while of_model is None:
            try:
                of_model = at_batch(name, size, device, steps, data, scratch)
            except torch.OutOfMemoryError:
                print(f"{name}: a batch of {size} does not fit, the next is {size // 2}", flush=True)
                size //= 2
        rows += of_model
    return rows


# ---- all ---------------------------------------------------------------------------------------------------------------


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("verb", "step"), default="step" if on_gpu else "verb")
    parser.add_argument("--data", help="glob of WebDataset tars")
    parser.add_argument("--models", nargs="+", default=["ViT-B-16=1024", "ViT-B-32=2048"], help="open_clip names (or tiny)=batch")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda" if on_gpu else "cpu"))
    parser.add_argument("--steps", type=int, default=10, help="of a timed window")
    parser.add_argument("--open-clip", metavar="FOLDER", help="goes on sys.path")
    parser.add_argument("--open-clip-train", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.open_clip_train is not None:
        run_open_clip_train(words.open_clip_train)
        return
    if words.open_clip:
        sys.path.insert(0, words.open_clip)
    logging.disable(logging.WARNING)  # open_clip's
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if words.part == "verb":
            rows = verb(words.data, scratch)
        else:
            rows = step(words.models, words.device, words.steps, words.data, scratch)
    finish(rows)


if __name__ == "__main__":
    main()
