"""What a corpus costs: hours, storage, bandwidth, requests, memory and money of annotate, filter, train and sweep, before anything is rented.

    python tools/plan.py --cores 512
    python tools/plan.py --gpus 64 --cores 512 --ocr-per-gpu 900 --train-per-gpu 3000 --gpu-hour 2.5 --tb-month 23 --points 12 --seeds 3
    python tools/plan.py --samples 400M --gpus 8 --bench outputs/bench --model ViT-B-32

A column for each number of samples. Rates are those that you give, else those of ``--bench`` (what ``make bench`` wrote), else those measured for the README on two
CPU cores; a list after the table names command and machine of each. No rate of a GPU is assumed: without one the plan is of CPUs. Rates times
workers are taken as they are: losses by other users of storage and network are not in it. Training runs no faster than the cores decode for it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from raysys.config import LoopConfig, OrderConfig
from raysys.corpus.tars import MAX_GAP_BYTES
from raysys.storage import READ_AHEAD_BYTES

TWO_CORES = "2 x AMD EPYC, no GPU"
TAR_BYTES = 2_800
"""Beside a picture in a tar of img2dataset (headers, caption, JSON): 1.05 bytes read a byte used at 53 KB, 1.22 at 13 KB (README, Measured)."""
ANNOTATION_BYTES = 217
"""A row of A/shards: 7,220 photographs of Flickr8k, 43 % with regions (216.6; other sets of Flickr8k 213, the demo's scenes 61)."""
SELECTION_BYTES, UID_BYTES = 13, 16
"""A row of S/selection (13.0 to 13.5 measured); a kept sample in S/subset.npy."""
STATE_BYTES, WEIGHT_BYTES = 12, 4
"""A parameter in a checkpoint (fp32, and AdamW's two moments: 1.8 GB of 151M parameters, README); in R/open_clip."""
DECODED_BYTES = 3 * 224 * 224
"""A picture of an evaluation set in service.cache_dir."""
EVAL_PICTURES = 105_000
"""ImageNet, ImageNet-Attr and COCO val2017."""
PLACES_REQUESTS = 6
"""To read places and captions of a block in a shard not seen lately: footer, flags and columns of a row group, each opened and read (counted)."""
DRIVER_BYTES_A_SHARD, BLOCK_BYTES, WORKER_BYTES = 1_400, 12, 0.12e9
"""Of the driver of train beside the order; of the order; of a worker for the footers and flags of 512 shards. With 100,000 shards of 50 blocks driver and
worker took 206 and 176 MB (tools/bench_scale.py)."""

DECODED_PER_WORKER = 4_500
"""Samples/s that the interpreter lock lets a worker's decode threads give it: README, Limits, an estimate of 4,000 to 5,000."""
TRIAL_START_S, TRIAL_GPUS = 15, 8
"""Imports of a trial's workers (README, Limits); GPUs or cores of a trial unless given."""


@dataclass(frozen=True)
class Rate:
    """Samples a second of one unit (a GPU or a core)."""

    per_s: float
    source: str


MEASURED = {
    "ocr": Rate(9.9, f"README: 101 ms a 500 px photograph, ocr=default, one thread; `python tools/bench_text_regions.py --data FOLDER --only all`, {TWO_CORES}"),
    "filter": Rate(450_000, f"README: 0.9 million rows/s of policy=paper on two cores; `python tools/bench_scale.py --only filter`, {TWO_CORES}"),
    "train": Rate(72, f"README: 144 samples/s of resnet10t-112, a toy, bf16, on two cores; `python tools/bench_train.py`, {TWO_CORES}"),
    "decode": Rate(520, f"README: 1,040 samples/s of 53 KB pictures on two cores (13 KB: to 1,832); `python tools/bench_ingest.py --only ingest`, {TWO_CORES}"),
    "eval": Rate(301, f"README: 603 pictures/s of test_resnet-64, a toy, on two cores; `python tools/bench_evaluate.py --pictures FOLDER`, {TWO_CORES}"),
}  # fmt: skip
"""Of a core."""


# ---- reading -----------------------------------------------------------------------------------------------------------


def bytes_read_per_sample(picture: float, kept: float) -> float:
    """Expected bytes that training reads for a kept sample, where samples are kept at random: the picture and the gap to the next kept one, unless
    that is so wide that it is not read (:data:`raysys.corpus.tars.MAX_GAP_BYTES`). Gives the README's measured 1.05 and 1.30 times the picture
    at 53 KB, 1.22 and 2.04 (measured 2.11) at 13 KB."""
    gap, read, chance = float(TAR_BYTES), picture, kept
    while gap <= MAX_GAP_BYTES:
        read, gap, chance = read + chance * gap, gap + picture + TAR_BYTES, chance * (1 - kept)
    return read


def requests_per_sample(picture: float, kept: float, block_bytes: float) -> float:
    """Expected requests of training for a kept sample: one where a gap is too wide, or a block begins, and what tells where a block's samples lie."""
    dropped = max(0, math.floor((MAX_GAP_BYTES - TAR_BYTES) / (picture + TAR_BYTES)) + 1)  # so many in a row are too wide
    blocks = (picture + TAR_BYTES) / block_bytes / kept
    return min((1 - kept) ** dropped + blocks, 1.0) + PLACES_REQUESTS * blocks


# ---- the plan ----------------------------------------------------------------------------------------------------------


def seen(samples: float, words: argparse.Namespace) -> float:
    """Samples that training sees: of what is kept, an epoch or more."""
    return words.seen or words.epochs * words.kept * samples


def training_limits(units: float, words: argparse.Namespace, rates: dict[str, Rate]) -> dict[str, float]:
    """What limits a training on ``units`` GPUs (or cores) with their share of the cores -> samples/s; it runs at the least of them."""
    cores = words.cores * units / words.gpus if words.gpus else units
    workers = units if words.gpus else math.ceil(units / words.cores_per_node)  # a worker of a CPU plan has a node
    return {
        "steps": units * rates["train"].per_s,
        f"decoding on {cores:g} cores": cores * rates["decode"].per_s,
        f"its workers' decoding, at most {DECODED_PER_WORKER:,}/s each (estimated)": workers * DECODED_PER_WORKER,
    }


def trials_that_fit(words: argparse.Namespace) -> tuple[int, int]:
    """GPUs (or cores) of a trial, and trials at a time beside an evaluator on one GPU (or core); it shares the only one.

    :raises ValueError: where a trial has no room.
    """
    kind, room = ("GPUs", words.gpus) if words.gpus else ("cores", math.floor(words.cores))
    room = max(room - 1, 1)
    of_trial = min(TRIAL_GPUS, room) if words.workers_per_trial is None else words.workers_per_trial
    if not 1 <= of_trial <= room:
        raise ValueError(f"--workers-per-trial={of_trial}: 1 to {room} {kind} fit beside the evaluator")
    return of_trial, room // of_trial


def plan(samples: float, words: argparse.Namespace, rates: dict[str, Rate]) -> dict[str, float | None]:
    """Name and unit of a row -> its number; None where a price is not given."""
    picture, units = words.picture_kb * 1e3, words.gpus or words.cores
    nodes = math.ceil(max(words.gpus / words.gpus_per_node, words.cores / words.cores_per_node if not words.gpus else 0, 1))
    corpus, kept = samples * (picture + TAR_BYTES), samples * words.kept
    trials, seen_by_trial = words.points * words.seeds, words.sweep_seen
    ocr, train = units * rates["ocr"].per_s, min(training_limits(units, words, rates).values())
    annotate_h, train_h = samples / ocr / 3600, seen(samples, words) / train / 3600
    filter_h = samples / (min(words.filter_cores, words.cores) * rates["filter"].per_s) / 3600
    of_trial, at_a_time = trials_that_fit(words)
    evaluation_s = EVAL_PICTURES / rates["eval"].per_s
    trial_s = TRIAL_START_S + seen_by_trial / min(training_limits(of_trial, words, rates).values()) + evaluation_s
    sweep_h = max(math.ceil(trials / at_a_time) * trial_s, trials * evaluation_s) / 3600  # one evaluator serves all
    read, block_bytes = bytes_read_per_sample(picture, words.kept), OrderConfig().block_mb * 1e6
    shards, blocks = corpus / (words.shard_mb * 1e6), corpus / block_bytes
    checkpoints = LoopConfig().keep_checkpoints + LoopConfig().keep_best
    lanes, window = OrderConfig().lanes, OrderConfig().window_mb * 1e6
    workers = words.gpus or nodes  # a worker of a CPU plan has a node
    encoded = 2 * window * max(lanes / workers, 1)
    requests = {
        "annotate": corpus / READ_AHEAD_BYTES + 2 * shards,
        "train": requests_per_sample(picture, words.kept, block_bytes) * seen(samples, words),
        "sweep": requests_per_sample(picture, words.kept, block_bytes) * trials * seen_by_trial,
    }
    storage_tb = {
        "corpus": corpus / 1e12,
        "annotations": samples * ANNOTATION_BYTES / 1e12,
        "selections": (1 + words.policies) * (samples * SELECTION_BYTES + kept * UID_BYTES) / 1e12,
        "checkpoints": (checkpoints * STATE_BYTES + trials * WEIGHT_BYTES) * words.params / 1e12,
        "decoded sets, on each node": EVAL_PICTURES * DECODED_BYTES / 1e12,
    }
    shared_tb = sum(tb for name, tb in storage_tb.items() if "node" not in name)
    machine_h = annotate_h + train_h + sweep_h
    cost = {
        "machines": _cost(
            machine_h, (words.gpus, words.gpu_hour), (words.cores, 0 if cores_in_gpu_hour(words) else words.core_hour)
        ),
        "storage, a month": _cost(shared_tb, (1, words.tb_month)),
        "requests": _cost(sum(requests.values()) / 1000, (1, words.thousand_gets)),
    }
    return {
        "annotate, h": annotate_h,
        "filter, one driver, h": filter_h,
        "train, h": train_h,
        f"sweep of {trials} trials, h": sweep_h,
        "cores that decode for training": min(units * rates["train"].per_s, workers * DECODED_PER_WORKER) / rates["decode"].per_s,
        **{f"storage: {name}, TB": tb for name, tb in storage_tb.items()},
        "storage must give annotate, MB/s": ocr * corpus / samples / 1e6,
        "storage must give training, MB/s": train * read / 1e6,
        "of it to each node, MB/s": train * read / 1e6 / nodes,
        **{f"requests of {name}, millions": number / 1e6 for name, number in requests.items()},
        "memory of train's driver, GB": (shards * DRIVER_BYTES_A_SHARD + blocks * BLOCK_BYTES) / 1e9,
        "memory of a worker beside its model, GB": (blocks * BLOCK_BYTES + encoded + WORKER_BYTES) / 1e9,
        **{f"cost: {name}": money for name, money in cost.items()},
    }


def cores_in_gpu_hour(words: argparse.Namespace) -> bool:
    """The price of a GPU hour is taken to be that of its node."""
    return words.gpus > 0 and words.gpu_hour is not None and words.core_hour is None


def _cost(amount: float, *priced: tuple[float, float | None]) -> float | None:
    """``amount`` of each number at its price; None where a number that is not 0 has no price."""
    if any(number and price is None for number, price in priced):
        return None
    return sum(amount * number * (price or 0) for number, price in priced)


# ---- rates -------------------------------------------------------------------------------------------------------------


def rates_of(words: argparse.Namespace) -> dict[str, Rate]:
    """Of a GPU where there are some, else of a core; of filter and decode always of a core.

    :raises ValueError: where no rate of a GPU is known, or one is given that the plan has no use for.
    """
    rates = dict(MEASURED)
    kind, other = ("gpu", "core") if words.gpus else ("core", "gpu")
    useless = [f"{name}_per_{other}" for name in ("ocr", "train", "eval")] + ([] if words.gpus else ["gpu_hour", "bench"])
    for name in useless:
        if getattr(words, name) is not None:
            flag = name.replace("_", "-")
            mend = f"give --{flag.replace('core', 'gpu')}" if words.gpus else "give --gpus"
            raise ValueError(f"--{flag}: the plan is of {'GPUs' if words.gpus else 'CPUs'}; leave it out, or {mend}")
    if words.decode_per_core is not None:
        rates["decode"] = Rate(words.decode_per_core, "given, --decode-per-core")
    if words.bench is not None:
        rates |= benched(Path(words.bench), words.model)
    for name in ("ocr", "train", "eval"):
        given = getattr(words, f"{name}_per_{kind}")
        if given is not None:
            rates[name] = Rate(given, f"given, --{name}-per-{kind}")
        elif words.gpus and rates[name] == MEASURED[name]:
            if name == "eval":  # forward only, of one tower: not slower than a training step
                rates[name] = Rate(rates["train"].per_s, "assumed: as fast as training, at least")
                continue
            raise ValueError(f"--gpus={words.gpus}: no rate of a GPU is known; measure it (`python tools/bench_{'detector' if name == 'ocr' else 'train'}.py` there, then "
                             f"--bench), or give --{name}-per-gpu; without --gpus the plan is of CPUs")  # fmt: skip
    return rates


def benched(folder: Path, model: str) -> dict[str, Rate]:
    """The rates of one GPU that benchmarks wrote: whole looks, and compiled training steps of a model.

    :raises ValueError: where the folder is not there or a file cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"--bench={folder}: there is no such folder; `make bench` writes outputs/bench")
    found: dict[str, Rate] = {}
    tests: dict[str, tuple[str, Callable[[dict[str, Any]], bool]]] = {
        "ocr": ("detector.json", lambda row: row["name"].startswith("tar to verdict") and row["unit"] == "pictures/s"),
        "train": ("train.json", lambda row: row["name"].startswith(f"{model}, batch") and row["name"].endswith("compiled")),
    }
    for name, (file, fits) in tests.items():
        path = folder / file
        if not path.exists():
            continue
        try:
            rows = [row for row in json.loads(path.read_text()) if fits(row) and "NVIDIA" in row["machine"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not what a benchmark writes ({error}); run it again") from error
        if rows:
            best = max(rows, key=lambda row: row["ours"])
            found[name] = Rate(best["ours"], f"measured: {best['name']}; `{best['command']}`, {best['machine']}")
    return found


# ---- words -------------------------------------------------------------------------------------------------------------


def number(text: str) -> float:
    """``10M``, ``1B``, ``1.5e9``; more than 0."""
    factor = {"k": 1e3, "M": 1e6, "B": 1e9}.get(text[-1:])
    value = _float(text[:-1] if factor else text) * (factor or 1)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0, such as 400M, 2B or .8")
    return value


def share(text: str) -> float:
    """More than 0, at most 1."""
    value = _float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share above 0, at most 1, such as .8")
    return value


def price(text: str) -> float:
    """0 or more."""
    value = _float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a price of 0 or more, such as 2.5")
    return value


def count(text: str) -> int:
    """A whole number, 0 or more."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more, such as 64")
    return int(text)


