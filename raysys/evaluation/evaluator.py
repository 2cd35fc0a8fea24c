"""One model, asked every question: pictures and prompts -> embeddings -> ranks -> predictions and metrics. No Ray.

In: named sets (configs), a model. Out: :class:`SetResult` for each set. A pool shares the work: each of ``of`` evaluators embeds its share
(:meth:`Evaluator.embed`), any of them answers from all shares (:meth:`Evaluator.answer`). Decoded pictures stay on disk and tokenised
prompts in memory between models. Leaves files and processes to :mod:`raysys.evaluation.on_ray`.
Shapes: N pictures, C classes, T templates or captions, D embedding, B batch, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from raysys.config import ClassSetConfig, RetrievalSetConfig, ServiceConfig, TypographicSetConfig
from raysys.errors import UserError
from raysys.evaluation.class_sets import ClassSet, read_class_set
from raysys.evaluation.decoded import DecodedSet, cache_folder
from raysys.evaluation.metrics import CLASSIFICATION, RETRIEVAL, metrics
from raysys.evaluation.pictures import normalise
from raysys.evaluation.retrieval import image_ranks, text_ranks
from raysys.evaluation.retrieval_sets import RetrievalSet, read_retrieval_set
from raysys.evaluation.typographic import read_typographic_set
from raysys.evaluation.zero_shot import best_class, class_embeddings, class_ranks, prompts
from raysys.masking import mask
from raysys.output import fingerprint

if TYPE_CHECKING:  # it imports open_clip, which a bare GPU machine has not
    from raysys.models import LoadedModel

SetConfig = ClassSetConfig | RetrievalSetConfig | TypographicSetConfig
ATTACKED = "imagenet_attr"
"""The evaluator whose set says what ``raysys attack`` wrote on each picture."""
_AHEAD = 512  # pictures that are decoded before they are encoded
_TEXTS = 4  # texts that go through a model at once for every picture of a batch


@dataclass(frozen=True)
class SetResult:
    evaluator: str
    dataset: str
    """The evaluator's name, or a more exact one (``coco_val2017``)."""
    task: str
    metrics: dict[str, float]
    """Fractions, and counts (``num_...``)."""
    predictions: pa.Table
    """As :mod:`raysys.evaluation.metrics` takes it."""
    notes: list[str]
    """What a reader of the numbers must know, a line each."""


@dataclass
class Embeddings:
    """A share of the rows, all of length 1, float32."""

    image_ND: dict[str, np.ndarray] = field(default_factory=dict)
    """By set."""
    text_TD: dict[str, np.ndarray] = field(default_factory=dict)
    """By set: a row a class, or a row a caption."""


Watch = Callable[[str, str, int, int], None]
"""Told (set, unit, done here, total of all shares) as the work goes on."""


def read_set(name: str, cfg: SetConfig) -> ClassSet | RetrievalSet:
    """:raises UserError: for a set that cannot be used."""
    if isinstance(cfg, RetrievalSetConfig):
        return read_retrieval_set(cfg, name)
    if isinstance(cfg, TypographicSetConfig):
        return read_typographic_set(cfg, name)
    return read_class_set(cfg, name, attacked=name == ATTACKED)


