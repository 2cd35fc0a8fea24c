"""Our numbers against clip-benchmark's: the same models, pictures, prompts and captions, fp32 on the CPU, the same batch size.

Its own writer makes the sets; its own builder and open_clip's transform read them. Where two scores of a query lie within TIE, rounding
decides which comes first: such queries may differ, and are listed. All others must agree one by one.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from clip_benchmark import cli as clip_benchmark_cli
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from clip_benchmark.webdataset_builder import convert_dataset, convert_retrieval_dataset
from conftest import TINY_VIT, jpeg
from PIL import Image
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import DataLoader

from raysys.config import ClassSetConfig, RetrievalSetConfig, ServiceConfig
from raysys.corpus.scenes import COLOURS, KINDS, PLACES, Scene, Subject, draw_clean_scene
from raysys.evaluation.evaluator import Evaluator
from raysys.models import LoadedModel, load_model, save_open_clip_folder

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore:This DataLoader will create")]  # 8 processes, by its writer
BATCH = 16
TIE = 1e-6  # of cosines; float32 rounds at 6e-8, and a sum of 32 products in another order differs by some of it
CLASSES = [f"{colour} {kind}" for colour, kind in itertools.product(["red", "green", "blue"], list(KINDS)[:4])]
TEMPLATES = ["a photo of a {c}.", "{c}", "one {c} in a drawing"]
RECALLS = (1, 5, 10)


class _Samples(list[tuple[bytes, Any]]):
    """Pictures with labels or captions, as clip-benchmark's writer takes them."""

    classes, templates = CLASSES, TEMPLATES


@dataclass
class _Sets:
    classes: str
    captions: str


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> _Sets:
    """12 classes of 8 to 12 pictures, and 100 pictures with two to five captions, in shards."""
    root = tmp_path_factory.mktemp("sets")
    labels = [label for i in range(12) for label in range(len(CLASSES)) if i < 8 + label % 5]
    pictures = [jpeg(_scene(3, i, CLASSES[label]).image) for i, label in enumerate(labels)]
    convert_dataset(_Samples(zip(pictures, labels, strict=True)), "test", str(root / "classes"), image_format="jpg", max_count=50)
    scenes = [draw_clean_scene(4, i) for i in range(100)]
    said = _Samples((jpeg(scene.image), _captions(scene, i)) for i, scene in enumerate(scenes))
    convert_retrieval_dataset(said, "test", str(root / "captions"), image_format="jpg", max_count=30)
    return _Sets(str(root / "classes"), str(root / "captions"))


def _scene(seed: int, index: int, name: str) -> Scene:
    colour, kind = name.split(" ", 1)
    return draw_clean_scene(seed, index, Subject(kind, colour, list(PLACES)[index % len(PLACES)]))


def _captions(scene: Scene, number: int) -> list[str]:
    """Some pictures share one, and some have spaces at their ends, as COCO's do."""
    colour = next(colour for colour in COLOURS if colour in scene.caption)
    place = next(place for place in PLACES if place in scene.caption)
    said = [
        *(scene.caption.capitalize() + ".", f"the {scene.kind} is {colour}"),
        *(f"{place} there is a {scene.kind}", f"it is {colour}, {place}"),
    ]
    return [*said[: 1 + number % 4], f"a drawing  of a {scene.kind} {place} "]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One with random weights, and the same after some steps of CLIP's loss."""
    root = tmp_path_factory.mktemp("models")
    (root / "tiny.json").write_text(json.dumps(TINY_VIT))
    torch.manual_seed(0)
    loaded = load_model(str(root / "tiny.json"), "random")
    for name, steps in (("random", 0), ("trained", 120)):
        _train(loaded, steps)
        save_open_clip_folder(str(root / name), loaded, state_dict=loaded.model.state_dict(), card="")
    return {name: f"local-dir:{root / name}" for name in ("random", "trained")}


