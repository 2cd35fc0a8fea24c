"""The imported networks against ONNX Runtime, on drawn text."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image, ImageDraw, ImageFont

from raysys.errors import UserError
from raysys.regions.torch_graph import import_onnx


def _in_wheel(wheel: str, file: str) -> str:
    spec = importlib.util.find_spec(wheel)
    assert spec is not None and spec.origin is not None
    return str(Path(spec.origin).parent / "models" / file)


DETECTORS = [_in_wheel("rapidocr_onnxruntime", "ch_PP-OCRv4_det_infer.onnx")]
RECOGNIZERS = [_in_wheel("rapidocr_onnxruntime", "ch_PP-OCRv4_rec_infer.onnx")]
_CLOSE = 1e-4
"""ONNX Runtime itself is up to 7e-5 from float64 on such pictures."""

detectors = pytest.mark.parametrize("path", DETECTORS, ids=lambda path: Path(path).stem)
recognizers = pytest.mark.parametrize("path", RECOGNIZERS, ids=lambda path: Path(path).stem)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _pictures(num: int, height: int, width: int, font_px: int) -> torch.Tensor:
    """[N, 3, H, W] in -1..1: dark words on light noise, other words and noise in each picture."""
    pictures = []
    for seed, words in zip(range(num), ["Open 24 hours", "SALE 50% off", "Main Street"], strict=False):
        noise = np.random.default_rng(seed).integers(170, 230, (height, width, 3), dtype=np.uint8)
        picture = Image.fromarray(noise)
        ImageDraw.Draw(picture).text((4, height // 8), words, fill=(20, 20, 60), font=ImageFont.load_default(font_px))
        pictures.append(np.asarray(picture).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(pictures).astype(np.float32) / 127.5 - 1)


def _run(network: Callable[[torch.Tensor], torch.Tensor], pictures: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return network(pictures).float().numpy()


def _run_onnx(path: str, pictures: torch.Tensor) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: pictures.numpy()})[0]


def _assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < _CLOSE


@detectors
@pytest.mark.parametrize("shape", [(1, 64, 96), (2, 96, 160), (3, 160, 128)])
def test_detector_equals_onnx_runtime(path: str, shape: tuple[int, int, int]) -> None:
    pictures = _pictures(*shape, font_px=24)
    expected = _run_onnx(path, pictures)
    assert (expected > 0.3).mean() > 0.02  # there is text to find
    _assert_close(_run(import_onnx(path), pictures), expected)


@recognizers
@pytest.mark.parametrize(("num", "width"), [(1, 48), (2, 200), (3, 133)])
def test_recognizer_equals_onnx_runtime(path: str, num: int, width: int) -> None:
    pictures = _pictures(num, 48, width, font_px=26)
    expected = _run_onnx(path, pictures)
    assert (expected.argmax(2) != 0).any()  # there are letters to read
    _assert_close(_run(import_onnx(path), pictures), expected)


@detectors
def test_batch_of_maps_is_the_single_maps(path: str) -> None:
    network, pictures = import_onnx(path), _pictures(3, 64, 128, font_px=24)
    _assert_close(_run(network, pictures), np.concatenate([_run(network, one[None]) for one in pictures]))


@recognizers
def test_batch_of_lines_is_the_single_lines(path: str) -> None:
    network, pictures = import_onnx(path), _pictures(3, 48, 200, font_px=26)
    _assert_close(_run(network, pictures), np.concatenate([_run(network, one[None]) for one in pictures]))


@detectors
def test_bf16_channels_last_finds_the_same_mask(path: str) -> None:
    pictures = _pictures(2, 128, 192, font_px=26)
    exact = _run(import_onnx(path), pictures) > 0.3
    network = import_onnx(path).to(torch.bfloat16).to(memory_format=torch.channels_last)
    mask = _run(network, pictures.to(torch.bfloat16, memory_format=torch.channels_last)) > 0.3
    assert exact.mean() > 0.02
    assert (mask != exact).mean() < 0.05 * exact.mean()


@recognizers
def test_bf16_reads_the_same_letters(path: str) -> None:
    pictures = _pictures(3, 48, 240, font_px=28)
    letters = _run(import_onnx(path), pictures).argmax(2)
    assert (_run(import_onnx(path).to(torch.bfloat16), pictures.to(torch.bfloat16)).argmax(2) == letters).mean() > 0.95


@pytest.mark.parametrize("path", [*(pytest.param(path, marks=pytest.mark.long) for path in DETECTORS), *RECOGNIZERS])
def test_one_compiled_graph_takes_all_sizes(path: str) -> None:
    torch._dynamo.reset()
    network = import_onnx(path)
    compiled = torch.compile(network, backend="eager", fullgraph=True, dynamic=True)
    first, other = ((2, 64, 96), (3, 128, 160)) if path in DETECTORS else ((2, 48, 96), (3, 48, 200))
    _run(compiled, _pictures(*first, font_px=24))
    with torch.compiler.set_stance("fail_on_recompile"):
        result = _run(compiled, _pictures(*other, font_px=24))
    _assert_close(result, _run(network, _pictures(*other, font_px=24)))


def _save(tmp_path: Path, *nodes: onnx.NodeProto) -> str:
    """A network of these nodes, from x to y."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, "h", "w"]) for name in ("x", "y")]
    path = str(tmp_path / "small.onnx")
    onnx.save(helper.make_model(helper.make_graph(list(nodes), "small", ends[:1], ends[1:])), path)
    return path


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (helper.make_node("Mish", ["x"], ["y"]), "small.onnx: ONNX operator Mish .*does not implement"),
        (helper.make_node("Relu", ["x"], ["y"], domain="com.example"), "ONNX operator Relu .*does not implement"),
        (helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], storage_order=1), "MaxPool .*storage_order"),
        (helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], auto_pad="SAME_LOWER"), "MaxPool .*auto_pad=SAME_LOWER"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path: Path, node: onnx.NodeProto, message: str) -> None:
    with pytest.raises(UserError, match=message):
        import_onnx(_save(tmp_path, node))


def test_same_upper_pads_below_and_right(tmp_path: Path) -> None:
    path = _save(tmp_path, helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], auto_pad="SAME_UPPER"))
    rows = torch.tensor([[-4.0, -3.0], [-2.0, -1.0]]).expand(1, 3, 2, 2)
    assert _run(import_onnx(path), rows)[0, 0].tolist() == [[-1, -1], [-1, -1]]


def test_import_needs_neither_ray_nor_onnx_runtime() -> None:
    heavy = "{'ray', 'onnxruntime', 'cv2'} & set(sys.modules)"
    code = f"import sys, raysys.regions.torch_graph; sys.exit(str({heavy}) if {heavy} else 0)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