class Evaluator:
    """Nothing is read before the first question."""

    def __init__(
        self,
        sets: dict[str, SetConfig],
        service: ServiceConfig,
        *,
        device: str = "cpu",
        threads: int = 1,
        rank: int = 0,
        of: int = 1,
    ) -> None:
        """:param threads: that decode pictures; torch keeps its own number. :param rank: which of ``of`` shares is embedded here."""
        self._configs, self._service = sets, service
        self._device, self._threads = device, threads
        self._rank, self._of = rank, of
        self._sets: dict[str, ClassSet | RetrievalSet] = {}
        self._decoded: dict[str, tuple[str, DecodedSet]] = {}  # set -> (which transform, pixels)
        self._tokens: dict[str, list[torch.Tensor]] = {}  # texts and tokenizer -> a batch each, int64 [B, L]
        self._classifiers: dict[str, np.ndarray] = {}  # of the model at hand: clean and attacked sets ask the same prompts
        self._of_model: object = None
        self.num_decoded: dict[str, int] = {}
        """Set -> pictures that were decoded here; those found on disk don't count."""

    def evaluate(self, model: str, pretrained: str | None = None) -> dict[str, dict[str, float]]:
        """Metrics of a model on every set. :raises UserError: for a model or set that cannot be used."""
        return {result.evaluator: result.metrics for result in self.results(model, pretrained)}

    def results(self, model: str, pretrained: str | None = None) -> Iterator[SetResult]:
        """The same set by set, with predictions."""
        from raysys.models import load_model

        loaded = load_model(model, pretrained, device=self._device)
        yield from self.results_of(loaded)

    def results_of(self, loaded: LoadedModel) -> Iterator[SetResult]:
        """Of a model that somebody else has built; it is moved to the evaluator's device."""
        self._of_model = None  # its weights may have changed since
        for name in self._configs:
            yield self.answer(name, [self.embed(loaded, name)])

    def embed(self, loaded: LoadedModel, name: str, watch: Watch = lambda *_: None) -> Embeddings:
        """This evaluator's share of a set's pictures and texts.

        Shares end between batches, so that the numbers do not depend on how many evaluators there are.

        :raises UserError: for a set that cannot be used, or embeddings that are not finite.
        """
        loaded.model.to(self._device).eval()
        if loaded is not self._of_model:
            self._of_model, self._classifiers = loaded, {}
        a_set = self._read(name)
        image_ND = self._gather(loaded, name, "pictures", len(a_set.pictures), self._images(name, loaded), watch)
        if isinstance(a_set, RetrievalSet):
            text_TD = self._gather(loaded, name, "captions", len(a_set.captions), self._captions(a_set, loaded), watch)
        else:
            key = fingerprint([a_set.class_names, a_set.templates])
            if key not in self._classifiers:
                rows = self._classes(a_set, loaded)
                self._classifiers[key] = self._gather(loaded, name, "classes", len(a_set.class_names), rows, watch)
            text_TD = self._classifiers[key]
        return Embeddings({name: image_ND}, {name: text_TD})

    @torch.inference_mode()
    def answer(self, name: str, shares: Sequence[Embeddings]) -> SetResult:
        """:param shares: of all evaluators, by rank."""
        a_set = self._read(name)
        image_ND, text_TD = (
            torch.from_numpy(np.concatenate([getattr(share, what)[name] for share in shares])).to(self._device)
            for what in ("image_ND", "text_TD")
        )
        if isinstance(a_set, RetrievalSet):
            predictions, task, dataset = _retrieve(a_set, image_ND, text_TD), RETRIEVAL, a_set.name
            more = {}
        else:
            predictions, task, dataset = _classify(a_set, image_ND, text_TD), CLASSIFICATION, name
            more = {"num_classes": len(a_set.class_names)}
        dataset = self._configs[name].name or dataset
        return SetResult(name, dataset, task, metrics(task, predictions) | more, predictions, a_set.notes)

    def _read(self, name: str) -> ClassSet | RetrievalSet:
        if name not in self._sets:
            self._sets[name] = read_set(name, self._configs[name])
        return self._sets[name]

    def _share(self, total: int, batch: int) -> range:
        """Starts of this evaluator's batches."""
        batches = range(0, total, batch)
        return batches[len(batches) * self._rank // self._of : len(batches) * (self._rank + 1) // self._of]

    def _gather(
        self, loaded: LoadedModel, name: str, unit: str, total: int, batches: Iterator[torch.Tensor], watch: Watch
    ) -> np.ndarray:
        """Batches [B, D] -> [rows, D] in this share."""
        gathered: list[np.ndarray] = []
        done = 0
        watch(name, unit, done, total)
        for batch in batches:
            rows = batch.float().cpu().numpy()
            if not np.isfinite(rows).all():
                why = "its training diverged, or its weights are damaged; give an earlier checkpoint, or fetch them again"
                raise UserError(f"model={mask(loaded.name)} gives embeddings that are not finite; {why}")
            gathered.append(rows)
            done += len(rows)
            watch(name, unit, done, total)
        return np.concatenate(gathered) if gathered else np.empty((0, loaded.config["embed_dim"]), np.float32)

    # ---- pictures ----

    def _pixels(self, name: str, loaded: LoadedModel) -> DecodedSet:
        transform = repr(loaded.preprocess.transforms[:-1])
        if name in self._decoded and self._decoded[name][0] == transform:
            return self._decoded[name][1]
        if name in self._decoded:
            self._decoded.pop(name)[1].close()
        a_set = self._read(name)
        mark = [a_set.fingerprint, a_set.written if isinstance(a_set, ClassSet) else None]
        folder = cache_folder(self._service.cache_dir)
        decoded = DecodedSet(folder, a_set.pictures, mark, loaded.preprocess, threads=self._threads)
        self._decoded[name] = transform, decoded
        return decoded

    def _images(self, name: str, loaded: LoadedModel) -> Iterator[torch.Tensor]:
        """Embeddings [B, D], in order."""
        decoded = self._pixels(name, loaded)
        for start, stop in self._filled(name, decoded):
            pixels = torch.from_numpy(np.array(decoded.pixels_NHWC[start:stop])).to(self._device)
            yield self._encode(loaded, "image", normalise(pixels, loaded.preprocess))

    def _filled(self, name: str, decoded: DecodedSet) -> Iterator[tuple[int, int]]:
        """Start and stop of each batch, once it is decoded. Where a GPU encodes, the CPUs decode ahead of it."""
        total, batch = len(decoded.pixels_NHWC), self._service.batch_size
        starts = self._share(total, batch)
        spans = [starts[i : i + max(_AHEAD // batch, 1)] for i in range(0, len(starts), max(_AHEAD // batch, 1))]
        ends = [min(span[-1] + batch, total) for span in spans]
        with ThreadPoolExecutor(1) as ahead:
            fill = [ahead.submit(decoded.fill, span[0], end) for span, end in zip(spans[:1], ends[:1], strict=True)]
            for i, (span, end) in enumerate(zip(spans, ends, strict=True)):
                self.num_decoded[name] = self.num_decoded.get(name, 0) + fill[i].result()
                if i + 1 < len(spans) and self._device != "cpu":
                    fill.append(ahead.submit(decoded.fill, spans[i + 1][0], ends[i + 1]))
                for start in span:
                    yield start, min(start + batch, end)
                if i + 1 < len(spans) and self._device == "cpu":  # there decoding and encoding would fight for the cores
                    fill.append(ahead.submit(decoded.fill, spans[i + 1][0], ends[i + 1]))

    # ---- texts ----

    def _classes(self, class_set: ClassSet, loaded: LoadedModel) -> Iterator[torch.Tensor]:
        """Rows of the classifier, [B, D]."""
        num_templates = len(class_set.templates)
        starts = self._share(len(class_set.class_names), max(_TEXTS * self._service.batch_size // num_templates, 1))

        def texts() -> Iterator[list[str]]:
            for start in starts:
                yield prompts(class_set.class_names[start : start + starts.step], class_set.templates)

        for tokens_TL in self._tokenised(class_set, loaded, texts):
            yield class_embeddings(
                lambda tokens: self._encode(loaded, "text", tokens), tokens_TL.to(self._device).unflatten(0, (-1, num_templates))
            )

    def _captions(self, retrieval_set: RetrievalSet, loaded: LoadedModel) -> Iterator[torch.Tensor]:
        starts = self._share(len(retrieval_set.captions), _TEXTS * self._service.batch_size)

        def texts() -> Iterator[list[str]]:
            for start in starts:
                yield retrieval_set.captions[start : start + starts.step]

        for tokens in self._tokenised(retrieval_set, loaded, texts):
            yield self._encode(loaded, "text", tokens.to(self._device))

    def _tokenised(
        self, a_set: ClassSet | RetrievalSet, loaded: LoadedModel, texts: Callable[[], Iterator[list[str]]]
    ) -> Iterator[torch.Tensor]:
        """Batches of texts as int64 [B, L], tokenised once for all models with one tokenizer."""
        known = ("context_length", "hf_tokenizer_name", "tokenizer_kwargs")
        how = {k: v for k, v in loaded.config["text_cfg"].items() if k in known}
        asked = [a_set.captions] if isinstance(a_set, RetrievalSet) else [a_set.class_names, a_set.templates]
        key = fingerprint([asked, type(loaded.tokenizer).__name__, how])
        if key in self._tokens:
            yield from self._tokens[key]
            return
        tokenised = []
        for batch in texts():
            tokenised.append(loaded.tokenizer(batch))
            yield tokenised[-1]
        self._tokens[key] = tokenised

    @torch.inference_mode()
    def _encode(self, loaded: LoadedModel, what: str, batch: torch.Tensor) -> torch.Tensor:
        """Embeddings of length 1, float32 [B, D], of ``image`` [B, 3, H, W] or ``text`` [B, L]."""
        encode: Any = getattr(loaded.model, f"encode_{what}")
        kind = torch.device(self._device).type
        with torch.autocast(kind, torch.bfloat16, enabled=self._service.precision == "amp_bf16"):
            features = encode(batch)
        return torch.nn.functional.normalize(features.float(), dim=-1)


def _classify(class_set: ClassSet, image_ND: torch.Tensor, classifier_CD: torch.Tensor) -> pa.Table:
    label_N = torch.tensor(class_set.labels, device=image_ND.device)
    predicted_N, score_N = best_class(image_ND, classifier_CD)
    rank_N, own_score_N = class_ranks(image_ND, classifier_CD, label_N)
    columns = {
        "picture": pa.array([picture.name for picture in class_set.pictures], pa.string()),
        "true_class": pa.array(class_set.labels, pa.int32()),
        "predicted_class": pa.array(predicted_N.cpu().numpy(), pa.int32()),
        "score": pa.array(score_N.cpu().numpy(), pa.float32()),
        "true_rank": pa.array((rank_N + 1).cpu().numpy(), pa.int32()),
        "true_score": pa.array(own_score_N.cpu().numpy(), pa.float32()),
    }
    if class_set.written is not None:
        names = class_set.class_names
        written_rank_N, _ = class_ranks(image_ND, classifier_CD, torch.tensor(class_set.written, device=image_ND.device))
        same = [names[t] == names[w] for t, w in zip(class_set.labels, class_set.written, strict=True)]
        columns["written_class"] = pa.array(class_set.written, pa.int32())
        columns["written_rank"] = pa.array((written_rank_N + 1).cpu().numpy(), pa.int32())
        columns["self_attack"] = pa.array(same, pa.bool_())
    return pa.table(columns)


def _retrieve(retrieval_set: RetrievalSet, image_ID: torch.Tensor, text_TD: torch.Tensor) -> pa.Table:
    image_of_text_T = torch.tensor(retrieval_set.image_of_text, device=image_ID.device)
    rank_of_image_T = image_ranks(image_ID, text_TD, image_of_text_T).cpu().numpy() + 1
    rank_of_text_I = text_ranks(image_ID, text_TD, image_of_text_T).cpu().numpy() + 1
    names = [picture.name for picture in retrieval_set.pictures]
    columns = {
        "picture": pa.array([*(names[i] for i in retrieval_set.image_of_text), *names], pa.string()),
        "caption": pa.array([*retrieval_set.captions, *[None] * len(names)], pa.string()),
        "rank": pa.array(np.concatenate([rank_of_image_T, rank_of_text_I]), pa.int32()),
    }
    return pa.table(columns)
