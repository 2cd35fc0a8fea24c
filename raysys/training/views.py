"""What the augmentation does, as pictures: rows of views of a sample, made by what training calls.

In: samples of a batch, or any picture. Out: uint8 RGB grids with a line of text above each row, for TensorBoard
(``views/SAMPLE``) and ``tools/draw_views.py``. Making them changes nothing: a view is a pure function of (seed, sample, view, strength).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from raysys.board import one_line
from raysys.config import AugmentConfig
from raysys.corpus.images import BrokenImage
from raysys.corpus.index import BlockReader, SampleIndex
from raysys.corpus.order import Order
from raysys.errors import UserError
from raysys.masking import mask
from raysys.training.augment import make_view, strength_at, view_rng

NUM_SAMPLES, NUM_VIEWS = 4, 5
"""That a run shows at its start: some 40 views, a tenth of a second a core at 224 px."""
MARGIN_PX = 4
LABEL_PX = 16
"""Line above a row."""
MAX_STEPS_TRIED = 1_000
"""Steps among which the strongest augmentation is looked for."""


def draw_views(
    data: bytes,
    captions: list[str],
    *,
    title: str,
    augment: AugmentConfig,
    strengths: list[tuple[str, float]],
    num_views: int,
    size_px: int,
    seed: int,
    shard: int,
    offset: int,
) -> np.ndarray:
    """A row of 1 + num_views squares for each strength: the plain picture, then views 0, 1, 2, ...

    :param title: stands above each row, behind the strength's name; the caption of view 0 follows.
    :param strengths: name and strength, 0..1.
    :param shard: with ``offset``, which sample it is (:func:`view_rng`).
    :returns: uint8 RGB [h, w, 3].
    :raises BrokenImage: where the bytes are no picture.
    """
    column_px, row_px = size_px + MARGIN_PX, size_px + MARGIN_PX + LABEL_PX
    width = (1 + num_views) * column_px + MARGIN_PX
    grid = Image.new("RGB", (width, len(strengths) * row_px + MARGIN_PX), "white")
    pen, font = ImageDraw.Draw(grid), ImageFont.load_default(LABEL_PX - 4)
    for row, (name, strength) in enumerate(strengths):
        y, caption = row * row_px, ""
        for column in range(1 + num_views):
            rng = view_rng(seed, shard, offset, view=max(column - 1, 0))
            pixels, caption_of_view = make_view(
                data, captions, size_px=size_px, augment=augment, strength=strength if column else 0, rng=rng
            )
            caption = caption_of_view if column <= 1 else caption
            grid.paste(Image.fromarray(pixels), (MARGIN_PX + column * column_px, y + LABEL_PX))
        label = one_line(", ".join(part for part in (name, title, caption) if part), width // 6)
        pen.text((MARGIN_PX, y), label, fill="black", font=font)
    return np.asarray(grid)


def views_of(
    samples: np.ndarray, index: SampleIndex, order: Order, augment: AugmentConfig, *, size_px: int, num_steps: int
) -> dict[str, list[np.ndarray]]:
    """Views of some samples of a batch, as training makes them at the first step and where the augmentation is strongest.

    A sample that cannot be read or decoded is left out: the training, which needs the same batch, says what is wrong with it.

    :param samples: positions among the kept ones.
    :param num_steps: of the run.
    :returns: by tag, one picture each.
    """
    chosen = samples[np.linspace(0, len(samples) - 1, min(NUM_SAMPLES, len(samples))).astype(int)].tolist()
    strengths = _strengths(augment, num_steps)
    reader = BlockReader(index)

    def draw(sample: int) -> list[np.ndarray]:
        try:
            block = reader.read(sample, sample + 1)
            offset = int(block.offset[0])
            grid = draw_views(
                bytes(block.pictures[0]),
                block.captions[0].as_py(),
                title=f"{mask(block.path).rsplit('/', 1)[-1]} at byte {offset}",
                augment=augment,
                strengths=strengths,
                num_views=min(NUM_VIEWS, order.factor or NUM_VIEWS),
                size_px=size_px,
                seed=order.seed,
                shard=block.shard,
                offset=offset,
            )
        except (BrokenImage, UserError, OSError):
            return []
        return [grid]

    with ThreadPoolExecutor(NUM_SAMPLES, thread_name_prefix="views") as threads:
        drawn = list(threads.map(draw, chosen))
    return {f"views/{number}": grids for number, grids in enumerate(drawn, 1) if grids}


def _strengths(augment: AugmentConfig, num_steps: int) -> list[tuple[str, float]]:
    """Of the first step and of the strongest one (one of :data:`MAX_STEPS_TRIED`), once where they are alike."""

    def at(step: int) -> float:
        return strength_at(augment, step / num_steps)

    strongest = max(range(0, num_steps, -(-num_steps // MAX_STEPS_TRIED)), key=at)
    return [(f"step {step}, strength {at(step):.2f}", at(step)) for step in sorted({0, strongest})]
