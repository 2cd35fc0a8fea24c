"""The decoded pictures of a set under one transform, in one file that all processes of a machine share.

In: pictures, a model's transform, a local folder. Out: uint8 [N, H, W, 3], mapped into memory, so that a set larger than the memory works
and a restarted process finds what was decoded before it.

    CACHE/<mark>.u8      the pixels; room for all pictures from the start, without taking the disk's
    CACHE/<mark>.done    a byte for every CHUNK pictures: 1 once their pixels are on disk

Two processes that decode the same pictures at once write the same bytes. The mark stands for the set, the transform and the library that
decodes.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import PIL
from PIL import Image
from torchvision.transforms import Compose

from raysys.errors import UserError
from raysys.evaluation.pictures import Picture, before_tensor, open_picture
from raysys.output import fingerprint

CHUNK = 64  # pictures that are decoded, or not, together


def cache_folder(cache_dir: str | None) -> str:
    """The folder for decoded sets, of this user alone. :raises UserError: where it cannot be, or belongs to somebody else."""
    folder = cache_dir or os.path.join(tempfile.gettempdir(), f"raysys-{os.getuid()}")
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
    except OSError as error:
        raise UserError(f"service.cache_dir={folder} cannot be made ({error.strerror}); give another folder") from error
    if cache_dir is None and (os.path.islink(folder) or os.stat(folder).st_uid != os.getuid()):
        raise UserError(f"{folder} belongs to another user; give service.cache_dir=FOLDER")
    return folder


class DecodedSet:
    """Filled as it is asked for."""

    def __init__(self, folder: str, pictures: Sequence[Picture], mark: object, preprocess: Compose, *, threads: int) -> None:
        """:param mark: changes when the set changes. :param threads: that decode; Pillow lets go of the GIL. :raises UserError: for a full disk."""
        self._folder, self._pictures, self._threads = folder, pictures, threads
        self._to_uint8 = before_tensor(preprocess)
        height, width, _ = np.asarray(self._to_uint8(Image.new("RGB", (64, 64)))).shape
        self._shape = (len(pictures), height, width, 3)
        steps = repr(preprocess.transforms[:-1])
        name = os.path.join(folder, fingerprint([mark, steps, self._shape, PIL.__version__]))
        self._num_bytes = int(np.prod(self._shape))
        with self._disk_errors_named():
            self._data = _open(name + ".u8", self._num_bytes)
            self._flags = _open(name + ".done", -(-len(pictures) // CHUNK))
        missing = np.frombuffer(os.pread(self._flags, -(-len(pictures) // CHUNK), 0), np.uint8) == 0
        needed, free = int(missing.mean() * self._num_bytes), shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(
                f"{folder}: a decoded set takes {needed / 1e9:.1f} GB there, {free / 1e9:.1f} GB are free; give service.cache_dir=FOLDER"
            )
        self.pixels_NHWC = np.memmap(name + ".u8", np.uint8, mode="r", shape=self._shape)
        """Read what :meth:`fill` has filled."""

    def fill(self, start: int, stop: int) -> int:
        """Decode what is missing of pictures start <= i < stop. :returns: how many were decoded.

        EXIF orientation is not applied and transparency is dropped, as open_clip does.

        :raises UserError: naming the file that is no picture, or the disk that is full.
        """
        chunks = range(start // CHUNK, -(-stop // CHUNK))
        missing = [chunk for chunk in chunks if os.pread(self._flags, 1, chunk) != b"\1"]
        count, picture_bytes = 0, self._num_bytes // len(self._pictures)
        with self._disk_errors_named(), ThreadPoolExecutor(self._threads) as pool:
            for chunk in missing:
                mine = self._pictures[chunk * CHUNK : (chunk + 1) * CHUNK]
                for i, pixels in enumerate(pool.map(self._decode, mine)):
                    _write(self._data, pixels.tobytes(), (chunk * CHUNK + i) * picture_bytes)
                count += len(mine)
            if missing:
                os.fdatasync(self._data)  # a flag must never be on disk before its pixels
            for chunk in missing:
                _write(self._flags, b"\1", chunk)
        return count

    def _decode(self, picture: Picture) -> np.ndarray:
        return np.asarray(self._to_uint8(open_picture(picture)))

    def close(self) -> None:
        os.close(self._data)
        os.close(self._flags)

    @contextmanager
    def _disk_errors_named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
                raise
            raise UserError(f"{self._folder}: {error.strerror}; decoded sets lie there, give service.cache_dir=FOLDER") from error


def _open(path: str, num_bytes: int) -> int:
    """A file of zeros of this size, unless it is there."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    if os.fstat(file).st_size != num_bytes:
        os.ftruncate(file, num_bytes)
    return file


def _write(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)  # not through the map: a full disk would be a SIGBUS
        view, offset = view[written:], offset + written
