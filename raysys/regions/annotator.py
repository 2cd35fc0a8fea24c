"""The look: the bytes of a picture -> everything a policy may want to know.

In: bytes. Out: :class:`Look`. Leaves the files to :mod:`raysys.regions.annotations`. No Ray here.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import cv2
import numpy as np

from raysys.config import LookConfig, OcrConfig
from raysys.corpus.images import TIMEOUT, BrokenImage, Picture, decode
from raysys.corpus.prefetch import prefetch
from raysys.regions.detector import Boxes, Detector, input_size
from raysys.regions.engine import open_engine
from raysys.regions.geometry import keep_best, polygon_area, union_area
from raysys.regions.recognizer import Reading, cut_out

T = TypeVar("T")


@dataclass
class Look:
    """What one picture showed."""

    width: int | None = None
    height: int | None = None
    regions: list[dict[str, object]] = field(default_factory=list)
    text_area: float | None = None
    error: str | None = None


@dataclass
class _Regions:
    """What the looks at one picture found so far."""

    corners: np.ndarray = field(default_factory=lambda: np.zeros((0, 4, 2), np.float32))
    """[N, 4, 2] in pixels of the decoded picture."""
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    readings: list[Reading | None] = field(default_factory=list)

    def add(self, boxes: Boxes, readings: Sequence[Reading | None], most: int) -> None:
        """What another look found; of two that overlap, the one with more letters read for sure stays."""
        first = len(self.scores) == 0
        self.corners = np.concatenate([self.corners, boxes.corners])
        self.scores = np.concatenate([self.scores, boxes.scores])
        self.readings = [*self.readings, *readings]
        if first or len(boxes.scores) == 0:
            return
        sure = np.array([letters(r.text) * r.score if r else 0.0 for r in self.readings])
        kept = keep_best(self.corners, sure + self.scores * 1e-3)
        kept = kept[np.argsort(-self.scores[kept], kind="stable")][:most]
        self.corners, self.scores = self.corners[kept], self.scores[kept]
        self.readings = [self.readings[i] for i in kept]

    def settled(self, text_score: float) -> bool:
        """Whether a region says for sure that there is text, so that no further look is needed."""
        return any(
            score >= _SURE_SCORE and reading is not None and reading.score >= text_score and letters(reading.text) >= _SURE_LETTERS
            for score, reading in zip(self.scores, self.readings, strict=True)
        )


_SURE_SCORE = 0.5
_SURE_LETTERS = 3
"""What a sure region needs beside its text score: with .8 of that, none of 340 photographs without text was settled wrongly."""
_SPARE = 1.5
"""Pictures are decoded at no less than this times the side of the largest look, so that lines are read at more than its pixels."""


class Annotator:
    """Detectors and recogniser of one process."""

    def __init__(self, ocr: OcrConfig) -> None:
        cv2.setNumThreads(1)
        self._ocr = ocr
        self._engine = open_engine(ocr)
        self._turn = threading.Lock()
        self._min_side_px = int(_SPARE * max(look.max_side_px for look in ocr.looks))

    def look(self, data: bytes | None) -> Look:
        """Find and read the text of a picture; a broken one gets a reason."""
        return self._look_at([self._open((None, data))[1]])[0]

    def look_all(self, pictures: Iterable[tuple[T, bytes | None]]) -> Iterator[tuple[T, Look]]:
        """Looks at any number of pictures, in order, each with what came with it. Reading and decoding run ahead in threads.

        A second call, from another thread, reads and decodes its first pictures, then waits until this one is through.
        """
        opened = prefetch(
            pictures,
            self._open,
            threads=self._ocr.decode_threads,
            ahead=self._ocr.batch + self._ocr.decode_threads,
            limit_s=self._ocr.decode_timeout_s,
            late=lambda item: (item[0], BrokenImage(TIMEOUT)),
        )
        with contextlib.closing(opened), self._turn:
            while batch := list(itertools.islice(opened, self._ocr.batch)):
                yield from zip((label for label, _ in batch), self._look_at([picture for _, picture in batch]), strict=True)

    def _open(self, item: tuple[T, bytes | None]) -> tuple[T, Picture | BrokenImage]:
        label, data = item
        try:
            picture = decode(data, min_long_side_px=self._min_side_px)
        except BrokenImage as broken:
            return label, broken
        shrink = self._min_side_px / max(picture.pixels.shape)
        if shrink < 0.8:  # DCT scales are powers of two, and PNGs have none; some of these wait in memory
            picture.pixels = cv2.resize(picture.pixels, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
        return label, picture

    def _look_at(self, opened: list[Picture | BrokenImage]) -> list[Look]:
        pictures = {i: picture for i, picture in enumerate(opened) if isinstance(picture, Picture)}
        found = {i: _Regions() for i in pictures}
        for detector, look in zip(self._engine.detectors, self._ocr.looks, strict=True):
            open_cases = [i for i in pictures if not found[i].settled(self._ocr.sure_text_score)]
            for i, (boxes, readings) in zip(
                open_cases, self._detect(detector, look, [pictures[i] for i in open_cases]), strict=True
            ):
                found[i].add(boxes, readings, self._ocr.max_regions)
        return [
            _look_of(picture, found[i]) if isinstance(picture, Picture) else Look(error=picture.reason)
            for i, picture in enumerate(opened)
        ]

    def _detect(
        self, detector: Detector, look: LookConfig, pictures: list[Picture]
    ) -> Iterator[tuple[Boxes, Sequence[Reading | None]]]:
        """Boxes in pixels of the decoded pictures, and what stands in them."""
        inputs = []
        for picture in pictures:
            size = input_size(picture.width, picture.height, enlarge=look.enlarge, max_side_px=look.max_side_px)
            inputs.append(cv2.resize(picture.pixels, size, interpolation=cv2.INTER_LINEAR))
        found = detector.detect(inputs)
        for boxes, shown, picture in zip(found, inputs, pictures, strict=True):
            boxes.corners = boxes.corners * _scale(shown, picture.pixels)
        recognizer = self._engine.recognizer
        if recognizer is None:
            yield from ((boxes, [None] * len(boxes.scores)) for boxes in found)
            return
        lines = [cut_out(p.pixels, corners) for p, boxes in zip(pictures, found, strict=True) for corners in boxes.corners]
        readings = iter(recognizer.read(lines))
        for boxes in found:
            yield boxes, list(itertools.islice(readings, len(boxes.scores)))


def _scale(shown: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """Pixels of the picture for one pixel of what the detector was shown, (x, y)."""
    return np.array([picture.shape[1] / shown.shape[1], picture.shape[0] / shown.shape[0]], dtype=np.float32)


def _look_of(picture: Picture, found: _Regions) -> Look:
    height, width = picture.pixels.shape[:2]
    polygons = found.corners / np.array([width, height], dtype=np.float32)
    regions: list[dict[str, object]] = [
        {
            "polygon": polygon.reshape(-1).tolist(),
            "score": float(score),
            "area": polygon_area(polygon),
            "text": reading.text if reading else None,
            "text_score": reading.score if reading else None,
        }
        for polygon, score, reading in zip(polygons, found.scores, found.readings, strict=True)
    ]
    return Look(picture.width, picture.height, regions, union_area(polygons))


def letters(text: str) -> int:
    """How many letters and digits."""
    return sum(character.isalnum() for character in text)
