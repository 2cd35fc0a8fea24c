"""Where the text is: pictures -> boxes, by PP-OCR's DB detector (arXiv:1911.08947). What all engines share.

In: uint8 RGB [H, W, 3] at the network's size (:func:`input_size`). Out: :class:`Boxes` in pixels of that input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np

from raysys.config import OcrConfig

# ImageNet's mean and standard deviation, in PP-OCR's channel order (B, G, R), scaled to 0..255.
MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32) * 255
STD = np.array([0.229, 0.224, 0.225], dtype=np.float32) * 255
_MIN_SIDE_PX = 3
"""Kernels with a shorter side than this (detector's pixels) are noise (PP-OCR's default)."""


@dataclass
class Boxes:
    corners: np.ndarray
    """float32 [N, 4, 2], x and y in pixels, clockwise from top left."""
    scores: np.ndarray
    """float32 [N], mean text probability within the box; best first."""

    @staticmethod
    def none() -> Boxes:
        return Boxes(np.zeros((0, 4, 2), np.float32), np.zeros(0, np.float32))


class Detector(Protocol):
    def detect(self, images: Sequence[np.ndarray]) -> list[Boxes]:
        """Boxes of each picture; sides are multiples of 32, sizes may differ from picture to picture."""
        ...


def input_size(width: int, height: int, *, enlarge: float, max_side_px: int) -> tuple[int, int]:
    """Size of the network's input (width, height): aspect kept, multiples of 32, the long side within the limit."""
    scale = min(enlarge, max_side_px / max(width, height))
    return max(32, round(width * scale / 32) * 32), max(32, round(height * scale / 32) * 32)


def network_input(image: np.ndarray) -> np.ndarray:
    """uint8 RGB [H, W, 3] -> float32 [1, 3, H, W], BGR, normalised. A ninth of the time of cv2.dnn's blob (0.25 for 2.2 ms)."""
    blob = np.empty((1, 3, *image.shape[:2]), np.float32)
    for plane, channel, mean, std in zip(blob[0], cv2.split(image)[::-1], MEAN, STD, strict=True):
        np.multiply(channel, 1 / std, out=plane, dtype=np.float32)
        plane -= mean / std
    return blob


def boxes_of_map(prob_HW: np.ndarray, ocr: OcrConfig) -> Boxes:
    """DB's post-processing: a probability map [H, W] -> rotated boxes in its pixels, best score first."""
    mask_HW = (prob_HW > ocr.pixel_threshold).astype(np.uint8)
    if not mask_HW.any():
        return Boxes.none()
    contours, _ = cv2.findContours(mask_HW, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    found: list[tuple[float, np.ndarray]] = []
    for contour in contours:
        kernel = cv2.minAreaRect(contour)
        if min(kernel[1]) < _MIN_SIDE_PX:
            continue
        corners = cv2.boxPoints(kernel)
        score = _mean_inside(prob_HW, corners)
        if score < ocr.store_score:
            continue
        # Vatti clipping of a rectangle, and the smallest rectangle around that: every side moves out by the offset.
        offset = kernel[1][0] * kernel[1][1] * ocr.unclip_ratio / (2 * sum(kernel[1]))
        center, (width, height), angle = cv2.minAreaRect(np.trunc(corners))  # whole pixels, as PP-OCR's clipper has them
        found.append((score, order_corners(cv2.boxPoints((center, (width + 2 * offset, height + 2 * offset), angle)))))
    found.sort(key=lambda pair: -pair[0])
    found = found[: ocr.max_regions]
    if not found:
        return Boxes.none()
    height_px, width_px = prob_HW.shape
    corners_N42 = np.round(np.stack([corners for _, corners in found]))  # whole pixels, as PP-OCR
    return Boxes(corners_N42.clip(0, [width_px, height_px]).astype(np.float32), np.array([score for score, _ in found], np.float32))


def _mean_inside(prob_HW: np.ndarray, corners: np.ndarray) -> float:
    """Mean probability within a rotated box."""
    height, width = prob_HW.shape
    x0, y0 = np.floor(corners.min(0)).astype(int).clip(0, [width - 1, height - 1])
    x1, y1 = np.ceil(corners.max(0)).astype(int).clip(0, [width - 1, height - 1])
    mask = np.zeros((y1 - y0 + 1, x1 - x0 + 1), dtype=np.uint8)
    cv2.fillPoly(mask, [(corners - [x0, y0]).astype(np.int32)], [1])
    return float(cv2.mean(prob_HW[y0 : y1 + 1, x0 : x1 + 1], mask)[0])


def order_corners(box: np.ndarray) -> np.ndarray:
    """Corners [4, 2] clockwise from top left, so that text reads from corner 0 to corner 1."""
    by_x = box[np.argsort(box[:, 0], kind="stable")]
    left = by_x[:2][np.argsort(by_x[:2, 1], kind="stable")]
    right = by_x[2:][np.argsort(by_x[2:, 1], kind="stable")]
    return np.array([left[0], right[0], right[1], left[1]], dtype=np.float32)
