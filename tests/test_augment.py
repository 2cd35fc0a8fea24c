"""Views: what a sample looks like at each strength, against torchvision, Pillow and by hand."""

from __future__ import annotations

import colorsys
import io
import math
import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import noise_jpeg
from PIL import Image, ImageOps
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from raysys.cli import compose_config
from raysys.config import AugmentConfig, choices
from raysys.corpus.images import BrokenImage, EncodedPicture
from raysys.training.augment import ALL_OR_NOTHING, OPERATIONS, crop_box, make_view, operate, strength_at, view_rng

STILL = {"crop_scale_min": 1.0}
EVERYTHING = AugmentConfig(
    crop_scale_min=0.3, flip=0.5, color_jitter=0.4, hue=0.1, gray=0.3, erase=0.5, randaugment_ops=2, randaugment_magnitude=15
)
PLAIN = AugmentConfig(crop_scale_min=1.0, crop_ratio_max=1.0)


def view(data: bytes, augment: AugmentConfig, number: int = 0, *, strength: float = 1.0, size_px: int = 32) -> np.ndarray:
    pixels, _ = make_view(data, [""], size_px=size_px, augment=augment, strength=strength, rng=view_rng(0, 0, 0, number))
    assert pixels.shape == (size_px, size_px, 3) and pixels.dtype == np.uint8
    return pixels


def photo(width: int, height: int) -> Image.Image:
    """Smooth shapes in colours of every kind, none of them black or white."""
    grid = np.random.default_rng(0).integers(0, 256, (13, 17, 3), dtype=np.uint8)
    image = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)
    return image.point(lambda level: 20 + level * 200 // 255)


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bicubic(image: Image.Image, size_px: int) -> np.ndarray:
    return np.asarray(image.resize((size_px, size_px), Image.Resampling.BICUBIC)).astype(int)


# ---- random numbers --------------------------------------------------------------------------------------------------


def test_a_view_is_a_function_of_its_four_numbers() -> None:
    captions = [f"caption {i}" for i in range(5)]

    def made(*numbers: int) -> tuple[bytes, str]:
        pixels, caption = make_view(noise_jpeg(1), captions, size_px=32, augment=EVERYTHING, strength=1.0, rng=view_rng(*numbers))
        return pixels.tobytes(), caption

    one = (0, 2**64 - 1, 7, 3)
    others = [(1, 2**64 - 1, 7, 3), (0, 2**64 - 2, 7, 3), (0, 2**64 - 1, 8, 3), (0, 2**64 - 1, 7, 4), (7, 3, 0, 2**64 - 1)]
    assert made(*one) == made(*one)
    assert len({made(*numbers) for numbers in [one, *others]}) == 6


def test_the_numbers_of_a_view_stay_what_they_are() -> None:
    """A run that is resumed with another version of raysys or numpy sees the same views."""
    assert (
        view_rng(1, 2, 3, 4).random()
        == np.random.Generator(np.random.Philox(key=1 + (2 << 64), counter=(3 << 128) + (4 << 192))).random()
    )
    assert view_rng(1, 2, 3, 4).random() == GOLDEN


GOLDEN = 0.4758493340714328


def test_threads_make_the_same_views_and_leave_torchs_generator_alone() -> None:
    jpegs = [noise_jpeg(i, 64 + i) for i in range(40)]
    alone = [view(data, EVERYTHING, i) for i, data in enumerate(jpegs)]
    before = torch.get_rng_state()
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda i: view(jpegs[i % 40], EVERYTHING, i % 40), range(400)))
    assert all((pixels == alone[i % 40]).all() for i, pixels in enumerate(together))
    assert (torch.get_rng_state() == before).all()


