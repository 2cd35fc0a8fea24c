"""A simplified graph is the same network."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest

from raysys.regions.models import find_model
from raysys.regions.onnx_graph import simplify

SHAPES = {"det": [(1, 3, 64, 96), (1, 3, 160, 128)], "rec": [(1, 3, 48, 96), (1, 3, 48, 320)]}


@pytest.mark.parametrize("name", ["PP-OCRv4_mobile_det", "PP-OCRv4_mobile_rec", "PP-OCRv6_tiny_det", "PP-OCRv6_small_rec"])
def test_simplified_networks_give_the_same_outputs(name: str) -> None:
    path = find_model(name).onnx
    simple = simplify(path)
    original, cheaper = (onnxruntime.InferenceSession(m) for m in (path, simple.SerializeToString()))
    for shape in SHAPES[name[-3:]]:
        pixels = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        expected, got = (s.run(None, {s.get_inputs()[0].name: pixels})[0] for s in (original, cheaper))
        assert got == pytest.approx(expected, abs=1e-5)


def test_nothing_taken_apart_is_left_of_v4() -> None:
    kinds = Counter(node.op_type for node in simplify(find_model("PP-OCRv4_mobile_det").onnx).graph.node)
    assert kinds["Clip"] == kinds["Div"] == 0
    before = Counter(node.op_type for node in onnx.load(find_model("PP-OCRv4_mobile_det").onnx).graph.node)
    assert before["Clip"] == before["Div"] == kinds["HardSigmoid"] - before["HardSigmoid"] == 24
    assert before["Add"] + before["Mul"] > 2 * (kinds["Add"] + kinds["Mul"])
