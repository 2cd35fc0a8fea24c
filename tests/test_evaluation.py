"""Decoded sets, classifiers, ranks and the evaluator, against hand-computed answers and open_clip's own transform."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from raysys.config import ClassSetConfig, RetrievalSetConfig, ServiceConfig
from raysys.errors import UserError
from raysys.evaluation.decoded import CHUNK, DecodedSet, cache_folder
from raysys.evaluation.evaluator import Evaluator, SetConfig
from raysys.evaluation.pictures import Picture, normalise
from raysys.evaluation.retrieval import image_ranks, text_ranks
from raysys.evaluation.zero_shot import best_class, class_embeddings, class_ranks, prompts

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


def test_ranks_of_classes_by_hand() -> None:
    classifier = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    predicted, score = best_class(images, classifier)
    assert predicted.tolist() == [0, 1, 1] and score.tolist() == pytest.approx([1.0, 1.0, 0.8])  # of two alike the first
    rank, own = class_ranks(images, classifier, torch.tensor([1, 2, 0]))
    assert rank.tolist() == [1, 1, 2] and own.tolist() == pytest.approx([0.0, 1.0, 0.6])


def test_prompts_take_the_name_to_the_letter() -> None:
    assert prompts(["a {} b"], ["the {}.", "{} or {}"]) == ["the a {} b.", "a {} b or a {} b"]


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


def test_a_model_that_says_the_same_of_everything_is_at_chance() -> None:
    image, text, owner = torch.ones(10, 4), torch.ones(50, 4), torch.arange(10).repeat_interleave(5)
    assert (image_ranks(image, text, owner) == 0).float().mean() == pytest.approx(0.1)
    assert (text_ranks(image, text, owner) == 0).float().mean() == pytest.approx(0.1)


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
    (tmp_path / "cache").mkdir()
    decoded = DecodedSet(str(tmp_path / "cache"), [Picture(f.name, str(f)) for f in files], "mark", preprocess, threads=2)
    assert decoded.fill(0, 5) == 5
    pixels = np.array(decoded.pixels_NHWC)
    assert pixels.shape == (5, 32, 32, 3) and pixels.dtype == np.uint8
    expected = torch.stack([preprocess(Image.open(f)) for f in files])
    assert torch.equal(normalise(torch.from_numpy(pixels), preprocess), expected)


PREPROCESS = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(size=32), is_train=False)


@pytest.fixture
def many(tmp_path: Path) -> list[Picture]:
    """Three chunks of the decoded set."""
    (tmp_path / "many").mkdir()
    for i in range(2 * CHUNK + 10):
        noise(i, 8, 8).save(tmp_path / "many" / f"{i}.png")
    return [Picture(f"{i}.png", str(tmp_path / "many" / f"{i}.png")) for i in range(2 * CHUNK + 10)]


def test_what_one_process_decoded_the_next_finds(many: list[Picture], tmp_path: Path) -> None:
    def opened(mark: str = "mark") -> DecodedSet:
        return DecodedSet(str(tmp_path), many, mark, PREPROCESS, threads=2)

    first, second = opened(), opened()
    assert first.fill(0, CHUNK + 1) == 2 * CHUNK  # whole chunks
    assert second.fill(CHUNK, len(many)) == 10  # open before, and sees them
    again = opened()
    assert again.fill(0, len(many)) == 0
    expected = [np.asarray(PREPROCESS.transforms[1](PREPROCESS.transforms[0](Image.open(p.path)))) for p in many]
    assert np.array_equal(again.pixels_NHWC, np.stack(expected))
    assert opened("another set").fill(0, len(many)) == len(many)


def test_chunk_that_was_not_finished_is_decoded_again(many: list[Picture], tmp_path: Path) -> None:
    whole = Path(many[CHUNK].path).read_bytes()
    Path(many[CHUNK].path).write_bytes(b"")
    broken = DecodedSet(str(tmp_path), many, "mark", PREPROCESS, threads=1)
    broken.fill(0, CHUNK)
    with pytest.raises(UserError, match=r"64\.png: cannot be read as a picture"):
        broken.fill(0, len(many))
    Path(many[CHUNK].path).write_bytes(whole)
    assert DecodedSet(str(tmp_path), many, "mark", PREPROCESS, threads=1).fill(0, len(many)) == len(many) - CHUNK


def test_disk_without_room_is_refused_before_anything_is_decoded(
    many: list[Picture], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"a decoded set takes .* service\.cache_dir"):
        DecodedSet(str(tmp_path), many, "mark", PREPROCESS, threads=1)


def test_cache_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"service\.cache_dir=.*file"):
        cache_folder(str(tmp_path / "file" / "folder"))
    assert cache_folder(str(tmp_path / "new")) == str(tmp_path / "new") and (tmp_path / "new").is_dir()


def test_broken_picture_is_named(tmp_path: Path) -> None:
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(encoded(noise(0))[:300])
    with pytest.raises(UserError, match=r"cut\.jpg: cannot be read as a picture"):
        DecodedSet(str(tmp_path), [Picture("cut.jpg", str(cut))], "mark", PREPROCESS, threads=1).fill(0, 1)


def test_picture_of_a_parquet_row(tmp_path: Path) -> None:
    data = [encoded(noise(i)) for i in range(5)]
    pq.write_table(pa.table({"image": [{"bytes": d, "path": None} for d in data]}), tmp_path / "a.parquet", row_group_size=2)
    file = str(tmp_path / "a.parquet")
    pictures = [Picture(str(i), file, row_group=i // 2, row=i % 2) for i in range(5)]
    assert [picture.read() for picture in pictures] == data


# ---- the evaluator ---------------------------------------------------------------------------------------------------


@pytest.fixture
def service(tmp_path: Path) -> ServiceConfig:
    return ServiceConfig(batch_size=2, cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def sets(fruit: ClassSetConfig, tmp_path: Path) -> dict[str, SetConfig]:
    """The same pictures clean and "attacked", and three with captions."""
    attacked = shutil.copytree(str(fruit.path), tmp_path / "attacked")
    write_attack_file(attacked, [("a/1.jpg", 0, 1, "banana"), ("b/1.jpg", 1, 0, "apple"), ("b/2.PNG", 1, 0, "apple")])
    write_tar(tmp_path / "t.tar", {f"{i}.{kind}": data for i in range(3) for kind, data in
                                   (("jpg", encoded(noise(i))), ("txt", f"caption {i}".encode()))})  # fmt: skip
    return {
        "imagenet": fruit,
        "imagenet_attr": replace(fruit, path=str(attacked)),
        "retrieval": RetrievalSetConfig(str(tmp_path / "t.tar")),
    }


def test_evaluator_answers_every_set_and_decodes_once(model: str, sets: dict[str, SetConfig], service: ServiceConfig) -> None:
    evaluator = Evaluator(sets, service)
    results = {result.evaluator: result for result in evaluator.results(model, "random")}
    assert list(results) == list(sets)
    clean, attacked, retrieval = results.values()
    columns = ["picture", "true_class", "predicted_class", "score", "true_rank", "true_score"]
    assert clean.predictions.column_names == columns
    assert attacked.predictions.column_names == [*columns, "written_class", "written_rank", "self_attack"]
    assert retrieval.predictions.column_names == ["picture", "caption", "rank"]
    for row in attacked.predictions.to_pylist():
        assert (row["true_rank"] == 1) == (row["predicted_class"] == row["true_class"])
        assert (row["written_rank"] == 1) == (row["predicted_class"] == row["written_class"])
        assert row["true_rank"] != row["written_rank"] and not row["self_attack"]
        assert row["score"] >= row["true_score"]
    # the same pictures stand in both folders here, so both sets agree, and the metrics follow from the predictions
    assert clean.metrics["acc1"] == attacked.metrics["acc1"]
    rows = clean.predictions.to_pylist()
    assert clean.metrics["acc1"] == pytest.approx(np.mean([r["true_class"] == r["predicted_class"] for r in rows]))
    queries = retrieval.predictions.to_pylist()
    assert [q["caption"] for q in queries] == ["caption 0", "caption 1", "caption 2", None, None, None]
    assert retrieval.metrics["image_retrieval_recall@1"] == pytest.approx(np.mean([q["rank"] == 1 for q in queries[:3]]))
    assert clean.metrics["num_classes"] == 3 and clean.metrics["num_classes_with_pictures"] == 2
    assert set(evaluator.evaluate(model, "random")) == set(sets)
    # the attacked "set" is decoded apart, as something is written there
    assert evaluator.num_decoded == {"imagenet": 3, "imagenet_attr": 3, "retrieval": 3}
    later = Evaluator(sets, service)
    later.evaluate(model, "random")
    assert later.num_decoded == {"imagenet": 0, "imagenet_attr": 0, "retrieval": 0}


@pytest.mark.parametrize("of", [2, 3, 5])
def test_shares_of_several_evaluators_are_the_rows_of_one(
    of: int, model: str, sets: dict[str, SetConfig], service: ServiceConfig
) -> None:
    from raysys.models import load_model

    loaded = load_model(model, "random")
    alone = {result.evaluator: result for result in Evaluator(sets, service).results_of(loaded)}
    pool = [Evaluator(sets, service, rank=rank, of=of) for rank in range(of)]
    for name, whole in alone.items():
        shares = [evaluator.embed(loaded, name) for evaluator in pool]
        assert sum(len(share.image_ND[name]) for share in shares) == 3
        assert pool[0].answer(name, shares).predictions == whole.predictions


def test_weights_that_change_between_questions_count(model: str, sets: dict[str, SetConfig], service: ServiceConfig) -> None:
    from raysys.models import load_model

    evaluator, loaded = Evaluator(sets, service), load_model(model, "random")
    before = {result.evaluator: result.predictions for result in evaluator.results_of(loaded)}
    other = load_model(model, "random")
    loaded.model.load_state_dict(other.model.state_dict())
    after = {result.evaluator: result.predictions for result in evaluator.results_of(loaded)}
    fresh = {result.evaluator: result.predictions for result in Evaluator(sets, service).results_of(other)}
    assert after == fresh and after["imagenet"] != before["imagenet"]


def test_watcher_hears_of_every_row(model: str, sets: dict[str, SetConfig], service: ServiceConfig) -> None:
    from raysys.models import load_model

    heard: list[tuple[str, str, int, int]] = []
    evaluator, loaded = Evaluator(sets, service), load_model(model, "random")
    for name in sets:
        evaluator.embed(loaded, name, lambda *news: heard.append(news))
    last = {(name, unit): (done, total) for name, unit, done, total in heard}
    assert last["imagenet", "pictures"] == (3, 3) and last["imagenet", "classes"] == (3, 3)
    assert ("imagenet_attr", "classes") not in last  # one classifier serves both sets
    assert last["retrieval", "captions"] == (3, 3)


def test_bf16_is_near_fp32_and_not_the_same(model: str, sets: dict[str, SetConfig], service: ServiceConfig) -> None:
    from raysys.models import load_model

    loaded = load_model(model, "random")
    half = replace(service, precision="amp_bf16")
    exact, rough = (Evaluator(sets, s).embed(loaded, "imagenet").image_ND["imagenet"] for s in (service, half))
    assert exact == pytest.approx(rough, abs=0.02) and not np.array_equal(exact, rough)


def test_another_input_size_is_decoded_anew(model: str, fruit: ClassSetConfig, service: ServiceConfig, tmp_path: Path) -> None:
    larger = tmp_path / "larger.json"
    larger.write_text(json.dumps(MODEL | {"vision_cfg": MODEL["vision_cfg"] | {"image_size": 48}}))
    evaluator = Evaluator({"imagenet": fruit}, service)
    for spec in (model, str(larger), model):
        assert evaluator.evaluate(spec, "random")["imagenet"]["num_pictures"] == 3
    assert evaluator.num_decoded == {"imagenet": 6}  # the first size still lies there


def test_diverged_model_is_refused(model: str, fruit: ClassSetConfig, service: ServiceConfig, tmp_path: Path) -> None:
    from raysys.models import load_model

    state = load_model(model, "random").model.state_dict()
    state["visual.proj"].fill_(torch.nan)
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(UserError, match="not finite"):
        Evaluator({"imagenet": fruit}, service).evaluate(model, str(tmp_path / "nan.pt"))
