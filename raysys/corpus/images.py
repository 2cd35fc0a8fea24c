"""Bytes -> RGB pictures, or the reason why there is none.

In: the bytes of a file from the web. Out: uint8 RGB [H, W, 3] after EXIF orientation, or :class:`BrokenImage` with one of ``REASONS``.
Many threads may decode at once. How long a decode may take is the caller's to say (:mod:`raysys.corpus.prefetch`).
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "JPEG2000", "ICO")
"""What a page shows as a picture; AVIF needs Pillow 11.3. Not Pillow's other 30: EPS would run Ghostscript on what the web sent."""
MAX_PIXELS = 89_478_485
"""Pictures with more pixels are not decoded: Pillow's own limit against decompression bombs (a quarter of a GiB at 3 bytes)."""
MIN_SIDE_PX = 8
"""Shortest side of a picture: a 5x7 dot-matrix letter and its margin. Below are spacers and tracking pixels."""
MAX_ASPECT = 100
"""Largest long side / short side. At the detector's 960 px the short side of such a picture is under 10 px: nothing can be read."""

MISSING_IMAGE = "missing_image"
EMPTY = "empty"
HTML = "html"
"""A page in place of a picture, as dead links give."""
NOT_AN_IMAGE = "not_an_image"
TRUNCATED = "truncated"
"""Data that ends early, as broken-off downloads leave."""
UNDECODABLE = "undecodable"
"""A picture by its first bytes, but damaged."""
TOO_LARGE = "too_large"
TOO_SMALL = "too_small"
EXTREME_ASPECT = "extreme_aspect"
TIMEOUT = "timeout"
"""Set by the caller of :func:`decode`, which itself takes what time it needs."""
REASONS = (
    MISSING_IMAGE,
    EMPTY,
    HTML,
    NOT_AN_IMAGE,
    TRUNCATED,
    UNDECODABLE,
    TOO_LARGE,
    TOO_SMALL,
    EXTREME_ASPECT,
    TIMEOUT,
)

_DAMAGE = (OSError, SyntaxError, ValueError, TypeError, RuntimeError, ArithmeticError, LookupError, EOFError, struct.error)
"""What Pillow 13 raises for damaged files: LookupError and EOFError by its source, the others seen in 260,000 of 37 kinds."""

