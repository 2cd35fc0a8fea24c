"""A picture of an evaluation set: where it lies, decoded, and the end of a model's own transform on the device.

The transform up to its ToTensor gives uint8 (:mod:`raysys.evaluation.decoded` keeps it); :func:`normalise` on the device then gives what
open_clip's transform gives, to the bit.
"""

from __future__ import annotations

import functools
import io
import struct
import threading
from dataclasses import dataclass

import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms import Compose, Normalize, ToTensor

from raysys.corpus.parquet import row_group_images
from raysys.errors import UserError
from raysys.masking import mask
from raysys.patience import StorageDown
from raysys.storage import named_errors, open_fs, read_bytes

PICTURE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".gif", ".bmp")
_BROKEN = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, struct.error, Image.DecompressionBombError)
"""What Pillow's decoders are seen to raise on damaged files."""


@dataclass(frozen=True)
class Picture:
    """Where a picture lies: a file, a range of a tar, or a row of a Parquet file."""

    name: str
    """Unique within the set."""
    path: str
    offset: int = -1
    """First byte in the tar; -1 is none."""
    size: int = -1
    row_group: int = -1
    """Of the Parquet file; -1 is none."""
    row: int = -1
    """Within the row group."""

    def read(self) -> bytes:
        if self.row_group >= 0:
            return _row_group(self.path, self.row_group)[self.row] or b""
        if self.offset < 0:
            return read_bytes(self.path)
        fs, inner = open_fs(self.path)
        with named_errors(self.path):
            return fs.cat_file(inner, start=self.offset, end=self.offset + self.size)


_lock = threading.Lock()


def _row_group(path: str, group: int) -> list[bytes | None]:
    """The pictures of a row group; neighbours are asked for together, by several threads, and read once."""
    with _lock:
        return _read_row_group(path, group)


@functools.lru_cache(maxsize=2)
def _read_row_group(path: str, group: int) -> list[bytes | None]:
    return row_group_images(path, group)


def open_picture(picture: Picture) -> Image.Image:
    """The picture, decoded whole. :raises UserError: naming the file."""
    try:
        image = Image.open(io.BytesIO(picture.read()))
        image.load()
    except StorageDown:
        raise
    except _BROKEN as error:
        why = "no format that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        where = picture.path if picture.offset < 0 and picture.row_group < 0 else f"{picture.path}: {picture.name}"
        raise UserError(f"{mask(where)}: cannot be read as a picture ({why}); mend it or take it out of the set") from error
    return image


def normalise(pixels_BHWC: torch.Tensor, preprocess: Compose) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] on the same device: ToTensor and Normalize of the transform."""
    before_tensor(preprocess)
    end: Normalize = preprocess.transforms[-1]
    image_BCHW = pixels_BHWC.permute(0, 3, 1, 2).contiguous().to(torch.float32).div_(255)
    mean, std = (torch.tensor(v, dtype=torch.float32, device=image_BCHW.device).view(3, 1, 1) for v in (end.mean, end.std))
    return image_BCHW.sub_(mean).div_(std)


def before_tensor(preprocess: Compose) -> Compose:
    """What of open_clip's validation transform still gives PIL pictures."""
    steps = preprocess.transforms
    assert isinstance(steps[-2], ToTensor) and isinstance(steps[-1], Normalize), "open_clip's transforms end so"
    return Compose(steps[:-2])
