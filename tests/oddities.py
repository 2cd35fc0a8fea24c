"""Every kind of odd sample that the web holds, with the reason that raysys gives it (None: it is good)."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from conftest import Members, noise_jpeg, sample, write_tar
from PIL import Image


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _noise(mode: str, size: tuple[int, int] = (64, 48)) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], bands), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(), mode) if bands > 1 else Image.fromarray(pixels[..., 0]).convert(mode)


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _palette() -> bytes:
    image = _noise("RGB").quantize(16)
    return saved(image, "PNG", transparency=3)


def odd_pictures() -> dict[str, tuple[str, bytes | None, str | None]]:
    """Key -> suffix, bytes, reason."""
    good = noise_jpeg(7, 200)
    frames = [_noise("RGB"), Image.new("RGB", (64, 48))]
    deep = Image.fromarray(np.full((32, 40), 0x80FF, np.uint16))
    return {
        "cut": ("jpg", good[: len(good) * 2 // 3], "truncated"),
        "zero": ("jpg", b"", "empty"),
        "text": ("jpg", b"this is no picture at all", "not_an_image"),
        "page": ("jpg", b"<!DOCTYPE html><html><body>404</body></html>", "html"),
        "bomb": ("png", saved(Image.new("L", (20_000, 10_000)), "PNG"), "too_large"),
        "pixel": ("gif", saved(Image.new("L", (1, 1)), "GIF"), "too_small"),
        "ribbon": ("png", saved(Image.new("L", (20_000, 10)), "PNG"), "extreme_aspect"),
        "gone": ("jpg", None, "missing_image"),
        "cmyk": ("jpg", saved(_noise("CMYK"), "JPEG"), None),
        "deep": ("png", saved(deep, "PNG"), None),
        "palette": ("png", _palette(), None),
        "moving_gif": ("gif", saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), None),
        "moving_webp": ("webp", saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]), None),
        "turned": ("jpg", saved(_noise("RGB"), "JPEG", exif=_exif(6)), None),
    }


def odd_corpus(path: Path) -> dict[str, str | None]:
    """Write a tar with all of them among good ones; returns the reason of every sample, by key (of two the first has none)."""
    members: Members = []
    reasons: dict[str, str | None] = {}
    for number, (key, (suffix, data, reason)) in enumerate(odd_pictures().items()):
        members += [] if data is None else [(f"{key}.{suffix}", data)]
        members += [(f"{key}.txt", b"a caption"), *sample(f"good{number}", noise_jpeg(number))]
        reasons |= {key: reason, f"good{number}": None}
    members += [("latin.jpg", noise_jpeg(30)), ("latin.txt", "café".encode("latin-1"))]
    members += sample("../climber", noise_jpeg(31)) + sample("in/a/folder", noise_jpeg(32)) + sample("mute", noise_jpeg(33), None)
    members += sample("good0", noise_jpeg(34))  # a key that was there
    reasons |= {"latin": "caption_not_utf8", "../climber": "unsafe_name", "in/a/folder": None, "mute": None}
    write_tar(path, members)
    return reasons
