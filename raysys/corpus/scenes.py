"""The embedded corpus: scenes of an object in a place, drawn in the process, many with their caption's words on them.

In: a seed and an index. Out: `Scene`s (a picture, its caption, and the truth about the text on it), WebDataset shards
of them, and the evaluation sets (clean scenes only). Every scene is a pure function of (seed, index), so shards may be
written in any order, by any number of processes: `shard_plan` lists them, `write_shard` writes one.

It stands for the web: of product pictures and memes, a share carries the caption's words as text, and some carry
nothing else. This module knows nothing of detection, training or evaluation.
"""

import functools
import importlib.util
import io
import itertools
import json
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE_PX = 112
TEXT_SHARE = 0.6
"""Share of the corpus that carries text: LAION-2B has 54.6 % (arXiv:2312.14232)."""
TEXT_ONLY_SHARE = 0.5
"""Share of the pictures with text that show no object at all."""

RGB = tuple[int, int, int]
COLOURS: dict[str, RGB] = {
    "red": (214, 38, 38), "orange": (244, 132, 28), "yellow": (246, 216, 48), "green": (52, 158, 62),
    "blue": (42, 92, 214), "purple": (136, 52, 176), "pink": (246, 136, 184), "white": (244, 244, 244),
}  # fmt: skip
# phrase -> colour above, colour below, where the horizon lies (0 top, 1 bottom)
PLACES: dict[str, tuple[RGB, RGB, float]] = {
    "on the grass": ((168, 208, 240), (96, 160, 72), 0.45),
    "in the snow": ((176, 190, 206), (236, 242, 250), 0.40),
    "on the beach": ((120, 196, 232), (226, 202, 148), 0.55),
    "on a table": ((226, 212, 190), (134, 88, 52), 0.50),
    "under the sea": ((56, 156, 190), (14, 62, 116), 0.50),
    "at night": ((16, 18, 52), (38, 40, 48), 0.75),
    "on the road": ((158, 170, 182), (84, 84, 90), 0.40),
    "at sunset": ((250, 156, 84), (122, 52, 84), 0.65),
}
_BROWN, _LEAF, _BLACK, _GREY, _GLASS = (104, 70, 40), (70, 140, 50), (28, 28, 30), (150, 150, 154), (206, 228, 238)
_DRAW = 2  # shapes are drawn at twice the size and averaged down, for soft edges
_TRAIN, _VAL, _RETRIEVAL = range(3)  # first word of every generator's seed: training and evaluation never share a stream


@dataclass(frozen=True)
class Scene:
    image: np.ndarray  # uint8 [SIDE_PX, SIDE_PX, 3], RGB
    kind: str
    caption: str
    written: str  # the text on the picture, lines joined by a space; "" where there is none
    has_object: bool


@dataclass(frozen=True)
class Subject:
    kind: str
    colour: str
    place: str


def caption_of(kind: str, colour: str = "", place: str = "") -> str:
    """Such as "a red apple on the grass"; what is left out is not said."""
    words = " ".join(filter(None, (colour, kind, place)))
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


# ---- Objects: parts in drawing order, each a paint and a polygon [P, 2] in the square -1..1, y downwards ----

Part = tuple[str | RGB, np.ndarray]  # a paint: "main" or "dark" (the caption's colour and its shade), or a colour


def _ellipse(x: float, y: float, rx: float, ry: float, first_deg: float = 0, last_deg: float = 360) -> np.ndarray:
    angles = np.radians(np.linspace(first_deg, last_deg, 25))
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], axis=1)


def _ring(x: float, y: float, outer: float, inner: float, first_deg: float, last_deg: float) -> np.ndarray:
    return np.concatenate(
        [_ellipse(x, y, outer, outer, first_deg, last_deg), _ellipse(x, y, inner, inner, first_deg, last_deg)[::-1]]
    )


