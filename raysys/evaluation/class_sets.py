"""Labelled sets: which pictures, which class each shows, what is written on it, the class names and templates of the prompts.

In: :class:`ClassSetConfig`. Out: :class:`ClassSet`. The layout is told from what lies there; no picture is opened.
"""

from __future__ import annotations

import csv
import functools
import glob
import importlib.resources
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from raysys.config import ClassSetConfig
from raysys.corpus import tars
from raysys.corpus.parquet import Columns, read_columns
from raysys.corpus.samples import SAMPLE_REASONS, UNSAFE_NAME, DamagedShard, printable
from raysys.errors import UserError
from raysys.evaluation.pictures import PICTURE_SUFFIXES, Picture
from raysys.masking import mask
from raysys.output import fingerprint
from raysys.storage import exists, find_files, identity, identity_of, is_local, join, named_errors, open_fs, read_bytes, reading

T = TypeVar("T")
ATTACK_FILE = "attack.parquet"
CLASSES_FILE = "classes.json"
LABELS_FILE, LABELS_HEADER = "labels.csv", "picture,class"
"""raysys's own labels of a folder of pictures: the class by its id."""
USUAL_LABELS = (
    "LOC_val_solution.csv",
    "val.txt",
    "imagenet_2012_validation_synset_labels.txt",
    "ILSVRC2012_validation_ground_truth.txt",
)
"""Of ImageNet's validation pictures: Kaggle's, caffe's, TensorFlow's, and the devkit's, which is refused."""
LABEL_COLUMNS = ("label", "labels", "cls", "class", "fine_label")
"""First that is there."""
NUM_IMAGENET_VALIDATION = 50_000
"""arXiv:1409.0575, table 2."""
_WDS_SUFFIXES = ("webp", "png", "jpg", "jpeg")
"""CLIP_benchmark's, in its order."""


@dataclass(frozen=True)
class ClassSet:
    pictures: list[Picture]
    labels: list[int]
    """True class of each picture."""
    class_ids: list[str]
    """WNID, folder name or number of every class, with pictures or without."""
    class_names: list[str]
    """Every class is a possible answer, also one without pictures."""
    templates: list[str]
    fingerprint: str
    written: list[int] | None = None
    """The class whose name is written on each picture; None for a clean set."""
    layout: str = "folders"
    """How it lies on disk: ``folders``, ``flat``, ``webdataset`` or ``parquet``."""
    notes: list[str] = field(default_factory=list)
    """What a reader of its numbers must know ("pictures of 250 of 1,000 classes"), a line each."""

    @property
    def num_classes_with_pictures(self) -> int:
        return len(set(self.labels))


@dataclass
class _Found:
    """What lies there, before its classes are known."""

    layout: str
    pictures: list[Picture] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    """As they stand there: a class's id, name or number."""
    marks: list[Any] = field(default_factory=list)
    """What changes when a picture does, one each."""
    numbered: bool = True
    """Labels may be numbers from 0, in class order, or names; else they are ids."""
    classes: tuple[list[str], list[str]] | None = None
    """Ids and names of the set's own list."""
    templates: str | None = None
    """File of the set's own templates."""
    notes: list[str] = field(default_factory=list)

    def add(self, picture: Picture, label: str, mark: Any) -> None:
        self.pictures.append(picture)
        self.labels.append(label)
        self.marks.append(mark)