def _train(loaded: LoadedModel, steps: int) -> None:
    names = [CLASSES[i % len(CLASSES)] for i in range(300)]
    scenes = [_scene(5, i, name) for i, name in enumerate(names)] if steps else []
    image_NCHW = torch.stack([loaded.preprocess(Image.fromarray(scene.image)) for scene in scenes]) if steps else torch.empty(0)
    optimizer = torch.optim.AdamW(loaded.model.parameters(), 2e-3)
    loaded.model.train()
    for step in range(steps):
        rows = np.random.default_rng(step).permutation(len(scenes))[:64]
        texts = [scenes[i].caption if i % 3 else f"a photo of a {names[i]}." for i in rows]
        image_BD, text_BD, scale = loaded.model(image_NCHW[torch.from_numpy(rows)], loaded.tokenizer(texts))
        logits_BB = scale * image_BD @ text_BD.T
        own_B = torch.arange(len(rows))
        loss = (cross_entropy(logits_BB, own_B) + cross_entropy(logits_BB.T, own_B)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loaded.model.eval()


# ---- what clip-benchmark says -------------------------------------------------------------------------------------------


@dataclass
class _Theirs:
    metrics: dict[str, float]
    score_QN: np.ndarray
    """Cosines [queries, candidates] that it says it from."""
    right_QN: np.ndarray
    """Whether the candidate is an answer."""

    def sure_and_tied(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each query whether an answer is among the first k, whichever way ties fall; and whether that depends on how they fall."""
        best_Q1 = np.where(self.right_QN, self.score_QN, -np.inf).max(axis=1, keepdims=True)
        above_Q = (~self.right_QN & (self.score_QN > best_Q1 + TIE)).sum(axis=1)
        beside_Q = (~self.right_QN & (np.abs(self.score_QN - best_Q1) <= TIE)).sum(axis=1)
        return above_Q + beside_Q < k, (above_Q < k) & (k <= above_Q + beside_Q)


def _open(model: str, root: str, task: str) -> tuple[Any, Callable[[], DataLoader], Any]:
    clip, _, transform = open_clip.create_model_and_transforms(model)

    def data() -> DataLoader:
        dataset = build_dataset("wds/drawn", root=root, transform=transform, split="test", task=task)
        return DataLoader(dataset.batched(BATCH), batch_size=None)

    return clip.eval(), data, open_clip.get_tokenizer(model)


def _classify(model: str, root: str) -> _Theirs:
    clip, data, tokenizer = _open(model, root, "zeroshot_classification")
    classes, templates = data().dataset.classes, data().dataset.templates
    metrics = zeroshot_classification.evaluate(clip, data(), tokenizer, classes, templates, "cpu", amp=False)
    classifier = zeroshot_classification.zero_shot_classifier(clip, tokenizer, classes, templates, "cpu", amp=False)
    logits, target = zeroshot_classification.run_classification(clip, classifier, data(), "cpu", amp=False)
    return _Theirs(metrics, logits.numpy() / 100, np.arange(len(classes)) == target.numpy()[:, None])


def _retrieve(model: str, root: str) -> tuple[_Theirs, _Theirs]:
    """Image retrieval, whose queries are captions, and text retrieval, whose queries are pictures."""
    clip, data, tokenizer = _open(model, root, "zeroshot_retrieval")
    metrics = zeroshot_retrieval.evaluate(clip, data(), tokenizer, "cpu", amp=False, recall_k_list=list(RECALLS))
    images, texts, num_captions = [], [], []
    with torch.no_grad():
        for image_BCHW, captions in data():
            num_captions += [len(several) for several in captions]
            images.append(normalize(clip.encode_image(image_BCHW), dim=-1))
            texts.append(normalize(clip.encode_text(tokenizer([text for several in captions for text in several])), dim=-1))
    score_TI = (torch.cat(texts) @ torch.cat(images).T).numpy()
    right_TI = np.eye(len(num_captions), dtype=bool).repeat(num_captions, axis=0)
    return _Theirs(metrics, score_TI, right_TI), _Theirs(metrics, score_TI.T, right_TI.T)


# ---- and what we say ----------------------------------------------------------------------------------------------------


def _assert_agree(metric: str, k: int, ours: float, our_rank_Q: np.ndarray, theirs: _Theirs, names: list[str]) -> np.ndarray:
    """:returns: which queries are tied."""
    sure_Q, tied_Q = theirs.sure_and_tied(k)
    tied = ", ".join(names[q] for q in np.flatnonzero(tied_Q))
    if tied:
        print(f"{metric}: scores tie within {TIE} for {tied_Q.sum()} of {len(names)}: {tied}")
    wrong = [names[q] for q in np.flatnonzero(((our_rank_Q <= k) != sure_Q) & ~tied_Q)]
    assert not wrong, f"{metric}: {wrong}"
    assert ours == pytest.approx((our_rank_Q <= k).mean(), abs=1e-12)
    assert abs(ours - theirs.metrics[metric]) <= tied_Q.mean() + 1e-6, f"{metric}: tied are {tied}"  # theirs is a float32
    return tied_Q


@pytest.mark.parametrize("name", ["random", "trained"])
def test_every_metric_is_clip_benchmarks(name: str, models: dict[str, str], sets: _Sets, tmp_path: Path) -> None:
    asked = {"imagenet": ClassSetConfig(sets.classes), "retrieval": RetrievalSetConfig(sets.captions)}
    evaluator = Evaluator(asked, ServiceConfig(batch_size=BATCH, cache_dir=str(tmp_path)))
    ours = {result.evaluator: result for result in evaluator.results(models[name])}

    theirs = _classify(models[name], sets.classes)
    found, columns = ours["imagenet"].metrics, ours["imagenet"].predictions.to_pydict()
    true_N, rank_N = np.array(columns["true_class"]), np.array(columns["true_rank"])
    assert np.array_equal(true_N, theirs.right_QN.argmax(axis=1))  # the same pictures in the same order
    tied = {k: _assert_agree(f"acc{k}", k, found[f"acc{k}"], rank_N, theirs, columns["picture"]) for k in (1, 5)}
    share_N = 1 / len(CLASSES) / np.bincount(true_N)[true_N]  # of a picture in mean_per_class_recall
    assert abs(found["mean_per_class_recall"] - theirs.metrics["mean_per_class_recall"]) <= share_N[tied[1]].sum() + 1e-9
    num_tied = sum(int(tied_Q.sum()) for tied_Q in tied.values())

    found, columns = ours["retrieval"].metrics, ours["retrieval"].predictions.to_pydict()
    rank_Q, is_caption_Q = np.array(columns["rank"]), np.array([caption is not None for caption in columns["caption"]])
    captions = [caption for caption in columns["caption"] if caption is not None]
    pictures = [name for name, is_caption in zip(columns["picture"], is_caption_Q, strict=True) if not is_caption]
    by_text, by_image = _retrieve(models[name], sets.captions)
    for k in RECALLS:
        for what, theirs, chosen_Q, names in (
            ("image", by_text, is_caption_Q, captions),
            ("text", by_image, ~is_caption_Q, pictures),
        ):
            metric = f"{what}_retrieval_recall@{k}"
            num_tied += int(_assert_agree(metric, k, found[metric], rank_Q[chosen_Q], theirs, names).sum())
    assert num_tied < 50  # of 1,584 questions; else this test compares little
    if name == "trained":  # and there is something to compare
        assert ours["imagenet"].metrics["acc1"] > 3 / len(CLASSES) and found["text_retrieval_recall@1"] > 0.05


@pytest.mark.ray
def test_clip_benchmarks_command_line_gives_our_numbers(
    models: dict[str, str],
    sets: _Sets,
    tmp_path: Path,
    ray_cluster: None,
    run_cli: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["evaluators=[imagenet,retrieval]", f"imagenet.path={sets.classes}", f"retrieval.path={sets.captions}"]
    words += [f"service.batch_size={BATCH}", f"service.cache_dir={tmp_path / 'cache'}", f"output={tmp_path / 'ours'}"]
    status, _, error = run_cli("evaluate", f"model={models['trained']}", *words)
    assert status == 0, error

    def clip_benchmark(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["clip_benchmark", *words])
        clip_benchmark_cli.main()

    for evaluator, root, task in (
        ("imagenet", sets.classes, "zeroshot_classification"),
        ("retrieval", sets.captions, "zeroshot_retrieval"),
    ):
        file = tmp_path / f"{evaluator}.json"
        how = ["--no_amp", "--batch_size", str(BATCH), "--num_workers", "0", "--recall_k", *map(str, RECALLS), "--task", task]
        of = [
            "--dataset",
            "wds/drawn",
            "--dataset_root",
            root,
            "--model",
            models["trained"],
            "--pretrained",
            "",
            "--output",
            str(file),
        ]
        clip_benchmark("eval", *of, *how)
        theirs = json.loads(file.read_text())
        ours = json.loads(next((tmp_path / "ours" / "results").glob(f"{evaluator}_*.json")).read_text())
        assert theirs.keys() <= ours.keys() and ours["task"] == theirs["task"] and ours["language"] == theirs["language"]
        assert ours["model"] == theirs["model"] and ours["pretrained"] == theirs["pretrained"]
        assert {metric: ours["metrics"][metric] for metric in theirs["metrics"]} == pytest.approx(theirs["metrics"], abs=0.05)
