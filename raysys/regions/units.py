"""Units of annotation work: which shards, or which part of one, an actor takes at once; and the work itself. No Ray here.

A unit may be done twice (an actor died, a driver was killed): what it leaves is the same, and each file appears whole.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import pyarrow as pa

from raysys.corpus.samples import DamagedShard, Part, Plan, Sample
from raysys.corpus.shards import Shard, iter_samples
from raysys.errors import UserError
from raysys.masking import mask
from raysys.patience import is_final
from raysys.regions.annotations import SCHEMA, AnnotationFiles, Counts, Head
from raysys.regions.annotator import Annotator, Look
from raysys.storage import identity

UNITS_PER_ACTOR = 8
"""So many units each at least, so that actors end about together."""
SMALLEST_UNIT_BYTES = 4 << 20
"""Some hundred pictures: seconds of work, against Ray's 8 ms a unit."""
MOST_SHARDS = 64
"""Of a unit: ten thousand units wait in the driver at a time."""
REPORT_EVERY_S = 1.0


class ChangedShard(UserError):
    """The shard changed while it was read: somebody still writes it."""


@dataclass
class Unit:
    """Whole shards, or one part of a large one, or a large one whose parts are there and only have to be merged."""

    shards: list[Shard]
    part: Part | None = None
    merge: bool = False
    num_bytes: int = 0
    """Estimate of the pictures' bytes, for the time left."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Unit:
        raw = json.loads(text)
        return cls([Shard(**s) for s in raw["shards"]], raw["part"] and Part(**raw["part"]), raw["merge"], raw["num_bytes"])


def unit_bytes(shards: list[Shard], *, actors: int, unit_mb: float) -> int:
    """Size of a unit for so much work and so many actors."""
    fair = sum(shard.picture_bytes for shard in shards) // (UNITS_PER_ACTOR * actors)
    return int(min(max(fair, SMALLEST_UNIT_BYTES), unit_mb * (1 << 20)))


def large_shards(shards: list[Shard], limit: int) -> list[Shard]:
    """Those worth cutting: at least two parts come out."""
    return [shard for shard in shards if shard.picture_bytes >= 2 * limit]


def plan_units(shards: list[Shard], plans: dict[str, Plan], files: AnnotationFiles, limit: int) -> Iterator[Unit]:
    """Units in shard order.

    :param plans: of the large shards, by name; what is finished of them is left out.
    """
    together = Unit([])
    there = files.finished_parts() if plans else set()
    for shard in shards:
        if shard.name in plans:
            plan = plans[shard.name]
            missing = files.missing_parts(shard.name, plan, there)
            samples = max(sum(part.count for part in plan.parts), 1)
            for part in missing:
                yield Unit([shard], part, num_bytes=shard.picture_bytes * part.count // samples)
            if not missing:
                yield Unit([shard], merge=True)
            continue
        full = together.num_bytes + shard.picture_bytes > limit or len(together.shards) == MOST_SHARDS
        if together.shards and full:
            yield together
            together = Unit([])
        together.shards.append(shard)
        together.num_bytes += shard.picture_bytes
    if together.shards:
        yield together


# ---- the work ---------------------------------------------------------------------------------------------------------

Report = Callable[[Counts, int], object]
"""Takes what was seen since the last call: counts, and bytes of pictures."""


@dataclass
class UnitResult:
    done: dict[str, Head] = field(default_factory=dict)
    """Shards whose file is there now."""
    failed: dict[str, str] = field(default_factory=dict)
    """Shards that storage would not give; the others go on."""
    num_bytes: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> UnitResult:
        raw = json.loads(text)
        heads = {name: Head(**{**head, "counts": Counts(**head["counts"])}) for name, head in raw["done"].items()}
        return cls(heads, raw["failed"], raw["num_bytes"])


def annotate_unit(unit: Unit, annotator: Annotator, files: AnnotationFiles, report: Report) -> UnitResult:
    """Look at every sample of a unit; each shard's file is written as soon as it is complete."""
    result = UnitResult(num_bytes=unit.num_bytes)
    for shard in unit.shards:
        try:
            head = _annotate(shard, unit, annotator, files, report)
        except (ChangedShard, OSError) as error:
            if is_final(error):
                raise  # every other shard would fail too
            result.failed[shard.name] = " ".join(str(error).split()) or type(error).__name__
            continue
        if head is not None:
            result.done[shard.name] = head
    return result


def _annotate(shard: Shard, unit: Unit, annotator: Annotator, files: AnnotationFiles, report: Report) -> Head | None:
    """The head of the shard's file, None while parts of it are missing."""
    head = files.head(shard.name)  # by an actor that died later in the same unit
    if head is not None and (head.fingerprint, head.identity) == (files.fingerprint, identity(shard.path)):
        return head
    if unit.part is None and not unit.merge:
        table, made_of, damaged = look_at_shard(shard.path, shard.name, None, annotator, report)
        return files.write_shard(shard.name, table, made_of=made_of, damaged=damaged)
    plan = files.plan(shard)
    if plan is not None and unit.part is not None:
        table, made_of, damaged = look_at_shard(shard.path, shard.name, unit.part, annotator, report)
        if made_of == plan.identity:
            files.write_part(shard.name, plan, unit.part, table, damaged=damaged)
        else:
            plan = None
    if plan is None:
        raise ChangedShard(f"{mask(shard.path)} changed since it was cut into parts; run the same words again when it is complete")
    return files.merge(shard.name, plan)


def look_at_shard(
    path: str, name: str, part: Part | None, annotator: Annotator, report: Report = lambda counts, num_bytes: None
) -> tuple[pa.Table, str, str]:
    """Rows of a shard or a part of it, the identity of what was read, and why it broke off (empty for a sound one).

    :raises ChangedShard: where the shard changed meanwhile.
    """
    before = identity(path)
    reader = _Reader(path, part)
    tables: list[pa.Table] = []
    rows: list[dict[str, object]] = []
    last = time.monotonic()

    def flush() -> None:
        nonlocal last
        tables.append(pa.Table.from_pylist(rows, schema=SCHEMA))
        rows.clear()
        report(Counts.of(tables[-1]), reader.take_bytes())
        last = time.monotonic()

    for sample, look in annotator.look_all(reader.pictures()):
        rows.append(_row(name, sample, look))
        if time.monotonic() - last > REPORT_EVERY_S:
            flush()
    flush()
    if before != identity(path):
        raise ChangedShard(f"{mask(path)} changed while it was read; run the same words again when it is complete")
    return pa.concat_tables(tables), before, reader.damaged


@dataclass
class _Reader:
    """Samples and their pictures; counts bytes, and ends where a damaged shard breaks off."""

    path: str
    part: Part | None
    damaged: str = ""
    _num_bytes: int = 0

    def pictures(self) -> Iterator[tuple[Sample, bytes | None]]:
        try:
            for sample in iter_samples(self.path, self.part):
                data, sample.image, sample.metadata = sample.image, None, b""  # nothing holds on to them once they are looked at
                self._num_bytes += len(data or b"")
                yield sample, data
        except DamagedShard as error:
            self.damaged = str(error)

    def take_bytes(self) -> int:
        taken, self._num_bytes = self._num_bytes, 0
        return taken


def _row(name: str, sample: Sample, look: Look) -> dict[str, object]:
    return {
        "shard": name,
        "index": sample.index,
        "key": sample.key,
        "uid": sample.uid,
        "offset": sample.offset,
        "size": sample.size,
        "caption": sample.captions,
        "width": look.width,
        "height": look.height,
        "regions": look.regions,
        "text_area": look.text_area,
        "error": sample.error or look.error,
    }