def read_class_set(cfg: ClassSetConfig, key: str = "imagenet", *, attacked: bool = False) -> ClassSet:
    """List pictures and their classes. Layouts:

    - ``folders``: one folder of pictures a class; sorted by class and name.
    - ``flat``: pictures and a label file (``labels``, or one of the usual names beside them or one folder above); sorted by name.
    - ``webdataset``: CLIP_benchmark's SPLIT/nshards.txt, SPLIT/0.tar ... with KEY.cls, classnames.txt, zeroshot_classification_templates.txt;
      in the order of the tars. A picture's name is SPLIT/0.tar/KEY.
    - ``parquet``: pictures and a column of labels, as Hugging Face has them; in the order of the files. A picture's name is FILE/ROW.

    :param key: where the config stands in the user's words, for messages.
    :param attacked: the set is what ``raysys attack`` wrote: attack.parquet says what is written where, classes.json the classes.
    :raises UserError: for a set that is missing, empty or damaged, a label that is no class, a picture without a label or the reverse.
    """
    if cfg.path is None:
        raise UserError(f"{key}.path is missing: a folder with one folder of pictures a class")
    where = f"{key}.path={mask(cfg.path)}"
    root, files = list_set(cfg.path, key)
    if attacked and ATTACK_FILE not in files:
        raise UserError(f"{where}: no {ATTACK_FILE} there; build the set with `raysys attack` (or let it finish)")
    if not attacked and ATTACK_FILE in files:
        raise UserError(
            f"{where}: holds {ATTACK_FILE}, so words stand on its pictures; it is a set for the evaluator imagenet_attr; give the clean one"
        )
    own_file = join(root, CLASSES_FILE)
    classes_file = cfg.classes or (own_file if attacked and exists(own_file) else None)
    given = _read_classes(classes_file) if classes_file is not None else None
    found = _read_layout(cfg, key, where, root, files, (given or _imagenet())[0])
    if not found.pictures:
        raise UserError(f"{where}: no pictures there; its tars or Parquet files hold none, give others")
    twice = next((name for name, count in Counter(p.name for p in found.pictures).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"{where}: two pictures are called {twice}; rename one")

    if given is not None:
        class_ids, class_names = given
        known = mask(classes_file or "")
    elif found.classes is not None:
        class_ids, class_names = found.classes
        known = f"the {len(class_ids):,} classes of the set"
    else:
        class_ids, class_names = _imagenet()
        known = "ImageNet's 1,000 WNIDs"
        if found.layout in ("webdataset", "parquet"):
            found.notes.append("the set has no class names; ImageNet's 1,000 are taken")
    labels = _class_indexes(found, class_ids, class_names, known, where, key)
    templates = read_templates(cfg.templates or found.templates or "openai", key)
    written = _read_written(root, where, found.pictures, labels, class_names, key) if attacked else None
    places = [(picture.name, mark, label) for picture, mark, label in zip(found.pictures, found.marks, labels, strict=True)]
    mark = fingerprint([places, class_names, templates, written])
    notes = found.notes + _parts_missing(labels, class_ids)
    return ClassSet(found.pictures, labels, class_ids, class_names, templates, mark, written, found.layout, notes)


def _parts_missing(labels: list[int], class_ids: list[str]) -> list[str]:
    parts = []
    if len(set(labels)) < len(class_ids):
        parts.append(f"pictures of {len(set(labels)):,} of {len(class_ids):,} classes")
    if class_ids == _imagenet()[0] and len(labels) != NUM_IMAGENET_VALIDATION:
        parts.append(f"{len(labels):,} pictures, ImageNet validation has {NUM_IMAGENET_VALIDATION:,}")
    return ["; ".join(parts)] if parts else []


# ---- what lies there ---------------------------------------------------------------------------------------------------


def list_set(path: str, key: str) -> tuple[str, dict[str, str]]:
    """The folder of a set, and its files: relative path -> identity, sorted, from one listing. Hidden files are left out, links are followed.

    :param path: a folder; or a Parquet file, a glob or a brace list of such.
    """
    where = f"{key}.path={mask(path)}"
    fs, inner = open_fs(path)
    with named_errors(path):
        is_folder = fs.isdir(inner)
    if not is_folder and (glob.has_magic(path) or "{" in path or path.endswith(".parquet")):
        try:
            root, found = find_files(path, (".parquet",))
        except UserError as error:
            raise UserError(f"{key}.path={error}") from error
        other = next((file.path for file in found if not file.path.endswith(".parquet")), None)
        if other is not None:
            raise UserError(f"{where}: {other} is no Parquet file; for every other layout give the folder")
        return root, {file.path: file.identity for file in found}
    if not is_folder:
        what = "is a file; give the folder" if exists(path) else "no such folder; check the path"
        raise UserError(f"{where}: {what}")
    with named_errors(path):
        identities = _find(fs, inner.rstrip("/"), (os.path.realpath(inner),))
    root = ("" if is_local(path) else path.split("://")[0] + "://") + inner.rstrip("/")
    names = {name[len(inner.rstrip("/")) + 1 :]: identity for name, identity in identities.items()}
    return root, {name: names[name] for name in sorted(names) if not re.search(r"(^|/)\.", name)}


def _find(fs: fsspec.AbstractFileSystem, folder: str, above: tuple[str, ...]) -> dict[str, str]:
    """Files below a folder -> identity. fsspec names a link to a folder, but not what is in it.

    :param above: real paths of the folders whose listing led here; a link back to one has nothing new.
    """
    found: dict[str, str] = {}
    for name, info in fs.find(folder, detail=True).items():
        if info.get("islink") and fs.isdir(name):
            real = os.path.realpath(name)
            if not f"{os.path.realpath(os.path.dirname(name))}/".startswith(f"{real}/") and real not in above:
                found |= _find(fs, name, (*above, real))
        else:
            found[name] = identity_of(info)
    return found


def is_picture(name: str) -> bool:
    return name.lower().endswith(PICTURE_SUFFIXES)


def _read_layout(cfg: ClassSetConfig, key: str, where: str, root: str, files: dict[str, str], class_ids: list[str]) -> _Found:
    pictures = [name for name in files if is_picture(name)]
    shards = [name for name in files if name.endswith(".parquet") and os.path.basename(name) != ATTACK_FILE]
    if "nshards.txt" in files:
        raise UserError(f"{where}: the folder of one split; give the folder above and {key}.split={os.path.basename(root)}")
    if any(name.count("/") == 1 and name.endswith("/nshards.txt") for name in files):
        layout = "webdataset"
    elif pictures and shards:
        raise UserError(f"{where}: holds pictures ({pictures[0]}) and Parquet files ({shards[0]}); name the Parquet files with a glob, "
                        "or give the folder of the pictures")  # fmt: skip
    elif not pictures and not shards:
        tar = next((name for name in files if name.endswith(".tar")), None)
        no_count = f"{tar} lies there, but no SPLIT/nshards.txt; write the number of SPLIT's tars into it"
        raise UserError(f"{where}: {no_count if tar else 'no pictures there; expected FOLDER/CLASS/NAME.JPEG'}")
    else:
        layout = "parquet" if shards else "pictures"
    if cfg.labels is not None and layout != "pictures":
        raise UserError(
            f"{key}.labels is for a folder of pictures; the labels of {mask(cfg.path or '')} stand with its pictures; leave the key out"
        )
    if cfg.split is not None and layout == "pictures":
        raise UserError(f"{key}.split={cfg.split} is for WebDataset and Parquet; give the folder of the split as {key}.path")
    if layout == "webdataset":
        return _webdataset(root, files, cfg.split or "test", where, key)
    if layout == "parquet":
        return _parquet(root, shards, cfg.split, where, key)
    in_root = [name for name in pictures if "/" not in name]
    own = LABELS_FILE in files and read_text(join(root, LABELS_FILE)).startswith(LABELS_HEADER)
    if cfg.labels is not None or own or len(in_root) == len(pictures):
        file = cfg.labels or _usual_labels(root, files)
        if file is None:
            raise UserError(f"{where}: pictures without class folders, and no {LABELS_FILE}, {', '.join(USUAL_LABELS[:-1])} with them; "
                            f"give {key}.labels=FILE")  # fmt: skip
        found = _flat(root, {name: files[name] for name in pictures}, file, where, class_ids)
        if cfg.labels is None and not own:
            found.notes.append(f"classes of the pictures: {mask(file)}")
        return found
    found = _Found("folders", numbered=False)
    order = {id_: i for i, id_ in enumerate(class_ids)}
    for name in sorted(pictures, key=lambda name: (order.get(name.split("/")[0], -1), name)):
        if "/" in name:
            found.add(Picture(printable(name), join(root, name)), name.split("/")[0], files[name])
    if in_root:
        found.notes.append(f"pictures beside the class folders that are not used: {len(in_root):,} (first {in_root[0]})")
    return found


# ---- pictures with a label file ----------------------------------------------------------------------------------------


def _usual_labels(root: str, files: Collection[str]) -> str | None:
    here = [join(root, name) for name in (LABELS_FILE, *USUAL_LABELS) if name in files]
    above = (join(root.rpartition("/")[0], name) for name in USUAL_LABELS)
    return here[0] if here else next((file for file in above if exists(file)), None)


def _flat(root: str, files: dict[str, str], file: str, where: str, class_ids: list[str]) -> _Found:
    names = list(files)
    rows = _label_rows(file, names)
    by_order = len(rows[0]) == 1
    odd = next((row for row in rows if by_order != (len(row) == 1)), None)
    if odd is not None:
        raise UserError(f"{mask(file)}: '{' '.join(odd)}' is unlike its first line; a line is a picture's name and its class, or in every "
                        "line a class")  # fmt: skip
    if by_order:
        labels = [row[0] for row in rows]
        if all(label.isdecimal() for label in labels) and not set(labels) <= set(class_ids):
            raise UserError(f"{mask(file)}: bare numbers; ImageNet's devkit counts the classes in an order of its own (ILSVRC2012_ID), not "
                            f"in that of the WNIDs; give one of {', '.join(USUAL_LABELS[:-1])}")  # fmt: skip
        if len(labels) != len(names):
            raise UserError(f"{mask(file)}: {len(labels):,} lines, but {where} has {len(names):,} pictures; without names it has one line a "
                            "picture, in the order of their names")  # fmt: skip
    else:
        labels = match_names([(row[0], row[1]) for row in rows], names, mask(file), where)
    found = _Found("flat", numbered=not by_order)
    for name, label in zip(names, labels, strict=True):
        found.add(Picture(printable(name), join(root, name)), label, files[name])
    return found


def _label_rows(file: str, names: Collection[str]) -> list[list[str]]:
    """Lines of a label file: [picture, class] or [class]."""
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{mask(file)}: is empty; expected lines of a picture's name and its class")
    if "," not in lines[0]:
        return [line.rsplit(None, 1) for line in lines]
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines)]
    if [cell.lower() for cell in rows[0]] == ["imageid", "predictionstring"]:  # Kaggle: WNID x y x y, once for each box
        return [[row[0], *row[-1].split()[:1]] if len(row) == 2 else row[:1] for row in rows[1:]]
    has_header = rows[0][0].lower() in ("picture", "image", "imageid", "image_id", "filename", "file_name", "file", "name", "path")
    return rows[1:] if has_header and rows[0][0] not in names else rows


