"""What the text says: lines -> text and score, by PP-OCR's CTC recognisers (arXiv:2205.00159). What all engines share.

In: lines cut out of a picture, uint8 RGB [h, w, 3]. Out: one :class:`Reading` a line. Detection boxes alone throw good photographs
away (39 of 60 plain photographs had one); a box that can be read is text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np

_HEIGHT_PX = 48
"""Height of the recogniser's input (PP-OCRv3 and later)."""
_WIDTH_STEP_PX = 32
"""Widths are padded to multiples of this: few shapes for the allocator, equal shapes for batches."""
_MAX_WIDTH_PX = 1600
"""Longest line that is read at full resolution: a third of a thousand letters."""


@dataclass
class Reading:
    text: str
    score: float
    """Mean probability of the letters read, 0..1; 0 where none was."""


class Recognizer(Protocol):
    def read(self, lines: Sequence[np.ndarray]) -> list[Reading]: ...


def cut_out(image: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """The box [4, 2] straightened; upright ones (height >= 1.5 width) turned by 90 degrees, as PP-OCR does."""
    width = max(1, round(max(np.linalg.norm(corners[0] - corners[1]), np.linalg.norm(corners[3] - corners[2]))))
    height = max(1, round(max(np.linalg.norm(corners[0] - corners[3]), np.linalg.norm(corners[1] - corners[2]))))
    target = np.array([[0, 0], [width, 0], [width, height], [0, height]], dtype=np.float32)
    transform = cv2.getPerspectiveTransform(corners.astype(np.float32), target)
    line = cv2.warpPerspective(image, transform, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    return np.rot90(line) if height >= 1.5 * width else line


def line_input(line: np.ndarray) -> np.ndarray:
    """uint8 RGB [h, w, 3] -> uint8 BGR [48, W, 3]: aspect kept, padded with mid-grey (0 once normalised) at its end, as PP-OCR does."""
    width = int(np.clip(np.ceil(_HEIGHT_PX * line.shape[1] / line.shape[0]), _HEIGHT_PX, _MAX_WIDTH_PX))
    resized = cv2.resize(np.ascontiguousarray(line[:, :, ::-1]), (width, _HEIGHT_PX), interpolation=cv2.INTER_LINEAR)
    padding = -width % _WIDTH_STEP_PX
    return cv2.copyMakeBorder(resized, 0, 0, 0, padding, cv2.BORDER_CONSTANT, value=(127, 127, 127)) if padding else resized


def decode_ctc(best_T: np.ndarray, score_T: np.ndarray, characters: list[str]) -> Reading:
    """Greedy CTC: class [T] and its probability [T] of every step. Class 0 is blank; repeats fold; the score is the mean over the
    letters kept."""
    kept_T = (best_T != 0) & np.concatenate([[True], best_T[1:] != best_T[:-1]])
    if not kept_T.any():
        return Reading("", 0.0)
    return Reading("".join(characters[i] for i in best_T[kept_T]), float(score_T[kept_T].mean()))