def _float(text: str) -> float:
    """NaN where it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"plan: {message}", file=sys.stderr)
        sys.exit(2)


def parser() -> argparse.ArgumentParser:
    made = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--samples", nargs="+", type=number, default=[1e7, 1e9, 1e10], help="pairs, a column each (400M, 2B); default 10M 1B 10B")
    add("--picture-kb", type=number, default=20.0, help="size of a picture in KB, mean; default 20")
    add("--kept", type=share, default=0.8, help="share that the policy keeps; default .8")
    add("--shard-mb", type=number, default=200.0, help="size of a tar; default 200")
    add("--gpus", type=count, default=0, help="default 0: a plan of CPUs")
    add("--cores", type=number, default=64.0, help="CPU cores, all nodes together; default 64")
    add("--gpus-per-node", type=number, default=8.0, help="default 8")
    add("--cores-per-node", type=number, default=64.0, help="default 64")
    add(
        "--filter-cores",
        type=number,
        default=2.0,
        help="cores of the node of filter's driver that it uses (threads, at most 4); default 2, as measured",
    )
    for name, what in (("ocr", "looks: pictures/s"), ("train", "training: samples/s"), ("eval", "evaluation: pictures/s")):
        for kind in ("gpu", "core"):
            add(f"--{name}-per-{kind}", type=number, metavar="RATE", help=f"{what} of a {kind}, as you measured it")
    add(
        "--decode-per-core",
        type=number,
        metavar="RATE",
        help="samples/s that a core decodes for training; default 520, as measured",
    )
    add("--bench", metavar="FOLDER", help="rates of GPUs from the files of `make bench` (outputs/bench)")
    add("--model", default="ViT-B-32", help="whose training rate to take from --bench; default ViT-B-32")
    add("--params", type=number, default=151e6, help="parameters of the model; default 151M, ViT-B-32's")
    add("--epochs", type=number, default=1.0, help="passes over what is kept; default 1")
    add("--seen", type=number, help="samples seen, instead of --epochs")
    add("--points", type=count, default=12, help="of the sweep; default 12")
    add("--seeds", type=count, default=3, help="of each point; default 3")
    add("--policies", type=count, default=4, help="selections that the sweep makes; default 4")
    add("--sweep-seen", type=number, default=12.8e6, help="samples that a trial sees; default 12.8M")
    add("--workers-per-trial", type=count, help="GPUs (or cores) of a trial; default 8, or what is there beside the evaluator's")
    for name, what in (
        ("gpu-hour", "of a GPU hour (with its cores, unless --core-hour is given)"),
        ("core-hour", "of a core hour"),
        ("tb-month", "of a TB for a month"),
        ("thousand-gets", "of 1,000 reads"),
    ):
        add(f"--{name}", type=price, metavar="PRICE", help=f"price {what}, any currency; none is assumed")  # fmt: skip
    return made


def main() -> None:
    made = parser()
    words = made.parse_args()
    try:
        rates = rates_of(words)
        columns = [plan(samples, words, rates) for samples in words.samples]
    except ValueError as error:
        made.error(str(error))
    machines = f"{words.gpus} GPUs, {words.cores:g} cores" if words.gpus else f"{words.cores:g} CPU cores, no GPU"
    print(
        f"{machines}; pictures of {words.picture_kb:g} KB, {words.kept:.0%} kept; training sees {', '.join(_short(seen(samples, words)) for samples in words.samples)} samples\n"
    )
    print(f"{'pairs':44}" + "".join(f"{_short(samples):>12}" for samples in words.samples))
    for name in columns[0]:
        print(f"{name:44}" + "".join(f"{_short(column[name]):>12}" for column in columns))
    for line in notes(words, rates):
        print(line)
    print("\nRates, of a GPU or core as the plan has it:")
    for name, rate in rates.items():
        print(
            f"  {name:8}{rate.per_s:>10,.0f}/s  {rate.source}"
            if rate.per_s >= 100
            else f"  {name:8}{rate.per_s:>10,.1f}/s  {rate.source}"
        )
    print(f"""Measured: {ANNOTATION_BYTES} bytes a row of annotations (Flickr8k), {SELECTION_BYTES} of a selection, {TAR_BYTES:,} beside a picture in a tar, {STATE_BYTES} a parameter in a checkpoint.
