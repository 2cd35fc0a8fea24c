"""One model, asked every question: pictures and prompts -> embeddings -> metrics and predictions. No Ray.

In: named sets (configs), a model's spec. Out: :class:`SetResult` for each set. Decoded pictures and tokenised prompts stay in
memory between models, so a sweep decodes and tokenises once. Always float32. Leaves files and processes to
:mod:`raysys.evaluation.on_ray`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch

from raysys.config import ClassSetConfig, RetrievalSetConfig
from raysys.evaluation.datasets import ClassSet, Picture, RetrievalSet, decode, normalise, read_class_set, read_retrieval_set
from raysys.evaluation.retrieval import image_ranks, retrieval_metrics, text_ranks
from raysys.evaluation.zero_shot import attack_metrics, best_classes, class_embeddings, classification_metrics, prompts
from raysys.models import LoadedModel, load_model
from raysys.storage import UserError, fingerprint, mask

SetConfig = ClassSetConfig | RetrievalSetConfig
DECODE_CHUNK = 1024  # pictures between two steps of progress
ATTACKED = "imagenet_attr"
"""The evaluator whose set says what is written on each picture."""
PRIMARY = {"imagenet": "acc1", "imagenet_attr": "acc1", "coco": "mean_recall@1", "retrieval": "mean_recall@1"}
"""Evaluator -> the metric that stands for it in a sweep's score and in the demo's table."""
CLASSIFICATION, RETRIEVAL = "zeroshot_classification", "zeroshot_retrieval"  # CLIP_benchmark's names


@dataclass(frozen=True)
class SetResult:
    evaluator: str
    dataset: str
    """The evaluator's name, or a more exact one (``coco_val2017``)."""
    task: str
    metrics: dict[str, float]
    """Fractions, and counts (``num_...``)."""
    predictions: pa.Table
    """Classification: picture, true_class, predicted_class, (written_class), score. Retrieval: text, image, rank (1 is first)."""


@dataclass(frozen=True)
class Step:
    """Some work done, for a line of progress."""

    stage: str
    unit: str
    done: int
    """Since the last step; a stage begins with a step of 0."""
    total: int


def read_set(name: str, cfg: SetConfig) -> ClassSet | RetrievalSet:
    """:raises UserError: for a set that cannot be used."""
    if isinstance(cfg, RetrievalSetConfig):
        return read_retrieval_set(cfg, name)
    return read_class_set(cfg, name, attacked=name == ATTACKED)


