"""TensorBoard's files, read back by TensorBoard itself: tags, numbers and pictures of every verb. No Ray."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import S3Server, free_port, jpeg, noise_jpeg, sample, start_server, write_tar
from PIL import Image

from raysys.board import BINS, PICTURE_PX, Board, draw_boxes, new_board, one_line
from raysys.config import (
    AugmentConfig,
    CorpusConfig,
    FilterConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    PolicyConfig,
    ServiceConfig,
    TrainConfig,
)
from raysys.corpus.samples import Sample, shard_hash
from raysys.corpus.shards import open_corpus
from raysys.evaluation import on_board as evaluation_board
from raysys.evaluation.class_sets import ClassSet
from raysys.evaluation.evaluator import SetResult
from raysys.evaluation.metrics import CLASSIFICATION, metrics
from raysys.evaluation.pictures import Picture
from raysys.evaluation.results import read_results, write_result
from raysys.output import Output, open_output
from raysys.policy.on_board import groups_of_verdicts
from raysys.policy.policy import judge
from raysys.policy.select import filter_annotations, make_selection
from raysys.regions import on_board as regions_board
from raysys.regions.annotations import AnnotationFiles, open_annotations
from raysys.regions.annotator import Look
from raysys.regions.units import look_at_shard
from raysys.storage import join, open_fs, read_json, write_bytes
from raysys.training.augment import make_view, strength_at, view_rng
from raysys.training.lock import RunLock
from raysys.training.loop import Host, run_worker
from raysys.training.samples import choose_samples, order_of
from raysys.training.views import LABEL_PX, MARGIN_PX, views_of

PINK = (255, 0, 96)


def tags_of(folder: Path | str) -> dict[str, list[str]]:
    """What TensorBoard finds in a run: kind -> tags; kinds without tags are left out."""
    return {
        kind: sorted(tags)
        for kind, tags in _read(folder).Tags().items()
        if isinstance(tags, list) and tags and kind != "distributions"
    }


def scalars_of(folder: Path | str) -> dict[str, list[tuple[int, float]]]:
    events = _read(folder)
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def pictures_of(folder: Path | str, tag: str) -> list[np.ndarray]:
    """Of the newest step. uint8 [h, w, 3]"""
    cells = _read(folder).Tensors(tag)[-1].tensor_proto.string_val
    pictures = [np.asarray(Image.open(io.BytesIO(cell))) for cell in cells[2:]]
    assert [int(cell) for cell in cells[:2]] == [pictures[0].shape[1], pictures[0].shape[0]]
    return pictures


def _read(folder: Path | str) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def is_like(pixel: np.ndarray, color: tuple[int, int, int]) -> bool:
    """Up to what JPEG does to it."""
    return bool(np.abs(pixel.astype(int) - color).max() < 60)


# ---- the writer -------------------------------------------------------------------------------------------------------


def write_something(board: Board) -> None:
    board.scalars({"train/loss": 0.5, "val/score": 0.25}, 7)
    board.histogram("data/text_area", np.array([0.0, 0.01, 0.5, 1.0], np.float32), 0)
    gray = np.full((20, 30, 3), 128, np.uint8)
    board.pictures("regions/kept", [gray, gray[:10]], 3)


@pytest.mark.parametrize("place", ["local", "s3"])
def test_tensorboard_reads_what_a_board_was_given(place: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = str(tmp_path / "run") if place == "local" else join(request.getfixturevalue("s3").new_bucket(), "run")
    with new_board(folder) as board:
        write_something(board)
    fs, inner = open_fs(folder)
    fs.get(inner, str(tmp_path / "copy"), recursive=True)
    copy = tmp_path / "copy"
    assert tags_of(copy) == {
        "scalars": ["train/loss", "val/score"], "histograms": ["data/text_area"], "tensors": ["regions/kept"],
    }  # fmt: skip
    assert scalars_of(copy) == {"train/loss": [(7, 0.5)], "val/score": [(7, 0.25)]}
    assert [picture.shape for picture in pictures_of(copy, "regions/kept")] == [(20, 30, 3), (10, 30, 3)]
    assert is_like(pictures_of(copy, "regions/kept")[0][5, 5], (128, 128, 128))
    [event] = _read(copy).Histograms("data/text_area")
    counts = dict(zip(event.histogram_value.bucket_limit, event.histogram_value.bucket, strict=True))
    assert [round(limit * BINS) for limit, count in counts.items() if count] == [1, 16, 30]
    assert (event.histogram_value.num, event.histogram_value.bucket[1]) == (4, 2)


def test_a_new_board_takes_the_place_of_the_old_one_whole_or_not_at_all(tmp_path: Path) -> None:
    with new_board(str(tmp_path / "b")) as board:
        board.scalars({"a": 1.0}, 0)
    with pytest.raises(RuntimeError), new_board(str(tmp_path / "b")) as board:
        board.scalars({"b": 1.0}, 0)
        raise RuntimeError
    assert tags_of(tmp_path / "b") == {"scalars": ["a"]}
    with new_board(str(tmp_path / "b")) as board:
        board.scalars({"c": 1.0}, 0)
    assert tags_of(tmp_path / "b") == {"scalars": ["c"]} and len(list((tmp_path / "b").iterdir())) == 1


@pytest.mark.parametrize("step", ["write_bytes", "remove_file"])
def test_a_kill_while_a_board_takes_the_place_of_another_leaves_one(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(tag: str) -> None:
        with new_board(str(tmp_path / "b")) as board:
            board.scalars({tag: 1.0}, 0)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    write("a")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"raysys.board.{step}", killed)
        write("b")
    assert tags_of(tmp_path / "b") == {"scalars": ["a"] if step == "write_bytes" else ["a", "b"]}
    write("c")
    assert tags_of(tmp_path / "b") == {"scalars": ["c"]}


def test_on_an_object_store_what_was_flushed_stays_and_the_rest_goes(s3: S3Server, tmp_path: Path) -> None:
    """A worker that lost its run must not write when it ends."""
    folder = join(s3.new_bucket(), "run")
    board = Board(folder)
    board.scalars({"a": 1.0}, 1)
    board.flush()
    board.scalars({"a": 2.0}, 2)
    board.close()
    fs, inner = open_fs(folder)
    fs.get(inner, str(tmp_path / "copy"), recursive=True)
    assert scalars_of(tmp_path / "copy") == {"a": [(1, 1.0)]}


def test_boards_of_annotate_and_filter_load_no_torch() -> None:
    """It takes seconds, and their drivers do without."""
    code = (
        "import sys, tempfile, numpy as np\n"
        "import raysys.policy.on_board\n"
        "from raysys.board import new_board\n"
        "with new_board(tempfile.mkdtemp()) as board:\n"
        "    board.scalars({'a': 1}, 0); board.pictures('b', [np.zeros((9, 9, 3), np.uint8)], 0)\n"
        "    board.histogram('c', np.ones(3), 0); board.hparams({'d': 1.0}, ['a'], 'e')\n"
        "assert not {'torch', 'tensorflow'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_server_shows_runs_and_tags(tmp_path: Path) -> None:
    for run in ("R/tensorboard", "E/tensorboard/model"):
        with new_board(str(tmp_path / run)) as board:
            write_something(board)
    port = free_port()
    words = ["tensorboard.main", "--logdir", str(tmp_path), "--host", "127.0.0.1", "--port", str(port)]
    server = start_server(words, port, tmp_path / "log")
    try:

        def ask(what: str) -> Any:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/{what}", timeout=10) as answer:
                return json.load(answer)

        end = time.monotonic() + 60
        while len(ask("runs")) < 2 and time.monotonic() < end:  # it reads them after it answers
            time.sleep(0.2)
        scalars, images = ask("plugin/scalars/tags"), ask("plugin/images/tags")
        assert scalars.keys() == images.keys() == {"R/tensorboard", "E/tensorboard/model"}
        assert all(sorted(tags) == ["train/loss", "val/score"] for tags in scalars.values())
        assert images["R/tensorboard"]["regions/kept"]["samples"] == 2
        [shown] = ask("plugin/images/images?run=R/tensorboard&tag=regions/kept&sample=1")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/plugin/images/individualImage?{shown['query']}") as answer:
            assert answer.headers["Content-Type"] == "image/jpeg" and Image.open(answer).size == (30, 10)
    finally:
        server.terminate()
        server.wait()


# ---- boxes ------------------------------------------------------------------------------------------------------------

UPPER_LEFT = np.array([[[0.25, 0.5], [0.5, 0.5], [0.5, 0.75], [0.25, 0.75]]])
"""x .25 to .5, y .5 to .75."""


def test_a_box_is_drawn_at_its_pixels() -> None:
    drawn = draw_boxes(np.zeros((192, 96, 3), np.uint8), UPPER_LEFT, [""], [])
    assert drawn.shape == (PICTURE_PX, 200, 3) and drawn.dtype == np.uint8  # the picture is 192 wide, a note has 200
    pink = np.argwhere((drawn == PINK).all(axis=2))
    assert abs(pink.min(axis=0) - (192, 48)).max() <= 1 and abs(pink.max(axis=0) - (288, 96)).max() <= 1  # rows, columns
    assert not drawn[200:280, 60:90].any() and (drawn[:, 192:] == 255).all()


@pytest.mark.parametrize(("x", "y", "above"), [(0.2, 0.5, True), (0.2, 0.0, False), (0.9, 0.5, True)])
def test_a_label_stands_above_its_box_else_below_and_within_the_picture(x: float, y: float, above: bool) -> None:
    box = np.array([[[x, y], [x + 0.1, y], [x + 0.1, y + 0.2], [x, y + 0.2]]])
    picture = np.zeros((100, 200, 3), np.uint8)
    bare, labelled = (draw_boxes(picture, box, [text], []) for text in ("", "SALE (0.90)"))
    rows, columns = np.argwhere((bare != labelled).any(axis=2)).T
    top, bottom = round(y * 192), round((y + 0.2) * 192)
    assert rows.max() <= top + 2 if above else rows.min() >= bottom - 2
    assert 20 < np.ptp(columns) < 120 and columns.max() < PICTURE_PX


def test_labels_do_not_lie_on_each_other() -> None:
    boxes = np.repeat(UPPER_LEFT, 5, axis=0)
    five, one = (draw_boxes(np.zeros((99, 99, 3), np.uint8), boxes[:n], ["SALE"] * n, []) for n in (5, 1))
    more = (five != one).any(axis=2)
    assert more.any() and not more[: PICTURE_PX // 2].any()  # the second stands below, the other three nowhere


HOSTILE = [
    "\x00\x1b[31m\n\r",
    "\u202eevil",
    "<script>alert(1)</script>",
    "\ud800",
    "漢字" * 1000,
    "e\u0301" * 10_000,
    "a" * 10_000_000,
    "",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_any_text_does_no_harm(text: str) -> None:
    drawn = draw_boxes(np.zeros((50, 80, 3), np.uint8), UPPER_LEFT, [text], [text, "plain"])
    assert drawn.shape == (240 + 2 * 14, PICTURE_PX, 3)
    assert drawn[254:].min() < 255  # the line after it
    line = one_line(text, 20)
    assert len(line) <= 20 and line.isprintable() and line.encode().decode() == line


@pytest.mark.parametrize("shape", [(8, 800), (800, 8), (1, 1), (2000, 3000)])
def test_pictures_of_any_shape(shape: tuple[int, int]) -> None:
    drawn = draw_boxes(np.zeros((*shape, 3), np.uint8), np.zeros((0, 4, 2)), [], ["a note"])
    assert max(drawn.shape) <= PICTURE_PX + 14 and drawn.shape[1] >= 200 and min(drawn.shape[:2]) > 14


# ---- annotate and filter ----------------------------------------------------------------------------------------------

REGION = {"polygon": [0.25, 0.5, 0.5, 0.5, 0.5, 0.75, 0.25, 0.75], "score": 0.9, "area": 0.0625, "text": "SALE", "text_score": 0.8}


class Sees:
    """A box where the caption says ``text``, of which ``unread`` ones do not count."""

    def look_all(self, pictures: Iterable[tuple[Sample, bytes | None]]) -> Iterator[tuple[Sample, Look]]:
        for label, data in pictures:
            caption = " ".join(label.captions)
            regions = [REGION | ({"text": "", "text_score": 0.0} if "unread" in caption else {})] if "text" in caption else []
            error = "html" if data == b"<html>" else None
            yield label, Look(error=error) if error else Look(64, 64, regions, 0.0625 if regions else 0.0)


def annotate(place: str, tmp_path: Path) -> Output:
    """Of 10 pictures: three with text, two with a box that was not read, one broken. :param place: takes A and the corpus."""
    captions = ["text"] * 3 + ["unread text"] * 2 + ["broken"] + ["plain"] * 4
    black = jpeg(np.zeros((64, 64, 3), np.uint8))
    members = [m for i, c in enumerate(captions) for m in sample(f"{i}", b"<html>" if c == "broken" else black, c)]
    write_bytes(f"{place}/corpus/0.tar", write_tar(tmp_path / "0.tar", members).read_bytes())
    corpus = open_corpus(CorpusConfig(path=f"{place}/corpus"))
    words = asdict(CorpusConfig(path=f"{place}/corpus")) | {"roots": corpus.roots}
    output = open_output(f"{place}/A", "annotate", {"corpus": words, "ocr": {"store_score": 0.3, "recognize": True}})
    table, made_of, damaged = look_at_shard(corpus.shards[0].path, "0.tar", None, Sees())  # type: ignore[arg-type]
    head = AnnotationFiles(output.path, output.fingerprint).write_shard("0.tar", table, made_of=made_of, damaged=damaged)
    output.finish({"shards": 1, **asdict(head.counts)})
    return output


@pytest.fixture
def annotations(tmp_path: Path) -> Output:
    return annotate(str(tmp_path), tmp_path)


def test_annotations_and_corpus_on_an_object_store(s3: S3Server, tmp_path: Path) -> None:
    made = annotate(s3.new_bucket(), tmp_path)
    before = len(s3.requests())
    regions_board.write_board(made.path, open_annotations(made.path).roots, read_json(made.join("manifest.json"))["counts"])
    assert len(s3.requests()) - before < 50  # of nine pictures: each is two; some more for the rows and the board
    fs, inner = open_fs(made.join("tensorboard"))
    fs.get(inner, str(tmp_path / "copy"), recursive=True)
    assert [len(pictures_of(tmp_path / "copy", tag)) for tag in tags_of(tmp_path / "copy")["tensors"]] == [5, 4]


def test_annotate_shows_shares_histograms_and_pictures_with_their_boxes(annotations: Output) -> None:
    counts = read_json(annotations.join("manifest.json"))["counts"]
    regions_board.write_board(annotations.path, open_annotations(annotations.path).roots, counts)
    board = annotations.join("tensorboard")
    found = tags_of(board)
    assert found["histograms"] == ["data/box_score", "data/text_area", "data/text_score"]
    assert {tag: value for tag, [(_, value)] in scalars_of(board).items()} == pytest.approx(
        {"data/with_regions_share": 0.5, "data/with_text_share": 0.3, "data/error_share": 0.1}
    )
    assert [_read(board).Histograms(tag)[0].histogram_value.num for tag in found["histograms"]] == [5, 5, 3]
    with_text, *_, without = sorted(found["tensors"], key=lambda tag: "without" in tag)
    assert with_text.startswith("regions/with_text") and without == "regions/without_text"
    assert [len(pictures_of(board, tag)) for tag in (with_text, without)] == [5, 4]
    picture, plain = pictures_of(board, with_text)[0], pictures_of(board, without)[0]
    assert picture.shape == (384 + 2 * 14, 384, 3)
    for x, y in ((96, 240), (192, 240), (144, 192), (144, 288)):  # left, right, top and bottom edge
        assert is_like(picture[y, x], PINK), (x, y)
        assert not plain[y, x].any()


def filter_config(annotations: Output, tmp_path: Path, **more: Any) -> FilterConfig:
    return replace(FilterConfig(output=str(tmp_path / "S"), annotations=annotations.path), **more)


def test_filter_shows_what_it_keeps_and_what_it_drops_by_reason(annotations: Output, tmp_path: Path) -> None:
    filter_annotations(filter_config(annotations, tmp_path))
    board = tmp_path / "S" / "tensorboard"
    assert tags_of(board)["tensors"] == ["regions/kept", "regions/text_area"]
    assert [len(pictures_of(board, f"regions/{group}")) for group in ("kept", "text_area")] == [6, 3]
    assert is_like(pictures_of(board, "regions/kept")[0][192, 144], PINK)  # the nearest to being dropped: a box that was not read
    assert {tag: value for tag, [(_, value)] in scalars_of(board).items()} == pytest.approx(
        {"data/kept_share": 0.6, "data/dropped_share/text_area": 0.3, "data/dropped_share/html": 0.1}
    )
    assert _read(board).Histograms("data/text_area")[0].histogram_value.num == 2  # of the kept


def test_rows_nearest_to_the_other_verdict_come_first() -> None:
    area = [0.3, 0.1, 0.2, 0.0, 0.0]
    regions = [[REGION | {"area": a}] if a else [] for a in area]
    columns = {"caption": [["a"]] * 5, "regions": regions, "text_area": area, "error": [None] * 4 + ["html"]}
    table = pa.table(columns)
    groups = groups_of_verdicts(table, judge(table, PolicyConfig(name="area", max_text_area=0.15)))
    assert {name: rows.tolist() for name, rows in groups.items()} == {"kept": [1, 3], "text_area": [2, 0]}


def test_a_finished_selection_keeps_its_board_and_one_made_anew_gets_another(annotations: Output, tmp_path: Path) -> None:
    def files() -> list[tuple[str, int]]:
        return sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "S" / "tensorboard").iterdir())

    filter_annotations(filter_config(annotations, tmp_path))
    first = files()
    filter_annotations(filter_config(annotations, tmp_path))
    assert files() == first
    annotations.finish(read_json(annotations.join("manifest.json"))["counts"], changed=True)
    filter_annotations(filter_config(annotations, tmp_path))
    assert len(files()) == 1 and files() != first


def test_verdicts_that_train_makes_have_no_board(annotations: Output, tmp_path: Path) -> None:
    make_selection(open_annotations(annotations.path), PolicyConfig(), str(tmp_path / "S"))
    assert not (tmp_path / "S" / "tensorboard").exists()


def test_pictures_out_of_reach_are_told_in_a_line_and_the_numbers_are_there(
    annotations: Output, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "corpus").rename(tmp_path / "moved")
    filter_annotations(filter_config(annotations, tmp_path))
    assert "filter: 9 pictures are not shown in TensorBoard: " in capsys.readouterr().out
    found = tags_of(tmp_path / "S" / "tensorboard")
    assert "data/kept_share" in found["scalars"] and "tensors" not in found


# ---- train ------------------------------------------------------------------------------------------------------------

RAMP = AugmentConfig(factor=0, crop_scale_min=0.3, flip=0.5, color_jitter=0.4, schedule="ramp")


def train_config(tmp_path: Path, corpus: str, model: str, steps: int = 4) -> TrainConfig:
    return TrainConfig(
        output=str(tmp_path / "run"),
        corpus=CorpusConfig(path=corpus),
        model=model,
        seed=3,
        global_batch=16,
        train=LoopConfig(steps=steps, precision="fp32", log_every=1, checkpoint_every=2),
        optim=OptimConfig(lr=1e-3, warmup_steps=1),
        augment=RAMP,
    )


def train(cfg: TrainConfig) -> None:
    host = Host(rank=0, world_size=1, device=torch.device("cpu"), say=print, validator=None)
    run_worker(cfg, cfg.output, choose_samples(cfg, cfg.output), host, RunLock.take(cfg.output), threads=1)


def squares(grid: np.ndarray, size_px: int, row: int) -> list[np.ndarray]:
    """A row of views [S, S, 3]."""
    y = row * (size_px + MARGIN_PX + LABEL_PX) + LABEL_PX
    starts = range(MARGIN_PX, grid.shape[1] - size_px, size_px + MARGIN_PX)
    return [grid[y : y + size_px, x : x + size_px] for x in starts]


def test_the_views_are_those_of_training_for_seed_sample_and_view(tmp_path: Path, plain_corpus: Path) -> None:
    cfg = train_config(tmp_path, str(plain_corpus), "-")
    index = choose_samples(cfg, cfg.output)
    order = order_of(cfg, index)
    samples = order.batch(0)[0]
    drawn = views_of(samples, index, order, RAMP, size_px=40, num_steps=100)
    assert list(drawn) == ["views/1", "views/2", "views/3", "views/4"]
    for tag, sample_number in zip(drawn, samples[[0, 5, 10, 15]].tolist(), strict=True):
        shard, within = divmod(sample_number, 20)
        spans = [s for s in open_corpus(cfg.corpus).shards if s.name == f"{shard}.tar"]
        row = _row_of(spans[0].path, within)
        [grid] = drawn[tag]
        for number, step in enumerate((0, 99)):
            plain, *views = squares(grid, 40, number)
            assert len(views) == 5

            def view(v: int, strength: float, row: dict[str, Any] = row, shard: int = shard) -> np.ndarray:
                rng = view_rng(3, shard_hash(f"{shard}.tar"), row["offset"], v)
                return make_view(row["data"], ["c"], size_px=40, augment=RAMP, strength=strength, rng=rng)[0]

            assert np.array_equal(plain, view(0, 0.0))
            for v, shown in enumerate(views):
                assert np.array_equal(shown, view(v, strength_at(RAMP, step / 100))), (tag, step, v)


def _row_of(tar: str, index: int) -> dict[str, Any]:
    from raysys.corpus.shards import iter_samples, read_image

    found = list(iter_samples(tar))[index]
    return {"offset": found.offset, "data": read_image(tar, index=index, offset=found.offset, size=found.size)}


def test_a_run_shows_its_views_once_and_not_again_when_it_goes_on(tmp_path: Path, plain_corpus: Path, tiny_model: str) -> None:
    cfg = train_config(tmp_path, str(plain_corpus), tiny_model)
    train(cfg)
    board = Path(cfg.output) / "tensorboard"
    assert tags_of(board)["tensors"] == ["views/1", "views/2", "views/3", "views/4"]
    assert scalars_of(board)["data/kept_share"] == [(0, 1.0)]
    index = choose_samples(cfg, cfg.output)
    order = order_of(cfg, index)
    expected = views_of(order.batch(0)[0], index, order, RAMP, size_px=32, num_steps=4)
    shown = pictures_of(board, "views/3")[0].astype(int)
    assert np.abs(shown - expected["views/3"][0]).mean() < 8  # JPEG

    state = Path(cfg.output) / "checkpoints" / "step-4"
    for file in state.iterdir():
        file.unlink()
    train(cfg)  # from step 2
    assert len(list(board.iterdir())) == 2
    assert [event.step for event in _read(board).Tensors("views/1")] == [0]
    assert [step for step, _ in scalars_of(board)["train/loss"]] == [1, 2, 3, 4]


def test_views_of_samples_on_an_object_store(tmp_path: Path, plain_corpus: Path, s3: S3Server) -> None:
    bucket = s3.new_bucket()
    for shard in plain_corpus.iterdir():
        write_bytes(f"{bucket}/c/{shard.name}", shard.read_bytes())
    grids = []
    for number, corpus in enumerate((str(plain_corpus), f"{bucket}/c")):
        cfg = train_config(tmp_path / str(number), corpus, "-")
        index = choose_samples(cfg, cfg.output)
        grids.append(views_of(np.array([3, 30]), index, order_of(cfg, index), RAMP, size_px=24, num_steps=4))
    assert list(grids[0]) == ["views/1", "views/2"]
    assert all(np.array_equal(local[0], remote[0]) for local, remote in zip(grids[0].values(), grids[1].values(), strict=True))


def test_a_picture_that_cannot_be_decoded_is_left_out_of_the_views(tmp_path: Path) -> None:
    write_tar(tmp_path / "c" / "0.tar", [m for i in range(16) for m in sample(str(i), b"junk" if i == 5 else noise_jpeg(i))])
    cfg = train_config(tmp_path, str(tmp_path / "c"), "-")
    index = choose_samples(cfg, cfg.output)
    assert list(views_of(np.arange(16), index, order_of(cfg, index), RAMP, size_px=24, num_steps=4)) == [
        "views/1", "views/3", "views/4",
    ]  # fmt: skip


# ---- evaluate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "pretrained", "steps"),
    [
        ("R", None, 40),
        ("local-dir:R/open_clip", None, 40),
        ("ViT-B-32", "R/checkpoints/step-20/state.pt", 20),
        ("ViT-B-32", "R/checkpoints/step-30/state.pt", 0),  # not complete
        ("ViT-B-32", "random", 0),
        ("ViT-B-32", "openai", 0),
        ("A", None, 0),
    ],
)
def test_the_step_of_a_models_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, pretrained: str | None, steps: int
) -> None:
    monkeypatch.chdir(tmp_path)
    for verb, folder in (("train", "R"), ("annotate", "A")):
        Path(folder).mkdir()
        Path(folder, "manifest.json").write_text(json.dumps({"verb": verb, "counts": {"steps": 40}}))
    for step in (20, 30):
        Path(f"R/checkpoints/step-{step}").mkdir(parents=True)
        Path(f"R/checkpoints/step-{step}/state.pt").touch()
    Path("R/checkpoints/step-20/info.json").touch()
    assert evaluation_board.trained_steps(ModelConfig(model, pretrained)) == steps


def test_evaluate_shows_numbers_by_the_tags_of_training_and_attacked_pictures_with_the_answer(tmp_path: Path) -> None:
    output = open_output(str(tmp_path / "E"), "evaluate", {})
    true, written, said = [0, 1, 2, 0], [1, 2, 0, 1], [1, 1, 1, 0]  # the first reads, the second and the last see
    names = [f"{i}.jpg" for i in range(4)]
    columns: dict[str, Any] = {
        "picture": names,
        "true_class": true,
        "predicted_class": said,
        "score": pa.array([0.5] * 4, pa.float32()),
        "true_rank": [2, 1, 2, 1],
        "true_score": [0.1] * 4,
    }
    attacked = columns | {"written_class": written, "written_rank": [1, 2, 3, 2], "self_attack": [False] * 4}
    for evaluator, found in (("imagenet", columns), ("imagenet_attr", attacked)):
        table = pa.table(found)
        result = SetResult(evaluator, evaluator, CLASSIFICATION, metrics(CLASSIFICATION, table), table, [])
        write_result(output, "m", ModelConfig("R"), ServiceConfig(), result, "mark")
    pictures = []
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(b"gone" if i == 2 else noise_jpeg(i, 100))
        pictures.append(Picture(name, str(tmp_path / name)))
    a_set = ClassSet(pictures, true, ["a", "b", "c"], ["ant", "<b>", "cow"], ["{}"], "mark", written)
    results = [of_models[0] for of_models in read_results(output, ["imagenet", "imagenet_attr"], ["m"]).values()]
    for _ in range(2):
        evaluation_board.write_board(output, "m", ModelConfig("R", "random"), results, a_set)
    board = tmp_path / "E" / "tensorboard" / "m"
    numbers = scalars_of(board)
    assert numbers["val/imagenet/acc1"] == [(0, 0.5)] and numbers["val/score"] == [(0, 0.5)]
    assert numbers["val/imagenet_attr/attack_success_rate"] == [(0, 0.25)] and not any("num_" in tag for tag in numbers)
    assert tags_of(board)["tensors"] == ["attacked/read", "attacked/seen"]  # of the third, which is neither, the file is gone
    assert [len(pictures_of(board, f"attacked/{group}")) for group in ("read", "seen")] == [1, 2]
    assert pictures_of(board, "attacked/read")[0].shape == (384 + 28, 384, 3)
    assert sorted(p.name for p in (tmp_path / "E").iterdir()) == ["predictions", "results", "settings.json", "tensorboard"]
