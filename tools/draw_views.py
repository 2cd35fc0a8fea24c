"""Look at an augmentation: a grid of views, drawn by what training calls.

    python tools/draw_views.py PICTURE... --augment default [--views 8] [--strengths 0,0.5,1] [--size 224] [--seed 0] --out views.png

One row for a picture and a strength; the plain picture first, then views 0, 1, 2, ... ``--augment`` is a name of conf/augment or a YAML
file of its keys. A column is one view: down a picture's rows its strength grows.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from raysys.cli import compose_config
from raysys.config import AugmentConfig
from raysys.errors import UserError
from raysys.training.views import draw_views


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE")
    parser.add_argument("--augment", required=True, help="name of conf/augment, or a YAML file")
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--strengths", default="1", help="0..1, with commas")
    parser.add_argument("--size", type=int, default=224, help="side of a view, pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    words = ["corpus.path=x", "model=x", "output=x", "train.steps=1", f"augment={args.augment}"]
    augment = compose_config("train", words).augment
    strengths = [float(word) for word in args.strengths.split(",")]
    draw(args.pictures, augment, strengths, args.views, args.size, args.seed).save(args.out)


def draw(
    pictures: list[Path], augment: AugmentConfig, strengths: list[float], num_views: int, size_px: int, seed: int
) -> Image.Image:
    """RGB grid: len(pictures) * len(strengths) rows of 1 + num_views squares."""
    grids = [
        draw_views(
            file.read_bytes(),
            [""],
            title=file.name,
            augment=augment,
            strengths=[(f"strength {strength:g}", strength) for strength in strengths],
            num_views=num_views,
            size_px=size_px,
            seed=seed,
            shard=0,
            offset=number,
        )
        for number, file in enumerate(pictures)
    ]
    return Image.fromarray(np.concatenate(grids))


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"draw_views: {error}")
