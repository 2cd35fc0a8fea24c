"""Zero-shot, retrieval and the sets behind them, against hand-computed answers and open_clip's own transform."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from raysys.config import ClassSetConfig, RetrievalSetConfig
from raysys.evaluation import evaluator as evaluator_module
from raysys.evaluation.datasets import Picture, decode, normalise, read_class_set, read_retrieval_set
from raysys.evaluation.evaluator import Evaluator, SetConfig, SetResult, Step, acc1_drop
from raysys.evaluation.retrieval import image_ranks, retrieval_metrics, text_ranks
from raysys.evaluation.zero_shot import attack_metrics, best_classes, class_embeddings, classification_metrics, prompts
from raysys.storage import UserError

MODEL: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def noise(seed: int, width: int = 50, height: int = 40, mode: str = "RGB") -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(), mode)


def encoded(image: Image.Image, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def write_folder(root: Path, layout: dict[str, list[str]]) -> None:
    for folder, names in layout.items():
        (root / folder).mkdir(parents=True)
        for i, name in enumerate(names):
            noise(i).save(root / folder / name)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_attack_file(root: Path, rows: list[tuple[str, int, int, str]]) -> None:
    names = ("picture", "true_class", "written_class", "text")
    pq.write_table(pa.table(dict(zip(names, zip(*rows, strict=True), strict=True))), root / "attack.parquet")


@pytest.fixture
def model(tmp_path: Path) -> str:
    file = tmp_path / "model.json"
    file.write_text(json.dumps(MODEL))
    return str(file)


@pytest.fixture
def fruit(tmp_path: Path) -> ClassSetConfig:
    """Three classes, one of them without pictures."""
    root = tmp_path / "fruit"
    write_folder(root, {"b": ["1.jpg", "2.PNG"], "a": ["1.jpg"]})
    (root / "b" / "notes.txt").write_text("no picture")
    (tmp_path / "fruit.json").write_text(json.dumps({"a": "apple", "b": "banana", "c": "cherry"}))
    return ClassSetConfig(path=str(root), classes=str(tmp_path / "fruit.json"), templates="simple")


# ---- zero-shot -------------------------------------------------------------------------------------------------------


def test_classification_metrics_by_hand() -> None:
    best = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 0, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [3, 0, 1, 2, 4, 5]])
    label = torch.tensor([0, 0, 0, 3])
    # class 0: first answers 0, 1, 5 -> 1 of 3; class 3: 1 of 1. Row 2 finds class 0 only at place 6.
    metrics = classification_metrics(best, label)
    assert metrics == {"acc1": 0.5, "acc5": 0.75, "mean_per_class_recall": pytest.approx((1 / 3 + 1) / 2)}


def test_fewer_than_five_classes_use_them_all() -> None:
    scores, best = best_classes(torch.eye(3), torch.eye(3))
    assert best.shape == (3, 3) and scores[0, 0] == 1
    assert classification_metrics(best, torch.tensor([1, 2, 0]))["acc5"] == 1.0


def test_attack_metrics_leave_self_attacks_out_of_one_figure_only() -> None:
    names = ["missile", "projectile", "missile"]
    label, written = torch.tensor([0, 1, 1, 2]), torch.tensor([1, 0, 2, 0])
    best = torch.tensor([[1], [1], [2], [2]])  # fooled, right, fooled, right; the last carries its own name
    metrics = attack_metrics(best, label, written, names)
    assert metrics == {"attack_success_rate": 0.5, "num_self_attacks": 1, "acc1_without_self_attacks": pytest.approx(1 / 3)}


def test_classifier_is_open_clips_own(model: str) -> None:
    from raysys.models import load_model

    loaded = load_model(model, "random")
    clip: Any = loaded.model
    names, templates = ["apple", "banana {x}"], ["a {}.", "the {} here"]
    tokens = loaded.tokenizer(prompts(names, templates)).unflatten(0, (2, 2))
    with torch.no_grad():
        ours = class_embeddings(clip.encode_text, tokens)
        fillers = [lambda c: f"a {c}.", lambda c: f"the {c} here"]
        theirs = open_clip.build_zero_shot_classifier(clip, loaded.tokenizer, names, fillers)
    assert torch.allclose(ours, theirs.T, atol=1e-6)


# ---- retrieval -------------------------------------------------------------------------------------------------------


def test_retrieval_by_hand() -> None:
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.6, 0.8]])
    owner = torch.tensor([0, 0, 1, 2])
    for block in (1, 3, 100):
        # text 1 belongs to picture 0 but looks like picture 1, then 2
        assert image_ranks(image, text, owner, block=block).tolist() == [0, 2, 0, 0]
        # picture 1 scores texts 1 and 2 alike; its own is the second of them
        assert text_ranks(image, text, owner, block=block).tolist() == [0, 1, 0]
    metrics = retrieval_metrics(torch.tensor([0, 2, 0, 7]), torch.tensor([0, 1]))
    assert metrics["image_retrieval_recall@1"] == 0.5 and metrics["image_retrieval_recall@5"] == 0.75
    assert metrics["image_retrieval_recall@10"] == 1.0 and metrics["text_retrieval_recall@1"] == 0.5
    assert metrics["mean_recall@1"] == 0.5


def test_a_model_that_says_the_same_of_everything_is_at_chance() -> None:
    image, text, owner = torch.ones(10, 4), torch.ones(50, 4), torch.arange(10).repeat_interleave(5)
    metrics = retrieval_metrics(image_ranks(image, text, owner), text_ranks(image, text, owner))
    assert metrics["image_retrieval_recall@1"] == 0.1 and metrics["text_retrieval_recall@1"] == 0.1


def test_ranks_agree_with_sorting() -> None:
    torch.manual_seed(0)
    image, text, owner = torch.randn(30, 8), torch.randn(90, 8), torch.randint(0, 30, (90,))
    owner[:30] = torch.arange(30)
    by_text = (text @ image.T).argsort(dim=1, descending=True)
    assert image_ranks(image, text, owner, block=7).tolist() == [(by_text[t] == owner[t]).nonzero().item() for t in range(90)]
    by_image = (image @ text.T).argsort(dim=1, descending=True)
    expected = [min((owner[by_image[i]] == i).nonzero().flatten().tolist()) for i in range(30)]
    assert text_ranks(image, text, owner, block=7).tolist() == expected


# ---- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
def test_decode_and_normalise_equal_open_clips_transform_to_the_bit(resize_mode: str, tmp_path: Path) -> None:
    cfg = open_clip.transform.PreprocessCfg(size=32, resize_mode=resize_mode, fill_color=7)
    preprocess = open_clip.transform.image_transform_v2(cfg, is_train=False)
    turned = Image.Exif()
    turned[0x0112] = 6
    noise(0).save(tmp_path / "turned.jpg", exif=turned)
    noise(1, 31, 70, "L").save(tmp_path / "grey.png")
    noise(2, 33, 20, "RGBA").save(tmp_path / "transparent.png")
    noise(3, 90, 20).save(tmp_path / "a.gif")
    noise(4, 64, 64, "CMYK").save(tmp_path / "cmyk.jpg")
    files = sorted(tmp_path.iterdir())
    pixels = decode([Picture(f.name, str(f)) for f in files], preprocess, threads=2)
    assert pixels.shape == (5, 32, 32, 3) and pixels.dtype == np.uint8
    expected = torch.stack([preprocess(Image.open(f)) for f in files])
    assert torch.equal(normalise(torch.from_numpy(pixels), preprocess), expected)


def test_broken_picture_is_named(tmp_path: Path) -> None:
    preprocess = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(size=32), is_train=False)
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(encoded(noise(0))[:300])
    with pytest.raises(UserError, match=r"cut\.jpg: cannot be read as a picture"):
        decode([Picture("cut.jpg", str(cut))], preprocess, threads=1)


# ---- sets ------------------------------------------------------------------------------------------------------------


def test_class_set_with_its_own_classes(fruit: ClassSetConfig) -> None:
    found = read_class_set(fruit)
    assert [p.name for p in found.pictures] == ["a/1.jpg", "b/1.jpg", "b/2.PNG"] and found.labels == [0, 1, 1]
    assert found.class_names == ["apple", "banana", "cherry"] and found.num_classes_with_pictures == 2
    assert found.templates == ["a photo of a {}."] and found.written is None


def test_fingerprint_follows_the_set(fruit: ClassSetConfig) -> None:
    before = read_class_set(fruit).fingerprint
    assert read_class_set(fruit).fingerprint == before
    noise(9, 60, 60).save(Path(str(fruit.path)) / "a" / "1.jpg")
    assert read_class_set(fruit).fingerprint != before


def test_imagenet_folders_get_imagenets_order_names_and_prompts(tmp_path: Path) -> None:
    write_folder(tmp_path, {"n04008634": ["x.JPEG"], "n01440764": ["y.JPEG"]})
    found = read_class_set(ClassSetConfig(path=str(tmp_path)))
    assert found.labels == [0, 744] and len(found.class_names) == 1000 and len(found.templates) == 80
    assert found.class_names[0] == "tench" and found.templates[0] == "a bad photo of a {}."
    assert prompts(["tench"], found.templates) == [template("tench") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert found.num_classes_with_pictures == 2


def test_class_set_mistakes(fruit: ClassSetConfig, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text("a photo of {}\na photo\n")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "empty").mkdir()
    mistakes = [
        (ClassSetConfig(), "imagenet.path is missing"),
        (ClassSetConfig(path=fruit.path), "folder 'a' is not among ImageNet"),
        (ClassSetConfig(path=str(tmp_path / "none")), "no such folder"),
        (ClassSetConfig(path=str(tmp_path / "empty")), "no pictures there"),
        (ClassSetConfig(path=fruit.path, classes=str(tmp_path / "list.json")), "expected a JSON object"),
        (ClassSetConfig(path=fruit.path, classes=fruit.classes, templates="opnai"), "neither openai nor simple nor a file"),
        (ClassSetConfig(path=fruit.path, classes=fruit.classes, templates=str(tmp_path / "bad.txt")), "'a photo' has none"),
    ]
    for cfg, words in mistakes:
        with pytest.raises(UserError, match=words):
            read_class_set(cfg)


def test_attacked_set_knows_what_is_written(fruit: ClassSetConfig) -> None:
    root = Path(str(fruit.path))
    write_attack_file(root, [("b/2.PNG", 1, 2, "cherry"), ("a/1.jpg", 0, 1, "banana"), ("b/1.jpg", 1, 0, "apple")])
    assert read_class_set(fruit, "imagenet_attr", attacked=True).written == [1, 0, 2]
    (root / "classes.json").write_text(Path(str(fruit.classes)).read_text())  # as `raysys attack` leaves it
    assert read_class_set(ClassSetConfig(path=fruit.path), "imagenet_attr", attacked=True).class_names[0] == "apple"


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("a/1.jpg", 0, 1, "banana")], "b/1.jpg is not in attack.parquet"),
        ([("a/1.jpg", 0, 1, "pear"), ("b/1.jpg", 1, 0, "apple"), ("b/2.PNG", 1, 0, "apple")], "another class list"),
        ([("a/1.jpg", 2, 1, "banana"), ("b/1.jpg", 1, 0, "apple"), ("b/2.PNG", 1, 0, "apple")], "another class list"),
    ],
)
def test_attack_file_that_does_not_fit_is_refused(rows: list[Any], words: str, fruit: ClassSetConfig) -> None:
    write_attack_file(Path(str(fruit.path)), rows)
    with pytest.raises(UserError, match=words):
        read_class_set(fruit, "imagenet_attr", attacked=True)


def test_folder_without_attack_file_is_no_attacked_set(fruit: ClassSetConfig) -> None:
    with pytest.raises(UserError, match="raysys attack"):
        read_class_set(fruit, "imagenet_attr", attacked=True)


def test_retrieval_set_from_a_tar(tmp_path: Path) -> None:
    first, second, third = (encoded(noise(i)) for i in range(3))
    write_tar(
        tmp_path / "t.tar",
        {
            "0.jpg": first, "0.txt": b"not this one", "0.json": json.dumps({"captions": ["one", "two"]}).encode(),
            "1.jpg": second, "1.txt": b"drei\nvier \n\n",
            "2.jpg": third, "2.txt": b"five", "2.json": b"{}",
        },
    )  # fmt: skip
    found = read_retrieval_set(RetrievalSetConfig(str(tmp_path / "t.tar")))
    assert found.captions == ["one", "two", "drei", "vier", "five"] and found.image_of_text == [0, 0, 1, 1, 2]
    assert [picture.read() for picture in found.pictures] == [first, second, third]
    assert found.name == "retrieval"


def test_retrieval_set_from_cocos_folder(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    for name in ("7.jpg", "3.jpg"):
        noise(1).save(tmp_path / "val2017" / name)
    content = {
        "images": [{"id": 7, "file_name": "7.jpg"}, {"id": 3, "file_name": "3.jpg"}],
        "annotations": [{"image_id": i, "caption": c} for i, c in ((7, "a"), (3, "b"), (7, "c"))],
    }
    (tmp_path / "annotations" / "captions_val2017.json").write_text(json.dumps(content))
    found = read_retrieval_set(RetrievalSetConfig(str(tmp_path)), "coco")
    assert [p.name for p in found.pictures] == ["3.jpg", "7.jpg"] and found.name == "coco_val2017"
    assert found.captions == ["b", "a", "c"] and found.image_of_text == [0, 1, 1]
    assert found.pictures[0].read() == (tmp_path / "val2017" / "3.jpg").read_bytes()


def test_retrieval_mistakes(tmp_path: Path) -> None:
    write_tar(tmp_path / "mute.tar", {"0.jpg": encoded(noise(0))})
    write_tar(tmp_path / "blind.tar", {"0.txt": b"a dog"})
    (tmp_path / "cut.tar").write_bytes((tmp_path / "mute.tar").read_bytes()[:700])
    for name, words in (("mute", "0 has no caption"), ("blind", "0 has no picture"), ("cut", "damaged"), ("none", "no such file")):
        with pytest.raises(UserError, match=words):
            read_retrieval_set(RetrievalSetConfig(str(tmp_path / f"{name}.tar")))


# ---- the evaluator ---------------------------------------------------------------------------------------------------


def test_evaluator_answers_every_set_and_decodes_once(
    model: str, fruit: ClassSetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_attack_file(Path(str(fruit.path)), [("a/1.jpg", 0, 1, "banana"), ("b/1.jpg", 1, 0, "apple"), ("b/2.PNG", 1, 0, "apple")])
    write_tar(tmp_path / "t.tar", {f"{i}.{kind}": data for i in range(3) for kind, data in
                                   (("jpg", encoded(noise(i))), ("txt", f"caption {i}".encode()))})  # fmt: skip
    decoded: list[int] = []

    def counting(pictures: Any, *args: Any, **how: Any) -> np.ndarray:
        decoded.append(len(pictures))
        return decode(pictures, *args, **how)

    monkeypatch.setattr(evaluator_module, "decode", counting)
    sets: dict[str, SetConfig] = {
        "imagenet": fruit,
        "imagenet_attr": fruit,
        "retrieval": RetrievalSetConfig(str(tmp_path / "t.tar")),
    }
    evaluator = Evaluator(sets, batch_size=2)
    items = list(evaluator.steps(model, "random", list(sets)))
    results = {item.evaluator: item for item in items if isinstance(item, SetResult)}
    assert list(results) == list(sets)
    clean, attacked, retrieval = results.values()
    assert clean.predictions.column_names == ["picture", "true_class", "predicted_class", "score"]
    assert attacked.predictions.column_names == ["picture", "true_class", "predicted_class", "written_class", "score"]
    assert retrieval.predictions.column_names == ["text", "image", "rank"]
    # the same pictures stand in both folders here, so both sets agree, and the metrics follow from the predictions
    assert clean.metrics["acc1"] == attacked.metrics["acc1"] and acc1_drop(clean.predictions, attacked.predictions) == 0
    rows = clean.predictions.to_pylist()
    assert clean.metrics["acc1"] == pytest.approx(np.mean([r["true_class"] == r["predicted_class"] for r in rows]))
    assert retrieval.metrics["image_retrieval_recall@1"] == pytest.approx(
        np.mean([r["rank"] == 1 for r in retrieval.predictions.to_pylist()])
    )
    assert clean.metrics["num_classes"] == 3 and clean.metrics["num_classes_with_pictures"] == 2
    done: dict[tuple[str, str], int] = {}
    for step in items:
        if isinstance(step, Step):
            done[step.stage, step.unit] = done.get((step.stage, step.unit), 0) + step.done
            assert step.done <= step.total
    assert done["imagenet", "pictures"] == 3 and done["imagenet", "classes"] == 3
    assert ("imagenet_attr", "classes") not in done  # one classifier serves both sets
    assert set(evaluator.evaluate(model, "random")) == set(sets)
    assert decoded == [3, 3, 3]


def test_another_input_size_is_decoded_anew(model: str, fruit: ClassSetConfig, tmp_path: Path) -> None:
    larger = tmp_path / "larger.json"
    larger.write_text(json.dumps(MODEL | {"vision_cfg": MODEL["vision_cfg"] | {"image_size": 48}}))
    evaluator = Evaluator({"imagenet": fruit}, batch_size=2)
    for spec in (model, str(larger), model):
        assert evaluator.evaluate(spec, "random")["imagenet"]["num_pictures"] == 3


def test_diverged_model_is_refused(model: str, fruit: ClassSetConfig, tmp_path: Path) -> None:
    from raysys.models import load_model

    state = load_model(model, "random").model.state_dict()
    state["visual.proj"].fill_(torch.nan)
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(UserError, match="not finite"):
        Evaluator({"imagenet": fruit}, batch_size=2).evaluate(model, str(tmp_path / "nan.pt"))


def test_drop_is_only_told_of_the_same_pictures() -> None:
    clean = pa.table({"true_class": [0, 1], "predicted_class": [0, 1]})
    assert acc1_drop(clean, pa.table({"true_class": [1, 0], "predicted_class": [0, 0]})) == 0.5
    assert acc1_drop(clean, pa.table({"true_class": [1], "predicted_class": [0]})) is None