Assumed unless given: picture and shard size, share kept, samples seen, the sweep; evaluation sets of {EVAL_PICTURES:,} pictures; no time lost between workers.
Not in it: the cost of filter's hours (one driver's; what else is rented then stands idle), selections and exports of `filter shards=`, what machines cost while they start, traffic out of a region.""")  # fmt: skip


def notes(words: argparse.Namespace, rates: dict[str, Rate]) -> list[str]:
    """What the table does not show."""
    units, kind = (words.gpus, "GPUs") if words.gpus else (words.cores, "cores")
    of_trial, at_a_time = trials_that_fit(words)
    limits = training_limits(units, words, rates)
    limit = min(limits, key=limits.__getitem__)
    lines = [
        f"\nSweep: {at_a_time} trials at a time on {of_trial} {kind} each beside one evaluator; a trial sees {_short(words.sweep_seen)} samples."
    ]
    if limit != "steps":
        lines.append(
            f"Training is limited by {limit}: {_short(limits[limit])} samples/s; {units:g} {kind} could take {_short(limits['steps'])}."
        )
    if cores_in_gpu_hour(words):
        lines.append("Cost: cores count as paid with the GPUs (no --core-hour).")
    return lines


def _short(value: float | None) -> str:
    """Three digits; what no price was given for is a dash."""
    if value is None:
        return "-"
    for factor, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 10 * factor or (value >= factor and factor > 1e3):
            return f"{value / factor:.3g}{unit}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
