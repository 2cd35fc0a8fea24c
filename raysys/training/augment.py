"""Views: one picture and a caption of a sample, as a pure function of (seed, sample, view, strength).

In: the bytes of a picture, its captions. Out: uint8 RGB [S, S, 3] and one caption. The operations are torchvision's; the random numbers
come from a generator of its own for each view (torch's is shared by all threads), so threads, workers and resumes change nothing. Which
view is made when is not said here (:mod:`raysys.corpus.order`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from raysys.config import AugmentConfig
from raysys.corpus.images import EncodedPicture

CROP_TRIES = 10
"""As in torchvision's RandomResizedCrop."""
ERASE_AREA = (0.02, 0.2)
ERASE_ASPECT_MAX = 1 / 0.3
"""arXiv:1708.04896 (r1); log-uniform, as in torchvision. A rectangle of a fifth of a square fits in at any such aspect."""


def strength_at(augment: AugmentConfig, progress: float) -> float:
    """Strength of the augmentation, 0..1.

    :param progress: steps done / steps of the run, 0 <= progress < 1.
    """
    scheduled = 1 - augment.off_share
    if progress >= scheduled - 1e-9:  # 1 - .7 is more than 3 / 10
        return 0.0
    if augment.schedule == "ramp":
        return progress / scheduled
    if augment.schedule == "cosine":
        return (1 + math.cos(math.pi * progress / scheduled)) / 2
    return 1.0


