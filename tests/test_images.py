"""Pictures as the web has them: broken ones and their reasons, odd ones and their pixels."""

from __future__ import annotations

import io
import random
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import noise_jpeg
from PIL import Image, ImageFile, PngImagePlugin

from raysys.corpus.images import MAX_ASPECT, MIN_SIDE_PX, REASONS, TIMEOUT, BrokenImage, decode

# pytest takes away the filter of raysys.corpus.images
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def reason(data: bytes | None) -> str | None:
    try:
        decode(data)
    except BrokenImage as broken:
        return broken.reason
    return None


def noise(width: int = 120, height: int = 80) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def shades(mode: str = "RGB") -> Image.Image:
    y, x = np.mgrid[:40, :48]
    return Image.fromarray(np.stack([x * 5, y * 6, (x ^ y) * 4], axis=-1).astype(np.uint8)).convert(mode)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header says so, without pixels: only who looks at the header first gives the right reason."""
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + (13).to_bytes(4, "big")
        + header
        + zlib.crc32(header).to_bytes(4, "big")
        + (99).to_bytes(4, "big")
        + b"IDAT"
    )


# ---- broken ----------------------------------------------------------------------------------------------------------


def test_reasons() -> None:
    assert TIMEOUT in REASONS and len(set(REASONS)) == len(REASONS) == 10


def test_no_bytes() -> None:
    assert (reason(None), reason(b"")) == ("missing_image", "empty")


@pytest.mark.parametrize(
    "page",
    [
        b"<html></html>",
        b"\n\t <!DOCTYPE HTML PUBLIC '-//W3C//DTD HTML 4.01//EN'><HTML>",
        b"\xef\xbb\xbf<!doctype html>",
        b"\xef\xbb\xbf\r\n<HEAD>",
        b"<!-- cached --><!-- by x --><html>",
        b'<?xml version="1.0"?>\n<!DOCTYPE html><html><body><svg></svg></body></html>',
        b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        b"<br />\n<b>Fatal error</b>: Uncaught exception",
        "\ufeff<html>".encode("utf-16-le"),
    ],
)
def test_a_page_is_html(page: bytes) -> None:
    assert reason(page) == "html"


@pytest.mark.parametrize(
    "data",
    [
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        b"<?xml version='1.0'?><!-- x --><!DOCTYPE svg PUBLIC '-//W3C//DTD SVG 1.1//EN'><svg>",
        b"<svg:svg>",
        b'{"error": "not found"}',
        b"%PDF-1.4 <html>",
        b"<" * 5000,
        b"<!---->" * 1000,  # exponential time for a careless pattern
        bytes(300),
        saved(shades(), "EPS"),  # Pillow would run Ghostscript on it
    ],
)
def test_what_is_neither_a_page_nor_a_picture_is_not_an_image(data: bytes) -> None:
    assert reason(data) == "not_an_image"


@pytest.mark.parametrize(
    ("data", "header_bytes"),
    [
        (saved(noise(), "JPEG"), 700),
        (saved(noise(), "JPEG", progressive=True), 700),
        (saved(noise(), "PNG"), 60),
        (saved(noise(400, 200), "PNG"), 60),  # several IDAT chunks
        (saved(noise(), "WEBP"), 30),
        (saved(noise(), "WEBP", lossless=True), 30),
        (saved(noise(), "WEBP", save_all=True, append_images=[noise().rotate(180)]), 30),
        (saved(noise().quantize(64), "GIF"), 800),
        (saved(noise(), "BMP"), 60),
    ],
)
def test_data_that_ends_early_is_truncated_wherever_it_ends(data: bytes, header_bytes: int) -> None:
    assert reason(data) is None
    for length in np.linspace(header_bytes, len(data) - 50, 40).astype(int):
        assert reason(data[:length]) == "truncated", length


def test_damage_that_is_not_a_missing_end_is_undecodable() -> None:
    png = bytearray(saved(noise(), "PNG"))
    png[len(png) // 2] ^= 0xFF
    webp = bytearray(saved(noise(), "WEBP", lossless=True))
    webp[30:90] = 60 * b"\xff"
    jpeg = noise_jpeg(1)
    headless = jpeg[: jpeg.index(b"\xff\xc0")] + jpeg[jpeg.index(b"\xff\xda") :]
    assert [reason(bytes(data)) for data in (png, webp, headless, b"\xff\xd8\xff\xe0" + bytes(50))] == 4 * ["undecodable"]


def test_a_png_whose_text_is_a_bomb_is_undecodable() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 2_000_000, zip=True)
    bomb = saved(shades(), "PNG", pnginfo=text)
    assert len(bomb) < 10_000 and reason(bomb) == "undecodable"


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (20_000, 10_000, "too_large"),
        (9460, 9460, "too_large"),  # 89.5 million pixels, where Pillow only warns
        (1, 1, "too_small"),
        (4000, 7, "too_small"),
        (7, 4000, "too_small"),
        (20_000, 10, "extreme_aspect"),
        (8, 801, "extreme_aspect"),
        (100_000_000, 1, "too_large"),
    ],
)
def test_sizes_are_judged_by_the_header(width: int, height: int, expected: str) -> None:
    assert reason(png_of_size(width, height)) == expected


def test_the_smallest_and_the_longest_picture_decode() -> None:
    long_px = MAX_ASPECT * MIN_SIDE_PX
    assert decode(saved(Image.new("RGB", (MIN_SIDE_PX, MIN_SIDE_PX)), "PNG")).pixels.shape == (8, 8, 3)
    picture = decode(saved(Image.new("RGB", (long_px, MIN_SIDE_PX)), "JPEG"), min_long_side_px=1)
    assert (picture.width, picture.height, picture.pixels.shape) == (800, 8, (1, 100, 3))
    assert reason(saved(Image.new("P", (1, 1)), "GIF")) == "too_small"


def test_a_mistake_of_the_program_is_no_broken_picture() -> None:
    with pytest.raises(TypeError):
        decode("a string")  # type: ignore[arg-type]


# ---- odd and good ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_cmyk(options: dict[str, object]) -> None:
    image = Image.new("CMYK", (16, 16), (255, 0, 255, 0))  # green; Pillow writes it inverted, with an Adobe marker
    assert b"Adobe" in saved(image, "JPEG", **options)
    pixels = decode(saved(image, "JPEG", quality=100, **options)).pixels
    assert np.abs(pixels.astype(int) - (0, 255, 0)).max() <= 3


def test_sixteen_bits_give_the_high_byte() -> None:
    deep = (np.arange(256, dtype=np.uint16) * 256 + 0x7F).reshape(16, 16)
    gray = decode(saved(Image.fromarray(deep), "PNG")).pixels
    assert (gray == (deep >> 8)[..., None]).all()
    rows = np.stack([deep, deep[::-1], deep.T], axis=-1)
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)

    def chunk(name: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")

    header = chunk(b"IHDR", bytes([0, 0, 0, 16, 0, 0, 0, 16, 16, 2, 0, 0, 0]))
    rgb48 = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    assert (decode(rgb48).pixels == rows >> 8).all()


def test_transparency_lies_on_white() -> None:
    assert (decode(saved(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "PNG")).pixels == 255).all()
    assert (decode(saved(Image.new("RGBA", (8, 8), (200, 0, 0, 128)), "PNG")).pixels == (227, 127, 127)).all()
    assert (decode(saved(Image.new("LA", (8, 8), (0, 51)), "PNG")).pixels == 204).all()
    colors = Image.new("P", (8, 8))
    colors.putpalette([10, 20, 30, 40, 50, 60])
    colors.paste(1, (4, 0, 8, 8))
    for kind in ("PNG", "GIF"):
        pixels = decode(saved(colors, kind, transparency=1)).pixels
        assert (pixels[:, :4] == (10, 20, 30)).all() and (pixels[:, 4:] == 255).all()
    half = decode(saved(colors, "PNG", transparency=bytes([255, 51]))).pixels
    assert (half[:, :4] == (10, 20, 30)).all() and (half[:, 4:] == (212, 214, 216)).all()


def test_one_bit() -> None:
    image = shades("L").convert("1")
    for kind in ("PNG", "TIFF", "BMP"):
        assert (decode(saved(image, kind)).pixels == np.asarray(image)[..., None] * 255).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_picture(kind: str) -> None:
    first = shades().quantize(32).convert("RGB")
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(first, kind, save_all=True, append_images=[noise(48, 40).quantize(32).convert("RGB")], **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    assert (decode(data).pixels == np.asarray(first)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_exif_orientation_comes_upright(kind: str, orientation: int) -> None:
    quarters = np.zeros((160, 320, 3), np.uint8)
    quarters[:80, :160], quarters[:80, 160:], quarters[80:, :160], quarters[80:, 160:] = COLORS
    # As a camera stores it: the inverse of what shows it upright (CIPA DC-008).
    stored = {
        1: quarters,
        2: quarters[:, ::-1],
        3: quarters[::-1, ::-1],
        4: quarters[::-1],
        5: quarters.swapaxes(0, 1),
        6: np.rot90(quarters, 1),
        7: np.rot90(quarters, 2).swapaxes(0, 1),
        8: np.rot90(quarters, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif)
    for shrink in (1, 4) if kind == "JPEG" else (1,):
        picture = decode(data, min_long_side_px=320 // shrink)
        assert (picture.width, picture.height) == (320, 160)
        assert picture.pixels.shape == (160 // shrink, 320 // shrink, 3)
        middles = [picture.pixels[y // shrink, x // shrink] for y in (40, 120) for x in (80, 240)]
        assert np.abs(np.array(middles, int) - COLORS).max() < 40


COLORS = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 250)]


def test_broken_exif_breaks_no_picture() -> None:
    for exif in (
        b"Exif\0\0garbage!",
        b"Exif\0\0II*\0\xff\xff\xff\x7f",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abcd",
    ):
        picture = decode(saved(shades(), "JPEG", exif=exif))
        assert (picture.width, picture.height) == (48, 40)


def test_reduced_decode_keeps_the_pictures_size_and_the_side_asked_for() -> None:
    data = saved(noise(640, 480), "JPEG")
    for asked in ({"min_side_px": 100}, {"min_side_px": 120}, {"min_side_px": 121}, {"min_long_side_px": 160}, {"min_side_px": 1}):
        picture = decode(data, **asked)
        assert (picture.width, picture.height) == (640, 480)
    sides = [decode(data, min_side_px=side).pixels.shape[0] for side in (1, 60, 61, 120, 121, 240, 241, 480, 481)]
    assert sides == [60, 60, 120, 120, 240, 240, 480, 480, 480]
    assert [decode(data, min_long_side_px=side).pixels.shape[1] for side in (80, 81, 640, 1440)] == [80, 160, 640, 640]


# ---- all of them -----------------------------------------------------------------------------------------------------


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Cut off, bytes changed, put in and left out; half of it in the first 150 bytes, where the headers are."""
    if chance.random() < 0.25:
        data = data[: chance.randrange(1, len(data))]
    for _ in range(chance.choice([1, 1, 2, 4, 10])):
        at = chance.randrange(chance.choice([150, len(data) + 1]))
        data = data[:at] + chance.randbytes(chance.choice([0, 1, 4])) + data[at + chance.choice([0, 1, 1, 4]) :]
    return data


