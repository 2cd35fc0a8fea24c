"""Every setting of every verb, with its default, its unit and its reason.

In: nothing. Out: one dataclass per verb (``AnnotateConfig`` ... ``DemoConfig``), registered with hydra under the verb's name.
Choices (``conf/ocr/fast.yaml`` and so on) override these defaults; :mod:`raysys.cli` composes the two with the user's words.
The dataclasses are plain, not frozen (frozen ones break hydra's composition); change one with ``dataclasses.replace``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MISSING: Any = "???"  # OmegaConf's marker for "the user must say it"

ENGINES = ("onnx", "openvino", "paddle", "torch")
EVALUATORS = ("imagenet", "coco", "retrieval", "imagenet_attr", "typographic")
PRECISIONS = ("fp32", "amp_bf16")
OF_CPU = "of_cpu"
"""Precision of the demo: the one that is fast on this machine's CPU."""
SCHEDULES = ("constant", "ramp", "cosine")
LOSSES = ("clip", "siglip")
OVERFLOWS = ("cut", "fit", "wrap")
STRATEGIES = ("ddp", "fsdp")
SEARCHES = ("grid", "random", "tpe")
VERBOSITIES = ("normal", "quiet", "json")


@dataclass
class VerbConfig:
    verbosity: str = "normal"
    """``normal``; ``quiet``: only where the result lies, and what goes wrong; ``json``: every line a JSON object (:mod:`raysys.console`).
    Ray's own lines are off in all of them: ``ray.verbose=true`` shows them."""


@dataclass
class SourceConfig:
    path: str = MISSING
    """As ``corpus.path``."""
    weight: float | None = None
    """Share of every training batch, relative to the weights of the other sources; null for all: by the number of kept samples."""


@dataclass
class CorpusConfig:
    path: str | None = None
    """Folder, glob or brace list, local or on any fsspec filesystem (``s3://bucket/train-{00000..00099}.tar``), of WebDataset tars,
    Parquet files with pictures, or folders of pictures with captions.csv or captions.jsonl."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Several corpora instead of one path: ``corpus.sources.NAME.path=...``; NAME stands before their shards' names."""


@dataclass
class RayConfig:
    num_cpus: int | None = None
    """Logical CPUs of the local cluster; null counts the cores. Ignored when RAY_ADDRESS names a cluster."""
    dashboard: bool = False
    """Start Ray's dashboard (http://127.0.0.1:8265) with the local cluster; its processes take some per cent of two cores."""
    verbose: bool = False
    """Show Ray's own log lines and progress bars."""
    wait_minutes: float | None = 30.0
    """Minutes to wait before the start for room that others hold or an autoscaler may bring; null: without end."""


@dataclass
class LookConfig:
    """One look at a whole picture. Names of detectors are PaddleOCR's."""

    detector: str = "PP-OCRv6_tiny_det"
    enlarge: float = 1.0
    """Factor by which a picture is enlarged (never past ``max_side_px``): small text needs it, at a price."""
    max_side_px: int = 960
    """Long side of the detector's input; larger pictures are shrunk to it."""


def _default_looks() -> list[LookConfig]:
    return [LookConfig(), LookConfig("PP-OCRv4_mobile_det", enlarge=2.0)]


@dataclass
class OcrConfig:
    """How a picture is looked at. Everything but the last group (the pool) belongs to the fingerprint of the annotations."""

    engine: str = "onnx"
    """``onnx``: ONNX Runtime; ``openvino``: OpenVINO, for CPUs; ``torch``: batches, for GPUs; ``paddle``: PaddleOCR itself."""
    backend: str = "onnxruntime"
    """Of the engine ``paddle``: ``onnxruntime``, or ``paddle_static`` where paddlepaddle is installed (``raysys[paddle]``)."""
    precision: str = "fp32"
    """``fp32``, or ``bf16`` with the engines ``torch`` and ``openvino`` (fp16 breaks PP-OCRv4)."""
    model_dir: str | None = None
    """Folder with ``NAME.onnx`` for every network named below; null takes them from the wheels that raysys depends on."""
    looks: list[LookConfig] = field(default_factory=_default_looks)
    """A cascade: a picture gets the next look only where no text was read for sure (``sure_text_score``) before."""
    sure_text_score: float = 0.8
    """A region of three letters or digits read with at least this mean probability settles it; 1 takes every look at every picture."""
    recognize: bool = True
    """Read every stored region. Without it a third of plain photographs would be called text (see README, limits)."""
    recognizer: str = "PP-OCRv6_small_rec"
    pixel_threshold: float = 0.3
    """Text probability above which a pixel belongs to a region (PP-OCR's default)."""
    store_score: float = 0.3
    """Regions below this mean probability are not stored; policies may only ask for more."""
    unclip_ratio: float = 1.5
    """Growth of the shrunken text kernel, Vatti clipping: offset = area * ratio / perimeter (DB, arXiv:1911.08947, eq. 4)."""
    max_regions: int = 200
    """Regions stored of one picture, best score first; a page of a book has more and is decided long before."""

    num_actors: int = 0
    """OCR actors; 0 is one for each CPU of the cluster, or for each GPU share. One thread each: more threads only cost on a CPU."""
    num_gpus_per_actor: float = 0.0
    """Share of a GPU for each actor: engine torch, or onnx and paddle with onnxruntime-gpu."""
    batch: int = 16
    """Pictures that go through the looks together. A CPU gains nothing from more; a GPU wants 256 (``torch`` batches equal shapes)."""
    decode_threads: int = 1
    """Threads of an actor that read and decode ahead of the networks; a GPU wants 8 and more."""
    compile: bool = False
    """torch.compile the networks of the engine ``torch``: minutes at the start, faster after."""
    decode_timeout_s: float = 60.0
    """A picture whose decoder runs longer gets the reason ``timeout`` (a good one takes .01 to 1 s)."""
    unit_mb: float = 1024.0
    """Most bytes of a shard that an actor takes at once; a larger shard is cut by a pass over its headers (which on an object store
    reads it once more). Units are smaller, down to 4 MB, where actors would have fewer than 8 each. A crash costs what its units had
    not finished."""