def match_names(rows: Sequence[tuple[str, T]], names: Sequence[str], file: str, where: str) -> list[T]:
    """What a table says of each picture, in the order of ``names``. It may name them without their suffix or their folders.

    :param rows: name and content of every line of ``file``.
    :raises UserError: where a picture has no line, a line no picture, or a picture two lines.
    """
    whole = {name: i for i, name in enumerate(names)}
    short: dict[str, int] = {}
    for i, name in enumerate(names):
        base = os.path.basename(name)
        for alias in {base, os.path.splitext(name)[0], os.path.splitext(base)[0]}:
            short[alias] = -1 if alias in short else i  # not unique

    def find(name: str) -> int:
        name = name.removeprefix("./")
        return whole.get(name, short.get(name, short.get(os.path.basename(name), -1)))

    content: dict[int, T] = {}
    unknown = []
    for name, said in rows:
        i = find(name)
        if i in content:
            raise UserError(f"{file}: {name} is there twice; give every picture one line")
        if i < 0:
            unknown.append(name)
        else:
            content[i] = said
    if len(content) < len(names):
        first = next(name for i, name in enumerate(names) if i not in content)
        raise UserError(
            f"{where}: {first} is not in {file} ({len(names) - len(content):,} of {len(names):,} pictures are not); give every picture one line"
        )
    if unknown:
        raise UserError(
            f"{file}: {unknown[0]} is not among the pictures of {where} ({len(unknown):,} of {len(rows):,} lines name none); take such lines out"
        )
    return [content[i] for i in range(len(names))]


