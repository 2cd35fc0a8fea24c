"""Views: one picture and a caption of a sample, as a pure function of (seed, sample, view).

In: the bytes of a picture, its captions. Out: uint8 RGB [S, S, 3] and one caption. Random numbers come from a generator of its own for
each view, so threads, workers and resumes change nothing.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as F

from raysys.config import AugmentConfig
from raysys.corpus.images import decode


def view_rng(seed: int, sample: int, view: int) -> np.random.Generator:
    return np.random.default_rng([seed, 0xA06, sample, view])


def make_view(
    data: bytes, captions: list[str], *, size_px: int, augment: AugmentConfig, rng: np.random.Generator
) -> tuple[np.ndarray, str]:
    """One view of a sample.

    :raises BrokenImage: where the bytes are no picture.
    """
    caption = captions[int(rng.integers(len(captions)))] if augment.caption == "random" else captions[0]
    decoded = decode(data, min_side_px=math.ceil(size_px / math.sqrt(augment.crop_scale_min)))
    image = Image.fromarray(decoded.pixels)
    box = crop_box(image.width, image.height, scale_min=augment.crop_scale_min, ratio_max=augment.crop_ratio_max, rng=rng)
    image = image.resize((size_px, size_px), Image.Resampling.BICUBIC, box=box)
    if augment.flip and rng.random() < augment.flip:
        image = ImageOps.mirror(image)
    if augment.color_jitter:
        low, high = 1 - augment.color_jitter, 1 + augment.color_jitter
        image = F.adjust_brightness(image, float(rng.uniform(low, high)))
        image = F.adjust_contrast(image, float(rng.uniform(low, high)))
        image = F.adjust_saturation(image, float(rng.uniform(low, high)))
    if augment.gray and rng.random() < augment.gray:
        image = F.to_grayscale(image, num_output_channels=3)
    pixels = np.array(image)
    if augment.erase and rng.random() < augment.erase:
        _erase(pixels, rng)
    return pixels, caption


def crop_box(
    width: int, height: int, *, scale_min: float, ratio_max: float, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """Random resized crop (x0, y0, x1, y1), pixels: torchvision's RandomResizedCrop.get_params; scale_min=1 is the whole picture."""
    if scale_min >= 1:
        return 0, 0, width, height
    for _ in range(10):
        area = width * height * rng.uniform(scale_min, 1.0)
        ratio = math.exp(rng.uniform(-math.log(ratio_max), math.log(ratio_max)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return x, y, x + w, y + h
    side_w, side_h = min(width, round(height * ratio_max)), min(height, round(width * ratio_max))
    x, y = (width - side_w) // 2, (height - side_h) // 2
    return x, y, x + side_w, y + side_h


def _erase(pixels: np.ndarray, rng: np.random.Generator) -> None:
    """Random erasing (arXiv:1708.04896) with noise, in place."""
    side = pixels.shape[0]
    area, ratio = rng.uniform(0.02, 0.2) * side * side, math.exp(rng.uniform(-math.log(3), math.log(3)))
    h, w = min(side, round(math.sqrt(area * ratio))), min(side, round(math.sqrt(area / ratio)))
    y, x = int(rng.integers(side - h + 1)), int(rng.integers(side - w + 1))
    pixels[y : y + h, x : x + w] = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
