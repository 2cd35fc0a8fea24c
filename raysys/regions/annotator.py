"""The look: the bytes of a picture -> everything a policy may want to know; a shard -> one Parquet table.

In: samples of :mod:`raysys.corpus.shards`. Out: rows with the columns of ``SCHEMA`` (a contract, see README). No Ray here.
"""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass, field

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysys.config import OcrConfig
from raysys.corpus.images import BrokenImage, decode
from raysys.corpus.shards import DamagedShard, iter_samples
from raysys.regions.detector import Detector, OnnxDetector, PaddleDetector
from raysys.regions.geometry import polygon_area, union_area
from raysys.regions.models import find_models
from raysys.regions.recognizer import OnnxRecognizer, PaddleRecognizer, Recognizer
from raysys.storage import identity

REGION = pa.struct(
    [
        ("polygon", pa.list_(pa.float32(), 8)),
        ("score", pa.float32()),
        ("area", pa.float32()),
        ("text", pa.string()),
        ("text_score", pa.float32()),
    ]
)
SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("index", pa.int32()),
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("caption", pa.list_(pa.string())),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("regions", pa.list_(REGION)),
        ("text_area", pa.float32()),
        ("error", pa.string()),
    ]
)


@dataclass
class Look:
    """What one picture showed."""

    width: int | None = None
    height: int | None = None
    regions: list[dict[str, object]] = field(default_factory=list)
    text_area: float | None = None
    error: str | None = None


class Annotator:
    """Detector and recogniser of one process."""

    def __init__(self, ocr: OcrConfig) -> None:
        models = find_models(ocr)
        cv2.setNumThreads(1)
        self._detector: Detector = PaddleDetector(ocr, models) if ocr.engine == "paddle" else OnnxDetector(ocr, models)
        self._recognizer: Recognizer | None = None
        if ocr.recognize:
            self._recognizer = PaddleRecognizer(ocr, models) if ocr.engine == "paddle" else OnnxRecognizer(ocr, models)

    def look(self, data: bytes | None) -> Look:
        """Find and read the text of a picture; a broken one gets a reason."""
        try:
            picture = decode(data)
        except BrokenImage as broken:
            return Look(error=broken.reason)
        height, width = picture.pixels.shape[:2]
        boxes = self._detector.detect(picture.pixels)
        readings = self._recognizer.read(picture.pixels, boxes.corners) if self._recognizer else [None] * len(boxes.corners)
        polygons = boxes.corners / np.array([width, height], dtype=np.float32)
        regions: list[dict[str, object]] = [
            {
                "polygon": polygon.reshape(-1).tolist(),
                "score": float(score),
                "area": polygon_area(polygon),
                "text": reading.text if reading else None,
                "text_score": reading.score if reading else None,
            }
            for polygon, score, reading in zip(polygons, boxes.scores, readings, strict=True)
        ]
        return Look(picture.width, picture.height, regions, union_area(polygons))


@dataclass
class ShardCounts:
    """What the manifest says of one shard."""

    samples: int
    with_regions: int
    regions: int
    errors: dict[str, int]
    damaged: str | None
    """Why the shard broke off, None for a sound one."""


def annotate_shard(path: str, name: str, annotator: Annotator) -> pa.Table:
    """Look at every sample of a shard; a damaged one gives its good part and says so in the table's metadata.

    :param name: the shard's percent-encoded name, as in the column ``shard``.
    """
    before = identity(path)
    rows: list[dict[str, object]] = []
    damaged = ""
    try:
        for sample in iter_samples(path):
            look = annotator.look(sample.image)
            rows.append(
                {
                    "shard": name,
                    "index": sample.index,
                    "key": sample.key,
                    "offset": sample.offset,
                    "size": sample.size,
                    "caption": sample.captions,
                    "width": look.width,
                    "height": look.height,
                    "regions": look.regions,
                    "text_area": look.text_area,
                    "error": look.error,
                }
            )
    except DamagedShard as error:
        damaged = str(error) or "damaged"
    metadata = {"raysys.identity": before, "raysys.damaged": damaged}
    return pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata(metadata))


def to_parquet(table: pa.Table, *, fingerprint: str) -> bytes:
    """The table as a Parquet file that repeats the fingerprint of the settings."""
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({**(table.schema.metadata or {}), b"raysys.fingerprint": fingerprint}), buffer)
    return buffer.getvalue()


def count(table: pa.Table) -> ShardCounts:
    lengths = table["regions"].combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
    errors = Counter(e for e in table["error"].to_pylist() if e is not None)
    damaged = (table.schema.metadata or {}).get(b"raysys.damaged", b"").decode() or None
    return ShardCounts(table.num_rows, int((lengths > 0).sum()), int(lengths.sum()), dict(errors), damaged)
