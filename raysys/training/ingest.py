"""Batches of one worker: order -> ranged reads -> views -> tensors, ahead of the step.

In: the worker's lanes of the order, the index. Out: :class:`Batch`. One thread draws the order, ``read_threads`` read windows of encoded
pictures, ``decode_threads`` decode and augment straight into the batch (Pillow lets go of the interpreter lock); all share memory
with the step, so nothing is pickled or copied. No Ray here.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch

from raysys.config import AugmentConfig
from raysys.corpus.images import BrokenImage
from raysys.corpus.index import Block, BlockReader, SampleIndex
from raysys.corpus.order import Order, Places
from raysys.corpus.prefetch import prefetch
from raysys.errors import UserError
from raysys.masking import mask
from raysys.training.augment import make_view, strength_at, view_rng

CHUNK = 16
"""Samples that a thread decodes before it takes the next; small, so that all threads work on the batch that is due."""


@dataclass
class Batch:
    step: int
    images: torch.Tensor
    """uint8 [b, 3, S, S], channels last in memory; pinned for a GPU."""
    texts: torch.Tensor
    """int64 [b, context]"""
    bytes_read: int
    """From the shards, since the batch before."""
    bytes_used: int
    """Of the pictures in the batch."""


class BatchReader:
    def __init__(
        self,
        index: SampleIndex,
        order: Order,
        augment: AugmentConfig,
        tokenizer: Callable[[list[str]], torch.Tensor],
        *,
        size_px: int,
        num_steps: int,
        rank: int,
        world_size: int,
        read_threads: int,
        decode_threads: int,
        prefetch: int,
        pin_memory: bool,
    ) -> None:
        """:param num_steps: of the whole run, for the augmentation's schedule."""
        self._blocks = BlockReader(index)
        self._order, self._augment, self._tokenizer = order, augment, tokenizer
        self._parts = order.parts(rank, world_size)
        self._size_px, self._num_steps = size_px, num_steps
        self._read_threads, self._decode_threads, self._prefetch = read_threads, decode_threads, prefetch
        self._pin_memory = pin_memory
        self._bytes_read = 0
        self._counting = Lock()

    def batches(self, first_step: int, end_step: int) -> Generator[Batch, None, None]:
        """Batches of the steps ``first_step .. end_step - 1``.

        :raises UserError: for a picture that cannot be decoded.
        """
        share = sum(part.slots for part in self._parts)
        chunks_per_batch = -(-share // CHUNK)
        with ThreadPoolExecutor(self._read_threads, thread_name_prefix="read") as readers:
            made = prefetch(
                self._chunks(first_step, end_step, readers),
                self._make,
                threads=self._decode_threads,
                ahead=self._prefetch * chunks_per_batch,
            )
            try:
                read_before = 0
                for step in range(first_step, end_step):
                    chunks = [next(made) for _ in range(chunks_per_batch)]
                    texts = torch.cat([chunk.texts for chunk in chunks])
                    images = chunks[0].images.permute(0, 3, 1, 2)
                    read = self._bytes_read
                    yield Batch(step, images, texts, read - read_before, sum(chunk.bytes_used for chunk in chunks))
                    read_before = read
            finally:
                made.close()
                readers.shutdown(cancel_futures=True)

    def _chunks(self, first_step: int, end_step: int, readers: ThreadPoolExecutor) -> Iterator[_Chunk]:
        """What is to be made, in order; windows are read from half of the window before on."""
        ends = [part.take(end_step - 1)[-1] for part in self._parts]
        windows = [_Windows(lambda samples: self._read(samples, readers), end.key) for end in ends]
        for step in range(first_step, end_step):
            todo: list[_Task] = []
            for part, ready in zip(self._parts, windows, strict=True):
                for places in part.take(step):
                    window = ready.get(places)
                    view = self._order.view(places.number)
                    todo += [_Task(*window.find(sample), view) for sample in window.samples[places.at].tolist()]
            images = torch.empty((len(todo), self._size_px, self._size_px, 3), dtype=torch.uint8, pin_memory=self._pin_memory)
            strength = strength_at(self._augment, step / self._num_steps)
            for first in range(0, len(todo), CHUNK):
                yield _Chunk(images, first, todo[first : first + CHUNK], strength)

    def _read(self, samples: np.ndarray, readers: ThreadPoolExecutor) -> _Window:
        ranges = self._blocks.ranges(np.sort(samples))
        return _Window(samples, [first for first, _ in ranges], [readers.submit(self._read_block, *span) for span in ranges])

    def _read_block(self, first: int, end: int) -> Block:
        block = self._blocks.read(first, end)
        with self._counting:
            self._bytes_read += block.bytes_read
        return block

    def _make(self, chunk: _Chunk) -> _Made:
        pixels = chunk.images.numpy()
        captions: list[str] = []
        bytes_used = 0
        for row, task in enumerate(chunk.tasks, chunk.first):
            block = task.block.result()
            at = task.sample - block.first
            data = bytes(block.pictures[at])
            offset = int(block.offset[at])
            rng = view_rng(self._order.seed, block.shard, offset, task.view)
            try:
                pixels[row], caption = make_view(
                    data,
                    block.captions[at].as_py(),
                    size_px=self._size_px,
                    augment=self._augment,
                    strength=chunk.strength,
                    rng=rng,
                )
            except BrokenImage as broken:
                raise UserError(
                    f"{mask(block.path)} at byte {offset}: {broken.reason}; annotate the corpus first, samples with an error are "
                    "never trained on"
                ) from broken
            captions.append(caption)
            bytes_used += len(data)
        return _Made(chunk.images, self._tokenizer(captions), bytes_used)


@dataclass
class _Window:
    """A window's samples, read or being read."""

    samples: np.ndarray
    """int64, in shuffled order."""
    firsts: list[int]
    """First sample of each block, ascending."""
    blocks: list[Future[Block]]

    def find(self, sample: int) -> tuple[int, Future[Block]]:
        return sample, self.blocks[bisect_right(self.firsts, sample) - 1]


class _Windows:
    """The windows that a part of a lane has in memory: the one at work and, from its middle on, the next."""

    def __init__(self, read: Callable[[np.ndarray], _Window], last: tuple[int, int]) -> None:
        """:param last: pass and window that the run ends in; none after it is read."""
        self._read, self._last = read, last
        self._there: dict[tuple[int, int], _Window] = {}

    def get(self, places: Places) -> _Window:
        window = self._there.get(places.key) or self._read(places.window())
        following = places.part.after(places)
        keep = {places.key: window}
        if following in self._there:
            keep[following] = self._there[following]
        elif following <= self._last and 2 * (int(places.at[-1]) + 1) >= len(window.samples):
            keep[following] = self._read(places.part.window(*following))
        self._there = keep
        return window


@dataclass(slots=True)
class _Task:
    sample: int
    block: Future[Block]
    view: int


@dataclass
class _Chunk:
    """Some neighbouring rows of a batch."""

    images: torch.Tensor
    """uint8 [b, S, S, 3]: the whole batch, to be filled."""
    first: int
    tasks: list[_Task]
    strength: float


@dataclass
class _Made:
    images: torch.Tensor
    texts: torch.Tensor
    bytes_used: int
