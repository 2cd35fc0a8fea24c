"""Bytes <-> RGB pictures, or the reason why there is none.

In: the bytes of a file from the web. Out: uint8 RGB [H, W, 3] after EXIF orientation, or :class:`BrokenImage` with one of ``REASONS``.
"""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 89_478_485
"""Pictures with more pixels are not decoded: Pillow's own limit against decompression bombs (a quarter of a GiB at 3 bytes)."""

MISSING_IMAGE = "missing_image"
EMPTY = "empty"
NOT_AN_IMAGE = "not_an_image"
UNDECODABLE = "undecodable"
TOO_LARGE = "too_large"
REASONS = (MISSING_IMAGE, EMPTY, NOT_AN_IMAGE, UNDECODABLE, TOO_LARGE)


class BrokenImage(ValueError):
    """A picture that cannot be looked at; ``reason`` is one of ``REASONS``."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass
class Picture:
    pixels: np.ndarray
    """uint8 RGB [h, w, 3]; h and w may be smaller than the picture's where a smaller decode was asked for."""
    width: int
    height: int
    """Of the whole picture, pixels, after EXIF orientation."""


def decode(data: bytes | None, *, min_side_px: int | None = None, min_long_side_px: int | None = None) -> Picture:
    """Decode a picture.

    :param min_side_px: JPEGs are decoded at the smallest DCT scale (1/1 ... 1/8) whose short side is at least this.
    :param min_long_side_px: the same for the long side.
    :raises BrokenImage: with the reason.
    """
    if data is None:
        raise BrokenImage(MISSING_IMAGE)
    if len(data) == 0:
        raise BrokenImage(EMPTY)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings on odd EXIF and large pictures; the limit below decides
            image = Image.open(io.BytesIO(data))
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BrokenImage(TOO_LARGE)
            turned = image.getexif().get(0x0112, 1) >= 5  # orientations 5..8 swap width and height
            shrink = (
                min(width, height) / min_side_px
                if min_side_px
                else max(width, height) / min_long_side_px
                if min_long_side_px
                else 1
            )
            if shrink > 1:
                image.draft("RGB", (int(width / shrink), int(height / shrink)))
            rgb = to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise BrokenImage(NOT_AN_IMAGE) from error
    except Image.DecompressionBombError as error:
        raise BrokenImage(TOO_LARGE) from error
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, struct.error, MemoryError) as error:
        if isinstance(error, BrokenImage):
            raise
        raise BrokenImage(UNDECODABLE) from error  # what Pillow's decoders are seen to raise on damaged files
    if turned:
        width, height = height, width
    return Picture(np.asarray(rgb), width, height)


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode: 16 bits are scaled, transparency lies on white."""
    if image.mode.startswith("I;16") or image.mode == "I":
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        white.alpha_composite(rgba)
        return white.convert("RGB")
    return image.convert("RGB")
