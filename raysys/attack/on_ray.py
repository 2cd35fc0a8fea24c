"""``raysys attack`` on Ray: unit after unit of pictures, each drawn and written by one task.

In: :class:`AttackConfig`. Out: O/{the pictures in the layout of their source, classes.json, attack.parquet, manifest.json}; O/_parts while it is
unfinished. Which class is written stands in :mod:`raysys.attack.written`, how in :mod:`raysys.attack.drawing`, files in
:mod:`raysys.attack.layouts`.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from raysys.attack.drawing import Font, check_characters, read_fonts
from raysys.attack.layouts import PARTS_FOLDER, Job, Row, from_parquet, target_names, to_parquet, units_of, write_lists, write_unit
from raysys.attack.written import CONFUSIONS, NEAREST, RANDOM, choose_written, nearest_classes
from raysys.cluster import check_storage, make_room, num_cpus, ray_session, refuse_other_storage, watched
from raysys.config import AttackConfig, AttackSettings
from raysys.console import Progress, say, tell_result
from raysys.errors import UserError
from raysys.evaluation.class_sets import ATTACK_FILE, ClassSet, read_class_set
from raysys.masking import mask
from raysys.output import Output, fingerprint, open_output, require_finished, settings_of
from raysys.room import Need
from raysys.storage import exists, list_names, read_bytes, read_json, remove_folder, write_bytes, write_json

NEAREST_FILE = "nearest.json"
"""In the folder of parts: what a model's texts decided, so that a call that is taken up need not encode them again."""


def attack(cfg: AttackConfig) -> str:
    """Write ImageNet-Attr; units that an earlier call finished stay. :returns: the output folder."""
    clean = read_class_set(cfg.imagenet)
    target_names(clean)  # refuses a set with two pictures for one name, before anything is made
    written = choose_written(cfg.attack, clean)
    fonts = read_fonts(cfg.attack.fonts)
    # a model's texts may decide for any class
    texts = clean.class_names if None in written else [clean.class_names[w] for w in written if w is not None]
    check_characters(fonts, texts)
    # by names: a picture may be mended while the set is unfinished
    source = fingerprint([[picture.name for picture in clean.pictures], clean.labels, clean.class_names])
    facts = {"source": source, "written": fingerprint(written), "font_sha256": [font.sha256 for font in fonts]}
    output = open_output(cfg.output, "attack", settings_of(cfg, "num_actors") | facts)
    parts = output.join(PARTS_FOLDER)
    if output.finished:
        if require_finished(output.path, "attack")["source"] != clean.fingerprint:
            raise UserError(f"output={mask(output.path)}: its source has changed since; give a new folder")
        say(f"attack: nothing is left to do, all {len(clean.pictures):,} attacked pictures are there")
    else:
        nearest = _nearest(cfg.attack, clean, written, parts)
        classes = [nearest[label] if w is None else w for label, w in zip(clean.labels, written, strict=True)]
        units = units_of(clean, classes)
        with _forgotten_unless_begun(output, parts), ray_session(cfg.ray):
            need = Need("attack", [{"CPU": 1}])
            make_room(need, cfg.ray.wait_minutes)
            check_storage(output.path, {"imagenet.path": str(cfg.imagenet.path)})
            with watched(need):
                rows = _draw(units, clean.layout, output, cfg.attack, fonts, at_once=cfg.num_actors or num_cpus())
        write_lists(clean, output.path)
        write_bytes(output.join(ATTACK_FILE), to_parquet(rows))
        _finish(output, cfg.attack, clean, rows, fonts, num_nearest=len(nearest))
    remove_folder(parts)
    tell_result(mask(output.path), next_words=_next(cfg, output))
    return output.path


@contextmanager
def _forgotten_unless_begun(output: Output, parts: str) -> Iterator[None]:
    """A mistake that is found before the first picture leaves nothing that would refuse other words."""
    try:
        yield
    except UserError:
        if not [name for name in list_names(parts) if name.endswith(".parquet")]:
            output.forget()
        raise


def _nearest(settings: AttackSettings, clean: ClassSet, written: Sequence[int | None], parts: str) -> dict[int, int]:
    """True class -> written class, for those that a model's texts decide."""
    undecided = sorted({label for label, index in zip(clean.labels, written, strict=True) if index is None})
    if not undecided:
        return {}
    file = f"{parts}/{NEAREST_FILE}"
    if not exists(file):
        assert settings.model is not None  # choose_written
        found = nearest_classes(undecided, clean, model=settings.model, pretrained=settings.pretrained)
        write_json(file, {str(label): index for label, index in found.items()})
    return {int(label): index for label, index in read_json(file).items()}


