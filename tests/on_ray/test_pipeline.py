"""One real run a stage on Ray: real processes, real OCR models, small pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import open_clip
import pyarrow.parquet as pq
import pytest
from conftest import noise_jpeg, sample, write_tar

from raysys.regions.models import find_model
from raysys.storage import read_json
from raysys.training.metrics import read_metrics

pytestmark = pytest.mark.ray
Cli = Callable[..., tuple[int, str, str]]
RECIPE = [
    "train.precision=fp32",
    "train.log_every=1",
    "global_batch=8",
    "optim.warmup_steps=2",
    "augment=strong",
]


def rows(annotations: Path) -> list[tuple[str, str]]:
    return sorted(
        (row["shard"], row["key"])
        for file in sorted((annotations / "shards").glob("*.parquet"))
        for row in pq.read_table(file, columns=["shard", "key"]).to_pylist()
    )


def test_annotate_then_filter(ray_cluster: None, run_cli: Cli, tmp_path: Path, small_corpus: Path) -> None:
    out = tmp_path / "A"
    words = ("annotate", f"corpus.path={small_corpus}/train-{{00000..00001}}.tar", f"output={out}")
    status, printed, _ = run_cli(*words)
    assert status == 0 and "30 samples in 2 shards" in printed and "2 samples with an error: html" in printed
    assert len(rows(out)) == len(set(rows(out))) == 30
    assert [p.name for p in sorted((out / "shards").iterdir())] == ["train-00000.tar.parquet", "train-00001.tar.parquet"]

    first = (out / "shards" / "train-00000.tar.parquet").stat().st_mtime_ns
    (board,) = (out / "tensorboard").iterdir()
    assert b"regions/without_text" in board.read_bytes()
    status, printed, _ = run_cli(*words)
    assert status == 0 and "nothing is left to do" in printed
    assert list((out / "tensorboard").iterdir()) == [board]

    (out / "shards" / "train-00001.tar.parquet").unlink()  # as if the run had died there
    (out / "manifest.json").unlink()
    status, printed, _ = run_cli(*words)
    assert status == 0 and "1 of 2 shards are done already" in printed
    assert len(set(rows(out))) == 30
    assert (out / "shards" / "train-00000.tar.parquet").stat().st_mtime_ns == first
    (redone,) = (out / "tensorboard").iterdir()
    assert redone != board

    status, _, err = run_cli(*words, "ocr=fast")
    assert status == 2 and "ocr.looks: [" in err

    status, printed, _ = run_cli("filter", f"annotations={out}", f"output={tmp_path / 'S'}", f"shards={tmp_path / 'F'}")
    assert status == 0
    assert read_json(str(tmp_path / "S" / "manifest.json"))["counts"] == {
        "samples": 30,
        "kept": 24,
        "reasons": {"text_area": 4, "html": 2},
    }
    assert sorted(p.name for p in (tmp_path / "F").glob("*.tar")) == ["train-00000.tar", "train-00001.tar"]


def test_annotate_counts_a_damaged_shard_and_refuses_a_corpus_without_samples(
    ray_cluster: None, run_cli: Cli, tmp_path: Path
) -> None:
    good = write_tar(tmp_path / "c" / "a.tar", [m for i in range(4) for m in sample(str(i), noise_jpeg(i))])
    cut = write_tar(tmp_path / "c" / "b.tar", [m for i in range(4) for m in sample(str(i), noise_jpeg(i))])
    cut.write_bytes(cut.read_bytes()[:5000])
    status, printed, err = run_cli("annotate", f"corpus.path={tmp_path / 'c'}", f"output={tmp_path / 'A'}")
    assert status == 0 and "shard b.tar is damaged, its good part is kept" in printed and "Traceback" not in err
    assert 4 < len(rows(tmp_path / "A")) < 8

    good.write_bytes(b"no tar at all " * 100)
    status, _, err = run_cli("annotate", f"corpus.path={good}", f"output={tmp_path / 'B'}")
    assert status == 2 and "no sample could be read from 1 shards" in err.splitlines()[-1] and "Traceback" not in err


def test_two_workers_give_the_losses_of_one(
    ray_cluster: None, run_cli: Cli, tmp_path: Path, plain_corpus: Path, tiny_model: str
) -> None:
    losses = {}
    pairs = write_tar(tmp_path / "pairs.tar", [m for i in range(8) for m in sample(str(i), noise_jpeg(i), f"picture 0 {i}")])
    for workers in (1, 2):
        validate = ["evaluators=[retrieval]", f"retrieval.path={pairs}", "train.validate_every=4"] if workers == 2 else []
        run = tmp_path / f"R{workers}"
        status, printed, _ = run_cli(
            "train",
            f"corpus.path={plain_corpus}",
            f"model={tiny_model}",
            f"output={run}",
            "train.steps=10",
            f"num_workers={workers}",
            *validate,
            *RECIPE,
        )
        assert status == 0 and "10 steps of 8" in printed
        losses[workers] = [m["loss"] for m in read_metrics(str(run))]
        assert sorted(p.name for p in run.iterdir()) == [
            "checkpoints",
            "index",
            "manifest.json",
            "metrics.jsonl",
            "open_clip",
            "settings.json",
            "tensorboard",
        ]
    assert len(losses[1]) == 10 and losses[1] == pytest.approx(losses[2], abs=1e-4)
    open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'R2'}/open_clip")
    validated = {m["step"]: m["val/retrieval/mean_recall@1"] for m in read_metrics(str(tmp_path / "R2")) if "val/score" in m}
    assert list(validated) == [4, 8, 10]
    assert read_json(str(tmp_path / "R2" / "manifest.json"))["validation"]["retrieval/mean_recall@1"] == validated[10]
    status, _, _ = run_cli("evaluate", f"model={tmp_path / 'R2'}", *validate[:2], f"output={tmp_path / 'E'}")
    assert status == 0
    (result,) = (tmp_path / "E" / "results").iterdir()
    assert read_json(str(result))["metrics"]["mean_recall@1"] == pytest.approx(validated[10])
    of_run, of_evaluate = (_scalars(tmp_path / folder) for folder in ("R2/tensorboard", "E/tensorboard/R2"))
    assert of_evaluate and all(points[-1] == pytest.approx(of_run[tag][-1]) for tag, points in of_evaluate.items())
    assert of_evaluate["val/score"] == [pytest.approx((10, validated[10]))]

    status, printed, _ = run_cli(
        "train",
        f"corpus.path={plain_corpus}",
        f"model={tiny_model}",
        f"output={tmp_path / 'R2'}",
        "train.steps=10",
        "num_workers=2",
        *RECIPE,
    )
    assert status == 0 and "nothing is left to do" in printed


def _scalars(board: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's own reading: tag -> steps and values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(board)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_mistake_in_a_worker_is_one_line(
    ray_cluster: None, run_cli: Cli, tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # workers run elsewhere: what words name relatively must reach them
    write_tar(tmp_path / "c" / "0.tar", [m for i in range(8) for m in sample(str(i), b"junk" if i == 3 else noise_jpeg(i))])
    status, _, err = run_cli(
        "train", "corpus.path=c", f"model={Path(tiny_model).name}", "output=R", "train.steps=2", "num_workers=2", *RECIPE
    )
    assert status == 2 and "not_an_image; annotate the corpus first" in err.splitlines()[-1]
    assert not (tmp_path / "R").exists()  # nothing was learnt: other words may take the folder


def test_a_training_that_diverges_is_one_line_and_status_1(
    ray_cluster: None, run_cli: Cli, tmp_path: Path, plain_corpus: Path, tiny_model: str
) -> None:
    words = [f"corpus.path={plain_corpus}", f"model={tiny_model}", "num_workers=2", "optim.lr=1e39"]
    status, _, err = run_cli("train", *words, "train.steps=20", f"output={tmp_path / 'R'}", *RECIPE)
    assert status == 1 and "Traceback" not in err
    last = err.splitlines()[-1]
    assert "not finite at step 2; no checkpoint was due before; begin a new run" in last and "smaller optim.lr" in last


def _labelled_folder(folder: Path) -> Path:
    for number, name in enumerate(("cat", "dog", "fish")):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            (folder / name / f"{i}.jpg").write_bytes(noise_jpeg(number * 10 + i, 120))
    (folder.parent / "classes.json").write_text(json.dumps({"cat": "cat", "dog": "dog", "fish": "fish"}))
    return folder


def test_attack_then_evaluate_three_ways(ray_cluster: None, run_cli: Cli, tmp_path: Path, tiny_model: str) -> None:
    val = _labelled_folder(tmp_path / "val")
    classes = f"imagenet.classes={tmp_path / 'classes.json'}"
    status, _, _ = run_cli("attack", f"imagenet.path={val}", classes, "attack.classes=random", f"output={tmp_path / 'O'}")
    assert status == 0
    table = pq.read_table(tmp_path / "O" / "attack.parquet").to_pylist()
    assert len(table) == 9 and all(
        row["text"] in ("cat", "dog", "fish") and row["true_class"] != row["written_class"] for row in table
    )
    assert len(list((tmp_path / "O").glob("*/*.jpg"))) == 9

    test = write_tar(
        tmp_path / "test.tar", [m for i in range(6) for m in sample(str(i), noise_jpeg(i), None, [f"one {i}", f"two {i}"])]
    )
    words = (
        "evaluate", f"model={tiny_model}", "pretrained=random", "evaluators=[imagenet,imagenet_attr,retrieval]", f"imagenet.path={val}", classes,
        f"imagenet_attr.path={tmp_path / 'O'}", f"retrieval.path={test}", f"output={tmp_path / 'E'}",
    )  # fmt: skip
    status, printed, _ = run_cli(*words)
    assert status == 0 and "attack_success_rate" in printed
    (board,) = (tmp_path / "E" / "tensorboard" / "tiny").iterdir()
    assert b"val/imagenet_attr/pair_acc" in board.read_bytes() and b"attacked/" in board.read_bytes()
    results = sorted((tmp_path / "E" / "results").iterdir())
    assert {r.name.split("_tiny")[0] for r in results} == {"imagenet", "imagenet_attr", "retrieval"}
    for file in results:
        content = read_json(str(file))
        assert list(content)[:6] == ["dataset", "model", "pretrained", "task", "metrics", "language"]  # CLIP_benchmark's
    assert run_cli("report", str(tmp_path / "E"))[0] == 0
    assert (tmp_path / "E" / "report.html").is_file()


def test_demo_from_raw_pictures_to_the_report(ray_cluster: None, run_cli: Cli, tmp_path: Path) -> None:
    """The main job, short: numbers are not judged, the path is."""
    status, printed, err = run_cli("demo", f"output={tmp_path / 'D'}", "num_scenes=1000", "train.steps=4", "train.log_every=1")
    assert status == 0, err
    assert "a wrong word on it" in printed
    results = read_json(str(tmp_path / "D" / "results.json"))
    for name in ("raw", "filtered"):
        assert set(results[name]) == {"clean", "retrieval", "attacked"} and all(0 <= v <= 1 for v in results[name].values())
    assert results["text_detector"]["recall"] > 0.9 and results["text_detector"]["false_positives"] < 0.1
    page = (tmp_path / "D" / "report.html").read_text()
    assert "data:image/jpeg" in page and "<polygon" in page


def test_an_engine_that_cannot_start_ends_annotate_with_one_line(
    small_corpus: Path, tmp_path: Path, run_cli: Cli, ray_cluster: None
) -> None:
    """An actor whose constructor raises would be born again without end."""
    models = tmp_path / "models"
    models.mkdir()
    for name in ("PP-OCRv6_tiny_det", "PP-OCRv4_mobile_det", "PP-OCRv6_small_rec"):
        (models / f"{name}.onnx").symlink_to(find_model(name).onnx)  # but no PP-OCRv6_small_rec.txt
    words = ("annotate", f"corpus.path={small_corpus}", f"output={tmp_path / 'A'}", f"ocr.model_dir={models}")
    status, _, err = run_cli(*words)
    assert status == 2
    assert "no 'character' list in its metadata and no PP-OCRv6_small_rec.txt beside it" in err.splitlines()[-1]
