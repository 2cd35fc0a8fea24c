"""``raysys annotate``: Ray Data maps a pool of OCR actors over units of work.

One row of the data set is one unit (:mod:`raysys.regions.units`): the actor streams its shards, catches what broken pictures raise, and
writes Parquet files whole or not at all. A shard is done when its file is there, so a rerun does what is left.
"""

from __future__ import annotations

import itertools
import shlex
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import ray
from ray.data import ActorPoolStrategy

from raysys.cluster import check_storage, make_room, on_this_node, ray_session, refuse_other_storage, settled_nodes, watched
from raysys.config import POOL_KEYS, AnnotateConfig, OcrConfig, RayConfig
from raysys.console import Progress, say, tell_result
from raysys.corpus.samples import Plan
from raysys.corpus.shards import Corpus, Shard, absolute_corpus, first_shards, open_corpus, plan_parts, refuse_output_in_corpus
from raysys.errors import UserError, WorkFailed
from raysys.masking import as_written, mask
from raysys.output import Output, fingerprint, open_output, settings_of
from raysys.patience import explained, is_final, refused
from raysys.regions.annotations import AnnotationFiles, Counts, Head, read_heads
from raysys.regions.annotator import Annotator
from raysys.regions.models import find_models
from raysys.regions.on_board import write_board
from raysys.regions.units import Unit, UnitResult, annotate_unit, large_shards, plan_units, unit_bytes
from raysys.room import Need, num_that_fit
from raysys.storage import find_files, join, list_names, read_json, remove_file, remove_folder, write_json

WAVE = 10_000
"""Units that Ray Data gets at once: it takes 1 ms to create one before the first starts, so a million would wait a quarter of an hour."""
ACTOR_BYTES = 4e8
"""What an OCR actor takes at least (measured on photographs of 500 px: .4 GB with ``ocr=fast``, .7 GB with ``ocr=default``)."""
CLOCK_SLACK_S = 60.0
"""A shard modified less than this before its annotations were written is compared by its footer: clocks differ."""

MOST_DAMAGED = 20
"""Damaged shards that the summary names."""


class Tally:
    """What the actors have seen so far, for the line of progress; the files have the true counts."""

    def __init__(self) -> None:
        self._counts, self._num_bytes = Counts(), 0

    def add(self, counts: Counts, num_bytes: int) -> None:
        self._counts += counts
        self._num_bytes += num_bytes

    def read(self) -> tuple[Counts, int]:
        return self._counts, self._num_bytes


@dataclass
class Done:
    """Shards whose files this call has seen, so that nobody reads their footers again."""

    names: set[str] = field(default_factory=set)
    counts: Counts = field(default_factory=Counts)
    damaged: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, head: Head) -> None:
        if name in self.names:
            return
        self.names.add(name)
        self.counts += head.counts
        if head.damaged:
            self.damaged[name] = head.damaged


class UnitAnnotator:
    """One OCR actor: a unit in, its files on storage, its counts out."""

    def __init__(self, ocr: OcrConfig, files: AnnotationFiles, tally: Any) -> None:
        self._files, self._tally = files, tally
        self._annotator: Annotator | Exception
        try:
            refuse_other_storage(files.folder)
            self._annotator = Annotator(ocr)
        except Exception as error:  # raised by the first call: an actor that dies at birth is born again by Ray, without end
            self._annotator = error

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if isinstance(self._annotator, UserError):
            return _row(refused=str(self._annotator))
        if isinstance(self._annotator, Exception):
            raise self._annotator
        try:
            result = annotate_unit(Unit.from_json(row["unit"]), self._annotator, self._files, self._tally.add.remote)
        except OSError as error:  # what is raised reaches the driver as Ray's error, without its cause
            return _row_of(error)
        return _row(result=result.to_json())


def _row(*, result: str = "", refused: str = "", ended: str = "") -> dict[str, Any]:
    """What an actor answers: a result, or what ends the call: a :class:`UserError`, a :class:`WorkFailed`."""
    return {"result": result, "refused": refused, "ended": ended}