class Evaluator:
    """Holds decoded sets between models. Nothing is read before the first question."""

    def __init__(self, sets: dict[str, SetConfig], *, batch_size: int, device: str = "cpu", threads: int = 1) -> None:
        """:param threads: that decode pictures; torch keeps its own number."""
        self._configs = sets
        self._batch_size = batch_size
        self._device = device
        self._threads = threads
        self._sets: dict[str, ClassSet | RetrievalSet] = {}
        self._pixels: dict[str, tuple[str, np.ndarray]] = {}  # set -> (which transform, uint8 [N, H, W, 3])
        self._tokens: dict[str, torch.Tensor] = {}  # prompts and tokenizer -> int64 [C, T, L]

    def evaluate(self, model: str, pretrained: str | None = None) -> dict[str, dict[str, float]]:
        """Metrics of a model on every set. :raises UserError: for a model or set that cannot be used."""
        results = (item for item in self.steps(model, pretrained, list(self._configs)) if isinstance(item, SetResult))
        return {result.evaluator: result.metrics for result in results}

    def steps(self, model: str, pretrained: str | None, names: Sequence[str]) -> Iterator[Step | SetResult]:
        """The same set by set, with steps for a line of progress in between."""
        yield from self._ask(load_model(model, pretrained, device=self._device), names)

    def evaluate_loaded(self, loaded: LoadedModel) -> dict[str, dict[str, float]]:
        """Metrics on every set of a model that somebody else has built; it is moved to the evaluator's device."""
        loaded.model.to(self._device).eval()
        results = (item for item in self._ask(loaded, list(self._configs)) if isinstance(item, SetResult))
        return {result.evaluator: result.metrics for result in results}

    def _ask(self, loaded: LoadedModel, names: Sequence[str]) -> Iterator[Step | SetResult]:
        classifiers: dict[str, torch.Tensor] = {}  # clean and attacked sets ask the same prompts: encoded once a model
        for name in names:
            if name not in self._sets:
                self._sets[name] = read_set(name, self._configs[name])
            a_set = self._sets[name]
            yield from self._decode(name, a_set.pictures, loaded)
            image_ND = yield from self._gather(
                Step(name, "pictures", 0, len(a_set.pictures)), self._encode_images(name, loaded), loaded
            )
            if isinstance(a_set, ClassSet):
                key = fingerprint([a_set.class_names, a_set.templates])
                if key not in classifiers:
                    begin = Step(name, "classes", 0, len(a_set.class_names))
                    classifiers[key] = yield from self._gather(begin, self._encode_classes(a_set, loaded), loaded)
                yield _classify(name, a_set, image_ND, classifiers[key])
            else:
                begin = Step(name, "captions", 0, len(a_set.captions))
                text_TD = yield from self._gather(begin, self._encode_captions(a_set, loaded), loaded)
                yield _retrieve(name, a_set, image_ND, text_TD)

    @staticmethod
    def _gather(begin: Step, batches: Iterator[torch.Tensor], loaded: LoadedModel) -> Generator[Step, None, torch.Tensor]:
        """Batches [B, D] -> [total, D], a step for each."""
        yield begin
        gathered = []
        for batch in batches:
            if not batch.isfinite().all():
                why = "its training diverged, or its weights are damaged"
                raise UserError(f"model={mask(loaded.name)} gives embeddings that are not finite; {why}")
            gathered.append(batch)
            yield replace(begin, done=len(batch))
        return torch.cat(gathered)

    def _decode(self, name: str, pictures: list[Picture], loaded: LoadedModel) -> Iterator[Step]:
        shape_of_it = {k: v for k, v in loaded.preprocess_cfg.items() if k not in ("mean", "std")}
        key = fingerprint([shape_of_it, repr(loaded.preprocess.transforms[:-1])])
        if name in self._pixels and self._pixels[name][0] == key:
            return
        self._pixels.pop(name, None)  # before the new one is made: one transform a set is held
        begin = Step(f"{name}: decode", "pictures", 0, len(pictures))
        yield begin
        pixels_NHWC: np.ndarray | None = None
        for start in range(0, len(pictures), DECODE_CHUNK):
            chunk = decode(pictures[start : start + DECODE_CHUNK], loaded.preprocess, threads=self._threads)
            if pixels_NHWC is None:
                pixels_NHWC = np.empty((len(pictures), *chunk.shape[1:]), np.uint8)
            pixels_NHWC[start : start + len(chunk)] = chunk
            yield replace(begin, done=len(chunk))
        assert pixels_NHWC is not None  # a set without pictures is refused when it is read
        self._pixels[name] = key, pixels_NHWC

    @torch.inference_mode()
    def _encode_images(self, name: str, loaded: LoadedModel) -> Iterator[torch.Tensor]:
        """Embeddings [B, D] of length 1, in order."""
        pixels_NHWC = self._pixels[name][1]
        encode: Callable[..., torch.Tensor] = loaded.model.encode_image  # type: ignore[assignment]
        for start in range(0, len(pixels_NHWC), self._batch_size):
            pixels = torch.from_numpy(pixels_NHWC[start : start + self._batch_size]).to(self._device)
            yield encode(normalise(pixels, loaded.preprocess), normalize=True).float()

    @torch.inference_mode()
    def _encode_classes(self, class_set: ClassSet, loaded: LoadedModel) -> Iterator[torch.Tensor]:
        encode: Callable[..., torch.Tensor] = loaded.model.encode_text  # type: ignore[assignment]
        tokens_CTL = self._prompt_tokens(class_set, loaded)
        for tokens in tokens_CTL.split(max(4 * self._batch_size // tokens_CTL.shape[1], 1)):
            yield class_embeddings(lambda tokens_BL: encode(tokens_BL).float(), tokens.to(self._device))

    def _prompt_tokens(self, class_set: ClassSet, loaded: LoadedModel) -> torch.Tensor:
        tokenizer = type(loaded.tokenizer).__name__
        how = {
            k: v for k, v in loaded.config["text_cfg"].items() if k in ("context_length", "hf_tokenizer_name", "tokenizer_kwargs")
        }
        key = fingerprint([class_set.class_names, class_set.templates, tokenizer, how])
        if key not in self._tokens:
            texts = prompts(class_set.class_names, class_set.templates)
            self._tokens[key] = loaded.tokenizer(texts).unflatten(0, (-1, len(class_set.templates)))
        return self._tokens[key]

    @torch.inference_mode()
    def _encode_captions(self, retrieval_set: RetrievalSet, loaded: LoadedModel) -> Iterator[torch.Tensor]:
        encode: Callable[..., torch.Tensor] = loaded.model.encode_text  # type: ignore[assignment]
        for start in range(0, len(retrieval_set.captions), 4 * self._batch_size):
            tokens = loaded.tokenizer(retrieval_set.captions[start : start + 4 * self._batch_size])
            yield encode(tokens.to(self._device), normalize=True).float()


def _classify(name: str, class_set: ClassSet, image_ND: torch.Tensor, classifier_CD: torch.Tensor) -> SetResult:
    scores_NK, best_NK = (t.cpu() for t in best_classes(image_ND, classifier_CD))
    label_N = torch.tensor(class_set.labels)
    metrics = classification_metrics(best_NK, label_N)
    columns = {
        "picture": pa.array([picture.name for picture in class_set.pictures], pa.string()),
        "true_class": pa.array(class_set.labels, pa.int32()),
        "predicted_class": pa.array(best_NK[:, 0].numpy(), pa.int32()),
    }
    if class_set.written is not None:
        metrics |= attack_metrics(best_NK, label_N, torch.tensor(class_set.written), class_set.class_names)
        columns["written_class"] = pa.array(class_set.written, pa.int32())
    columns["score"] = pa.array(scores_NK[:, 0].numpy(), pa.float32())  # cosine of the first answer
    metrics |= {
        "num_pictures": len(class_set.pictures),
        "num_classes": len(class_set.class_names),
        "num_classes_with_pictures": class_set.num_classes_with_pictures,
    }
    return SetResult(name, name, CLASSIFICATION, metrics, pa.table(columns))


def _retrieve(name: str, retrieval_set: RetrievalSet, image_ID: torch.Tensor, text_TD: torch.Tensor) -> SetResult:
    image_of_text_T = torch.tensor(retrieval_set.image_of_text, device=image_ID.device)
    image_rank_T = image_ranks(image_ID, text_TD, image_of_text_T).cpu()
    text_rank_I = text_ranks(image_ID, text_TD, image_of_text_T).cpu()
    metrics = retrieval_metrics(image_rank_T, text_rank_I)
    metrics |= {"num_pictures": len(retrieval_set.pictures), "num_captions": len(retrieval_set.captions)}
    columns = {
        "text": pa.array(retrieval_set.captions, pa.string()),
        "image": pa.array([retrieval_set.pictures[i].name for i in retrieval_set.image_of_text], pa.string()),
        "rank": pa.array((image_rank_T + 1).numpy(), pa.int32()),
    }
    return SetResult(name, retrieval_set.name, RETRIEVAL, metrics, pa.table(columns))


def acc1_drop(clean: pa.Table, attacked: pa.Table) -> float | None:
    """Clean top-1 less attacked top-1, from predictions of sets that are the same pictures by number and true class; else None."""
    if sorted(clean["true_class"].to_pylist()) != sorted(attacked["true_class"].to_pylist()):
        return None
    first, second = (np.mean(table["true_class"].to_numpy() == table["predicted_class"].to_numpy()) for table in (clean, attacked))
    return float(first - second)