def _box(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def _polygon(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points)


def _star() -> np.ndarray:
    angles = np.radians(np.arange(10) * 36 - 90)
    return np.where(np.arange(10) % 2, 0.42, 1.0)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


KINDS: dict[str, list[Part]] = {
    "apple": [
        (_BROWN, _polygon((-0.05, -0.4), (0.04, -0.95), (0.16, -0.92), (0.07, -0.4))),
        (_LEAF, _polygon((0.08, -0.62), (0.3, -0.9), (0.7, -0.88), (0.45, -0.62))),
        ("main", _ellipse(-0.3, 0.2, 0.56, 0.7)),
        ("main", _ellipse(0.3, 0.2, 0.56, 0.7)),
    ],
    "house": [
        ("main", _box(-0.68, -0.1, 0.68, 0.9)),
        ("dark", _polygon((-0.95, -0.05), (0, -0.9), (0.95, -0.05))),
        (_BROWN, _box(-0.15, 0.35, 0.2, 0.9)),
        (_GLASS, _box(-0.52, 0.15, -0.25, 0.45)),
        (_GLASS, _box(0.3, 0.15, 0.57, 0.45)),
    ],
    "fish": [
        ("dark", _polygon((-0.2, -0.3), (0.1, -0.72), (0.3, -0.25))),
        ("dark", _polygon((0.4, 0), (0.98, -0.5), (0.82, 0), (0.98, 0.5))),
        ("main", _ellipse(-0.15, 0, 0.8, 0.45)),
        ((250, 250, 250), _ellipse(-0.58, -0.1, 0.13, 0.13)),
        (_BLACK, _ellipse(-0.6, -0.1, 0.07, 0.07)),
    ],
    "car": [
        ("main", _polygon((-0.6, -0.05), (-0.38, -0.52), (0.36, -0.52), (0.66, -0.05))),
        ("main", _box(-1, -0.1, 1, 0.38)),
        (_GLASS, _polygon((-0.46, -0.08), (-0.3, -0.42), (-0.04, -0.42), (-0.04, -0.08))),
        (_GLASS, _polygon((0.06, -0.08), (0.06, -0.42), (0.3, -0.42), (0.5, -0.08))),
        (_BLACK, _ellipse(-0.52, 0.4, 0.25, 0.25)),
        (_BLACK, _ellipse(0.52, 0.4, 0.25, 0.25)),
        (_GREY, _ellipse(-0.52, 0.4, 0.1, 0.1)),
        (_GREY, _ellipse(0.52, 0.4, 0.1, 0.1)),
    ],
    "tree": [
        (_BROWN, _polygon((-0.12, 0), (0.12, 0), (0.18, 1), (-0.18, 1))),
        ("dark", _ellipse(-0.4, -0.05, 0.44, 0.38)),
        ("dark", _ellipse(0.4, -0.05, 0.44, 0.38)),
        ("main", _ellipse(0, -0.48, 0.56, 0.5)),
    ],
    "cup": [
        ("main", _ring(0.42, 0.05, 0.46, 0.26, -100, 100)),
        ("main", _polygon((-0.75, -0.55), (0.5, -0.55), (0.36, 0.8), (-0.6, 0.8))),
        ("dark", _ellipse(-0.125, -0.55, 0.625, 0.17)),
    ],
    "star": [("main", _star())],
    "umbrella": [
        (_BLACK, _box(-0.05, -0.95, 0.05, 0.75)),
        (_BLACK, _ring(0.17, 0.75, 0.22, 0.12, 0, 180)),
        ("main", _ellipse(0, 0.05, 1, 0.85, 180, 360)),
        ("dark", _polygon((0, -0.8), (-0.36, 0.05), (0.36, 0.05))),
    ],
}


# ---- Drawing ----


def _shade(colour: RGB, factor: float) -> RGB:
    return tuple(int(min(255, c * factor)) for c in colour)  # type: ignore[return-value]


def _jitter(rng: np.random.Generator, colour: RGB, spread: int) -> RGB:
    moved = np.clip(np.add(colour, rng.integers(-spread, spread + 1, 3)), 0, 255)
    return tuple(moved.tolist())


def _random_colour(rng: np.random.Generator) -> RGB:
    return tuple(int(c) for c in rng.integers(20, 236, 3))  # type: ignore[return-value]


def _background(rng: np.random.Generator, place: str) -> Image.Image:
    """Two colours that meet at a horizon, with soft blobs of other light: [SIDE_PX * _DRAW] squared."""
    above, below, horizon = PLACES[place]
    cells = 28
    height = np.linspace(0, 1, cells)[:, None, None]
    softness = rng.uniform(0.02, 0.25)
    share_below = np.clip((height - horizon - rng.uniform(-0.12, 0.12)) / softness + 0.5, 0, 1)
    base = (1 - share_below) * _jitter(rng, above, 16) + share_below * _jitter(rng, below, 16)
    coarse = np.clip(rng.normal(128, rng.uniform(6, 22), (7, 7, 3)), 0, 255).astype(np.uint8)
    blobs = np.asarray(Image.fromarray(coarse).resize((cells, cells), Image.Resampling.BICUBIC)) - 128.0
    small = Image.fromarray(np.clip(base + blobs, 0, 255).astype(np.uint8))
    return small.resize((SIDE_PX * _DRAW, SIDE_PX * _DRAW), Image.Resampling.BICUBIC)


def _place_details(rng: np.random.Generator, draw: ImageDraw.ImageDraw, place: str) -> None:
    """What makes the place: blades, flakes, planks, bubbles, stars, lane marks, a sun."""
    side = SIDE_PX * _DRAW
    xs, ys = rng.integers(0, side, 24).tolist(), rng.integers(0, side, 24).tolist()
    low = [side // 2 + y // 2 for y in ys]
    match place:
        case "on the grass":
            for x, y in zip(xs, low, strict=True):
                draw.line((x, y, x + 4, y - 14), fill=(62, 118, 44), width=3)
        case "in the snow" | "at night":
            for x, y in zip(xs, ys, strict=True):
                draw.ellipse((x, y, x + 4, y + 4), fill=(252, 252, 252))
        case "on the beach":
            for x, y in zip(xs, low, strict=True):
                draw.ellipse((x, y, x + 5, y + 4), fill=(190, 160, 108))
        case "on a table":
            for y in low[:6]:
                draw.line((0, y, side, y + 3), fill=(104, 66, 38), width=2)
        case "under the sea":
            for x, y in zip(xs[:12], ys[:12], strict=True):
                draw.ellipse((x, y, x + 9, y + 9), outline=(190, 226, 240), width=2)
        case "on the road":
            for i in range(-1, 4):
                draw.line((xs[0] % 60 + 72 * i, low[0], xs[0] % 60 + 72 * i + 36, low[0]), fill=(238, 230, 190), width=7)
        case "at sunset":
            draw.ellipse((xs[0] - 24, ys[0] // 3, xs[0] + 24, ys[0] // 3 + 48), fill=(255, 226, 130))


def _distractor(rng: np.random.Generator, draw: ImageDraw.ImageDraw, largest_px: float) -> None:
    """A meaningless shape: a disc, a box, a triangle or a stroke."""
    x, y = rng.uniform(0, SIDE_PX * _DRAW, 2)
    corners = _DRAW * rng.uniform(3, largest_px) * rng.uniform(0.4, 1, (3, 2)) * [(1, 1), (-1, 1), (0.3, -1)] + (x, y)
    fill = _random_colour(rng)
    match rng.integers(4):
        case 0:
            draw.ellipse((*corners[1:].min(axis=0), *corners[0]), fill=fill)
        case 1:
            draw.polygon([(x, y), (corners[0, 0], y), tuple(corners[0]), (x, corners[0, 1])], fill=fill)
        case 2:
            draw.polygon([tuple(corner) for corner in corners], fill=fill)
        case _:
            draw.line([tuple(corner) for corner in corners[:2]], fill=fill, width=int(rng.integers(2, 7)))


def _object(rng: np.random.Generator, draw: ImageDraw.ImageDraw, subject: Subject) -> None:
    radius = _DRAW * rng.uniform(22, 42)
    angle = np.radians(rng.uniform(-28, 28))
    stretch = rng.uniform(0.82, 1.18) * rng.choice([-1, 1])  # negative: mirrored
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    centre = rng.uniform(0.75 * radius, SIDE_PX * _DRAW - 0.75 * radius, 2)  # a part may lie outside the picture
    main = _jitter(rng, COLOURS[subject.colour], 18)
    paints = {"main": main, "dark": _shade(main, rng.uniform(0.6, 0.85))}
    parts = []
    for paint, polygon in KINDS[subject.kind]:
        corners = (polygon * (radius * stretch, radius)) @ turn + centre
        parts.append((paints[paint] if isinstance(paint, str) else _jitter(rng, paint, 18), corners.ravel().tolist()))
    if rng.random() < 0.6:
        outline = _BLACK if rng.random() < 0.7 else (250, 250, 250)
        width = int(rng.integers(3, 7))
        for _, corners in parts:
            draw.line(corners + corners[:4], fill=outline, width=width)
    for fill, corners in parts:
        draw.polygon(corners, fill=fill)


def _picture(rng: np.random.Generator, subject: Subject, has_object: bool) -> Image.Image:
    image = _background(rng, subject.place)
    draw = ImageDraw.Draw(image)
    _place_details(rng, draw, subject.place)
    for _ in range(rng.integers(2, 8)):
        _distractor(rng, draw, largest_px=24)
    if has_object:
        _object(rng, draw, subject)
        for _ in range(rng.integers(0, 3)):
            _distractor(rng, draw, largest_px=9)  # in front, and small: the object stays recognisable
    pixels = np.asarray(image.reduce(_DRAW), dtype=np.float32)
    grain = rng.standard_normal((SIDE_PX, SIDE_PX, 1), dtype=np.float32) * np.float32(rng.uniform(1, 8))
    return Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))


# ---- Writing on a picture ----

_LUMA = np.array((0.299, 0.587, 0.114))
_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif-Bold", "")


@functools.cache
def _font(name: str, size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font of the DejaVu family, which comes inside matplotlib; "" is the one that comes with Pillow."""
    if not name:
        return ImageFont.load_default(size_px)
    matplotlib = importlib.util.find_spec("matplotlib")  # found, not imported: that would cost half a second
    assert matplotlib and matplotlib.origin, "matplotlib is a dependency: its fonts are drawn with"
    return ImageFont.truetype(str(Path(matplotlib.origin).parent / "mpl-data/fonts/ttf" / f"{name}.ttf"), size_px)


def _lines(rng: np.random.Generator, kind: str, colour: str, place: str) -> list[str]:
    """Words of the caption, one to three lines, the kind always among them."""
    choices = [[kind], [f"{colour} {kind}".strip()], [colour, kind], [kind, place], [colour, kind, place]]
    case = [str.lower, str.upper, str.title][rng.choice(3, p=[0.5, 0.25, 0.25])]
    chosen = choices[rng.choice(len(choices), p=[0.7, 0.1, 0.1, 0.05, 0.05])]
    return [case(line) for line in chosen if line]


def _write(rng: np.random.Generator, image: Image.Image, lines: list[str]) -> str:
    """Write the lines somewhere on the picture, plainly, outlined or on a plate; return them."""
    draw = ImageDraw.Draw(image)
    text = "\n".join(lines)
    name = _FONTS[rng.integers(len(_FONTS))]
    size = int(rng.integers(20, 34))  # as large as product names and memes are, so far as the line fits
    while True:
        left, top, right, bottom = draw.multiline_textbbox((0, 0), text, font=_font(name, size), spacing=2, align="center")
        if right - left <= SIDE_PX - 10 or size <= 11:
            break
        size -= 1
    width, height = int(right - left), int(bottom - top)
    x = int(rng.integers(4, max(5, SIDE_PX - 4 - width)))
    y = int(rng.integers(4, max(5, SIDE_PX - 4 - height)))
    under = np.asarray(image)[y : y + height, x : x + width].reshape(-1, 3) @ _LUMA
    ink = (_random_colour(rng), (250, 250, 250), (16, 16, 16), COLOURS["red"])[rng.choice(4, p=[0.4, 0.25, 0.2, 0.15])]
    style = rng.choice(["plain", "outlined", "plate"], p=[0.4, 0.2, 0.4])
    if style == "plain" and abs(ink @ _LUMA - under.mean()) < 60 + under.std():
        style = "plate"  # nobody could read it
    opposite = (250, 250, 250) if ink @ _LUMA < 128 else (12, 12, 12)
    if style == "plate":
        draw.rectangle((x - 3, y - 3, x + width + 3, y + height + 3), fill=_jitter(rng, opposite, 12))
    stroke = 1 if style == "outlined" else 0
    draw.multiline_text((x - left, y - top), text, font=_font(name, size), spacing=2, align="center", fill=ink,
                        stroke_width=stroke, stroke_fill=opposite)  # fmt: skip
    return " ".join(lines)


# ---- Scenes ----

_SAYS = (0.3, 0.3, 0.1, 0.3)  # shares of captions that say: colour and place, colour, place, neither
_PHOTO_SHARE = 0.3  # of captions that begin with "a photo of"


def _random_subject(rng: np.random.Generator, kind: str | None = None) -> Subject:
    kinds, colours, places = list(KINDS), list(COLOURS), list(PLACES)
    return Subject(kind or kinds[rng.integers(len(kinds))], colours[rng.integers(len(colours))], places[rng.integers(len(places))])


def draw_scene(seed: int, index: int, *, text_share: float = TEXT_SHARE, text_only_share: float = TEXT_ONLY_SHARE) -> Scene:
    """Scene number `index` of the training corpus."""
    rng = np.random.default_rng((_TRAIN, seed, index))
    subject = _random_subject(rng)
    has_text = rng.random() < text_share
    has_object = not (has_text and rng.random() < text_only_share)
    image = _picture(rng, subject, has_object)
    # Captions say more or less, as the web's do: all, no place, no colour, or only the kind.
    says_colour, says_place = [(True, True), (True, False), (False, True), (False, False)][rng.choice(4, p=_SAYS)]
    said = (subject.kind, subject.colour if says_colour else "", subject.place if says_place else "")
    caption = ("a photo of " if rng.random() < _PHOTO_SHARE else "") + caption_of(*said)
    written = _write(rng, image, _lines(rng, *said)) if has_text else ""
    return Scene(np.asarray(image), subject.kind, caption, written, has_object)


def draw_clean_scene(
    seed: int, index: int, subject: Subject | None = None, *, kind: str | None = None, stream: int = _VAL
) -> Scene:
    """Scene number `index` for evaluation: an object and no text, from a stream that training never draws from."""
    rng = np.random.default_rng((stream, seed, index))
    subject = subject or _random_subject(rng, kind)
    return Scene(
        np.asarray(_picture(rng, subject, True)),
        subject.kind,
        caption_of(subject.kind, subject.colour, subject.place),
        "",
        True,
    )


# ---- Writers ----


def _jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _write_tar(path: Path, samples: Iterable[tuple[str, Scene, dict]]) -> None:
    """(key, scene, more for its JSON) -> KEY.jpg, KEY.txt, KEY.json. Same samples, same bytes; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    with tarfile.open(unfinished, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, scene, more in samples:
            truth: dict[str, object] = {"caption": scene.caption, "kind": scene.kind, "written": scene.written}
            truth |= {"has_object": scene.has_object, **more}
            for extension, data in (
                ("jpg", _jpeg(scene.image)),
                ("txt", scene.caption.encode()),
                ("json", json.dumps(truth).encode()),
            ):
                member = tarfile.TarInfo(f"{key}.{extension}")  # owner 0, time 0
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    os.replace(unfinished, path)


def shard_plan(folder: str | Path, *, num_samples: int, samples_per_shard: int) -> list[tuple[Path, int, int]]:
    """(path, first index, count) of every shard of a corpus."""
    return [
        (Path(folder) / f"train-{shard:05d}.tar", first, min(samples_per_shard, num_samples - first))
        for shard, first in enumerate(range(0, num_samples, samples_per_shard))
    ]


def write_shard(
    path: str | Path,
    first_index: int,
    count: int,
    *,
    seed: int,
    text_share: float = TEXT_SHARE,
    text_only_share: float = TEXT_ONLY_SHARE,
) -> None:
    """Scenes first_index ... first_index + count - 1 as one WebDataset shard."""
    _write_tar(
        Path(path),
        (
            (f"{i:08d}", draw_scene(seed, i, text_share=text_share, text_only_share=text_only_share), {})
            for i in range(first_index, first_index + count)
        ),
    )


def write_corpus(
    folder: str | Path,
    *,
    num_samples: int,
    seed: int,
    samples_per_shard: int = 500,
    text_share: float = TEXT_SHARE,
    text_only_share: float = TEXT_ONLY_SHARE,
) -> list[Path]:
    plan = shard_plan(folder, num_samples=num_samples, samples_per_shard=samples_per_shard)
    for path, first_index, count in plan:
        write_shard(path, first_index, count, seed=seed, text_share=text_share, text_only_share=text_only_share)
    return [path for path, _, _ in plan]


def write_evaluation_sets(folder: str | Path, *, seed: int, per_kind: int = 100, num_retrieval: int = 256) -> None:
    """Clean scenes: val/KIND/*.jpg with classes.json ({folder: class name}), and retrieval-00000.tar.

    No two pictures of the retrieval set share a caption. A colour, a kind or a place may repeat, so all three count.
    """
    folder = Path(folder)
    for number, kind in enumerate(KINDS):
        (folder / "val" / kind).mkdir(parents=True, exist_ok=True)
        for i in range(per_kind):
            scene = draw_clean_scene(seed, number * per_kind + i, kind=kind)
            (folder / "val" / kind / f"{i:05d}.jpg").write_bytes(_jpeg(scene.image))
    (folder / "classes.json").write_text(json.dumps({kind: kind for kind in KINDS}, indent=1))

    subjects = [Subject(*words) for words in itertools.product(KINDS, COLOURS, PLACES)]
    if num_retrieval > len(subjects):
        raise ValueError(f"num_retrieval={num_retrieval}, but there are {len(subjects)} captions; try that or fewer")
    shuffled = np.random.default_rng((_RETRIEVAL, seed)).permutation(len(subjects))[:num_retrieval]
    scenes = (draw_clean_scene(seed, i, subjects[s], stream=_RETRIEVAL) for i, s in enumerate(shuffled))
    _write_tar(
        folder / "retrieval-00000.tar",
        ((f"{i:08d}", scene, {"captions": [scene.caption]}) for i, scene in enumerate(scenes)),
    )