POOL_KEYS = ("num_actors", "num_gpus_per_actor", "batch", "decode_threads", "compile", "decode_timeout_s", "unit_mb", "model_dir")
"""Keys of OcrConfig that change the speed and not the annotations (the models' hashes stand for ``model_dir``)."""


@dataclass
class PolicyConfig:
    """Which regions count (first four), then which samples go (last three). See :mod:`raysys.policy.policy`."""

    name: str = "paper"
    min_score: float = 0.4
    """Smallest detection score of a counting region, 0..1. Low: a reading proves more than a box (README, text regions)."""
    min_text_score: float = 0.55
    """Smallest recognition score of a counting region: boxes alone throw good photographs away."""
    min_text_chars: int = 2
    """Fewest letters or digits read in a counting region."""
    min_height_frac: float = 0.0
    """Smallest height of a counting region as a share of the picture's height."""
    max_regions: int | None = None
    """Most counting regions of a kept sample; null is any number."""
    max_text_area: float = 0.0
    """Largest share of the picture that counting regions may cover. 0 is the paper's rule: no text region at all."""
    max_caption_overlap: float = 1.0
    """Largest share of the caption's words that may stand in the recognised text ("parrot captions", arXiv:2312.14232)."""


@dataclass
class AugmentConfig:
    """Views of a sample. Pass p over the data uses view p mod factor; a view is a pure function of (seed, sample, view, strength)."""

    factor: int = 1
    """Distinct views of every sample (the paper's augmentation factor); 0 draws a new view on every pass."""
    schedule: str = "constant"
    """Strength over the run: ``constant`` 1, ``ramp`` from 0 to 1 in a line, ``cosine`` from 1 to 0 along half a cosine. Strength scales
    every range and every chance below: at 0 the picture is only resized."""
    off_share: float = 0.0
    """Last share of the steps that see plain pictures (strength 0), whatever the schedule; the schedule runs over the steps before."""
    crop_scale_min: float = 0.9
    """Smallest share of the picture's area in a random resized crop (open_clip's default is .9); 1 switches it off."""
    crop_ratio_max: float = 1.333
    """Largest aspect of the crop, and 1 / it the smallest, whatever the picture's (torchvision's default 4/3)."""
    flip: float = 0.0
    """Chance of a horizontal flip. Off by default: captions know left from right, and text mirrors."""
    color_jitter: float = 0.0
    """Brightness, contrast and saturation: each factor is uniform in [1 - s, 1 + s]."""
    hue: float = 0.0
    """Hue: a turn uniform in [-h, h], in whole circles (torchvision's ColorJitter; at most .5). Slow: 1.4 ms for a view of 224 px."""
    gray: float = 0.0
    """Chance of a grey picture."""
    erase: float = 0.0
    """Chance that a random rectangle (2-20 % of the picture, aspect .3 to 3.3) is filled with noise."""
    randaugment_ops: int = 0
    """Operations of RandAugment (arXiv:1909.13719) one after the other; 0 is none. It rotates and shears, so text may lean. Strength
    scales the magnitude; of Solarize, AutoContrast and Equalize, which have none that leaves a picture as it is, the chance."""
    randaugment_magnitude: int = 9
    """Of RandAugment's 31 magnitudes (0..30), at strength 1."""
    caption: str = "random"
    """Which of several captions a view gets: ``random`` or ``first``."""


@dataclass
class OptimConfig:
    """AdamW as in open_clip: no weight decay on gains, biases and the logit scale."""

    lr: float = 5e-4
    weight_decay: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    warmup_steps: int = 100
    """Steps of linear warm-up; then cosine to 0."""
    grad_clip_norm: float | None = None


@dataclass
class TowersConfig:
    """Which weights are trained; words and meaning are those of open_clip's flags (open_clip_train/params.py)."""

    lock_image: bool = False
    """The image tower keeps its weights (LiT, arXiv:2111.07991)."""
    lock_image_unlocked_groups: int = 0
    """Last groups of its layers that are trained all the same."""
    lock_image_freeze_bn_stats: bool = True
    """Batch norm of the locked layers keeps its statistics too; with open_clip's default, false, they drift."""
    lock_text: bool = False
    """The text tower keeps its weights."""
    lock_text_unlocked_layers: int = 0
    """Last layers of it that are trained all the same."""
    patch_dropout: float | None = None
    """Share of a picture's patches that a ViT does not see in training (FLIP, arXiv:2212.00794); null: as the model's config says."""


