"""What the text says: boxes -> text and score, by PP-OCR's CTC recogniser.

In: uint8 RGB [H, W, 3] and boxes in its pixels. Out: one :class:`Reading` a box. Detection boxes alone throw good photographs
away (39 of 60 plain photographs had one); a box that can be read is text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np

from raysys.config import OcrConfig
from raysys.regions.models import ModelFiles, onnx_session, paddle_rec_folder, rec_characters

_HEIGHT_PX = 48
"""Height of the recogniser's input (PP-OCRv3 and later)."""
_MAX_WIDTH_PX = 1600
"""Longest line that is read at full resolution: a third of a thousand letters."""


@dataclass
class Reading:
    text: str
    score: float
    """Mean probability of the letters read, 0..1; 0 where none was."""


class Recognizer(Protocol):
    def read(self, image: np.ndarray, corners: np.ndarray) -> list[Reading]: ...


def cut_out(image: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """The box [4, 2] straightened; upright ones (height >= 1.5 width) turned by 90 degrees, as PP-OCR does."""
    width = max(1, round(max(np.linalg.norm(corners[0] - corners[1]), np.linalg.norm(corners[3] - corners[2]))))
    height = max(1, round(max(np.linalg.norm(corners[0] - corners[3]), np.linalg.norm(corners[1] - corners[2]))))
    target = np.array([[0, 0], [width, 0], [width, height], [0, height]], dtype=np.float32)
    transform = cv2.getPerspectiveTransform(corners.astype(np.float32), target)
    line = cv2.warpPerspective(image, transform, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    return np.rot90(line) if height >= 1.5 * width else line


class OnnxRecognizer:
    def __init__(self, ocr: OcrConfig, models: ModelFiles) -> None:
        self._session = onnx_session(models.rec, gpu=ocr.num_gpus_per_actor > 0)
        self._input = self._session.get_inputs()[0].name
        self._characters = rec_characters(models.rec)

    def read(self, image: np.ndarray, corners: np.ndarray) -> list[Reading]:
        return [self._read_line(cut_out(image, box)) for box in corners]

    def _read_line(self, line: np.ndarray) -> Reading:
        width = int(np.clip(np.ceil(_HEIGHT_PX * line.shape[1] / line.shape[0]), _HEIGHT_PX, _MAX_WIDTH_PX))
        resized = cv2.resize(np.ascontiguousarray(line[:, :, ::-1]), (width, _HEIGHT_PX), interpolation=cv2.INTER_LINEAR)
        pixels = resized.astype(np.float32).transpose(2, 0, 1) / 127.5 - 1
        prob_TC = self._session.run(None, {self._input: pixels[None]})[0][0]
        return decode_ctc(prob_TC, self._characters)


def decode_ctc(prob_TC: np.ndarray, characters: list[str]) -> Reading:
    """Greedy CTC: [T, C] probabilities, class 0 is blank; repeats fold, the score is the mean over the letters kept."""
    best_T = prob_TC.argmax(1)
    kept_T = (best_T != 0) & np.concatenate([[True], best_T[1:] != best_T[:-1]])
    if not kept_T.any():
        return Reading("", 0.0)
    text = "".join(characters[i] for i in best_T[kept_T])
    return Reading(text, float(prob_TC.max(1)[kept_T].mean()))


class PaddleRecognizer:
    """PaddleOCR's own TextRecognition, offline, on its ONNX Runtime backend."""

    def __init__(self, ocr: OcrConfig, models: ModelFiles) -> None:
        from paddleocr import TextRecognition

        self._model: Any = TextRecognition(
            model_name=models.paddle_rec_name,
            model_dir=paddle_rec_folder(models),
            device="gpu" if ocr.num_gpus_per_actor > 0 else "cpu",
            engine="onnxruntime",
            engine_config={"intra_op_num_threads": 1},
        )

    def read(self, image: np.ndarray, corners: np.ndarray) -> list[Reading]:
        lines = [np.ascontiguousarray(cut_out(image, box)[:, :, ::-1]) for box in corners]
        return [Reading(r["rec_text"], float(r["rec_score"])) for r in self._model.predict(lines, batch_size=1)] if lines else []
