"""Batches of one worker: order -> ranged reads -> views -> tensors, ahead of the step.

Threads read, decode and augment (Pillow and numpy let go of the interpreter lock); they share memory with the step, so nothing is
pickled. The worker's part of a step is a slice of the global batch, so any number of workers sees the same batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from raysys.config import AugmentConfig
from raysys.corpus.images import BrokenImage
from raysys.corpus.index import PictureReader, SampleIndex
from raysys.corpus.order import Order
from raysys.storage import UserError
from raysys.training.augment import make_view, view_rng


@dataclass
class Batch:
    step: int
    images: torch.Tensor
    """uint8 [b, 3, S, S], channels last in memory."""
    texts: torch.Tensor
    """int64 [b, context]"""
    bytes_read: int


class BatchReader:
    def __init__(
        self,
        index: SampleIndex,
        order: Order,
        augment: AugmentConfig,
        tokenizer: Callable[[list[str]], torch.Tensor],
        *,
        size_px: int,
        rank: int,
        world_size: int,
        threads: int,
        prefetch: int,
    ) -> None:
        self._index, self._order, self._augment, self._tokenizer = index, order, augment, tokenizer
        self._reader = PictureReader(index)
        self._size_px, self._threads, self._prefetch = size_px, threads, prefetch
        share = order.global_batch // world_size
        self._mine = slice(rank * share, (rank + 1) * share)

    def batches(self, first_step: int, end_step: int) -> Iterator[Batch]:
        """Batches of the steps ``first_step .. end_step - 1``."""
        with ThreadPoolExecutor(self._threads, thread_name_prefix="decode") as pool:
            waiting: deque[tuple[int, list[Future[tuple[np.ndarray, str, int]]]]] = deque()
            for step in range(first_step, end_step):
                while len(waiting) <= self._prefetch and step + len(waiting) < end_step:
                    ahead = step + len(waiting)
                    samples, views = self._order.batch(ahead)
                    pairs = zip(samples[self._mine].tolist(), views[self._mine].tolist(), strict=True)
                    waiting.append((ahead, [pool.submit(self._load, sample, view) for sample, view in pairs]))
                number, futures = waiting.popleft()
                assert number == step
                yield self._collate(step, [future.result() for future in futures])

    def _load(self, sample: int, view: int) -> tuple[np.ndarray, str, int]:
        data = self._reader.read(sample)
        rng = view_rng(self._order.seed, sample, view)
        try:
            pixels, caption = make_view(
                data, self._index.captions_of(sample), size_px=self._size_px, augment=self._augment, rng=rng
            )
        except BrokenImage as broken:
            raise UserError(
                f"{self._index.place(sample)}: {broken.reason}; annotate the corpus first, samples with an error are never trained on"
            ) from broken
        return pixels, caption, len(data)

    def _collate(self, step: int, loaded: list[tuple[np.ndarray, str, int]]) -> Batch:
        images_NHWC = torch.from_numpy(np.stack([pixels for pixels, _, _ in loaded]))
        texts = self._tokenizer([caption for _, caption, _ in loaded])
        return Batch(step, images_NHWC.permute(0, 3, 1, 2), texts, sum(size for _, _, size in loaded))