@dataclass
class OrderConfig:
    """In which order samples come (:mod:`raysys.corpus.order`); the numbers of a run depend on all three."""

    lanes: int = 64
    """Streams of samples that make up every batch. A worker serves lanes / num_workers of them, so the number of workers should divide it."""
    block_mb: float = 4.0
    """Neighbouring samples that are read at once; an object store wants 4 to 32 MB a request."""
    window_mb: float = 16.0
    """Samples of a lane that are shuffled among each other, over several blocks from all over the lane. All workers together hold
    1 to 2 x lanes x window_mb of encoded pictures in memory."""


@dataclass
class LoopConfig:
    """The budget is steps: it depends neither on the filter nor on ``augment.factor``."""

    steps: int | None = None
    """Optimisation steps; or say ``samples_seen``."""
    samples_seen: int | None = None
    """The budget in samples (DataComp's word), whole batches: steps = samples_seen / global_batch, rounded up."""
    micro_batch: int | None = None
    """Most samples that go through a worker's model at once. A smaller one saves memory and costs a second forward pass (GradCache,
    arXiv:2101.06983); the loss is over the whole global batch all the same. null: all at once; with num_workers=[min,max], a worker's share
    at max."""
    precision: str = "amp_bf16"
    """``amp_bf16`` (GPU, and CPUs with AMX: 3.6 times faster) or ``fp32``: many times as fast on CPUs without AVX512_BF16 and AMX."""
    channels_last: bool = True
    """Memory format of pictures and weights; convolutions are faster so."""
    compile: bool = False
    """torch.compile the model: a minute or more at the start, faster after on a GPU. Needs a C++ compiler."""
    grad_checkpointing: bool = False
    """Keep the inputs of a tower's blocks only and compute the rest anew going backward: less memory, a third more work.
    Batch norm then updates its running statistics twice a step."""
    strategy: str = "ddp"
    """``ddp``: every worker holds the whole model; ``fsdp``: weights, gradients and AdamW's state are cut in num_workers parts (FSDP2),
    for models that do not fit."""
    peak_tflops: float | None = None
    """Most TFLOP/s of one worker's device in this precision, for the metric ``mfu``; null: from a table of GPUs, and no metric for others."""
    validate_every: int | None = None
    """Steps between two validations by ``evaluators``, each with a checkpoint; null: only after the last step."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    checkpoint_every: int = 200
    """Steps between two checkpoints; one more at the end."""
    checkpoint_minutes: float | None = 10.0
    """Minutes after which one is written although ``checkpoint_every`` is not reached: what a crash may cost."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay on disk."""
    keep_best: bool = True
    """Also keep the best: by validation (mean of the evaluators' first metrics), else by mean training loss since the checkpoint before."""
    decode_threads: int = 2
    """Threads of each worker that decode and augment; they share memory with the step, nothing is pickled."""
    read_threads: int = 4
    """Threads of each worker that read from storage; an object store wants 8 and more."""
    prefetch_batches: int = 4
    """Batches that wait ready for a step."""
    max_failures: int = 3
    """Worker deaths that a run survives before it stops."""


FREE_LOOP_KEYS = (
    *("micro_batch", "log_every", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "keep_best"),
    *("decode_threads", "read_threads", "prefetch_batches", "max_failures"),
    *("compile", "grad_checkpointing", "strategy", "peak_tflops", "validate_every"),
)
"""Keys of LoopConfig that change speed and safety, not what is learnt: a run may be taken up with others."""


@dataclass
class ClassSetConfig:
    """A labelled set for zero-shot classification."""

    path: str | None = None
    """One folder of pictures a class (WNIDs for ImageNet); a folder of pictures with ``labels``; CLIP_benchmark's WebDataset folder; Parquet
    files with pictures and labels (Hugging Face's); or any of them as ``raysys attack`` wrote it."""
    labels: str | None = None
    """Which class each picture of a flat folder shows: lines of a picture's name and its class (WNID, folder name or number from 0), or one
    WNID a line in the order of the pictures' names; null takes the one of the usual names beside the pictures."""
    classes: str | None = None
    """JSON file {folder name: class name}, in class order; null is the set's own list where it has one, else ImageNet's 1,000."""
    templates: str | None = None
    """``openai`` (80 templates), ``simple`` ("a photo of a {}.") or a text file, one template with {} (or {c}) a line; null is the set's own
    where it has them, else ``openai``."""
    split: str | None = None
    """Of a WebDataset folder (null is ``test``) or of Parquet files named by their split."""
    name: str | None = None
    """Of the data set, in results; null is the evaluator's."""


@dataclass
class RetrievalSetConfig:
    path: str | None = None
    """Pictures with captions: COCO's folder, CLIP_benchmark's WebDataset folder, WebDataset tars (captions in .json ``captions`` or .txt, one
    a line), Parquet files, or a folder with captions.jsonl or captions.csv."""
    captions: str | None = None
    """COCO's captions_val2017.json or Karpathy's dataset_coco.json (dataset_flickr30k.json) where it does not lie in ``path``."""
    split: str | None = None
    """Of Karpathy's file, a WebDataset folder, or Parquet files (in their names, or a column ``split``); null is ``test``."""
    name: str | None = None
    """Of the data set, in results; null is the evaluator's, or a more exact one."""