# Of odd EXIF and large pictures. Once for the process: warnings.catch_warnings swaps a global and is not for threads.
warnings.filterwarnings("ignore", module="PIL")


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
    """Decode a picture, the first of an animation.

    :param min_side_px: JPEGs are decoded at the smallest DCT scale (1/1 ... 1/8) whose short side is at least this.
    :param min_long_side_px: the same for the long side.
    :raises BrokenImage: with the reason.
    """
    picture = EncodedPicture(data)
    short, long = sorted((picture.width, picture.height))
    whole_px, wanted_px = (short, min_side_px) if min_side_px else (long, min_long_side_px)
    return Picture(picture.whole(whole_px // wanted_px if wanted_px else 1), picture.width, picture.height)


class EncodedPicture:
    """A picture of which the header is read: its size is known before its pixels are decoded, which happens once. Of an animation, the
    first picture.

    :raises BrokenImage: with the reason; the methods too.
    """

    def __init__(self, data: bytes | None) -> None:
        if data is None:
            raise BrokenImage(MISSING_IMAGE)
        if len(data) == 0:
            raise BrokenImage(EMPTY)
        self._data, file = data, io.BytesIO(data)
        with _damage_as_broken(data):
            self._image = Image.open(file, formats=FORMATS)
            if problem := _size_problem(*self._image.size):
                raise BrokenImage(problem)
            if not isinstance(self._image, JpegImageFile):
                self._image.load()  # no scales there; PNG may say its orientation behind the pixels, and TIFF is upright by then
            self._orientation = _orientation(self._image)
        turned = self._orientation >= 5
        self.width, self.height = self._image.size[::-1] if turned else self._image.size
        """Pixels, after EXIF orientation."""

    def whole(self, max_shrink: int) -> np.ndarray:
        """uint8 RGB [h, w, 3], upright. JPEGs are decoded at the smallest DCT scale that makes them at most ``max_shrink`` times smaller."""
        rgb, _ = self._load(max_shrink)
        return np.asarray(self._upright(rgb))

    def part(self, box: tuple[int, int, int, int], *, min_side_px: int) -> np.ndarray:
        """uint8 RGB [h, w, 3] of a part of the picture, writable.

        :param box: x0, y0, x1, y1 in pixels of the upright picture.
        :param min_side_px: JPEGs are decoded at the smallest DCT scale at which the part's short side is at least this; the part begins
            and ends at whole pixels of that scale.
        """
        x0, y0, x1, y1 = box
        rgb, shrink = self._load(min(x1 - x0, y1 - y0) // min_side_px)
        x0, y0, x1, y1 = (round(edge / shrink) for edge in self._as_stored(box))
        return np.array(self._upright(rgb.crop((x0, y0, x1, y1))))

    def _load(self, max_shrink: int) -> tuple[Image.Image, int]:
        """RGB as stored, and how many times smaller than the picture."""
        image, shrink = self._image, 1
        with _damage_as_broken(self._data):
            if max_shrink > 1 and isinstance(image, JpegImageFile):
                shrink = max(by for by in (2, 4, 8) if by <= max_shrink)
                image.draft("RGB", (image.width // shrink, image.height // shrink))
            image.load()
            return to_rgb(image), shrink

    def _upright(self, image: Image.Image) -> Image.Image:
        return image.transpose(_UPRIGHT[self._orientation]) if self._orientation in _UPRIGHT else image

    def _as_stored(self, box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        """Where a part of the upright picture lies in the stored one."""
        x0, y0, x1, y1 = box
        width, height = self.width, self.height
        if self._orientation >= 5:
            x0, y0, x1, y1, width, height = y0, x0, y1, x1, height, width
        if self._orientation in (2, 3, 7, 8):
            x0, x1 = width - x1, width - x0
        if self._orientation in (3, 4, 6, 7):
            y0, y1 = height - y1, height - y0
        return x0, y0, x1, y1


@contextmanager
def _damage_as_broken(data: bytes) -> Iterator[None]:
    """What Pillow raises for a damaged file becomes :class:`BrokenImage`."""
    try:
        yield
    except BrokenImage:
        raise
    except UnidentifiedImageError as error:
        raise BrokenImage(_reason_unidentified(data)) from error
    except Image.DecompressionBombError as error:
        raise BrokenImage(TOO_LARGE) from error
    except _DAMAGE as error:
        raise BrokenImage(TRUNCATED if _ends_early(data, error) else UNDECODABLE) from error


_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes an EXIF orientation (tag 0x0112, CIPA DC-008)."""


def _orientation(image: Image.Image) -> int:
    """1..8."""
    try:
        orientation = image.getexif().get(0x0112, 1)
    except _DAMAGE:
        return 1  # a broken EXIF block breaks no picture
    return orientation if orientation in _UPRIGHT else 1


def _size_problem(width: int, height: int) -> str | None:
    short, long = sorted((width, height))
    if width * height > MAX_PIXELS:
        return TOO_LARGE
    if short < MIN_SIDE_PX:
        return TOO_SMALL
    return EXTREME_ASPECT if long > MAX_ASPECT * short else None


_TAG = re.compile(rb"(?>\s+|<!--.*?-->|<\?.*?\?>)*+<(?:!doctype\s+)?([a-z][\w:]*)", re.IGNORECASE | re.DOTALL)
"""The first tag or the document type, behind comments and <?xml?>. Atomic, or many comments would take exponential time."""


def _reason_unidentified(data: bytes) -> str:
    head = data[:4096].lstrip(b"\xef\xbb\xbf\xff\xfe").replace(b"\0", b"")  # byte order marks; UTF-16 has zeros between letters
    if tag := _TAG.match(head):
        return NOT_AN_IMAGE if tag[1].lower().endswith(b"svg") else HTML
    known = any(accept and accept(data[:16]) is True for _, accept in (Image.OPEN[name] for name in FORMATS))
    return UNDECODABLE if known else NOT_AN_IMAGE


def _ends_early(data: bytes, error: Exception) -> bool:
    """Whether the decoder failed for want of data."""
    if data.startswith(b"RIFF"):  # WebP says its length; of the two, Pillow only says that there is no decoder for it
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data
    return "truncated" in str(error).lower()


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode: 16 bits are scaled, transparency lies on white."""
    if image.mode.startswith("I;16") or image.mode == "I":
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        white.alpha_composite(rgba)
        return white.convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
