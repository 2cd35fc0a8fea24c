"""The engines ``onnx`` and ``openvino``: the bare networks, with our own pre- and post-processing.

One picture and one line at a time on one thread: on a CPU, batches and threads cost more a picture than they bring. ONNX Runtime also
runs on a GPU where onnxruntime-gpu is installed. Sessions cannot be pickled: they are made in the actor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from raysys.config import OcrConfig
from raysys.errors import UserError
from raysys.regions.detector import Boxes, boxes_of_map, network_input
from raysys.regions.models import Model
from raysys.regions.onnx_graph import simplify
from raysys.regions.recognizer import Reading, decode_ctc, line_input

Network = Callable[[np.ndarray], np.ndarray]
"""float32 [1, 3, H, W] -> the first output; the result may be overwritten by the next call."""


class CpuDetector:
    def __init__(self, network: Network, ocr: OcrConfig) -> None:
        self._network, self._ocr = network, ocr

    def detect(self, images: Sequence[np.ndarray]) -> list[Boxes]:
        return [boxes_of_map(self._network(network_input(image))[0, 0], self._ocr) for image in images]


class CpuRecognizer:
    def __init__(self, network: Network, characters: list[str]) -> None:
        self._network, self._characters = network, characters

    def read(self, lines: Sequence[np.ndarray]) -> list[Reading]:
        return [self._read(line_input(line)) for line in lines]

    def _read(self, line_HW3: np.ndarray) -> Reading:
        pixels = line_HW3.astype(np.float32).transpose(2, 0, 1) / 127.5 - 1
        prob_TC = self._network(np.ascontiguousarray(pixels[None]))[0]
        best_T = prob_TC.argmax(1)
        return decode_ctc(best_T, prob_TC[np.arange(len(best_T)), best_T], self._characters)


def onnx_network(model: Model, *, gpu: bool) -> Network:
    """:raises UserError: where a GPU is asked for and ONNX Runtime has none (it would fall back to the CPU in silence)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    provider = "CUDAExecutionProvider" if gpu else "CPUExecutionProvider"
    there = onnxruntime.get_available_providers()
    session = None
    if provider in there:
        network = model.onnx if gpu else simplify(model.onnx).SerializeToString()
        session = onnxruntime.InferenceSession(network, options, providers=[provider])
    if session is None or provider not in session.get_providers():
        raise UserError(
            "ocr.num_gpus_per_actor > 0 needs onnxruntime-gpu and its CUDA libraries; this ONNX Runtime cannot use a GPU"
        )
    name = session.get_inputs()[0].name
    return lambda pixels: session.run(None, {name: pixels})[0]


def openvino_network(model: Model, *, precision: str) -> Network:
    """:raises UserError: where OpenVINO is not installed, or bf16 is asked of a CPU without it (OpenVINO would take fp32 in silence)."""
    try:
        import openvino
    except ImportError as error:
        raise UserError("ocr.engine=openvino needs: pip install 'raysys[openvino]'") from error
    core = openvino.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise UserError("ocr.precision=bf16: this CPU has no bfloat16 (AMX or AVX512_BF16); use fp32")
    settings = {
        "INFERENCE_NUM_THREADS": 1,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
    }
    request = core.compile_model(model.onnx, "CPU", settings).create_infer_request()

    def run(pixels: np.ndarray) -> np.ndarray:
        request.infer({0: pixels})
        output: np.ndarray = request.get_output_tensor(0).data
        return output

    return run
