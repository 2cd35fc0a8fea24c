"""Geometry and post-processing by hand; the real models on drawn text."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from raysys.config import OcrConfig
from raysys.regions.annotations import SCHEMA, Counts
from raysys.regions.annotator import Annotator
from raysys.regions.detector import MEAN, STD, boxes_of_map, input_size, network_input, order_corners
from raysys.regions.geometry import keep_best, polygon_area, union_area
from raysys.regions.recognizer import cut_out, decode_ctc, line_input
from raysys.regions.units import look_at_shard


def _box(x0: float, y0: float, x1: float, y1: float) -> list[tuple[float, float]]:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def test_union_area_overlapping_boxes_counts_overlap_once() -> None:
    assert union_area(np.array([_box(0, 0, 0.5, 0.5), _box(0.25, 0, 0.75, 0.5)])) == pytest.approx(0.375)


def test_union_area_leaves_out_what_lies_outside() -> None:
    assert union_area(np.array([_box(0.5, 0.5, 1.5, 1.5)])) == pytest.approx(0.25)


def test_union_area_of_nothing_and_of_a_line() -> None:
    assert union_area(np.zeros((0, 4, 2))) == 0
    assert union_area(np.array([[(0.1, 0.1), (0.5, 0.1), (0.5, 0.1), (0.1, 0.1)]])) == pytest.approx(0)


def test_polygon_area_of_a_diamond() -> None:
    assert polygon_area(np.array([(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)])) == pytest.approx(0.5)


def test_corners_start_top_left_and_go_clockwise() -> None:
    shuffled = np.array([(10, 5), (0, 0), (0, 5), (10, 0)], np.float32)
    assert order_corners(shuffled).tolist() == [[0, 0], [10, 0], [10, 5], [0, 5]]


@pytest.mark.parametrize(
    ("size", "enlarge", "limit", "expected"),
    [
        ((1280, 720), 1.0, 960, (960, 544)),
        ((224, 224), 1.0, 960, (224, 224)),
        ((112, 112), 2.0, 224, (224, 224)),
        ((9, 900), 1.0, 960, (32, 896)),
    ],
)
def test_network_input_keeps_aspect_in_multiples_of_32(
    size: tuple[int, int], enlarge: float, limit: int, expected: tuple[int, int]
) -> None:
    assert input_size(*size, enlarge=enlarge, max_side_px=limit) == expected


def test_a_blob_becomes_one_grown_box() -> None:
    prob = np.zeros((64, 128), np.float32)
    prob[20:30, 30:90] = 0.9
    boxes = boxes_of_map(prob, OcrConfig(max_regions=9))
    assert len(boxes.corners) == 1
    assert boxes.scores[0] == pytest.approx(0.9, abs=0.05)
    # a 59 x 9 kernel grows by area * 1.5 / perimeter = 59 * 9 * 1.5 / 136 = 5.9 px on each side
    (x0, y0), (x1, y1) = boxes.corners[0].min(0), boxes.corners[0].max(0)
    assert [x0, y0, x1, y1] == pytest.approx([24, 14, 95, 35], abs=1.5)


def test_faint_blobs_are_not_stored_and_best_come_first() -> None:
    prob = np.zeros((64, 128), np.float32)
    prob[5:15, 10:50], prob[40:50, 10:50], prob[20:30, 60:100] = 0.5, 0.95, 0.35
    boxes = boxes_of_map(prob, OcrConfig(store_score=0.4))
    assert len(boxes.scores) == 2 and boxes.scores[0] > boxes.scores[1]
    assert len(boxes_of_map(prob, OcrConfig(store_score=0.4, max_regions=1)).scores) == 1


def test_ctc_folds_repeats_and_drops_blanks() -> None:
    path = [0, 1, 1, 0, 1, 2, 2, 0]  # blank a a blank a b b blank
    prob = np.full((8, 3), 0.1, np.float32)
    for t, c in enumerate(path):
        prob[t, c] = 0.8
    reading = decode_ctc(prob.argmax(1), prob.max(1), ["", "a", "b"])
    assert (reading.text, reading.score) == ("aab", pytest.approx(0.8))
    assert decode_ctc(np.zeros(3, np.int64), np.ones(3, np.float32), ["", "a", "b"]).score == 0


def test_upright_lines_are_turned() -> None:
    image = np.zeros((100, 100, 3), np.uint8)
    assert cut_out(image, np.array(_box(10, 10, 20, 90), np.float32)).shape[:2] == (10, 80)
    assert cut_out(image, np.array(_box(10, 10, 90, 20), np.float32)).shape[:2] == (10, 80)


def test_lines_are_padded_not_squeezed() -> None:
    line = line_input(np.zeros((24, 50, 3), np.uint8))  # 100 px wide at 48 px height
    assert line.shape == (48, 128, 3)
    assert (line[:, :100] == 0).all() and (line[:, 100:] == 127).all()
    assert line_input(np.zeros((48, 5000, 3), np.uint8)).shape == (48, 1600, 3)


def test_normalising_is_pp_ocrs() -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    expected = (image[:, :, ::-1].astype(np.float32) - MEAN) / STD
    assert network_input(image)[0].transpose(1, 2, 0) == pytest.approx(expected, abs=1e-5)


def test_the_better_of_two_overlapping_polygons_stays() -> None:
    line, word, elsewhere = _box(0, 0, 1, 0.2), _box(0.5, 0, 0.9, 0.2), _box(0, 0.5, 1, 0.6)
    polygons = np.array([word, line, elsewhere])
    assert keep_best(polygons, np.array([1.0, 2.0, 0.5])).tolist() == [1, 2]
    assert keep_best(polygons, np.array([2.0, 1.0, 0.5])).tolist() == [0, 2]


def test_a_shard_becomes_a_table_of_the_contract(small_corpus) -> None:  # type: ignore[no-untyped-def]
    table, _, damaged = look_at_shard(str(small_corpus / "train-00000.tar"), "train-00000.tar", None, Annotator(OcrConfig()))
    assert table.schema.names == SCHEMA.names and table.num_rows == 15
    assert table["key"].to_pylist()[-3:] == ["0900", "0901", "0902"]
    assert table["error"].to_pylist() == [None] * 14 + ["html"]
    counts = Counts.of(table)
    assert (counts.samples, counts.errors, counts.with_text, damaged) == (15, {"html": 1}, 2, "")


def test_one_thread_an_actor() -> None:
    Annotator(OcrConfig())
    assert cv2.getNumThreads() == 1