def view_rng(seed: int, shard: int, offset: int, view: int) -> np.random.Generator:
    """Random numbers of one view: no two of these streams overlap (Philox, doi:10.1145/2063384.2063405, is made to be numbered).

    :param shard: 64-bit hash of the shard's name. With ``offset``, the picture's first byte in the shard, it is the sample's identity,
        whatever a filter drops around it.
    """
    key = np.array([seed % 2**64, shard % 2**64], np.uint64)
    counter = np.array([0, 0, offset % 2**64, view], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def make_view(
    data: bytes, captions: list[str], *, size_px: int, augment: AugmentConfig, strength: float, rng: np.random.Generator
) -> tuple[np.ndarray, str]:
    """One view of a sample: crop and resize; flip; RandAugment; brightness, contrast, saturation, hue; grey; erase; in this order.

    :param strength: 0..1, scales every range and every chance; at 0 the picture is only resized.
    :returns: uint8 RGB [size_px, size_px, 3] and a caption.
    :raises BrokenImage: where the bytes are no picture.
    """
    # All numbers first, whatever the strength: a view changes smoothly with it, and no operation changes another's numbers.
    which, flip, gray = rng.random(3).tolist()
    place = rng.random(2).tolist()
    tries = rng.random((CROP_TRIES, 2)).tolist()
    jitter = rng.random(4).tolist()
    erase = rng.random(5).tolist()
    operations = rng.random((augment.randaugment_ops, 3)).tolist()

    picture = EncodedPicture(data)
    box = crop_box(picture.width, picture.height, augment=augment, strength=strength, tries=tries, place=place)
    pixels = _resize(picture.part(box, min_side_px=size_px), size_px)
    if strength and (augment.flip or augment.randaugment_ops or augment.color_jitter or augment.hue or augment.gray):
        image = Image.fromarray(pixels)
        if flip < strength * augment.flip:
            image = F.horizontal_flip(image)
        image = _randaugment(image, augment.randaugment_magnitude, strength, operations)
        image = _jitter_colors(image, strength * augment.color_jitter, strength * augment.hue, jitter)
        if gray < strength * augment.gray:
            image = F.rgb_to_grayscale(image, num_output_channels=3)
        pixels = np.array(image)
    if erase[0] < strength * augment.erase:
        x0, y0, x1, y1 = _erase_box(size_px, *erase[1:])
        pixels[y0:y1, x0:x1] = rng.integers(0, 256, (y1 - y0, x1 - x0, 3), dtype=np.uint8)
    return pixels, captions[int(which * len(captions))] if augment.caption == "random" else captions[0]


def crop_box(
    width: int, height: int, *, augment: AugmentConfig, strength: float, tries: list[list[float]], place: list[float]
) -> tuple[int, int, int, int]:
    """Random resized crop (x0, y0, x1, y1), pixels.

    At strength 1 it is torchvision's RandomResizedCrop.get_params: the crop's own aspect lies in 1/ratio .. ratio, whatever the
    picture's. Towards strength 0 that range narrows and its middle goes from 1 to the picture's aspect: the crop becomes the picture.

    :param tries: random numbers for area and aspect, taken by the first pair that fits in; where none does, the crop is central.
    :param place: random numbers for x and y.
    """
    if augment.crop_scale_min == 1:
        return 0, 0, width, height
    own_log_ratio = math.log(width / height)
    middle, spread = (1 - strength) * own_log_ratio, strength * math.log(augment.crop_ratio_max)
    for u, v in tries:
        area = width * height * (1 - strength * (1 - augment.crop_scale_min) * u)
        ratio = math.exp(middle + spread * (2 * v - 1))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(place[0] * (width - w + 1)), int(place[1] * (height - h + 1))
            return x, y, x + w, y + h
    ratio = math.exp(min(max(own_log_ratio, middle - spread), middle + spread))
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def _resize(pixels: np.ndarray, size_px: int) -> np.ndarray:
    """Bicubic with antialias: contiguous [h, w, 3] -> [size_px, size_px, 3].

    On tensors: torch's kernel takes a third of the time of Pillow's on CPUs with AVX2 (almost twice it on others) and differs by rounding.
    It stays in the calling thread as long as its input is contiguous, colours last.
    """
    image_CHW = torch.from_numpy(pixels).permute(2, 0, 1)
    resized_CSS = F.resize(image_CHW, [size_px, size_px], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return resized_CSS.permute(1, 2, 0).numpy()


def _jitter_colors(image: Image.Image, spread: float, turn: float, numbers: list[float]) -> Image.Image:
    """torchvision's ColorJitter, but always in one order: brightness, contrast, saturation, hue.

    :param spread: each factor is uniform in [1 - spread, 1 + spread].
    :param turn: the hue turns by up to this many circles to either side.
    """
    *factors, hue = (2 * u - 1 for u in numbers)
    if spread:
        for adjust, factor in zip((F.adjust_brightness, F.adjust_contrast, F.adjust_saturation), factors, strict=True):
            image = adjust(image, 1 + spread * factor)
    return F.adjust_hue(image, turn * hue) if turn else image


def _erase_box(size_px: int, area: float, aspect: float, x: float, y: float) -> tuple[int, int, int, int]:
    """Rectangle (x0, y0, x1, y1) of random erasing (arXiv:1708.04896), from four random numbers."""
    least, most = ERASE_AREA
    area_px, ratio = (least + (most - least) * area) * size_px**2, ERASE_ASPECT_MAX ** (2 * aspect - 1)
    w, h = round(math.sqrt(area_px * ratio)), round(math.sqrt(area_px / ratio))
    x0, y0 = int(x * (size_px - w + 1)), int(y * (size_px - h + 1))
    return x0, y0, x0 + w, y0 + h


# ---- RandAugment -----------------------------------------------------------------------------------------------------


def _shear(image: Image.Image, x: float, y: float) -> Image.Image:
    degrees = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
    return F.affine(image, angle=0.0, translate=[0, 0], scale=1.0, shear=degrees, center=[0, 0])


def _shift(image: Image.Image, x: float, y: float) -> Image.Image:
    return F.affine(image, angle=0.0, translate=[int(x), int(y)], scale=1.0, shear=[0.0, 0.0])


OPERATIONS: dict[str, tuple[float, float, Callable[[Image.Image, float], Image.Image]]] = {
    "Identity": (0, 0, lambda image, m: image),
    "ShearX": (0, 0.3, lambda image, m: _shear(image, m, 0)),
    "ShearY": (0, 0.3, lambda image, m: _shear(image, 0, m)),
    "TranslateX": (0, 150 / 331, lambda image, m: _shift(image, m, 0)),
    "TranslateY": (0, 150 / 331, lambda image, m: _shift(image, 0, m)),
    "Rotate": (0, 30, lambda image, m: F.rotate(image, m)),
    "Brightness": (0, 0.9, lambda image, m: F.adjust_brightness(image, 1 + m)),
    "Color": (0, 0.9, lambda image, m: F.adjust_saturation(image, 1 + m)),
    "Contrast": (0, 0.9, lambda image, m: F.adjust_contrast(image, 1 + m)),
    "Sharpness": (0, 0.9, lambda image, m: F.adjust_sharpness(image, 1 + m)),
    "Posterize": (8, 4, lambda image, m: F.posterize(image, round(m))),
    "Solarize": (1, 0, lambda image, m: F.solarize(image, 255 * m)),
    "AutoContrast": (0, 0, lambda image, m: F.autocontrast(image)),
    "Equalize": (0, 0, lambda image, m: F.equalize(image)),
}
"""torchvision's RandAugment: what stands for magnitude 0 and for 30 (of a translation in sides of the picture), and what is done."""
MAGNITUDES = 31
SIGNED = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness")
ALL_OR_NOTHING = ("Solarize", "AutoContrast", "Equalize")
"""They change a picture even at magnitude 0 (Solarize turns white to black); the strength is their chance."""


def _randaugment(image: Image.Image, magnitude: int, strength: float, numbers: list[list[float]]) -> Image.Image:
    """arXiv:1909.13719, with one triple of random numbers for each operation: which, its sign, whether the strength lets it happen."""
    names = list(OPERATIONS)
    for which, sign, chance in numbers:
        name = names[int(which * len(names))]
        if name not in ALL_OR_NOTHING or chance < strength:
            image = operate(image, name, round(strength * magnitude), negative=sign < 0.5)
    return image


def operate(image: Image.Image, name: str, magnitude: int, *, negative: bool) -> Image.Image:
    """One operation of RandAugment on a square picture. As torchvision's default has it, pixels are moved without interpolation, and what
    comes in from outside is black.

    :param magnitude: 0..30.
    :param negative: the other way, where there are two (``SIGNED``).
    """
    low, high, operation = OPERATIONS[name]
    if name.startswith("Translate"):
        high *= image.width
    # As torchvision counts it, to the last bit: a translation is cut to whole pixels.
    size = float(torch.linspace(low, high, MAGNITUDES)[magnitude])
    return operation(image, -size if negative and name in SIGNED else size)