def _refuse(row: dict[str, Any]) -> None:
    """:raises UserError, WorkFailed: where an actor's answer says so."""
    if row["refused"]:
        raise UserError(row["refused"])
    if row["ended"]:
        raise WorkFailed(row["ended"])


def _row_of(error: OSError) -> dict[str, Any]:
    if is_final(error):
        return _row(ended=str(explained(error)))
    mistake = refused(error) if isinstance(error, PermissionError) else None
    if mistake is None:
        raise error
    return _row(refused=str(mistake))


def annotate(cfg: AnnotateConfig) -> None:
    refuse_output_in_corpus("output", cfg.output, cfg.corpus)
    corpus = open_corpus(cfg.corpus)
    models = find_models(cfg.ocr)
    settings = settings_of(cfg) | {"models": models.sha256()}
    settings["corpus"] = asdict(absolute_corpus(cfg.corpus)) | {"roots": corpus.roots}
    pool = {key: settings["ocr"].pop(key) for key in POOL_KEYS}
    mark = fingerprint(corpus.roots)  # roots may hold variables, which are written as such
    free = {"pool": pool, "roots_mark": mark}
    output = open_output(cfg.output, "annotate", settings | free, not_in_fingerprint=(*free, "corpus"))
    files = AnnotationFiles(output.path, output.fingerprint)
    todo, changed = shards_to_do(corpus, output)
    _remember_where_it_lies({"corpus": settings["corpus"], "roots_mark": mark}, output)
    _say_what_is_done(corpus, todo, changed)
    done = Done()
    if todo:
        remove_file(output.join("manifest.json"))  # of an earlier call, before the corpus grew or changed
        with _forgotten_unless_begun(output), ray_session(cfg.ray):
            actors = _find_room(cfg.ocr, cfg.ray)
            check_storage(output.path, first_shards(corpus.roots, (shard.name for shard in corpus.shards)))
            done = _annotate_shards(cfg.ocr, todo, files, actors)
    if todo or not _is_counted(output):
        counts = counts_of(files, done)
        write_board(output.path, corpus.roots, counts)
        output.finish(counts)
        remove_folder(output.join("_parts"))
        remove_folder(output.join("_tmp"))
    _print_summary(output, corpus)


def _bundle(ocr: OcrConfig) -> dict[str, float]:
    """An actor beside the CPUs that decode for its GPU."""
    gpus = ocr.num_gpus_per_actor
    return {"CPU": ocr.decode_threads if gpus else 1, "GPU": gpus, "memory": ACTOR_BYTES}


def _find_room(ocr: OcrConfig, cfg: RayConfig) -> int:
    """OCR actors; as many as were asked for, or have room now."""
    one = [_bundle(ocr)]
    asked = ocr.num_actors or 1
    make_room(Need(f"annotate with {asked} OCR actors", one * asked), cfg.wait_minutes, enough=one)
    fit = num_that_fit(one, [node.free for node in settled_nodes()])
    if fit < asked:
        say(f"annotate: {fit} of {asked} OCR actors have room now, the others begin when there is more")
    return ocr.num_actors or max(fit, 1)


@contextmanager
def _forgotten_unless_begun(output: Output) -> Iterator[None]:
    """A mistake that is found before the first shard leaves nothing that would refuse other words."""
    try:
        yield
    except UserError:
        if not list_names(output.join("shards")) and not list_names(output.join("_parts")):
            output.forget()
        raise


def _annotate_shards(ocr: OcrConfig, shards: list[Shard], files: AnnotationFiles, actors: int) -> Done:
    """:returns: the shards that this call finished. :raises UserError: at the end, where storage would not give one."""
    limit = unit_bytes(shards, actors=actors, unit_mb=ocr.unit_mb)
    plans = _cut(large_shards(shards, limit), files, limit)
    units = plan_units(shards, plans, files, limit)
    tally = ray.remote(Tally).options(num_cpus=0, scheduling_strategy=on_this_node()).remote()
    done = Done()
    failed: dict[str, str] = {}
    with watched(Need("annotate", [_bundle(ocr)])), _progress(shards, tally) as finished:
        while wave := list(itertools.islice(units, WAVE)):
            for row in _pool(wave, min(actors, len(wave)), ocr, files, tally):
                _refuse(row)
                result = UnitResult.from_json(row["result"])
                for name, head in result.done.items():
                    done.add(name, head)
                failed |= result.failed
                finished(result)
    if failed:
        name, why = min(failed.items())
        raise UserError(
            f"{len(failed)} of {len(shards)} shards could not be read, the others are annotated and the same words try these again; {name}: {why}"
        )
    return done


