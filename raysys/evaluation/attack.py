"""ImageNet-Attr: the name of a wrong class on every picture, by the authors' recipe.

In: a clean :class:`ClassSet` and :class:`AttackSettings`. Out: which class is written on which picture, and the picture with
the text: drawn on the original-size image before any crop, red, 50 px, at (50, 50), saved as JPEG with Pillow's defaults.
Leaves folders and parallel work to :mod:`raysys.evaluation.on_ray`.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw, ImageFont

from raysys.config import AttackSettings
from raysys.evaluation.datasets import ClassSet
from raysys.storage import UserError, mask, read_bytes, read_json, sha256_file

RANDOM = "random"


def choose_written(settings: AttackSettings, class_set: ClassSet) -> list[int]:
    """The class whose name is written on each picture.

    ``random`` draws one for each picture, never of the same name as the true class; a file has one for each class.

    :raises UserError: for a file that does not fit the class list.
    """
    names = class_set.class_names
    if settings.classes == RANDOM:
        if len(set(names)) < 2:
            raise UserError("attack.classes=random needs at least two different class names")
        rng = np.random.default_rng(settings.seed)
        return [_other(rng, label, names) for label in class_set.labels]
    content = read_json(settings.classes)
    by_class = content.get("written_class") if isinstance(content, dict) else None
    where = f"attack.classes={mask(settings.classes)}"
    if not isinstance(by_class, list):
        raise UserError(f'{where}: expected {{"written_class": [one class index for each class]}}')
    if len(by_class) != len(names):
        raise UserError(f"{where}: {len(by_class)} written classes for {len(names)} classes")
    if not all(type(index) is int and 0 <= index < len(names) for index in by_class):
        raise UserError(f"{where}: every written class must be a whole number from 0 to {len(names) - 1}")
    return [by_class[label] for label in class_set.labels]


def _other(rng: np.random.Generator, label: int, names: list[str]) -> int:
    while True:
        written = int(rng.integers(len(names)))
        if names[written] != names[label]:
            return written


def output_name(name: str) -> str:
    """Name of the attacked picture: the source's, with .JPEG where that was no JPEG."""
    stem, suffix = os.path.splitext(name)
    return name if suffix.lower() in (".jpg", ".jpeg") else f"{stem}.JPEG"


def attack_table(class_set: ClassSet, written: list[int], settings: AttackSettings) -> pa.Table:
    """attack.parquet: one row a picture, in the set's order.

    :raises UserError: where two pictures would get one name.
    """
    pictures = [output_name(picture.name) for picture in class_set.pictures]
    if len(set(pictures)) < len(pictures):
        twice = next(name for i, name in enumerate(pictures) if name in pictures[:i])
        raise UserError(f"{twice}: two source pictures would get this name as JPEG; rename one")
    font, count = font_file(settings), len(pictures)
    columns: dict[str, pa.Array] = {
        "picture": pa.array(pictures, pa.string()),
        "true_class": pa.array(class_set.labels, pa.int32()),
        "written_class": pa.array(written, pa.int32()),
        "text": pa.array([class_set.class_names[w] for w in written], pa.string()),
        "font": pa.array([os.path.basename(font)] * count, pa.string()),
        "font_sha256": pa.array([sha256_file(font)] * count, pa.string()),
        "font_px": pa.array([settings.font_px] * count, pa.int32()),
        "color": pa.array([list(settings.color)] * count, pa.list_(pa.uint8())),
        "x_px": pa.array([settings.x_px] * count, pa.int32()),
        "y_px": pa.array([settings.y_px] * count, pa.int32()),
    }
    return pa.table(columns)


def font_file(settings: AttackSettings) -> str:
    """Path of the TrueType file: the user's, else DejaVu Sans out of the matplotlib wheel.

    :raises UserError: where it is missing.
    """
    if settings.font is not None:
        if not os.path.isfile(settings.font):
            raise UserError(f"attack.font={settings.font}: no such file")
        return settings.font
    matplotlib = importlib.util.find_spec("matplotlib")  # found, not imported: that would cost half a second
    if matplotlib is None or matplotlib.origin is None:
        raise UserError("the default font comes with matplotlib, which is not installed; give attack.font=FILE.ttf")
    return str(Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf")


@functools.lru_cache(maxsize=4)
def _font(file: str, size_px: int) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(io.BytesIO(read_bytes(file)), size_px)
    except OSError as error:
        raise UserError(f"attack.font={file}: not a TrueType font ({error})") from error


def draw_attack(image: Image.Image, text: str, settings: AttackSettings) -> Image.Image:
    """The picture's first frame, as RGB at its own size, with the text on it; what reaches past the edge is cut off."""
    attacked = image.convert("RGB")
    red, green, blue = settings.color
    font = _font(font_file(settings), settings.font_px)
    ImageDraw.Draw(attacked).text((settings.x_px, settings.y_px), text, fill=(red, green, blue), font=font)
    return attacked


def to_jpeg(image: Image.Image) -> bytes:
    """JPEG with Pillow's defaults (quality 75, 4:2:0), as the authors save."""
    file = io.BytesIO()
    image.save(file, "JPEG")
    return file.getvalue()
