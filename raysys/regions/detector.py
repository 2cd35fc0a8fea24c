"""Where the text is: pictures -> boxes, by PP-OCR's DB detector (arXiv:1911.08947).

In: uint8 RGB [H, W, 3]. Out: :class:`Boxes` in pixels of that picture. Two engines: ONNX Runtime on the bare network with our own
pre- and post-processing, and PaddleOCR's TextDetection. Both run one picture at a time on one thread: on a CPU, batches and
threads cost more per picture than they bring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np
import pyclipper

from raysys.config import OcrConfig
from raysys.regions.geometry import order_corners
from raysys.regions.models import ModelFiles, onnx_session, paddle_det_folder

# ImageNet's mean and standard deviation, in PP-OCR's channel order (B, G, R), scaled to 0..255.
_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32) * 255
_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32) * 255
_MIN_SIDE_PX = 3
"""Kernels with a shorter side than this (detector's pixels) are noise (PP-OCR's default)."""


@dataclass
class Boxes:
    corners: np.ndarray
    """float32 [N, 4, 2], x and y in pixels of the picture, clockwise from top left."""
    scores: np.ndarray
    """float32 [N], mean text probability within the box."""


class Detector(Protocol):
    def detect(self, image: np.ndarray) -> Boxes: ...


def input_size(width: int, height: int, *, enlarge: float, max_side_px: int) -> tuple[int, int]:
    """Size of the network's input (width, height): aspect kept, multiples of 32, the long side within the limit."""
    scale = min(enlarge, max_side_px / max(width, height))
    return max(32, round(width * scale / 32) * 32), max(32, round(height * scale / 32) * 32)


class OnnxDetector:
    def __init__(self, ocr: OcrConfig, models: ModelFiles) -> None:
        self._ocr = ocr
        self._session = onnx_session(models.det, gpu=ocr.num_gpus_per_actor > 0)
        self._input = self._session.get_inputs()[0].name

    def detect(self, image: np.ndarray) -> Boxes:
        height, width = image.shape[:2]
        size = input_size(width, height, enlarge=self._ocr.enlarge, max_side_px=self._ocr.max_side_px)
        resized = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
        pixels = (resized[:, :, ::-1].astype(np.float32) - _MEAN) / _STD
        prob_HW = self._session.run(None, {self._input: pixels.transpose(2, 0, 1)[None]})[0][0, 0]
        boxes = boxes_of_map(
            prob_HW,
            pixel_threshold=self._ocr.pixel_threshold,
            min_score=self._ocr.store_score,
            unclip_ratio=self._ocr.unclip_ratio,
            max_boxes=self._ocr.max_regions,
        )
        boxes.corners *= np.array([width / size[0], height / size[1]], dtype=np.float32)
        return boxes


def boxes_of_map(prob_HW: np.ndarray, *, pixel_threshold: float, min_score: float, unclip_ratio: float, max_boxes: int) -> Boxes:
    """DB's post-processing: a probability map [H, W] -> rotated boxes in its pixels, best score first."""
    mask_HW = (prob_HW > pixel_threshold).astype(np.uint8)
    if not mask_HW.any():
        return Boxes(np.zeros((0, 4, 2), np.float32), np.zeros(0, np.float32))
    contours, _ = cv2.findContours(mask_HW, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    found: list[tuple[float, np.ndarray]] = []
    for contour in contours:
        kernel = cv2.minAreaRect(contour)
        if min(kernel[1]) < _MIN_SIDE_PX:
            continue
        corners = cv2.boxPoints(kernel)
        score = _mean_inside(prob_HW, corners)
        if score < min_score:
            continue
        grown = _unclip(corners, unclip_ratio)
        if grown is None:
            continue
        box = cv2.minAreaRect(grown)
        if min(box[1]) >= _MIN_SIDE_PX + 2:
            found.append((score, order_corners(cv2.boxPoints(box))))
    found.sort(key=lambda pair: -pair[0])
    found = found[:max_boxes]
    height, width = prob_HW.shape
    corners_N42 = np.array([corners for _, corners in found], np.float32).reshape(-1, 4, 2)
    return Boxes(corners_N42.clip(0, [width, height]).astype(np.float32), np.array([score for score, _ in found], np.float32))


def _mean_inside(prob_HW: np.ndarray, corners: np.ndarray) -> float:
    """Mean probability within a rotated box."""
    height, width = prob_HW.shape
    x0, y0 = np.floor(corners.min(0)).astype(int).clip(0, [width - 1, height - 1])
    x1, y1 = np.ceil(corners.max(0)).astype(int).clip(0, [width - 1, height - 1])
    mask = np.zeros((y1 - y0 + 1, x1 - x0 + 1), dtype=np.uint8)
    cv2.fillPoly(mask, [(corners - [x0, y0]).astype(np.int32)], [1])
    return float(cv2.mean(prob_HW[y0 : y1 + 1, x0 : x1 + 1], mask)[0])


def _unclip(corners: np.ndarray, ratio: float) -> np.ndarray | None:
    """Grow a shrunken kernel by Vatti clipping; None where nothing or several pieces come out."""
    area, perimeter = cv2.contourArea(corners), cv2.arcLength(corners, True)
    if perimeter == 0:
        return None
    offset = pyclipper.PyclipperOffset()
    offset.AddPath(corners.tolist(), pyclipper.JT_ROUND, pyclipper.ET_CLOSEDPOLYGON)
    grown = offset.Execute(area * ratio / perimeter)
    return np.array(grown[0], dtype=np.float32) if len(grown) == 1 else None


class PaddleDetector:
    """PaddleOCR's own TextDetection, offline, on its ONNX Runtime backend."""

    def __init__(self, ocr: OcrConfig, models: ModelFiles) -> None:
        from paddleocr import TextDetection

        self._ocr = ocr
        self._model: Any = TextDetection(
            model_name=models.paddle_det_name,
            model_dir=paddle_det_folder(models),
            device="gpu" if ocr.num_gpus_per_actor > 0 else "cpu",
            limit_side_len=ocr.max_side_px,
            limit_type="max",
            thresh=ocr.pixel_threshold,
            box_thresh=ocr.store_score,
            unclip_ratio=ocr.unclip_ratio,
            engine="onnxruntime",
            engine_config={"intra_op_num_threads": 1},
        )

    def detect(self, image: np.ndarray) -> Boxes:
        height, width = image.shape[:2]
        scale = min(self._ocr.enlarge, self._ocr.max_side_px / max(width, height))
        if scale > 1:  # PaddleOCR only shrinks
            image = cv2.resize(image, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_LINEAR)
        result = self._model.predict(np.ascontiguousarray(image[:, :, ::-1]), batch_size=1)[0]
        corners = np.array(result["dt_polys"], dtype=np.float32).reshape(-1, 4, 2)
        scores = np.array(result["dt_scores"], dtype=np.float32)
        best = np.argsort(-scores, kind="stable")[: self._ocr.max_regions]
        corners = corners[best] * np.array([width / image.shape[1], height / image.shape[0]], dtype=np.float32)
        return Boxes(np.array([order_corners(c) for c in corners], np.float32).reshape(-1, 4, 2), scores[best])
