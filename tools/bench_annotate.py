"""Speed of the look: raysys against RapidOCR's and PaddleOCR's own pipelines on the same networks, pictures and one thread.

Pictures are embedded scenes (112 px, 60 % with text) and the same scenes at 448 px. Every engine sees every picture; the rates are
of the second pass, in turns of 20 pictures, so a machine that changes its speed changes it for all.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable

import cv2
import numpy as np
from benchmark import Row, finish, rate
from PIL import Image

from raysys.config import OcrConfig
from raysys.corpus.scenes import draw_scene
from raysys.regions.annotator import Annotator

NUM_PICTURES = 60
TURN = 20
Look = Callable[[bytes], int]


def pictures(side_px: int) -> list[bytes]:
    found = []
    for index in range(NUM_PICTURES):
        buffer = io.BytesIO()
        Image.fromarray(draw_scene(0, index).image).resize((side_px, side_px), Image.Resampling.BICUBIC).save(
            buffer, "JPEG", quality=90
        )
        found.append(buffer.getvalue())
    return found


def raysys_engine(engine: str) -> Look:
    annotator = Annotator(OcrConfig(engine=engine))
    return lambda data: len(annotator.look(data).regions)


def rapidocr() -> Look:
    """RapidOCR 1.4.4 at its stock settings (short side enlarged to 736), one thread, no direction classifier."""
    from rapidocr_onnxruntime import RapidOCR

    engine = RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1, use_cls=False)

    def look(data: bytes) -> int:
        found, _ = engine(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), use_cls=False)
        return len(found or [])

    return look


def main() -> None:
    engines: dict[str, Look] = {
        "raysys": raysys_engine("onnx"),
        "PaddleOCR, same settings": raysys_engine("paddle"),
        "RapidOCR, stock": rapidocr(),
    }
    rows: list[Row] = []
    for side_px in (112, 448):
        data = pictures(side_px)
        spent = dict.fromkeys(engines, 0.0)
        for counted in (False, True):
            for first in range(0, NUM_PICTURES, TURN):
                for name, look in engines.items():
                    start = time.perf_counter()
                    for picture in data[first : first + TURN]:
                        look(picture)
                    spent[name] += (time.perf_counter() - start) * counted
        for name in list(engines)[1:]:
            ours, reference = NUM_PICTURES / spent["raysys"], NUM_PICTURES / spent[name]
            rows.append(
                rate(f"look, {side_px} px, against {name}", ours=ours, reference=reference, unit="pictures/s, 1 thread", goal=1.0)
            )
    finish(rows)


if __name__ == "__main__":
    main()