# ---- CLIP_benchmark's WebDataset ---------------------------------------------------------------------------------------


def _webdataset(root: str, files: dict[str, str], split: str, where: str, key: str) -> _Found:
    kind = read_text(join(root, "dataset_type.txt")).strip().lower() if "dataset_type.txt" in files else ""
    if kind == "retrieval":
        raise UserError(f"{where}: dataset_type.txt says retrieval; it is a set for the evaluator retrieval (retrieval.path)")
    if kind == "multilabel":
        raise UserError(
            f"{where}: dataset_type.txt says multilabel; raysys knows sets with one class a picture only; give one of those"
        )
    if f"{split}/nshards.txt" not in files:
        splits = [name.split("/")[0] for name in files if name.count("/") == 1 and name.endswith("/nshards.txt")]
        raise UserError(f"{where}: no {split}/nshards.txt; it has the splits {', '.join(splits)}; give {key}.split={splits[0]}")
    count = read_text(join(root, split, "nshards.txt")).strip()
    if not count.isdecimal():
        raise UserError(f"{where}: {split}/nshards.txt holds '{count}'; expected the number of tars")
    expected = [f"{split}/{i}.tar" for i in range(int(count))]
    missing = [name for name in expected if name not in files]
    if missing:
        raise UserError(
            f"{where}: {split}/nshards.txt says {count} tars, {missing[0]} is not there ({len(missing):,} are missing); fetch them"
        )
    found = _Found("webdataset")
    more = [name for name in files if name.startswith(f"{split}/") and name.endswith(".tar") and name not in expected]
    if more:
        found.notes.append(f"tars that are not read, as {split}/nshards.txt says {count}: {len(more):,} (first {more[0]})")
    if "classnames.txt" in files:
        names = [line.strip() for line in read_text(join(root, "classnames.txt")).splitlines()]
        if "" in names:
            raise UserError(f"{where}: line {names.index('') + 1} of classnames.txt is empty; a line is a class name")
        wnids = _imagenet()[0]
        found.classes = (wnids if len(names) == len(wnids) else [str(i) for i in range(len(names))]), names
    if "zeroshot_classification_templates.txt" in files:
        found.templates = join(root, "zeroshot_classification_templates.txt")
    for name in expected:
        for sample, offset, size, label in _labelled_samples(join(root, name)):
            found.add(Picture(f"{name}/{sample}", join(root, name), offset, size), label, (files[name], offset))
    return found


