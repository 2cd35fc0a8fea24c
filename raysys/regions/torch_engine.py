"""The engine ``torch``: the same networks, imported from their ONNX files, in batches of equal shape. For GPUs; it runs on CPUs too.

Pictures go to the device as uint8 and are normalised there. Only maps with a pixel above the threshold come back for contours.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor, nn

from raysys.config import OcrConfig
from raysys.errors import UserError
from raysys.regions.detector import MEAN, STD, Boxes, boxes_of_map
from raysys.regions.models import Model
from raysys.regions.recognizer import Reading, decode_ctc, line_input
from raysys.regions.torch_graph import import_onnx

_MAX_DETECTOR_PX = 256 * 640 * 640
"""Pixels of one batch of pictures: 4 GB of activations of PP-OCRv4 in bf16 (counted, not measured on a GPU)."""
_MAX_RECOGNIZER_PX = 1024 * 48 * 320
"""Pixels of one batch of lines: 3 GB of activations of PP-OCRv6 small, and its 18,710 classes a step."""


class _Network:
    """A network on its device, and the way of uint8 batches there."""

    def __init__(self, ocr: OcrConfig, model: Model, mean: Sequence[float], std: Sequence[float]) -> None:
        self.device = device_of(ocr)
        self._dtype = torch.bfloat16 if ocr.precision == "bf16" else torch.float32
        network: nn.Module = import_onnx(model.onnx).to(self.device, self._dtype).to(memory_format=torch.channels_last)
        self._network = torch.compile(network, dynamic=True) if ocr.compile else network
        self._mean, self._std = (torch.tensor(v, device=self.device).reshape(1, 3, 1, 1) for v in (mean, std))

    def __call__(self, images_NHW3: np.ndarray, *, flip: bool) -> Tensor:
        """uint8 [N, H, W, 3] -> the network's output in its precision; ``flip`` turns RGB into BGR on the device."""
        batch = torch.from_numpy(images_NHW3)
        if self.device.type == "cuda":
            batch = batch.pin_memory().to(self.device, non_blocking=True)
        channels = batch.permute(0, 3, 1, 2)
        pixels = (((channels.flip(1) if flip else channels).float() - self._mean) / self._std).to(self._dtype)
        output: Tensor = self._network(pixels.contiguous(memory_format=torch.channels_last))
        return output


class _OnItsWay:
    """Tensors that are being copied to the host, behind the work that makes them and before whatever is queued next."""

    def __init__(self, *tensors: Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        self._host = tensors
        if tensors[0].is_cuda:
            self._host = tuple(torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors)
            self._done = torch.cuda.Event()
            self._done.record()

    def arrays(self) -> list[np.ndarray]:
        if self._done is not None:
            self._done.synchronize()
        return [tensor.numpy() for tensor in self._host]


class TorchDetector:
    def __init__(self, ocr: OcrConfig, model: Model) -> None:
        self._ocr = ocr
        self._network = _Network(ocr, model, MEAN.tolist(), STD.tolist())
        self._tracers = ThreadPoolExecutor(ocr.decode_threads, "contours")

    def detect(self, images: Sequence[np.ndarray]) -> list[Boxes]:
        # Everything is queued before anything is waited for, so contours of one batch are traced while the next is in the network.
        queued = []
        with torch.inference_mode():
            for members in equal_shapes([image.shape for image in images], _MAX_DETECTOR_PX):
                prob_NHW = self._network(np.stack([images[i] for i in members]), flip=True)[:, 0].float()
                queued.append((members, _OnItsWay(prob_NHW, prob_NHW.amax((1, 2)))))
        found = [Boxes.none()] * len(images)
        for members, coming in queued:
            maps_NHW, highest_N = coming.arrays()
            with_text = np.flatnonzero(highest_N > self._ocr.pixel_threshold).tolist()
            traced = self._tracers.map(lambda prob_HW: boxes_of_map(prob_HW, self._ocr), (maps_NHW[i] for i in with_text))
            for i, boxes in zip(with_text, traced, strict=True):
                found[members[i]] = boxes
        return found


class TorchRecognizer:
    def __init__(self, ocr: OcrConfig, model: Model) -> None:
        self._characters = model.characters()
        self._network = _Network(ocr, model, [127.5] * 3, [127.5] * 3)

    def read(self, lines: Sequence[np.ndarray]) -> list[Reading]:
        inputs = [line_input(line) for line in lines]
        queued = []
        with torch.inference_mode():
            for members in equal_shapes([line.shape for line in inputs], _MAX_RECOGNIZER_PX):
                score_NT, best_NT = self._network(np.stack([inputs[i] for i in members]), flip=False).max(2)
                queued.append((members, _OnItsWay(best_NT, score_NT.float())))
        readings = [Reading("", 0.0)] * len(lines)
        for members, coming in queued:
            for member, best_T, score_T in zip(members, *coming.arrays(), strict=True):
                readings[member] = decode_ctc(best_T, score_T, self._characters)
        return readings


def device_of(ocr: OcrConfig) -> torch.device:
    """:raises UserError: where a GPU is asked for and torch sees none."""
    if ocr.num_gpus_per_actor > 0 and not torch.cuda.is_available():
        raise UserError(
            "ocr.num_gpus_per_actor > 0: torch sees no CUDA device here; install a CUDA build of torch, or leave the key at 0"
        )
    return torch.device("cuda" if ocr.num_gpus_per_actor > 0 else "cpu")


def equal_shapes(shapes: Sequence[tuple[int, ...]], max_px: int) -> Iterator[list[int]]:
    """Positions grouped by shape (H, W, 3), in batches of at most so many pixels."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for position, shape in enumerate(shapes):
        groups[shape].append(position)
    for shape, members in groups.items():
        size = max(1, max_px // (shape[0] * shape[1]))
        for first in range(0, len(members), size):
            yield members[first : first + size]
