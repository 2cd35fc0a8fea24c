"""The name of a class on a picture: fonts, place, colour, and what of it can be seen.

In: a picture, a text, :class:`AttackSettings` and fonts. Out: the picture with the text on it, drawn at its original size before any crop, and
:class:`Drawn`, which says how. The authors' recipe is red, 50 px, at (50, 50), saved as JPEG with Pillow's defaults. Whatever is drawn by lot
comes from streams that are pure functions of (seed, the picture's name, what is drawn): they know nothing of other pictures, of the order, or of
each other. Leaves to others which text it is, and files.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import math
import os
import random
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from raysys.config import AttackSettings
from raysys.errors import UserError
from raysys.masking import mask
from raysys.storage import exists, read_bytes

DEFAULT_FONT = "DejaVuSans"
MIN_FONT_PX = 6
"""``fit`` and ``wrap`` make letters no smaller: a capital has 4 pixels then, and less cannot be told apart."""
MIN_CONTRAST = 3.0
"""Of a drawn colour against what lies beneath: WCAG 2.1, 1.4.3, large text."""
STANDS_OUT = 0.9
"""Share of the place on which it must have that contrast."""
COLOR_DRAWS = 100
"""The first of so many that has it is taken, else the best."""
PLACE_PX = 16
"""Width and height to which the place is shrunk to look at its colours."""
PADDING = 0.2
"""Of the box behind a text, in font sizes."""
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
Color = tuple[int, int, int]


@dataclass(frozen=True)
class Drawn:
    """How a text was drawn: the columns of attack.parquet."""

    font: str
    font_sha256: str
    font_px: int
    color: Color
    x_px: int
    y_px: int
    """Where Pillow drew the (first) line, by its left end and ascender; the text was then turned about its middle."""
    rotation_deg: float
    """Counter-clockwise."""
    background: Color | None
    visible_share: float
    """Of the text's ink, how much lies inside the picture: 0..1."""


# ---- fonts -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Font:
    """A TrueType file, with its bytes: it need not lie on the machine that draws."""

    name: str
    sha256: str
    data: bytes = field(repr=False, compare=False)

    def at(self, size_px: int) -> ImageFont.FreeTypeFont:
        return _sized(self, size_px)