def _labelled_samples(path: str) -> Iterator[tuple[str, int, int, str]]:
    """Key, first byte and bytes of the picture, and label of every sample of a tar."""
    try:
        with reading(path) as file:
            for group in tars.sample_groups(file, end=None, read=False):
                suffix = next((suffix for suffix in _WDS_SUFFIXES if suffix in group.members), None)
                lacks = "picture" if suffix is None else "" if "cls" in group.members else "label (.cls)"
                if suffix is None or lacks:
                    raise UserError(f"{mask(path)}: sample {group.key} has no {lacks}; mend it or take it out")
                if group.unsafe:
                    raise UserError(f"{mask(path)}: sample {group.key}: {SAMPLE_REASONS[UNSAFE_NAME]}; rename it")
                _, offset, size = group.members["cls"]
                file.seek(offset)
                label = file.read(size).decode("utf-8", errors="replace").strip()
                yield group.key, group.members[suffix][1], group.members[suffix][2], label
    except DamagedShard as error:
        raise UserError(f"{mask(path)}: a damaged tar ({error}); fetch it again") from error


# ---- Parquet -----------------------------------------------------------------------------------------------------------


def _parquet(root: str, shards: list[str], split: str | None, where: str, key: str) -> _Found:
    by_split: dict[str, list[str]] = {}
    for name in shards:
        by_split.setdefault(_split_of(name), []).append(name)
    splits = ", ".join(name or "(none in the name)" for name in by_split)
    if split is None and len(by_split) > 1:
        raise UserError(f"{where}: its files are of the splits {splits}; say which with {key}.split=NAME")
    if split is not None and split not in by_split:
        raise UserError(f"{key}.split={split}: the files of {where} are of the splits {splits}; choose one")
    found = _Found("parquet")
    chosen = by_split[next(iter(by_split)) if split is None else split]
    found.notes += _missing_files(chosen)
    for name in chosen:
        columns, pictures, marks = parquet_pictures(root, name, LABEL_COLUMNS)
        column = next((column for column in LABEL_COLUMNS if column in columns.table.column_names), None)
        if column is None:
            raise UserError(f"{mask(join(root, name))}: no column of labels (one of {', '.join(LABEL_COLUMNS)}); name it so")
        found.classes = found.classes or _feature_classes(columns.table.schema, column, found.notes)
        labels = _column_labels(columns.table.column(column), f"{mask(join(root, name))}: column {column}")
        for picture, label, mark in zip(pictures, labels, marks, strict=True):
            found.add(picture, label, mark)
    return found