def _draw(
    units: list[list[Job]], layout: str, output: Output, settings: AttackSettings, fonts: Sequence[Font], *, at_once: int
) -> list[Row]:
    """Draw the units that are not done. :returns: the rows of all, in order."""
    files = [output.join(PARTS_FOLDER, f"{number:05d}.parquet") for number in range(len(units))]
    there = set(list_names(output.join(PARTS_FOLDER)))
    parts = {number: read_bytes(file) for number, file in enumerate(files) if file.rsplit("/", 1)[-1] in there}
    todo = iter([number for number in range(len(units)) if number not in parts])
    # A task needs a CPU: where all may draw, more of them wait at the ready, and no process waits for this one.
    in_flight = 2 * at_once if at_once >= num_cpus() else at_once
    already = sum(len(units[number]) for number in parts)
    shared = ray.put(list(fonts))
    running: dict[Any, int] = {}
    with Progress("attack", sum(map(len, units)), "pictures", already=already) as progress:
        while True:
            while len(running) < in_flight and (number := next(todo, None)) is not None:
                running[_draw_unit.remote(units[number], layout, output.path, settings, shared, files[number])] = number
            if not running:
                break
            for ref in ray.wait(list(running))[0]:
                number = running.pop(ref)
                parts[number] = ray.get(ref)
                progress.advance(len(units[number]))
    return [row for number in range(len(units)) for row in from_parquet(parts[number])]


@ray.remote(num_cpus=1)
def _draw_unit(unit: list[Job], layout: str, folder: str, settings: AttackSettings, fonts: list[Font], part: str) -> bytes:
    """The unit's rows as a Parquet file, which is written last: where it is, its pictures are."""
    refuse_other_storage(folder)
    rows = to_parquet(write_unit(unit, layout, folder, settings, fonts))
    write_bytes(part, rows)
    return rows


def _finish(
    output: Output, settings: AttackSettings, clean: ClassSet, rows: list[Row], fonts: Sequence[Font], *, num_nearest: int
) -> None:
    """The manifest, and what a user should know of the set."""
    num_classes = clean.num_classes_with_pictures
    counts = {
        "pictures": len(rows),
        "classes_with_pictures": num_classes,
        "self_attacks": sum(clean.class_names[row["true_class"]] == row["text"] for row in rows),
        "cut_off": sum(0 < row["visible_share"] < 1 for row in rows),
        "invisible": sum(row["visible_share"] == 0 for row in rows),
    }
    source = mask(settings.classes)
    if settings.classes == CONFUSIONS:
        counts |= {"classes_by_confusions": num_classes - num_nearest, "classes_by_nearest_text": num_nearest}
        source = f"confusions for {num_classes - num_nearest:,} classes, nearest text for {num_nearest:,}"
    elif settings.classes == NEAREST:
        counts |= {"classes_by_nearest_text": num_nearest}
    elif settings.classes == RANDOM:
        source = f"random, seed {settings.seed}"
    drawn_with = Counter(row["font_sha256"] for row in rows)
    output.finish(
        counts,
        layout=clean.layout,
        classes=mask(settings.classes),
        preset=settings.name,
        seed=settings.seed,
        source=clean.fingerprint,
        fonts=[{"name": font.name, "sha256": font.sha256, "pictures": drawn_with[font.sha256]} for font in fonts],
        notes=clean.notes,
    )
    say(f"attack: {len(rows):,} attacked pictures of {num_classes:,} classes; written class: {source}")
    say(f"attack: {counts['self_attacks']:,} of them carry their own class's name")
    say(f"attack: text cut off at the edge on {counts['cut_off']:,}, nothing of it to be seen on {counts['invisible']:,}")
    say(f"attack: fonts: {', '.join(f'{font.name} ({drawn_with[font.sha256]:,})' for font in fonts)}")
    for note in clean.notes:
        say(f"attack: {note}")


def _next(cfg: AttackConfig, output: Output) -> str:
    """The call that asks a model for clean and attacked accuracy."""
    source = cfg.imagenet
    given = {
        key: getattr(source, key) for key in ("path", "labels", "classes", "templates", "split") if getattr(source, key) is not None
    }
    words = ["evaluators=[imagenet,imagenet_attr]", *(f"imagenet.{key}={value}" for key, value in given.items())]
    words += [f"imagenet_attr.path={output.path}"]  # its classes stand there
    words += [f"imagenet_attr.{key}={given[key]}" for key in ("templates", "split") if key in given]
    return f"raysys evaluate model=MODEL {' '.join(shlex.quote(mask(word)) for word in words)} output=RESULTS"