@dataclass
class TypographicSetConfig:
    """Pictures on which a wrong word stands (RTA-100, SCAM, PAINT): picture, true label, written label."""

    path: str | None = None
    """Folder of pictures, or Parquet files with them."""
    labels: str | None = None
    """CSV, JSON lines or Parquet with a line a picture; null: columns of the Parquet files, metadata.csv or metadata.jsonl beside the
    pictures, else their names, ``label=TRUE_text=WRITTEN.png`` (RTA-100, PAINT)."""
    type: str | None = None
    """Take only lines whose column ``type`` says so (SCAM's table holds SCAM, SynthSCAM and NoSCAM)."""
    classes: str | None = None
    """Text file, one possible answer a line; null: every true and every written label of the set."""
    templates: str | None = None
    """As of the class sets; null is ``simple``."""
    name: str | None = None
    """Of the data set, in results; null is the evaluator's."""


@dataclass
class ServiceConfig:
    """The evaluators' actors. Nothing here changes a number but ``precision``."""

    batch_size: int = 64
    """Pictures that go through a model at once."""
    num_actors: int = 0
    """Actors that share the work on every set; 0: one for each GPU share, without GPUs one for each node."""
    num_gpus_per_actor: float = 0.0
    """Share of a GPU for each actor."""
    precision: str = "fp32"
    """``fp32``, or ``amp_bf16``: faster on a GPU, and not the same numbers."""
    cache_dir: str | None = None
    """Local folder of each node for decoded sets (147 KB a picture at 224 px); null is raysys-UID in the system's temporary folder."""


@dataclass
class QuestionsConfig(VerbConfig):
    """What a model is asked, and where the pictures are."""

    evaluators: list[str] = MISSING
    """Some of imagenet, coco, retrieval, imagenet_attr, typographic."""
    imagenet: ClassSetConfig = field(default_factory=ClassSetConfig)
    """Any labelled set, with ``classes`` and ``templates`` of its own."""
    imagenet_attr: ClassSetConfig = field(default_factory=ClassSetConfig)
    """What ``raysys attack`` wrote."""
    coco: RetrievalSetConfig = field(default_factory=RetrievalSetConfig)
    retrieval: RetrievalSetConfig = field(default_factory=RetrievalSetConfig)
    typographic: TypographicSetConfig = field(default_factory=TypographicSetConfig)
    service: ServiceConfig = field(default_factory=ServiceConfig)