def test_nothing_but_reasons_comes_of_damaged_pictures() -> None:
    image, exif, chance = shades(), Image.Exif(), random.Random(0)
    exif[0x0112] = 6
    good = [
        saved(image, "JPEG", exif=exif),
        saved(image, "JPEG", progressive=True),
        saved(image.convert("CMYK"), "JPEG"),
        saved(image, "PNG", exif=exif),
        saved(image.quantize(16), "PNG", transparency=3),
        saved(image, "WEBP", exif=exif),
        saved(image, "WEBP", save_all=True, append_images=[noise(48, 40)]),
        saved(image.quantize(16), "GIF", save_all=True, append_images=[noise(48, 40).quantize(16)], transparency=2),
        saved(image, "TIFF", compression="tiff_lzw"),
        saved(image, "AVIF"),
        saved(image, "JPEG2000"),
        saved(image, "BMP"),
        saved(image, "ICO"),
    ]
    assert [reason(data) for data in good] == [None] * len(good)
    seen = {reason(damaged(data, chance)) for _ in range(100) for data in good}
    assert {None, "truncated", "undecodable", "not_an_image"} <= seen <= {None, *REASONS}


def test_threads_leave_pillows_and_pythons_switches_alone() -> None:
    text_of_filters, truncated = repr(warnings.filters), saved(noise(), "JPEG")[:2000]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(reason, [truncated, saved(noise(), "JPEG"), b"<html>"] * 100))
    assert found == ["truncated", None, "html"] * 100
    assert repr(warnings.filters) == text_of_filters
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