def parquet_pictures(root: str, name: str, columns: Collection[str]) -> tuple[Columns, list[Picture], list[Any]]:
    """Columns of a Parquet file, its pictures by row (FILE/ROW), and what changes when one of them does.

    :raises UserError: for a file that is damaged or has no pictures.
    """
    file = join(root, name)
    try:
        found = read_columns(file, columns)
    except DamagedShard as error:
        raise UserError(f"{mask(file)}: {error}; mend the file, or take it out") from error
    pictures: list[Picture] = []
    for group, rows in enumerate(found.row_groups):
        pictures += [Picture(f"{name}/{len(pictures) + row}", file, row_group=group, row=row) for row in range(rows)]
    return found, pictures, [identity(file)] * len(pictures)


def _split_of(name: str) -> str:
    """``data/validation-00000-of-00014-1a2b.parquet``, ``default/validation/0000.parquet`` and ``val.parquet`` -> the split."""
    folder, stem = os.path.split(os.path.splitext(name)[0])
    numbered = re.fullmatch(r"(.+?)[-_.]\d+-of-\d+([-_.].*)?", stem)
    if numbered:
        return numbered[1]
    if stem.isdecimal():
        return os.path.basename(folder)
    known = r"(train|validation|valid|val|dev|test)(?![a-z])"
    found = re.match(known, stem.lower()) or re.match(known, os.path.basename(folder).lower())
    return found[1] if found else ""


def _missing_files(names: list[str]) -> list[str]:
    """What names that count themselves (``-00000-of-00014``) say of files that are not there."""
    series = Counter(re.sub(r"\d+(?=-of-\d+)", "*", re.sub(r"(-of-\d+)[-_.].*", r"\1", name)) for name in names)
    totals = {pattern: int(re.sub(r".*-of-", "", pattern)) for pattern in series if "-of-" in pattern}
    return [f"{series[p]:,} of {total:,} Parquet files of {p}" for p, total in totals.items() if series[p] != total]