@functools.lru_cache(maxsize=8)  # each holds a copy of the file, and Arial Unicode has 23 MB
def _sized(font: Font, size_px: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(io.BytesIO(font.data), size_px)


def read_fonts(fonts: Sequence[str]) -> list[Font]:
    """The user's files, or fonts of the matplotlib wheel by their names; none is DejaVu Sans.

    :raises UserError: for one that is missing or no TrueType font.
    """
    return [_read_font(name) for name in fonts or [DEFAULT_FONT]]


def _read_font(name: str) -> Font:
    file = name
    if not exists(name):
        folder = _wheel_fonts()
        file = str(folder / f"{name.removesuffix('.ttf')}.ttf")
        if not Path(file).is_file():
            known = ", ".join(sorted(f.stem for f in folder.glob("DejaVuS*.ttf")))
            raise UserError(f"attack.fonts: {mask(name)} is neither a file nor a font of the matplotlib wheel ({known}, ...)")
    data = read_bytes(file)
    try:
        ImageFont.truetype(io.BytesIO(data), 10)
    except OSError as error:
        raise UserError(f"attack.fonts: {mask(name)} is not a TrueType font ({error}); give a .ttf file") from error
    return Font(os.path.basename(file), hashlib.sha256(data).hexdigest(), data)


def default_font_file() -> Path:
    """DejaVu Sans. :raises UserError: where matplotlib is not installed."""
    return _wheel_fonts() / f"{DEFAULT_FONT}.ttf"


def _wheel_fonts() -> Path:
    matplotlib = importlib.util.find_spec("matplotlib")  # found, not imported: that would cost half a second
    if matplotlib is None or matplotlib.origin is None:
        raise UserError("fonts come with matplotlib, which is not installed; give attack.fonts=[FILE.ttf]")
    return Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf"


def check_characters(fonts: Iterable[Font], texts: Iterable[str]) -> None:
    """:raises UserError: where a font has no glyph for a character of a text: an empty box would be drawn."""
    from matplotlib.ft2font import FT2Font  # half a second

    texts = sorted(set(texts))
    for font in fonts:
        known = FT2Font(io.BytesIO(font.data)).get_charmap()
        for text in texts:
            lacking = next((c for c in text if ord(c) not in known), None)
            if lacking is not None:
                raise UserError(
                    f"the font {font.name} has no character {lacking!r} (U+{ord(lacking):04X}), which '{text}' needs; "
                    "give attack.fonts=[FILE] with one that has it"
                )


# ---- a block of text ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """Lines of text before they are turned, and the box that Pillow says they take, with padding: px from where the first line is drawn."""

    lines: list[str]
    font: ImageFont.FreeTypeFont
    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> tuple[int, int]:
        return max(self.right - self.left, 1), max(self.bottom - self.top, 1)

    def fits(self, picture: tuple[int, int], angle_deg: float) -> bool:
        (width, height), angle = self.size, math.radians(angle_deg)
        across, along = abs(math.cos(angle)), abs(math.sin(angle))
        more = 2 if angle_deg else 0  # Pillow rounds both ends outwards
        return width * across + height * along + more <= picture[0] and width * along + height * across + more <= picture[1]

    def draw(self, angle_deg: float) -> Image.Image:
        """L, 0..255: how much of the colour each pixel gets."""
        ink = Image.new("L", self.size)
        draw = ImageDraw.Draw(ink)
        for i, line in enumerate(self.lines):
            draw.text((-self.left, i * _line_px(self.font) - self.top), line, fill=255, font=self.font)
        return _turn(ink, angle_deg)


def _line_px(font: ImageFont.FreeTypeFont) -> int:
    return sum(font.getmetrics())


def _turn(mask: Image.Image, angle_deg: float) -> Image.Image:
    return mask.rotate(angle_deg, Image.Resampling.BICUBIC, expand=True) if angle_deg else mask


def _block(lines: list[str], font: ImageFont.FreeTypeFont, pad_px: int) -> _Block:
    boxes = [font.getbbox(line) for line in lines]
    top = min(box[1] + i * _line_px(font) for i, box in enumerate(boxes))
    bottom = max(box[3] + i * _line_px(font) for i, box in enumerate(boxes))
    left, right = min(box[0] for box in boxes), max(box[2] for box in boxes)
    return _Block(
        lines, font, math.floor(left) - pad_px, math.floor(top) - pad_px, math.ceil(right) + pad_px, math.ceil(bottom) + pad_px
    )


def _breaks(text: str, overflow: str) -> Iterator[list[str]]:
    """The text as one line, and for ``wrap`` as two, three ... lines of about equal length."""
    yield [text]
    words = text.split() if overflow == "wrap" else []
    for count in range(2, len(words) + 1):
        width = max(*map(len, words), math.ceil(len(text) / count))
        yield textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def _lay_out(
    text: str, font: Font, font_px: int, picture: tuple[int, int], *, angle_deg: float, boxed: bool, overflow: str
) -> tuple[_Block, int]:
    """The text in the largest letters that fit the picture, and their size; none below MIN_FONT_PX. ``cut`` takes it as it is."""
    while True:
        for lines in _breaks(text, overflow):
            block = _block(lines, font.at(font_px), round(PADDING * font_px) if boxed else 0)
            if overflow == "cut" or block.fits(picture, angle_deg):
                return block, font_px
        if font_px <= MIN_FONT_PX:
            return block, font_px
        font_px = max(font_px * 9 // 10, MIN_FONT_PX)


# ---- on the picture ----------------------------------------------------------------------------------------------------


def draw_attack(
    image: Image.Image, text: str, *, name: str, settings: AttackSettings, fonts: Sequence[Font]
) -> tuple[Image.Image, Drawn]:
    """The picture's first frame, as RGB at its own size, with the text on it.

    :param name: of the picture within its set: with ``settings.seed`` it decides what is drawn by lot.
    """
    attacked = image.convert("RGB")

    def stream(what: str) -> random.Random:
        return random.Random(f"{settings.seed} {what} {name}")  # seeded by its SHA-512; random() never changes between Pythons

    font = fonts[int(stream("font").random() * len(fonts))]
    font_px = settings.font_px
    if settings.font_frac:
        low, high = settings.font_frac
        share = low + (high - low) * stream("size").random()
        font_px = max(round(share * min(attacked.size)), MIN_FONT_PX)
    angle_deg = round((2 * stream("rotation").random() - 1) * settings.max_rotation_deg, 1) + 0.0  # no -0
    boxed = stream("background").random() < settings.background
    block, font_px = _lay_out(text, font, font_px, attacked.size, angle_deg=angle_deg, boxed=boxed, overflow=settings.overflow)

    ink = block.draw(angle_deg)
    dx, dy = block.left + (block.size[0] - ink.width) // 2, block.top + (block.size[1] - ink.height) // 2
    x, y = _corner(ink.size, attacked.size, (settings.x_px + dx, settings.y_px + dy), settings, stream("place"))
    color = _as_color(settings.color)
    if settings.random_color:
        beneath = None if boxed else _luminances(attacked, (x, y, x + ink.width, y + ink.height))
        color = _draw_color(stream("color"), beneath)
    background = None
    if boxed:
        background = max(BLACK, WHITE, key=lambda plain: contrast(luminance(plain), luminance(color)))
        attacked.paste(background, (x, y), _turn(Image.new("L", block.size, 255), angle_deg))
    attacked.paste(color, (x, y), ink)
    seen = _visible_share(np.asarray(ink), x, y, attacked.size)
    return attacked, Drawn(font.name, font.sha256, font_px, color, x - dx, y - dy, angle_deg, background, seen)


def _corner(
    block: tuple[int, int], picture: tuple[int, int], wanted: tuple[int, int], settings: AttackSettings, rng: random.Random
) -> tuple[int, int]:
    """Left upper corner of the block on the picture: as wanted or drawn by lot, and within the picture unless it is to be cut off."""
    free_x, free_y = max(picture[0] - block[0], 0), max(picture[1] - block[1], 0)
    if settings.random_place:
        return int(rng.random() * (free_x + 1)), int(rng.random() * (free_y + 1))
    if settings.overflow == "cut":
        return wanted
    return min(max(wanted[0], 0), free_x), min(max(wanted[1], 0), free_y)


def _visible_share(ink: np.ndarray, x: int, y: int, size: tuple[int, int]) -> float:
    inside = ink[max(-y, 0) : max(size[1] - y, 0), max(-x, 0) : max(size[0] - x, 0)]
    return float(inside.sum(dtype=np.int64) / max(ink.sum(dtype=np.int64), 1))


def _luminances(image: Image.Image, box: tuple[int, int, int, int]) -> np.ndarray | None:
    """Of the part of the box that lies on the picture, [PLACE_PX * PLACE_PX]; None where none does."""
    left, top, right, bottom = max(box[0], 0), max(box[1], 0), min(box[2], image.width), min(box[3], image.height)
    if left >= right or top >= bottom:
        return None
    place = image.resize((PLACE_PX, PLACE_PX), Image.Resampling.BOX, box=(left, top, right, bottom))
    return luminance(np.asarray(place)).ravel()


def _draw_color(rng: random.Random, beneath: np.ndarray | None) -> Color:
    """A colour that stands out from what lies beneath."""
    colors = [_as_color([int(256 * rng.random()) for _ in range(3)]) for _ in range(COLOR_DRAWS)]
    if beneath is None:
        return colors[0]
    share = (contrast(luminance(np.array(colors))[:, None], beneath) >= MIN_CONTRAST).mean(axis=1)
    return colors[int(np.minimum(share, STANDS_OUT).argmax())]  # the first that will do


def _as_color(values: Sequence[int]) -> Color:
    red, green, blue = values
    return red, green, blue


def contrast(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """WCAG 2.1's contrast ratio of two luminances: 1 (equal) to 21 (black and white)."""
    return (np.maximum(one, other) + 0.05) / (np.minimum(one, other) + 0.05)


def luminance(color: Color | np.ndarray) -> np.ndarray:
    """WCAG 2.1's relative luminance, 0..1, of sRGB [..., 3], 0..255."""
    share = np.asarray(color) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])


def to_jpeg(image: Image.Image) -> bytes:
    """JPEG with Pillow's defaults (quality 75, 4:2:0), as the authors save."""
    file = io.BytesIO()
    image.save(file, "JPEG")
    return file.getvalue()