def _pool(wave: list[Unit], actors: int, ocr: OcrConfig, files: AnnotationFiles, tally: Any) -> Iterable[dict[str, Any]]:
    rows = [{"unit": unit.to_json()} for unit in wave]
    return (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .map(
            UnitAnnotator,  # type: ignore[arg-type]  # Ray takes a class here
            fn_constructor_args=(ocr, files, tally),
            # Two units an actor: while one is in the networks, the next is read and decoded (Annotator.look_all).
            compute=ActorPoolStrategy(
                size=actors, max_tasks_in_flight_per_actor=2, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
            ),
            num_cpus=_bundle(ocr)["CPU"],
            num_gpus=ocr.num_gpus_per_actor,
        )
        .iter_rows()
    )


def _cut(shards: list[Shard], files: AnnotationFiles, limit: int) -> dict[str, Plan]:
    """A plan for every large shard: that of an earlier call, else one pass over its headers."""

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        [shard] = Unit.from_json(row["unit"]).shards
        try:
            files.save_plan(shard, plan_parts(shard.path, limit))
        except OSError as error:
            return _row_of(error)
        return _row()

    plans = files.plans(shards)
    new = [shard for shard in shards if shard.name not in plans]
    for first in range(0, len(new), WAVE):
        rows = [{"unit": Unit([shard]).to_json()} for shard in new[first : first + WAVE]]
        for row in ray.data.from_items(rows, override_num_blocks=len(rows)).map(cut).iter_rows():
            _refuse(row)
    return plans | files.plans(new)  # one that changed just now has none and is read whole


def shards_to_do(corpus: Corpus, output: Output) -> tuple[list[Shard], list[Shard]]:
    """Shards without annotations, and those that changed since theirs were made; both are to do.

    One listing finds what is done. Footers are read where the shard may be another: it is newer, or the corpus lies elsewhere now.

    :raises UserError: where the annotations are of another corpus.
    """
    try:
        _, written = find_files(output.join("shards"), (".parquet",))
    except UserError:
        return corpus.shards, []  # nothing is there yet
    done = {file.path.removesuffix(".parquet"): file.modified for file in written}
    saved = read_json(output.join("settings.json"))["settings"]
    then = saved["corpus"]["roots"]
    moved = saved.get("roots_mark", fingerprint(then)) != fingerprint(corpus.roots)
    doubtful = [s for s in corpus.shards if s.name in done and (moved or s.modified > done[s.name] - CLOCK_SLACK_S)]
    heads = read_heads([output.join("shards", f"{shard.name}.parquet") for shard in doubtful])
    changed = [shard for shard, head in zip(doubtful, heads, strict=True) if head.identity != shard.identity]
    if moved and (len(doubtful) < len(done) or len(changed) == len(doubtful)):
        raise UserError(
            f"output={mask(output.path)} was made of another corpus (at {mask(', '.join(then.values()))}): {len(doubtful) - len(changed)} of its "
            f"{len(done)} shards are in this one; give a new folder (a corpus that moved must have kept its files' times)"
        )
    names = {shard.name for shard in changed}
    return [shard for shard in corpus.shards if shard.name not in done or shard.name in names], changed


def _remember_where_it_lies(words: dict[str, Any], output: Output) -> None:
    """Where a corpus moved, the next verbs must look for it there."""
    saved = read_json(output.join("settings.json"))
    if saved["settings"].get("roots_mark") != words["roots_mark"]:
        saved["settings"] |= as_written(words)
        write_json(output.join("settings.json"), saved)


def _is_counted(output: Output) -> bool:
    """Whether the manifest is there and of the files that are."""
    names = list_names(output.join("shards"))
    return output.finished and read_json(output.join("manifest.json"))["counts"]["shards"] == len(names)