def _column_labels(column: pa.ChunkedArray, where: str) -> list[str]:
    kind = column.type
    if not (
        pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)
    ):
        raise UserError(f"{where} is of type {kind}; expected one number or name a picture")
    labels = [str(label).strip() if label is not None else "" for label in column.to_pylist()]
    bad = {"-1": "-1 (Hugging Face hides the labels of a test set)", "": "empty"}
    row = next((i for i, label in enumerate(labels) if label in bad), None)
    if row is not None:
        count = sum(label == labels[row] for label in labels)
        raise UserError(f"{where} is {bad[labels[row]]} in row {row} ({count:,} of {len(labels):,} rows); take a split with labels")
    return labels


def _feature_classes(schema: pa.Schema, column: str, notes: list[str]) -> tuple[list[str], list[str]] | None:
    """Class ids and names as Hugging Face keeps them with the schema; of ImageNet the field's names instead of WordNet's."""
    names = feature_names(schema, column)
    if names is None:
        return None
    wnids, field_names = _imagenet()
    name_of = dict(zip(wnids, field_names, strict=True))
    by_wnid = all(name in name_of for name in names)
    if not by_wnid and not _is_imagenet(names):
        return [str(i) for i in range(len(names))], names
    ids = names if by_wnid else wnids
    if names != field_names:
        notes.append(f"class names: open_clip's ({name_of[ids[0]]}), not those in the Parquet files ({names[0]})")
    return ids, [name_of[wnid] for wnid in ids]


def feature_names(schema: pa.Schema, column: str) -> list[str] | None:
    """What the numbers of a column mean, where Hugging Face's ``ClassLabel`` says it."""
    try:
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    good = isinstance(names, list) and names and all(isinstance(name, str) and name.strip() for name in names)
    return names if good else None


def _is_imagenet(names: list[str]) -> bool:
    """Whether 1,000 names are those of WordNet for ImageNet's classes ("tench, Tinca tinca"), by the first word for each."""
    wnids, field_names = _imagenet()
    if len(names) != len(wnids):
        return False
    lines = (importlib.resources.files("timm") / "data" / "_info" / "imagenet_synset_to_lemma.txt").read_text().splitlines()
    lemmas = dict(line.split("\t", 1) for line in lines)
    same = sum(
        name.split(",")[0].lower() in (lemmas[wnid].split(",")[0].lower(), field_name.lower())
        for name, wnid, field_name in zip(names, wnids, field_names, strict=True)
    )
    return same > 0.9 * len(wnids)


# ---- classes and templates ---------------------------------------------------------------------------------------------


@functools.cache
def _imagenet() -> tuple[list[str], list[str]]:
    """WNIDs and the field's names of ImageNet's 1,000 classes, in class order."""
    import open_clip

    synsets = importlib.resources.files("timm") / "data" / "_info" / "imagenet_synsets.txt"
    return synsets.read_text().split(), list(open_clip.IMAGENET_CLASSNAMES)