# ---- strength --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule, off_share, expected",
    [
        ("constant", 0.0, [1, 1, 1, 1]),
        ("constant", 0.5, [1, 1, 0, 0]),
        ("constant", 1.0, [0, 0, 0, 0]),
        ("ramp", 0.0, [0, 0.25, 0.5, 0.75]),
        ("ramp", 0.5, [0, 0.5, 0, 0]),
        ("cosine", 0.0, [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
        ("cosine", 0.25, [1, 0.75, 0.25, 0]),
    ],
)
def test_schedules(schedule: str, off_share: float, expected: list[float]) -> None:
    augment = AugmentConfig(schedule=schedule, off_share=off_share)
    assert [strength_at(augment, step / 4) for step in range(4)] == pytest.approx(expected)


@pytest.mark.parametrize("tenths", range(11))
def test_the_last_share_of_the_steps_is_off_to_the_step(tenths: int) -> None:
    augment = AugmentConfig(off_share=tenths / 10)
    assert sum(strength_at(augment, step / 10) == 0 for step in range(10)) == tenths


@pytest.mark.parametrize("name", choices("augment"))
def test_at_strength_0_every_preset_only_resizes(name: str) -> None:
    augment = compose_config("train", ["corpus.path=x", "model=x", "output=x", "train.steps=1", f"augment={name}"]).augment
    for data in (noise_jpeg(1), saved(photo(90, 50)), saved(photo(50, 91), "JPEG")):
        for number in range(10):
            assert (view(data, augment, number, strength=0.0) == view(data, PLAIN)).all()


def test_strength_is_a_share_of_every_chance() -> None:
    """A view that is flipped at some strength is flipped at every greater one; so are the others."""
    data, plain = saved(photo(48, 48)), view(saved(photo(48, 48)), PLAIN)
    for change in ({"flip": 1.0}, {"gray": 1.0}, {"erase": 1.0}):
        augment = AugmentConfig(**STILL, **change)
        changed = np.array(
            [[(view(data, augment, i, strength=s) != plain).any() for s in (0.0, 0.25, 0.5, 0.75, 1.0)] for i in range(200)]
        )
        assert (np.diff(changed.astype(int)) >= 0).all()
        # Four standard deviations of a binomial.
        assert np.abs(changed.mean(0) - [0, 0.25, 0.5, 0.75, 1]).max() < 4 * math.sqrt(0.25 / 200)
        assert not changed[:, 0].any() and changed[:, 4].all()


def test_a_view_changes_smoothly_with_strength() -> None:
    augment, data = AugmentConfig(crop_scale_min=0.5, color_jitter=0.4), saved(photo(480, 360))
    paths = np.stack([[view(data, augment, i, strength=s) for s in np.linspace(0, 1, 21)] for i in range(30)]).astype(int)
    steps = np.abs(np.diff(paths, axis=1)).mean((2, 3, 4))
    ends = np.abs(paths[:, -1] - paths[:, 0]).mean((1, 2, 3))
    assert np.median(ends) > 40
    # Where the first crop fits in no longer, there is a jump to the next.
    assert np.quantile(steps, 0.95) < 15


# ---- crops -----------------------------------------------------------------------------------------------------------


def boxes(width: int, height: int, augment: AugmentConfig, strength: float = 1.0, num: int = 4000) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.array(
        [
            crop_box(
                width, height, augment=augment, strength=strength, tries=rng.random((10, 2)).tolist(), place=rng.random(2).tolist()
            )
            for _ in range(num)
        ]
    )


@pytest.mark.parametrize("size, scale_min", [((400, 300), 0.3), ((300, 300), 0.9), ((200, 500), 0.2)])
def test_crops_are_spread_as_torchvisions(size: tuple[int, int], scale_min: float) -> None:
    torch.manual_seed(0)
    transform = v2.RandomResizedCrop(32, scale=(scale_min, 1.0), ratio=(3 / 4, 4 / 3))
    params = [transform.make_params([Image.new("RGB", size)]) for _ in range(4000)]
    theirs = np.array([[p["left"], p["top"], p["left"] + p["width"], p["top"] + p["height"]] for p in params])
    ours = boxes(*size, AugmentConfig(crop_scale_min=scale_min, crop_ratio_max=4 / 3))

    def measures(box: np.ndarray) -> np.ndarray:
        x0, y0, x1, y1 = box.T.astype(float)
        w, h = x1 - x0, y1 - y0
        return np.stack([w * h / (size[0] * size[1]), np.log(w / h), (x0 + x1) / 2 / size[0], (y0 + y1) / 2 / size[1]])

    a, b = measures(ours), measures(theirs)
    error = np.sqrt((a.var(1) + b.var(1)) / 4000) + 1e-9
    assert (np.abs(a.mean(1) - b.mean(1)) < 4 * error).all()
    quantiles = np.quantile(a, [0.1, 0.5, 0.9], axis=1) - np.quantile(b, [0.1, 0.5, 0.9], axis=1)
    assert np.abs(quantiles).max() < 0.03
    assert np.abs(np.corrcoef(a) - np.corrcoef(b)).max() < 4 * math.sqrt(2 / 4000)


@pytest.mark.parametrize("size", [(1000, 100), (90, 900), (1000, 101)])
def test_where_no_crop_fits_in_it_is_torchvisions_central_one(size: tuple[int, int]) -> None:
    transform = v2.RandomResizedCrop(32, scale=(0.9, 1.0), ratio=(3 / 4, 4 / 3))
    p = transform.make_params([Image.new("RGB", size)])
    found = boxes(*size, AugmentConfig(crop_scale_min=0.9, crop_ratio_max=4 / 3), num=20)
    assert (found == [p["left"], p["top"], p["left"] + p["width"], p["top"] + p["height"]]).all()


def test_strength_narrows_the_crops_to_the_whole_picture() -> None:
    augment = AugmentConfig(crop_scale_min=0.4, crop_ratio_max=1.5)
    for width, height in ((300, 300), (450, 300), (300, 500)):
        for strength in (1.0, 0.5, 0.1):
            x0, y0, x1, y1 = boxes(width, height, augment, strength, 1000).T
            assert (x0 >= 0).all() and (y0 >= 0).all() and (x1 <= width).all() and (y1 <= height).all()
            area = (x1 - x0) * (y1 - y0) / (width * height)
            least = 1 - strength * (1 - 0.4)
            assert least - 0.01 <= area.min() < least + 0.05
    for width, height in ((8, 8), (8, 799), (1023, 517), (9001, 9937)):
        assert (boxes(width, height, augment, 0.0, 20) == (0, 0, width, height)).all()


# ---- resize and decode -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width, height", [(90, 70), (20, 27), (64, 32), (32, 32)])
def test_no_augmentation_is_a_plain_resize(width: int, height: int) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    found = view(saved(image), PLAIN)
    by_torchvision = F.resize(F.pil_to_tensor(image), [32, 32], v2.InterpolationMode.BICUBIC, antialias=True)
    assert (found == by_torchvision.permute(1, 2, 0).numpy()).all()
    # Pillow goes over rows and columns in another order and rounds in between.
    assert np.abs(found - bicubic(image, 32)).mean() < 0.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_decode_shows_the_same_part_whatever_the_exif_orientation(orientation: int) -> None:
    stored = photo(1203, 901)
    exif = Image.Exif()
    exif[0x0112] = orientation
    jpeg = saved(stored, "JPEG", quality=95, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(jpeg)))
    for shrink, stored_box in ((1, (16, 8, 160, 200)), (4, (200, 104, 1000, 600)), (8, (320, 80, 1200, 896))):
        mask = Image.new("L", stored.size)
        mask.paste(255, stored_box)
        box = ImageOps.exif_transpose(Image.open(io.BytesIO(saved(mask, exif=exif)))).getbbox()
        part = EncodedPicture(jpeg).part(box, min_side_px=100)
        assert part.shape == ((box[3] - box[1]) // shrink, (box[2] - box[0]) // shrink, 3)
        assert np.abs(bicubic(Image.fromarray(part), 100) - bicubic(upright.crop(box), 100)).mean() < 0.5


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_view_of_a_reduced_decode_is_nearly_that_of_the_whole(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    jpeg = saved(photo(1203, 901), "JPEG", quality=95, exif=exif)
    png = saved(ImageOps.exif_transpose(Image.open(io.BytesIO(jpeg))))
    for number in range(10):
        ours, whole = (view(data, AugmentConfig(crop_scale_min=0.3), number, size_px=100).astype(int) for data in (jpeg, png))
        # The crop moves by up to half of a reduced pixel.
        assert np.abs(ours - whole).mean() < 4


def test_gray_and_transparent_pictures_become_rgb() -> None:
    gray = photo(64, 64).convert("L")
    assert np.abs(view(saved(gray, "JPEG", quality=100), PLAIN) - bicubic(gray.convert("RGB"), 32)).mean() < 2
    assert (view(saved(Image.new("RGBA", (64, 64), (0, 0, 0, 0))), PLAIN) == 255).all()


def test_a_broken_picture_has_no_view() -> None:
    for data in (b"<html>", noise_jpeg(0)[:300]):
        with pytest.raises(BrokenImage):
            view(data, AugmentConfig())


# ---- operations ------------------------------------------------------------------------------------------------------


def test_a_flip_mirrors() -> None:
    data = saved(photo(32, 32))
    assert (view(data, AugmentConfig(**STILL, flip=1.0)) == view(data, PLAIN)[:, ::-1]).all()


def test_gray_is_torchvisions() -> None:
    data = saved(photo(32, 32))
    gray = F.rgb_to_grayscale(photo(32, 32), num_output_channels=3)
    assert (view(data, AugmentConfig(**STILL, gray=1.0)) == np.asarray(gray)).all()


def test_brightness_is_uniform_around_1() -> None:
    data = saved(Image.new("RGB", (32, 32), (100, 100, 100)))  # contrast, saturation leave an even gray picture alone
    levels = np.array([np.unique(view(data, AugmentConfig(**STILL, color_jitter=0.4), i)) for i in range(400)])
    assert levels.shape == (400, 1) and 60 <= levels.min() < 62 and 138 < levels.max() <= 140
    assert abs(levels.mean() - 100) < 4 * 80 / math.sqrt(12 * 400)


def test_contrast_and_saturation_are_torchvisions_in_that_order() -> None:
    """Each view is found again among the pictures of a grid of factors, and nothing but the three factors makes it."""
    image = photo(8, 8)
    augment = AugmentConfig(**STILL, color_jitter=0.4)
    for number in range(5):
        rng = view_rng(0, 0, 0, number)
        factors = 1 + 0.4 * (2 * rng.random(29)[25:28] - 1)
        expected: Any = image
        for adjust, factor in zip((F.adjust_brightness, F.adjust_contrast, F.adjust_saturation), factors, strict=True):
            expected = adjust(expected, float(factor))
        assert (view(saved(image), augment, number, size_px=8) == np.asarray(expected)).all()


def test_hue_turns_by_its_share_of_the_circle() -> None:
    data = saved(Image.new("RGB", (32, 32), (200, 100, 100)))  # hue 0
    hues = [colorsys.rgb_to_hsv(*(view(data, AugmentConfig(**STILL, hue=0.1), i)[0, 0] / 255))[0] for i in range(200)]
    turns = np.array([(hue + 0.5) % 1 - 0.5 for hue in hues])
    assert -0.105 < turns.min() < -0.085 and 0.085 < turns.max() < 0.105


def test_erasing_fills_a_rectangle_of_2_to_20_per_cent_with_noise() -> None:
    data, plain = saved(Image.new("RGB", (8, 8), (10, 20, 30))), np.array([10, 20, 30])
    areas, aspects = [], []
    for number in range(100):
        changed = (view(data, AugmentConfig(**STILL, erase=1.0), number, size_px=100) != plain).any(-1)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        h, w = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert changed.sum() > 0.99 * h * w
        areas.append(h * w / 100**2)
        aspects.append(w / h)
    assert 0.015 < min(areas) < 0.03 and 0.18 < max(areas) < 0.21
    assert 0.28 < min(aspects) < 0.4 and 2.5 < max(aspects) < 3.6
    noise = view(data, AugmentConfig(**STILL, erase=1.0), 0, size_px=100)
    values = noise[(noise != plain).any(-1)]
    assert abs(values.mean() - 127.5) < 5 and abs(values.std() - 73.9) < 3


# ---- RandAugment -----------------------------------------------------------------------------------------------------


def by_torchvision(image: Image.Image, name: str, magnitude: int) -> set[bytes]:
    """What torchvision's own class makes of it, of either sign."""

    class One(v2.RandAugment):
        _AUGMENTATION_SPACE = {name: v2.RandAugment._AUGMENTATION_SPACE[name]}  # noqa: RUF012

    transform = One(num_ops=1, magnitude=magnitude)
    made = set()
    for seed in range(8):
        torch.manual_seed(seed)
        made.add(transform(image).tobytes())
    return made


@pytest.mark.parametrize("name", v2.RandAugment._AUGMENTATION_SPACE)
def test_an_operation_is_torchvisions_at_every_magnitude(name: str) -> None:
    for side in (65, 224):
        image = photo(side, side)
        for magnitude in range(31):
            ours = {operate(image, name, magnitude, negative=negative).tobytes() for negative in (False, True)}
            assert ours == by_torchvision(image, name, magnitude), magnitude


def test_randaugment_draws_every_operation_alike() -> None:
    assert list(OPERATIONS) == list(v2.RandAugment._AUGMENTATION_SPACE)
    image = photo(32, 32)
    made = {operate(image, name, 9, negative=negative).tobytes(): name for name in OPERATIONS for negative in (False, True)}
    augment = AugmentConfig(**STILL, randaugment_ops=1, randaugment_magnitude=9)
    drawn = [made[view(saved(image), augment, number).tobytes()] for number in range(700)]
    counts = np.array([drawn.count(name) for name in OPERATIONS])
    assert np.abs(counts - 50).max() < 4 * math.sqrt(50)


def test_randaugment_scales_magnitude_with_strength_and_the_chance_of_what_has_none() -> None:
    image = photo(32, 32)
    scaled = {operate(image, name, 5, negative=negative).tobytes() for name in OPERATIONS for negative in (False, True)}
    augment = AugmentConfig(**STILL, randaugment_ops=1, randaugment_magnitude=10)
    drawn = [view(saved(image), augment, number, strength=0.5).tobytes() for number in range(600)]
    assert set(drawn) <= scaled
    for name in ALL_OR_NOTHING:  # 600 / 14 / 2
        count = drawn.count(operate(image, name, 5, negative=False).tobytes())
        assert abs(count - 21) < 4 * math.sqrt(21), name


def test_two_operations_follow_each_other() -> None:
    image = photo(32, 32)
    augment = AugmentConfig(**STILL, randaugment_ops=2, randaugment_magnitude=9)
    signed = [(name, negative) for name in OPERATIONS for negative in (False, True)]
    first = {key: operate(image, key[0], 9, negative=key[1]) for key in signed}
    both = {operate(first[a], b[0], 9, negative=b[1]).tobytes() for a in signed for b in signed}
    assert all(view(saved(image), augment, number).tobytes() in both for number in range(100))


# ---- captions --------------------------------------------------------------------------------------------------------


def test_captions_are_drawn_alike_and_whatever_the_strength() -> None:
    def caption(number: int, choice: str, strength: float) -> str:
        augment = AugmentConfig(caption=choice)
        rng = view_rng(0, 0, 0, number)
        return make_view(noise_jpeg(0, 8), ["a", "b", "c"], size_px=8, augment=augment, strength=strength, rng=rng)[1]

    drawn = [caption(i, "random", 1.0) for i in range(300)]
    assert drawn == [caption(i, "random", 0.0) for i in range(300)]
    assert all(abs(drawn.count(one) - 100) < 4 * math.sqrt(300 * 2 / 9) for one in "abc")
    assert {caption(i, "first", 1.0) for i in range(20)} == {"a"}


# ---- the tool --------------------------------------------------------------------------------------------------------


def test_draw_views_draws_a_row_for_each_strength_with_the_plain_picture_first(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "a.png").write_bytes(saved(photo(48, 32)))
    (tmp_path / "flip.yaml").write_text("crop_scale_min: 1.0\nflip: 1.0\n")
    words = f"draw_views.py {tmp_path}/a.png --augment {tmp_path}/flip.yaml --views 2 --strengths 0,1 --size 32 --out {tmp_path}/grid.png"
    monkeypatch.setattr("sys.argv", words.split())
    runpy.run_path(str(Path(__file__).parent.parent / "tools" / "draw_views.py"), run_name="__main__")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (108, 112, 3)
    plain = view(saved(photo(48, 32)), PLAIN)
    columns = [slice(4 + 36 * i, 36 + 36 * i) for i in range(3)]
    rows = [slice(16, 48), slice(68, 100)]
    assert all((grid[rows[0], column] == plain).all() for column in columns)
    assert (grid[rows[1], columns[0]] == plain).all()
    assert all((grid[rows[1], column] == plain[:, ::-1]).all() for column in columns[1:])