def counts_of(files: AnnotationFiles, done: Done) -> dict[str, Any]:
    """Counts over all shards; footers are read of those that this call did not make.

    :raises UserError: where a file is of other settings, or no sample could be read at all.
    """
    names = sorted(name.removesuffix(".parquet") for name in list_names(join(files.folder, "shards")))
    others = [name for name in names if name not in done.names]
    for name, head in zip(others, read_heads([files.shard_file(name) for name in others]), strict=True):
        if head.fingerprint != files.fingerprint:
            raise UserError(f"{mask(files.shard_file(name))}: made with other settings; delete it and run the same words again")
        done.add(name, head)
    lost = done.names - set(names)
    if lost:
        raise UserError(
            f"{len(lost)} of {len(done.names)} shards were annotated and are not there, {min(lost)} first; run the same words again"
        )
    if done.counts.samples == 0:
        reasons = ", ".join(sorted(set(done.damaged.values()))) or "the shards are empty"
        raise UserError(
            f"no sample could be read from {len(names)} shards ({reasons}), {names[0]} first; is this the right corpus?"
        )
    return {"shards": len(names), **asdict(done.counts), "damaged_shards": done.damaged}


# ---- what the user sees -----------------------------------------------------------------------------------------------


def _say_what_is_done(corpus: Corpus, todo: list[Shard], changed: list[Shard]) -> None:
    if not todo:
        say(f"annotate: nothing is left to do, all {len(corpus.shards)} shards are annotated")
    elif len(todo) < len(corpus.shards):
        say(f"annotate: {len(corpus.shards) - len(todo)} of {len(corpus.shards)} shards are done already")
    if changed:
        say(f"annotate: {len(changed)} shards changed since they were annotated and are looked at again, {changed[0].name} first")


@contextmanager
def _progress(shards: list[Shard], tally: Any) -> Iterator[Any]:
    """A line of progress from what the actors report and from what is finished; yields the function that takes results."""
    total_bytes = max(sum(shard.picture_bytes for shard in shards), 1)
    done_bytes = 0
    ended = threading.Event()

    def finished(result: UnitResult) -> None:
        nonlocal done_bytes
        done_bytes += result.num_bytes
        progress.done += len(result.done) + len(result.failed)

    def show() -> None:
        while not ended.wait(progress.every_s):
            seen, seen_bytes = ray.get(tally.read.remote())
            errors = sum(seen.errors.values())
            note = f"text in {seen.with_text / seen.samples:.1%}, {errors} errors" if seen.samples else "actors are starting"
            share = max(done_bytes, min(seen_bytes, int(0.99 * total_bytes))) / total_bytes
            progress.show(seen.samples, share, note)

    with Progress("annotate", len(shards), "shards") as progress:
        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            yield finished
        finally:
            ended.set()
            thread.join()


def _print_summary(output: Output, corpus: Corpus) -> None:
    counts = read_json(output.join("manifest.json"))["counts"]
    samples = counts["samples"]
    say(f"annotate: {samples} samples in {counts['shards']} shards; text was read in {counts['with_text'] / samples:.1%} of them, "
          f"{counts['regions']} regions in {counts['with_regions'] / samples:.1%}")  # fmt: skip
    for reason, number in sorted(counts["errors"].items(), key=lambda item: (-item[1], item[0])):
        say(f"annotate: {number} samples with an error: {reason}")
    if counts["without_caption"]:
        say(f"annotate: {counts['without_caption']} samples without a caption")
    damaged = sorted(counts["damaged_shards"].items())
    for name, reason in damaged[:MOST_DAMAGED]:
        say(f"annotate: shard {name} is damaged, its good part is kept: {reason}")
    if len(damaged) > MOST_DAMAGED:
        say(f"annotate: and {len(damaged) - MOST_DAMAGED} more damaged shards; {mask(output.join('manifest.json'))} names them")
    place = mask(output.path)
    as_tars = "" if all(shard.path.endswith(".tar") for shard in corpus.shards) else " shards=FOLDER"  # which training reads
    tell_result(place, next_words=f"raysys filter annotations={shlex.quote(place)} policy=paper output=SELECTION{as_tars}")