@dataclass
class RecipeConfig(VerbConfig):
    """What is trained, on what, and how."""

    output: str = MISSING
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    annotations: str | None = None
    """Annotations of the corpus; with ``policy`` they decide what is kept."""
    selection: str | None = None
    """A selection written by ``raysys filter``, instead of annotations and policy."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    model: str = MISSING
    """An open_clip name, a model of conf/models, a JSON config file, ``local-dir:DIR`` or a run folder."""
    pretrained: str | None = None
    """Start from: ``random``, an open_clip tag or a file; null: the weights of the model's folder where it is one, else random."""
    loss: str = "clip"
    """``clip``: softmax over the global batch (arXiv:2103.00020), or ``siglip``: a sigmoid for every pair (arXiv:2303.15343). Each worker
    compares its rows with the whole batch, and gradients pass through the gathered features. Of open_clip's flags that is --local-loss
    with --gather-with-grad; without the second the first trains wrongly, and the other two ways give the same for more work."""
    global_batch: int = 256
    """Samples of one step over all workers; CLIP contrasts within it."""
    num_workers: Any = 1
    """Training processes (one GPU each where ``use_gpu``), or ``[min,max]``: as many as the cluster has at the time. The global batch stays."""
    use_gpu: bool = False
    seed: int = 0
    towers: TowersConfig = field(default_factory=TowersConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    order: OrderConfig = field(default_factory=OrderConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    @property
    def num_steps(self) -> int:
        """Optimisation steps of the run."""
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.samples_seen is not None  # check_recipe
        return -(-self.train.samples_seen // self.global_batch)

    @property
    def worker_range(self) -> tuple[int, int]:
        """Fewest and most workers."""
        return (self.num_workers, self.num_workers) if isinstance(self.num_workers, int) else tuple(self.num_workers)


@dataclass
class TrainConfig(QuestionsConfig, RecipeConfig):
    evaluators: list[str] = field(default_factory=list)
    """Asked after the last step, and every ``train.validate_every`` steps, by an evaluator that works beside the training."""


@dataclass
class AnnotateConfig(VerbConfig):
    output: str = MISSING
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    ocr: OcrConfig = field(default_factory=OcrConfig)
    ray: RayConfig = field(default_factory=RayConfig)


@dataclass
class FilterConfig(VerbConfig):
    output: str = MISSING
    annotations: str = MISSING
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """Where the corpus lies now, if not where it was annotated (``shards`` reads it; else only sizes and times are compared)."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    shards: str | None = None
    """Also write the kept samples as WebDataset shards into this folder."""


@dataclass
class AttackSettings:
    """What is written on the pictures, and how. The defaults are the authors' recipe (``attack=authors``)."""

    name: str = "authors"
    classes: str = MISSING
    """Which wrong class, never chosen silently: ``confusions`` (of a model: ``predictions``, and ``model`` for classes that it never takes for
    another), ``nearest`` (nearest text embedding of ``model``), ``random`` (drawn from ``seed`` for each picture), or a JSON file: {class:
    class} by folder or class names, or {"written_class": [index for each class]}."""
    predictions: str | None = None
    """Of ``classes=confusions``: E/predictions/imagenet_MODEL.parquet of ``raysys evaluate``."""
    model: str | None = None
    """Of ``classes=nearest`` and ``confusions``; as ``model`` of evaluate."""
    pretrained: str | None = None
    seed: int = 0
    fonts: list[str] = field(default_factory=list)
    """TrueType files (the authors: Arial Unicode), or names of fonts in the matplotlib wheel (``DejaVuSerif-Bold``), one drawn for each
    picture; none is DejaVu Sans. The manifest names them."""
    font_px: int = 50
    """Size of the letters on the picture's original size."""
    font_frac: list[float] = field(default_factory=list)
    """[low, high] instead of ``font_px``: drawn for each picture, as a share of its short side."""
    x_px: int = 50
    y_px: int = 50
    """Left upper corner of the text."""
    random_place: bool = False
    """Draw the place instead, such that the text lies in the picture where it fits."""
    color: list[int] = field(default_factory=lambda: [255, 0, 0])
    random_color: bool = False
    max_rotation_deg: float = 0.0
    """Turn the text by an angle drawn from minus this to this."""
    background: float = 0.0
    """Chance of a plain box behind the text, black or white, whichever differs more from the text."""
    overflow: str = "cut"
    """Text longer than the picture is wide: ``cut`` off at the edge, ``fit`` (smaller letters) or ``wrap`` (lines, then smaller letters)."""


@dataclass
class AttackConfig(VerbConfig):
    output: str = MISSING
    imagenet: ClassSetConfig = field(default_factory=ClassSetConfig)
    attack: AttackSettings = field(default_factory=AttackSettings)
    num_actors: int = 0
    """Processes that draw at once; 0 is one for each CPU of the cluster."""
    ray: RayConfig = field(default_factory=RayConfig)


@dataclass
class ModelConfig:
    model: str = MISSING
    """As ``model``."""
    pretrained: str | None = None


@dataclass
class EvaluateConfig(QuestionsConfig):
    output: str = MISSING
    model: str | None = None
    """An open_clip name, a model of conf/models, a JSON config file, ``local-dir:DIR`` or a run folder."""
    pretrained: str | None = None
    """open_clip's tag, a file, or the word ``random``; not needed for run folders and ``local-dir:``."""
    models: dict[str, ModelConfig] = field(default_factory=dict)
    """Several instead of one: ``models.NAME.model=... models.NAME.pretrained=...``; every other one is compared with the first."""
    ray: RayConfig = field(default_factory=RayConfig)


@dataclass
class AshaConfig:
    """Early stopping by asynchronous successive halving (arXiv:1810.05934)."""

    grace_steps: int | None = None
    """No trial ends before it has so many steps (``train.validate_every`` says when trials are compared); null: every trial runs to its end."""
    reduction_factor: float = 4.0
    """At each rung (grace_steps, this many times it, ...) the best 1 / reduction_factor of the trials go on (Ray Tune's default)."""


@dataclass
class SweepConfig(TrainConfig):
    """A point is what ``space`` says of it; a trial is a point with a seed; one pool of evaluators serves all trials."""

    evaluators: list[str] = MISSING
    """Some of imagenet, coco, retrieval, imagenet_attr, typographic. Objectives are their first metrics (acc1, mean_recall@1)."""
    space: str = MISSING
    """Name in conf/space or a YAML file: key of the train config -> list of values, or {low, high, log} for a number."""
    search: str = "grid"
    """``grid``: every combination of the lists; ``random``; ``tpe``: Optuna's tree-structured Parzen estimator, which learns from the trials
    that ended (arXiv:2304.11127)."""
    num_samples: int | None = None
    """Points of ``random`` and ``tpe``. More than an earlier call had: the sweep goes on."""
    seeds: int = 1
    """Trials of each point, with ``seed``, ``seed + 1``, ...: their means are compared, never the luckiest. More than before: goes on."""
    objective: str = "mean"
    """What ``best.yaml``, ``asha`` and ``tpe`` go by: the ``mean`` of the objectives, or one evaluator's name. With ``tpe`` also ``front``: all
    objectives at once (Optuna's multi-objective TPE); best.yaml then goes by the mean."""
    asha: AshaConfig = field(default_factory=AshaConfig)
    max_concurrent: int = 0
    """Trials at a time; 0: as many as the cluster has room for."""
    measure_steps: int = 20
    """Steps of the rehearsal that says, before the start, what the sweep will take; 0: none."""
    dry_run: bool = False
    """Stop after the cost line."""


@dataclass
class ReportConfig(VerbConfig):
    path: str = MISSING
    """Any output folder of raysys; ``raysys report PATH`` writes PATH/report.html."""


@dataclass
class DoctorConfig(VerbConfig):
    ray: RayConfig = field(default_factory=RayConfig)


@dataclass
class DemoConfig(VerbConfig):
    output: str = MISSING
    num_scenes: int = 14_000
    text_share: float = 0.5
    """Share of the scenes that carry text (LAION-2B: .55, arXiv:2312.14232); half of these carry nothing else."""
    model: str = "test_resnet-64"
    """A name of conf/models or a JSON file: 0.4M parameters for the pictures, so that the demo ends in minutes on two cores."""
    num_workers: int = 2
    global_batch: int = 64
    seed: int = 0
    ocr: OcrConfig = field(default_factory=OcrConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    order: OrderConfig = field(default_factory=OrderConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    ray: RayConfig = field(default_factory=RayConfig)


VERBS: dict[str, type] = {
    "annotate": AnnotateConfig,
    "filter": FilterConfig,
    "train": TrainConfig,
    "attack": AttackConfig,
    "evaluate": EvaluateConfig,
    "sweep": SweepConfig,
    "report": ReportConfig,
    "doctor": DoctorConfig,
    "demo": DemoConfig,
}
"""Verb -> schema, in the order of the pipeline."""


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, f"{key}={value} is not one of {', '.join(choices)}")


def _positive(key: str, value: float) -> None:
    _require(value > 0, f"{key}={value} must be greater than 0")


def _share(key: str, value: float) -> None:
    _require(0 <= value <= 1, f"{key}={value} must lie in 0..1")


def check_ocr(ocr: OcrConfig) -> None:
    _one_of("ocr.engine", ocr.engine, ENGINES)
    _one_of("ocr.backend", ocr.backend, ("onnxruntime", "paddle_static"))
    _one_of("ocr.precision", ocr.precision, ("fp32", "bf16"))
    _require(ocr.backend == "onnxruntime" or ocr.engine == "paddle", f"ocr.backend={ocr.backend} needs ocr.engine=paddle")
    _require(
        ocr.precision == "fp32" or ocr.engine in ("torch", "openvino"), "ocr.precision=bf16 needs ocr.engine=torch or openvino"
    )
    _require(not ocr.compile or ocr.engine == "torch", "ocr.compile=true needs ocr.engine=torch")
    _require(
        ocr.num_gpus_per_actor == 0 or ocr.engine != "openvino",
        "ocr.engine=openvino runs on CPUs; leave ocr.num_gpus_per_actor at 0",
    )
    for key in ("pixel_threshold", "store_score", "num_gpus_per_actor", "sure_text_score"):
        _share(f"ocr.{key}", getattr(ocr, key))
    for key in ("unclip_ratio", "max_regions", "batch", "decode_threads", "decode_timeout_s", "unit_mb"):
        _positive(f"ocr.{key}", getattr(ocr, key))
    _require(len(ocr.looks) > 0, "ocr.looks is empty: give at least one look")
    for number, look in enumerate(ocr.looks):
        for key in ("enlarge", "max_side_px"):
            _positive(f"ocr.looks[{number}].{key}", getattr(look, key))
        _require(look.max_side_px % 32 == 0, f"ocr.looks[{number}].max_side_px={look.max_side_px} must be a multiple of 32")
    _require(ocr.num_actors >= 0, f"ocr.num_actors={ocr.num_actors} must not be negative")


def check_policy(policy: PolicyConfig) -> None:
    for key in ("min_score", "min_text_score", "min_height_frac", "max_text_area", "max_caption_overlap"):
        _share(f"policy.{key}", getattr(policy, key))
    _require(policy.min_text_chars >= 0, f"policy.min_text_chars={policy.min_text_chars} must not be negative")
    _require(policy.max_regions is None or policy.max_regions >= 0, f"policy.max_regions={policy.max_regions} must not be negative")


def check_augment(augment: AugmentConfig) -> None:
    _require(augment.factor >= 0, f"augment.factor={augment.factor} must not be negative (0 draws a new view on every pass)")
    _one_of("augment.schedule", augment.schedule, SCHEDULES)
    for key in ("crop_scale_min", "flip", "color_jitter", "gray", "erase", "off_share"):
        _share(f"augment.{key}", getattr(augment, key))
    _positive("augment.crop_scale_min", augment.crop_scale_min)
    _require(0 <= augment.hue <= 0.5, f"augment.hue={augment.hue} must lie in 0 .. 0.5")
    _require(augment.randaugment_ops >= 0, f"augment.randaugment_ops={augment.randaugment_ops} must not be negative")
    magnitude = augment.randaugment_magnitude
    _require(0 <= magnitude <= 30, f"augment.randaugment_magnitude={magnitude} must lie in 0..30")
    _require(augment.crop_ratio_max >= 1, f"augment.crop_ratio_max={augment.crop_ratio_max} must be at least 1")
    _one_of("augment.caption", augment.caption, ("random", "first"))


def check_recipe(cfg: TrainConfig | DemoConfig) -> None:
    """What train, sweep and demo share."""
    loop = cfg.train
    _require(loop.steps is not None or loop.samples_seen is not None, "missing: train.steps=... or train.samples_seen=...")
    _require(loop.steps is None or loop.samples_seen is None, "train.steps and train.samples_seen are both given; leave one out")
    for key in ("steps", "samples_seen", "micro_batch", "checkpoint_minutes", "peak_tflops", "validate_every"):
        if getattr(loop, key) is not None:
            _positive(f"train.{key}", getattr(loop, key))
    for key in ("log_every", "checkpoint_every", "keep_checkpoints", "decode_threads", "read_threads", "prefetch_batches"):
        _positive(f"train.{key}", getattr(loop, key))
    _one_of("train.precision", loop.precision, (*PRECISIONS, OF_CPU) if isinstance(cfg, DemoConfig) else PRECISIONS)
    _one_of("train.strategy", loop.strategy, STRATEGIES)
    for key in ("lr", "eps", "grad_clip_norm"):
        if getattr(cfg.optim, key) is not None:
            _positive(f"optim.{key}", getattr(cfg.optim, key))
    for key in ("weight_decay", "warmup_steps"):
        _require(getattr(cfg.optim, key) >= 0, f"optim.{key}={getattr(cfg.optim, key)} must not be negative")
    check_augment(cfg.augment)
    check_order(cfg.order)
    _positive("global_batch", cfg.global_batch)
    check_workers(cfg)


def check_workers(cfg: TrainConfig | DemoConfig) -> None:
    """Every worker has the same number of samples, or, where their number is not fixed, at least one."""
    workers, batch, lanes = cfg.num_workers, cfg.global_batch, cfg.order.lanes
    if isinstance(workers, list):
        whole = len(workers) == 2 and all(type(n) is int for n in workers) and 1 <= workers[0] <= workers[1]
        _require(whole, f"num_workers={workers} must be a number or [min,max]")
        _require(
            cfg.train.strategy == "ddp",
            f"num_workers={workers}: train.strategy=fsdp needs a fixed number of workers; try {workers[1]}",
        )
        most = min(batch, lanes)
        _require(workers[1] <= most, f"num_workers={workers}: at most {most}, as global_batch={batch} and order.lanes={lanes}")
        return
    _require(type(workers) is int, f"num_workers={workers} must be a number or [min,max]")
    _positive("num_workers", workers)
    nearest = max(batch // workers, 1) * workers
    _require(batch % workers == 0, f"global_batch={batch} is not a multiple of num_workers={workers}; try {nearest}")
    more = -(-lanes // workers) * workers
    _require(lanes % workers == 0, f"num_workers={workers} does not divide order.lanes={lanes}; try order.lanes={more}")


def check_order(order: OrderConfig) -> None:
    for key in ("lanes", "block_mb", "window_mb"):
        _positive(f"order.{key}", getattr(order, key))


def check_towers(towers: TowersConfig) -> None:
    for what, key in (("image", "lock_image_unlocked_groups"), ("text", "lock_text_unlocked_layers")):
        unlocked = getattr(towers, key)
        _require(unlocked >= 0, f"towers.{key}={unlocked} must not be negative")
        _require(unlocked == 0 or getattr(towers, f"lock_{what}"), f"towers.{key}={unlocked} needs towers.lock_{what}=true")
    dropout = towers.patch_dropout
    _require(dropout is None or 0 <= dropout < 1, f"towers.patch_dropout={dropout} must be at least 0 and less than 1")


def check_evaluators(cfg: QuestionsConfig) -> None:
    for name in cfg.evaluators:
        _one_of("evaluators", name, EVALUATORS)
        _require(getattr(cfg, name).path is not None, f"evaluator {name} needs {name}.path=...")
    check_service(cfg.service)


def check_service(service: ServiceConfig) -> None:
    _positive("service.batch_size", service.batch_size)
    _require(service.num_actors >= 0, f"service.num_actors={service.num_actors} must not be negative")
    gpus = service.num_gpus_per_actor
    _require(
        gpus >= 0 and (gpus <= 1 or gpus == int(gpus)), f"service.num_gpus_per_actor={gpus} must be a share of a GPU or whole GPUs"
    )
    _one_of("service.precision", service.precision, PRECISIONS)


def check_attack(attack: AttackSettings) -> None:
    color, frac = attack.color, attack.font_frac
    _require(
        len(color) == 3 and all(0 <= c <= 255 for c in color),
        f"attack.color={color} must be three numbers 0..255 (red, green, blue)",
    )
    _positive("attack.font_px", attack.font_px)
    in_order = len(frac) == 2 and 0 < frac[0] <= frac[1] <= 1
    _require(not frac or in_order, f"attack.font_frac={frac} must be [low,high] with 0 < low <= high <= 1")
    _share("attack.background", attack.background)
    _require(0 <= attack.max_rotation_deg <= 180, f"attack.max_rotation_deg={attack.max_rotation_deg} must lie in 0..180")
    _one_of("attack.overflow", attack.overflow, OVERFLOWS)
    if attack.classes == "confusions":
        _require(
            attack.predictions is not None,
            "attack.classes=confusions needs attack.predictions=E/predictions/imagenet_MODEL.parquet",
        )
    else:
        _require(attack.predictions is None, "attack.predictions is for attack.classes=confusions; leave it out")
    if attack.classes == "nearest":
        _require(attack.model is not None, "attack.classes=nearest needs attack.model=MODEL")


def check_sweep(cfg: SweepConfig) -> None:
    _one_of("search", cfg.search, SEARCHES)
    if cfg.search == "grid":
        _require(
            cfg.num_samples is None,
            "num_samples is for search=random and search=tpe: a grid has every point once; seeds=N repeats each",
        )
    else:
        _require(cfg.num_samples is not None, f"search={cfg.search} needs num_samples=N, the number of points")
        _positive("num_samples", cfg.num_samples or 0)
    _positive("seeds", cfg.seeds)
    _require(cfg.measure_steps != 1, "measure_steps=1 measures nothing (the first step is slower); 0 leaves the rehearsal out")
    for key in ("max_concurrent", "measure_steps"):
        _require(getattr(cfg, key) >= 0, f"{key}={getattr(cfg, key)} must not be negative")
    _one_of("objective", cfg.objective, ("mean", *(["front"] if cfg.search == "tpe" else []), *cfg.evaluators))
    grace, every = cfg.asha.grace_steps, cfg.train.validate_every
    if grace is not None:
        _positive("asha.grace_steps", grace)
        _require(every is not None, f"asha.grace_steps={grace} needs train.validate_every=N: trials are compared by validations")
        _require(
            every is None or grace >= every,
            f"asha.grace_steps={grace} comes before the first validation, train.validate_every={every}; give as many",
        )
        _require(
            cfg.seeds == 1,
            f"asha with seeds={cfg.seeds}: one seed that is stopped takes its point out of the comparison; find points with seeds=1, then repeat the good ones",
        )
        _require(grace < cfg.num_steps, f"asha.grace_steps={grace} must be less than the {cfg.num_steps} steps of a trial")
        _require(cfg.objective != "front", "objective=front: asha goes by one number; choose mean or an evaluator")
    _require(cfg.asha.reduction_factor > 1, f"asha.reduction_factor={cfg.asha.reduction_factor} must be greater than 1")


def check_corpus(corpus: CorpusConfig, *, needed: bool) -> None:
    _require(not needed or corpus.path is not None or bool(corpus.sources), "missing: corpus.path=...")
    _require(corpus.path is None or not corpus.sources, "corpus.path and corpus.sources are both given; leave one out")
    for name, source in corpus.sources.items():
        _require(name != "" and "/" not in name, f"corpus.sources.{name}: a source's name must be a word without a slash")
        _require(source.weight is None or source.weight > 0, f"corpus.sources.{name}.weight={source.weight} must be greater than 0")
    without = [name for name, source in corpus.sources.items() if source.weight is None]
    all_or_none = len(without) in (0, len(corpus.sources))
    _require(all_or_none, f"corpus.sources: {', '.join(without)} has no weight, others have; give all of them one, or none")


def check(cfg: Any) -> None:
    """Refuse impossible values. :raises ValueError: with one line that names the key and the mend."""
    if isinstance(cfg, VerbConfig):
        _one_of("verbosity", cfg.verbosity, VERBOSITIES)
    if isinstance(cfg, AnnotateConfig | TrainConfig | FilterConfig):
        check_corpus(cfg.corpus, needed=not isinstance(cfg, FilterConfig))
    if hasattr(cfg, "ocr"):
        check_ocr(cfg.ocr)
    if hasattr(cfg, "policy"):
        check_policy(cfg.policy)
    if isinstance(cfg, TrainConfig | DemoConfig):
        check_recipe(cfg)
    if isinstance(cfg, QuestionsConfig):
        needed = isinstance(cfg, EvaluateConfig | SweepConfig)
        _require(len(cfg.evaluators) > 0 or not needed, f"evaluators is empty; choose from {', '.join(EVALUATORS)}")
        check_evaluators(cfg)
    if isinstance(cfg, TrainConfig):
        _one_of("loss", cfg.loss, LOSSES)
        check_towers(cfg.towers)
        _require(
            cfg.annotations is None or cfg.selection is None,
            "annotations and selection are both given; a selection knows its annotations, leave one out",
        )
    if isinstance(cfg, TrainConfig | DemoConfig) and cfg.train.validate_every is not None:
        _require(
            isinstance(cfg, TrainConfig),
            "train.validate_every is for train and sweep; demo evaluates a model when it is trained; leave it out",
        )
        _require(isinstance(cfg, TrainConfig) and len(cfg.evaluators) > 0, "train.validate_every needs evaluators=[...]")
    if isinstance(cfg, SweepConfig):
        check_sweep(cfg)
    if isinstance(cfg, EvaluateConfig):
        _require(cfg.model is not None or bool(cfg.models), "missing: model=... (or models.NAME.model=... for several)")
        _require(cfg.model is None or not cfg.models, "model and models are both given; leave one out")
        _require(not cfg.models or cfg.pretrained is None, "pretrained is of model; of several write models.NAME.pretrained=...")
        for name in cfg.models:
            good = re.fullmatch(r"[\w-]+", name) is not None
            _require(good, f"models.{name}: a model's name is part of file names; use letters, digits, _ and -")
    if isinstance(cfg, AttackConfig):
        _require(cfg.imagenet.path is not None, "attack needs imagenet.path=FOLDER, one folder of pictures a class")
        _require(cfg.num_actors >= 0, f"num_actors={cfg.num_actors} must not be negative")
        check_attack(cfg.attack)
    if isinstance(cfg, DemoConfig):
        _require(cfg.num_scenes >= 1000, f"demo: num_scenes={cfg.num_scenes} must be at least 1000")
        _share("text_share", cfg.text_share)


def config_dir() -> str:
    """Folder of the choices: inside the installed package, or ``conf/`` of the checkout."""
    packaged = Path(__file__).parent / "conf"
    return str(packaged if packaged.is_dir() else Path(__file__).parent.parent / "conf")


def choices(group: str) -> list[str]:
    """Names in a group of ``conf/``."""
    return sorted(file.stem for file in (Path(config_dir()) / group).glob("*.yaml"))
