"""In which order a run sees its samples: a pure function of (seed, step), the same for any number of workers.

In: how many samples of each shard are kept, and how large it is; no rows. Out: for a step and a lane, the numbers of the samples (their
position among all kept ones, in shard order) and of their views. A position is a step number, so resuming needs no state.

The samples lie in blocks (neighbours within a shard, one read). The blocks are dealt to ``lanes`` once, by the seed; a lane's part in every
batch is fixed, and so is its part of the samples. On every pass a lane goes through all of its blocks in a new order, and shuffles within
windows of several blocks. A worker serves neighbouring lanes, so every block is read by one worker; and as a lane always owns the same
samples, by the same machine while the number of workers stays: its page cache can hold them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

_DEAL, _PASS, _WINDOW, _STEP = range(4)
"""What a random stream is for."""
_DEALT_AT_ONCE = 1 << 18
"""Blocks whose places are looked up at once: some 20 MB."""
_WINDOWS_KEPT = 3
"""Windows that a part of a lane remembers: the one at work and both neighbours."""


@dataclass(frozen=True)
class Source:
    """Shards that have a fixed share of every batch."""

    first: int
    end: int
    """Shards ``first .. end - 1``."""
    weight: float


class Order:
    def __init__(
        self,
        kept: np.ndarray,
        size: np.ndarray,
        *,
        sources: Sequence[Source] = (),
        global_batch: int,
        lanes: int,
        block_bytes: float,
        window_bytes: float,
        seed: int,
        factor: int,
    ) -> None:
        """
        :param kept: int64 [shards]: kept samples of each shard.
        :param size: int64 [shards]: its bytes.
        :param sources: none for one source of all shards.
        :param factor: distinct views of a sample; 0: a new one on every pass.
        :raises ValueError: where a source has fewer samples than its share of a batch, or no share.
        """
        lanes = min(lanes, global_batch)  # each has a sample in every batch
        self.num_samples = int(kept.sum())
        self.global_batch, self.num_lanes, self.seed, self.factor = global_batch, lanes, seed, factor
        sources = sources or [Source(0, len(kept), 1.0)]
        self.shares = _shares([source.weight for source in sources], global_batch)
        """Samples of each source in every batch."""
        ends = np.cumsum(kept)
        bounds = np.arange(lanes + 1) * global_batch // lanes
        slots = np.diff(_spread(self.shares)[bounds], axis=0)  # [lanes, sources]
        self._parts: list[list[_Part]] = [[] for _ in range(lanes)]
        for number, source in enumerate(sources):
            share, shards = self.shares[number], slice(source.first, source.end)
            num_samples = int(kept[shards].sum())
            if num_samples < share or share == 0:
                raise ValueError(
                    f"global_batch={global_batch} takes {share} samples of {num_samples} kept ones"
                    + (f" (source {number + 1} of {len(sources)})" if len(sources) > 1 else "")
                    + "; a batch must hold some of every source, and none twice"
                )
            blocks = _Blocks(kept[shards], size[shards], int(ends[source.first] - kept[source.first]), block_bytes)
            dealt = _Dealt(blocks, _rng(seed, _DEAL, number))
            window = int(window_bytes * num_samples / max(int(size[shards].sum()), 1))
            done = 0
            for lane, mine in enumerate(slots[:, number].tolist()):
                if mine:
                    span = (num_samples * done // share, num_samples * (done + mine) // share)
                    key = (seed, number, lane)
                    self._parts[lane].append(_Part(key, dealt, span, mine, max(window, mine), lane / lanes, share, num_samples))
                done += mine

    def sizes(self, world_size: int) -> tuple[int, ...]:
        """Samples of each worker in every step."""
        return tuple(
            sum(part.slots for lane in self.lanes_of(rank, world_size) for part in self._parts[lane]) for rank in range(world_size)
        )

    def lanes_of(self, rank: int, world_size: int) -> range:
        return range(rank * self.num_lanes // world_size, (rank + 1) * self.num_lanes // world_size)

    def parts(self, rank: int = 0, world_size: int = 1) -> list[_Part]:
        """What a worker serves, in the order of its rows of a batch."""
        return [part for lane in self.lanes_of(rank, world_size) for part in self._parts[lane]]

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """A worker's rows of a step: samples and views, int64 [b] each. Those of all workers, in the order of their ranks, are the global
        batch; no sample stands twice in it."""
        taken = [part.take(step) for part in self.parts(rank, world_size)]
        samples = [place.window()[place.at] for places in taken for place in places]
        views = [np.full(len(place.at), self.view(place.number)) for places in taken for place in places]
        return np.concatenate(samples), np.concatenate(views)

    def view(self, number: int) -> int:
        """View that the pass of that number shows."""
        return number % self.factor if self.factor else number


@dataclass(frozen=True)
class Places:
    """Some places of a window."""

    part: _Part
    number: int
    """Of the pass."""
    window_number: int
    """Of the window within the pass."""
    at: np.ndarray
    """int64: places within the shuffled window."""

    @property
    def key(self) -> tuple[int, int]:
        """Pass and window; the next ones are greater."""
        return self.number, self.window_number

    def window(self) -> np.ndarray:
        """Samples of the window, shuffled; int64."""
        return self.part.window(*self.key)


class _Part:
    """A lane's part of a source: its samples, and a fixed number of slots of every batch."""

    def __init__(
        self,
        key: tuple[int, ...],
        dealt: _Dealt,
        span: tuple[int, int],
        slots: int,
        window: int,
        stagger: float,
        share: int,
        num_samples: int,
    ) -> None:
        """
        :param span: first and end of the samples that are its own, as they are dealt.
        :param window: samples; at least ``slots``.
        :param stagger: 0..1: the first window of a pass is shorter by that part, so that lanes do not all read at the same time.
        """
        self.slots, self._key, self._dealt, self._span, self._window = slots, key, dealt, span, window
        self.num_samples = span[1] - span[0]
        self._first_window = window - int((window - slots) * stagger)
        # With fewer than two batches, every step is a pass of its own over a random part.
        self._step_is_pass = num_samples < 2 * share
        self._passes: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def take(self, step: int) -> list[Places]:
        """Where the part's samples of a step stand."""
        if self._step_is_pass:
            return [Places(self, step, 0, np.arange(self.slots))]
        places: list[Places] = []
        first, end = step * self.slots, (step + 1) * self.slots
        while first < end:
            number, position = divmod(first, self.num_samples)
            window, start, stop = self._window_at(position)
            count = min(end - first, stop - position)
            places.append(Places(self, number, window, np.arange(position - start, position - start + count)))
            first += count
        return places

    def after(self, place: Places) -> tuple[int, int]:
        """Pass and window that come next."""
        if self._step_is_pass:
            return place.number + 1, 0
        end = self._bounds(place.window_number)[1]
        return (place.number, place.window_number + 1) if end < self.num_samples else (place.number + 1, 0)

    def window(self, number: int, window: int) -> np.ndarray:
        """Samples of a window, shuffled; int64."""
        found = self._windows.get((number, window))
        if found is None:
            found = self._shuffled(number, window)
            self._windows[number, window] = found
            while len(self._windows) > _WINDOWS_KEPT:
                self._windows.popitem(last=False)
        return found

    def _window_at(self, position: int) -> tuple[int, int, int]:
        """Number, start and end of the window that holds a position of a pass."""
        number = 0 if position < self._first_window else 1 + (position - self._first_window) // self._window
        return number, *self._bounds(number)

    def _bounds(self, window: int) -> tuple[int, int]:
        if self._step_is_pass:
            return 0, self.num_samples
        start = 0 if window == 0 else self._first_window + (window - 1) * self._window
        end = self._first_window + window * self._window
        return start, min(end, self.num_samples)

    def _shuffled(self, number: int, window: int) -> np.ndarray:
        start, end = self._bounds(window)
        if self._step_is_pass:
            samples = self._samples(0, start, end)
            return samples[_rng(*self._key, _STEP, number).permutation(len(samples))]
        samples = self._bare(number, window)
        before = number * self.num_samples % self.slots  # slots that the last samples of the pass before have in the first batch
        if window or number == 0 or before == 0:
            return samples
        # Where a batch lies across two passes, the head of the second gives up what the tail of the first holds. Only the first window's
        # places before the last batch's worth of the pass change, so tails are those of the bare shuffle, and there are always enough
        # places to change with: a window and all but a batch of the pass hold a batch each.
        head, room = self.slots - before, min(end, self.num_samples - self.slots)
        clash = np.isin(samples, self._tail(number - 1, before))
        give = np.flatnonzero(clash[:head])
        take = head + np.flatnonzero(~clash[head:room])[: len(give)]
        samples[give], samples[take] = samples[take], samples[give]
        return samples

    def _tail(self, number: int, count: int) -> np.ndarray:
        """The last samples of a pass, as the bare shuffle has them."""
        tail: list[np.ndarray] = []
        end = self.num_samples
        while count > 0:
            window, start, _ = self._window_at(end - 1)
            first = max(start, end - count)
            tail.append(self._bare(number, window)[first - start : end - start])
            count, end = count - (end - first), first
        return np.concatenate(tail)

    def _bare(self, number: int, window: int) -> np.ndarray:
        samples = self._samples(number, *self._bounds(window))
        return samples[_rng(*self._key, _WINDOW, number, window).permutation(len(samples))]

    def _samples(self, number: int, start: int, end: int) -> np.ndarray:
        """Samples at the positions ``start .. end - 1`` of a pass, before the shuffle within windows."""
        ranges, ends = self._pass(number)
        first, last = np.searchsorted(ends, [start, end - 1], side="right")
        pieces = [np.arange(a, b) for a, b in ranges[first : last + 1].tolist()]
        skipped = start - (int(ends[first - 1]) if first else 0)
        return np.concatenate(pieces)[skipped : skipped + end - start]

    @cached_property
    def _ranges(self) -> np.ndarray:
        """int64 [pieces, 2]: first sample and end of each piece of a block; only who serves the lane has them in memory."""
        return self._dealt.cut(*self._span)

    def _pass(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Pieces in the order of a pass, and where each ends."""
        found = self._passes.get(number)
        if found is None:
            ranges = self._ranges[_rng(*self._key, _PASS, number).permutation(len(self._ranges))]
            found = self._passes[number] = (ranges, np.cumsum(ranges[:, 1] - ranges[:, 0]))
            while len(self._passes) > 2:
                self._passes.popitem(last=False)
        return found


class _Blocks:
    """The blocks of a source: each shard is cut into as many as its bytes ask for, of equal numbers of kept samples."""

    def __init__(self, kept: np.ndarray, size: np.ndarray, first_sample: int, block_bytes: float) -> None:
        self._kept = kept.astype(np.int64)
        self._cuts = np.minimum(np.ceil(size / block_bytes).astype(np.int64).clip(1), self._kept)
        self._ends = np.cumsum(self._cuts)
        self._first_sample = first_sample + np.cumsum(self._kept) - self._kept

    def __len__(self) -> int:
        return int(self._cuts.sum())

    def ranges(self, blocks: np.ndarray) -> np.ndarray:
        """int64 [blocks, 2]: first sample and end of each."""
        shard = np.searchsorted(self._ends, blocks, side="right")
        kept, cuts = self._kept[shard], self._cuts[shard]
        number = blocks - (self._ends[shard] - cuts)
        return np.stack([number * kept // cuts, (number + 1) * kept // cuts], axis=1) + self._first_sample[shard, None]


class _Dealt:
    """The blocks of a source, shuffled: 12 bytes a block, of which a billion samples of 20 KB have five million."""

    def __init__(self, blocks: _Blocks, rng: np.random.Generator) -> None:
        self._blocks = blocks
        self._order = np.arange(len(blocks), dtype=np.int32 if len(blocks) < 1 << 31 else np.int64)
        rng.shuffle(self._order)
        self._ends = np.empty(len(blocks), np.int64)
        """Samples up to the end of each."""
        for first in range(0, len(blocks), _DEALT_AT_ONCE):
            ranges = blocks.ranges(self._order[first : first + _DEALT_AT_ONCE])
            self._ends[first : first + _DEALT_AT_ONCE] = ranges[:, 1] - ranges[:, 0]
        np.cumsum(self._ends, out=self._ends)

    def cut(self, start: int, end: int) -> np.ndarray:
        """Ranges of the samples at ``start .. end - 1``, int64 [pieces, 2]; blocks at the cuts are shared with the neighbour."""
        first, last = np.searchsorted(self._ends, [start, end - 1], side="right")
        ranges = self._blocks.ranges(self._order[first : last + 1])
        ranges[-1, 1] -= int(self._ends[last]) - end
        ranges[0, 0] += start - (int(self._ends[first - 1]) if first else 0)
        return ranges


def _shares(weights: list[float], total: int) -> list[int]:
    """Whole shares that sum to ``total``, by largest remainder."""
    exact = np.array(weights) / sum(weights) * total
    shares = np.floor(exact).astype(int)
    for most in np.argsort(shares - exact, kind="stable")[: total - int(shares.sum())]:
        shares[most] += 1
    return [int(share) for share in shares]


def _spread(shares: list[int]) -> np.ndarray:
    """int [total + 1, sources]: of the first n slots of a batch, how many are each source's; evenly mixed."""
    source = np.repeat(np.arange(len(shares)), shares)
    at = np.concatenate([(np.arange(share) + 0.5) / share for share in shares if share])
    mixed = source[np.argsort(at, kind="stable")]
    return np.concatenate([np.zeros((1, len(shares)), int), np.cumsum(mixed[:, None] == np.arange(len(shares)), axis=0)])


def _rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)