def _read_classes(file: str) -> tuple[list[str], list[str]]:
    """Ids and names of a JSON file, in class order."""
    try:
        pairs = json.loads(read_text(file), object_pairs_hook=list)
    except json.JSONDecodeError as error:
        raise UserError(f"{mask(file)}: not valid JSON ({error}); expected {{class id: class name}}") from error
    if not isinstance(pairs, list) or not pairs or not all(isinstance(p, tuple) and isinstance(p[1], str) for p in pairs):
        raise UserError(f"{mask(file)}: expected a JSON object {{class id: class name}}")
    twice = next((id_ for id_, count in Counter(id_ for id_, _ in pairs).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"{mask(file)}: class '{twice}' is there twice; give every class one name")
    nameless = next((id_ for id_, name in pairs if not name.strip()), None)
    if nameless is not None:
        raise UserError(f"{mask(file)}: class '{nameless}' has no name; give it one")
    return [id_ for id_, _ in pairs], [name for _, name in pairs]


def _class_indexes(found: _Found, class_ids: list[str], class_names: list[str], known: str, where: str, key: str) -> list[int]:
    """Labels -> class indexes: all of them are ids; or all are numbers from 0; or they are names (or ids)."""
    index = {id_: i for i, id_ in enumerate(class_ids)}
    distinct = set(found.labels)
    if found.numbered and not distinct <= index.keys():
        if all(label.isdecimal() for label in distinct):
            index = {label: int(label) for label in distinct if int(label) < len(class_ids)}
        else:
            once = {name for name, count in Counter(class_names).items() if count == 1}
            index = {name: i for i, name in enumerate(class_names) if name in once} | index
    unknown = next((i for i, label in enumerate(found.labels) if label not in index), None)
    if unknown is None:
        return [index[label] for label in found.labels]
    label = found.labels[unknown]
    if label.isdecimal() and found.numbered:
        raise UserError(f"{where}: label {label} of {found.pictures[unknown].name} is not among {known}; numbers go from 0 to "
                        f"{len(class_ids) - 1:,}")  # fmt: skip
    what = f"folder '{label}'" if found.layout == "folders" else f"label '{label}' of {found.pictures[unknown].name}"
    if class_names.count(label) > 1:
        raise UserError(f"{where}: {what}: {class_names.count(label)} classes have this name; label pictures by class ids")
    below = found.pictures[unknown].name.split("/")[1] if found.layout == "folders" else ""
    mend = (
        f"give the folder '{label}' as {key}.path" if below in index else f"give {key}.classes=FILE, JSON {{class id: class name}}"
    )
    raise UserError(f"{where}: {what} is not among {known}; {mend}")


def read_templates(templates: str, key: str) -> list[str]:
    """:param templates: ``openai``, ``simple``, or a file with {} (or {c}) in every line. :returns: templates with {}."""
    if templates == "openai":
        import open_clip

        return [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    if templates == "simple":
        return ["a photo of a {}."]
    if not exists(templates):
        raise UserError(f"{key}.templates={mask(templates)} is neither openai nor simple nor a file")
    lines = [line.strip().replace("{c}", "{}") for line in read_text(templates).splitlines() if line.strip()]
    bad = next((line for line in lines if "{}" not in line), None)
    if bad is not None or not lines:
        which = f", '{bad}' has none" if bad else ""
        raise UserError(f"{key}.templates={mask(templates)}: each line needs {{}} (or {{c}}) for the class name{which}")
    return lines


def read_text(file: str) -> str:
    """:raises UserError: where the file is missing or no UTF-8."""
    try:
        return read_bytes(file).decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{mask(file)}: no such file; check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{mask(file)}: not text in UTF-8 ({error}); save it as UTF-8") from error


# ---- attacked sets -----------------------------------------------------------------------------------------------------


def _read_written(root: str, where: str, pictures: list[Picture], labels: list[int], class_names: list[str], key: str) -> list[int]:
    """The written class of every picture, from attack.parquet."""
    file = join(root, ATTACK_FILE)
    again = "build the set again with `raysys attack`"
    try:
        with reading(file) as handle:
            table = pq.read_table(handle, columns=["picture", "true_class", "written_class", "text"])
    except pa.ArrowException as error:
        raise UserError(f"{where}: {ATTACK_FILE} cannot be read ({str(error).splitlines()[0]}); {again}") from error
    rows = {row[0]: row[1:] for row in zip(*table.to_pydict().values(), strict=True)}
    missing = [picture.name for picture in pictures if picture.name not in rows]
    if missing:
        raise UserError(
            f"{where}: {missing[0]} is not in {ATTACK_FILE} ({len(missing):,} of {len(pictures):,} pictures are not); {again}"
        )
    if table.num_rows != len(pictures):
        raise UserError(f"{where}: {table.num_rows:,} rows in {ATTACK_FILE} but {len(pictures):,} pictures; {again}")
    for picture, label in zip(pictures, labels, strict=True):
        true, written, text = rows[picture.name]
        if true != label or written is None or not 0 <= written < len(class_names) or class_names[written] != text:
            raise UserError(f"{where}: {picture.name} was attacked under another class list; give {key}.classes of then")
    return [rows[picture.name][1] for picture in pictures]
