"""The engine ``torch``: the same networks, imported from their ONNX files, in batches of equal shape. For GPUs; it runs on CPUs too.

Pictures go to the device as uint8 and are normalised there. Only maps with a pixel above the threshold come back for contours.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from raysys.config import OcrConfig
from raysys.regions.detector import MEAN, STD, Boxes, boxes_of_map
from raysys.regions.models import Model
from raysys.regions.recognizer import Reading, decode_ctc, line_input
from raysys.regions.torch_graph import import_onnx
from raysys.storage import UserError

_MAX_BATCH_PX = 96 * 640 * 640
"""Pixels of one batch: about 20 GB of activations of PP-OCRv4 in bf16 (not measured)."""


class _Network:
    """A network on its device, and the way of uint8 batches there."""

    def __init__(self, ocr: OcrConfig, model: Model, mean: Sequence[float], std: Sequence[float]) -> None:
        self.device = device_of(ocr)
        self._dtype = torch.bfloat16 if ocr.precision == "bf16" else torch.float32
        network: nn.Module = import_onnx(model.onnx).to(self.device, self._dtype).to(memory_format=torch.channels_last)
        self._network = torch.compile(network, dynamic=True) if ocr.compile else network
        self._mean, self._std = (torch.tensor(v, device=self.device).reshape(1, 3, 1, 1) for v in (mean, std))

    def __call__(self, images_NHW3: np.ndarray) -> Tensor:
        """uint8 BGR [N, H, W, 3] -> the network's output, float32."""
        batch = torch.from_numpy(images_NHW3)
        if self.device.type == "cuda":
            batch = batch.pin_memory().to(self.device, non_blocking=True)
        pixels = ((batch.permute(0, 3, 1, 2).float() - self._mean) / self._std).to(self._dtype)
        output: Tensor = self._network(pixels.contiguous(memory_format=torch.channels_last))
        return output.float()


class TorchDetector:
    def __init__(self, ocr: OcrConfig, model: Model) -> None:
        self._ocr = ocr
        self._network = _Network(ocr, model, MEAN.tolist(), STD.tolist())

    @torch.inference_mode()
    def detect(self, images: Sequence[np.ndarray]) -> list[Boxes]:
        # Everything is queued before anything is waited for, so contours of one batch are traced while the next is in the network.
        queued = []
        for members in equal_shapes([image.shape for image in images]):
            prob_NHW = self._network(np.stack([images[i][:, :, ::-1] for i in members]))[:, 0]
            queued.append((members, prob_NHW, prob_NHW.amax((1, 2)) > self._ocr.pixel_threshold))
        found = [Boxes.none()] * len(images)
        for members, prob_NHW, has_text_N in queued:
            with_text = has_text_N.nonzero()[:, 0]
            maps = prob_NHW[with_text].cpu().numpy()
            for member, prob_HW in zip(with_text.tolist(), maps, strict=True):
                found[members[member]] = boxes_of_map(prob_HW, self._ocr)
        return found


class TorchRecognizer:
    def __init__(self, ocr: OcrConfig, model: Model) -> None:
        self._characters = model.characters()
        self._network = _Network(ocr, model, [127.5] * 3, [127.5] * 3)

    @torch.inference_mode()
    def read(self, lines: Sequence[np.ndarray]) -> list[Reading]:
        inputs = [line_input(line) for line in lines]
        queued = []
        for members in equal_shapes([line.shape for line in inputs]):
            score_NT, best_NT = self._network(np.stack([inputs[i] for i in members])).max(2)
            queued.append((members, best_NT, score_NT))
        readings = [Reading("", 0.0)] * len(lines)
        for members, best_NT, score_NT in queued:
            for member, best_T, score_T in zip(members, best_NT.cpu().numpy(), score_NT.cpu().numpy(), strict=True):
                readings[member] = decode_ctc(best_T, score_T, self._characters)
        return readings


def device_of(ocr: OcrConfig) -> torch.device:
    """:raises UserError: where a GPU is asked for and torch sees none."""
    if ocr.num_gpus_per_actor > 0 and not torch.cuda.is_available():
        raise UserError("ocr.num_gpus_per_actor > 0: torch sees no CUDA device here")
    return torch.device("cuda" if ocr.num_gpus_per_actor > 0 else "cpu")


def equal_shapes(shapes: Sequence[tuple[int, ...]]) -> Iterator[list[int]]:
    """Positions grouped by shape (H, W, 3), in batches that fit the memory."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for position, shape in enumerate(shapes):
        groups[shape].append(position)
    for shape, members in groups.items():
        size = max(1, _MAX_BATCH_PX // (shape[0] * shape[1]))
        for first in range(0, len(members), size):
            yield members[first : first + size]
