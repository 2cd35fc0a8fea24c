"""Retrieval sets: which pictures, which captions, and which caption belongs to which picture.

In: :class:`RetrievalSetConfig`. Out: :class:`RetrievalSet`. Opens no picture: it reads the headers and texts of tars, all other columns of
Parquet files, and one listing of a folder. Captions are taken as they stand; empty ones are left out, and a note counts them.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO
from urllib.parse import unquote

import pyarrow as pa

from raysys.config import CorpusConfig, RetrievalSetConfig
from raysys.corpus import folder, parquet, tars
from raysys.corpus.samples import SAMPLE_REASONS, UNSAFE_NAME, DamagedShard, is_unsafe
from raysys.corpus.shards import Shard, open_corpus
from raysys.errors import UserError
from raysys.evaluation.pictures import Picture
from raysys.masking import mask
from raysys.output import fingerprint
from raysys.storage import exists, find_files, join, list_names, read_bytes, read_json, reading

COCO_FILE = "annotations/captions_val2017.json"
KARPATHY_FILES = ("dataset_coco.json", "dataset_flickr30k.json", "dataset_flickr8k.json")
DEFAULT_SPLIT = "test"
NUM_PICTURES = {
    "coco_val2017": 5000,
    "coco_karpathy_val": 5000,
    "coco_karpathy_test": 5000,
    "flickr30k_karpathy_test": 1000,
    "flickr8k_karpathy_test": 1000,
}
"""Of the whole sets: Lin et al. 2014 (COCO); Karpathy and Fei-Fei 2015, section 4 (the splits)."""
VAL2017_NOTE = "val2017 is another set of 5,000 pictures than the Karpathy split of val2014, on which the literature reports"


@dataclass(frozen=True)
class RetrievalSet:
    name: str
    pictures: list[Picture]
    captions: list[str]
    image_of_text: list[int]
    """Index of the picture that each caption belongs to; every picture has at least one."""
    fingerprint: str
    notes: list[str] = field(default_factory=list)
    """What a reader of its numbers must know ("123 of 5,000 pictures"), a line each."""


@dataclass(frozen=True)
class _Row:
    picture: Picture
    captions: list[str]
    """All that is said of it."""
    identity: str
    """Of the file that the picture lies in, as its listing gave it: changes when the file does."""


def read_retrieval_set(cfg: RetrievalSetConfig, key: str = "retrieval") -> RetrievalSet:
    """List pictures and captions. The layout is told from what lies there:

    - ``captions`` is COCO's or Karpathy's JSON, or ``path`` holds annotations/captions_val2017.json or a file of Karpathy's;
    - ``path`` holds dataset_type.txt and SPLIT/nshards.txt: CLIP_benchmark's WebDataset, the captions are the lines of KEY.txt;
    - tars: ``captions`` of KEY.json, else the lines of KEY.txt, else ``caption`` of KEY.json;
    - Parquet files, or captions.jsonl or captions.csv beside pictures, as the corpus has them (:mod:`raysys.corpus`).

    COCO's pictures come in the order of their ids, all others in that of the set.

    :param key: where the config stands in the user's words, for messages; also the name of a set that has none of its own.
    :raises UserError: for a set that is missing, damaged or not whole: a picture without a caption, captions without a picture, a picture
        that is listed twice.
    """
    if cfg.path is None:
        raise UserError(f"{key}.path is missing: a folder, tars or Parquet files of pictures with captions")
    where = f"{key}.path={mask(cfg.path)}"
    split = cfg.split or DEFAULT_SPLIT
    there = list_names(cfg.path)
    files = [COCO_FILE] if "annotations" in there and exists(join(cfg.path, COCO_FILE)) else []
    files += [name for name in KARPATHY_FILES if name in there]
    name = key
    notes: list[str] = []
    if cfg.captions is not None or files:
        if cfg.captions is None and len(files) > 1:
            raise UserError(f"{where}: holds {' and '.join(files)}; say which with {key}.captions={mask(join(cfg.path, files[0]))}")
        name, rows = _json_set(cfg.path, cfg.captions or join(cfg.path, files[0]), cfg.split, key)
    elif "dataset_type.txt" in there or (split in there and exists(join(cfg.path, split, "nshards.txt"))):
        shards, notes = _clip_benchmark_tars(cfg.path, split, where)
        rows = list(_tar_set(shards, txt_only=True))
    else:
        try:
            shards = open_corpus(CorpusConfig(cfg.path)).shards
        except UserError as error:
            raise UserError(str(error).replace("corpus.path", f"{key}.path")) from error
        rows = _corpus_set(shards, cfg.split, key)
    return _checked(name, rows, notes, where)


def _checked(name: str, rows: list[_Row], notes: list[str], where: str) -> RetrievalSet:
    if not rows:
        raise UserError(f"{where}: no pictures there; give a folder, tars or Parquet files of pictures with captions")
    twice = next((name for name, count in Counter(row.picture.name for row in rows).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"{where}: picture {twice} is there twice; give it once, with all its captions")
    captions: list[str] = []
    image_of_text: list[int] = []
    num_empty = 0
    for index, row in enumerate(rows):
        said = [caption for caption in row.captions if caption.strip()]
        if not said:
            raise UserError(f"{where}: {row.picture.name} has no caption; give it one, or take it out")
        bad = next((caption for caption in said if re.search("[\ud800-\udfff]", caption)), None)
        if bad is not None:
            raise UserError(f"{where}: a caption of {row.picture.name} is not valid UTF-8 ({bad!a}); save it as UTF-8")
        captions += said
        image_of_text += [index] * len(said)
        num_empty += len(row.captions) - len(said)
    pictures = [row.picture for row in rows]
    notes = [*notes, *([VAL2017_NOTE] if name == "coco_val2017" else [])]
    whole = NUM_PICTURES.get(name, len(pictures))
    if len(pictures) != whole:
        notes.append(f"{len(pictures):,} of {whole:,} pictures")
    if num_empty:
        notes.append(f"empty captions left out: {num_empty:,}")
    places = [(row.identity, row.picture.name, row.picture.offset, row.picture.row_group, row.picture.row) for row in rows]
    return RetrievalSet(name, pictures, captions, image_of_text, fingerprint([places, captions, image_of_text]), notes)


# ---- COCO and Karpathy -------------------------------------------------------------------------------------------------

_Said = tuple[str, str, list[str]]
"""Folder that the picture may lie in, its name, and its captions."""


def _json_set(path: str, file: str, split: str | None, key: str) -> tuple[str, list[_Row]]:
    """Name and rows of COCO's or Karpathy's captions; their pictures lie in ``path`` or a folder of theirs in it."""
    if not exists(path):
        raise UserError(f"{key}.path={mask(path)}: no such folder; check the path")
    content = read_json(file)
    kinds = {"annotations": "COCO's", "dataset": "Karpathy's"}
    kind = next((kinds[name] for name in kinds if isinstance(content, dict) and name in content), None)
    if kind is None:
        raise UserError(
            f"{mask(file)}: neither COCO's captions (images, annotations) nor Karpathy's (dataset, images); give one of these"
        )
    if kind == "COCO's" and split is not None:
        raise UserError(f"{key}.split={split}: {mask(file)} has no splits; leave the key out")
    try:
        name, said = _coco(content, file) if kind == "COCO's" else _karpathy(content, split or DEFAULT_SPLIT, file)
    except (KeyError, TypeError) as error:
        raise UserError(f"{mask(file)}: not {kind} format of captions ({error!r}); give the file as it was published") from error
    files = {}
    for subfolder in {subfolder for subfolder, _, _ in said}:
        deeper = bool(subfolder) and exists(join(path, subfolder))
        files[subfolder] = _files_below(join(path, subfolder) if deeper else path)
    missing = [name for subfolder, name, _ in said if name not in files[subfolder]]
    if missing:
        raise UserError(
            f"{key}.path={mask(path)}: {missing[0]} of {mask(file)} is not there ({len(missing):,} of {len(said):,} pictures are missing); "
            "fetch them, or give the folder that has them"
        )
    return name, [
        _Row(Picture(name, files[subfolder][name][0]), captions, files[subfolder][name][1]) for subfolder, name, captions in said
    ]


def _coco(content: dict[str, Any], file: str) -> tuple[str, list[_Said]]:
    """Pictures by id, as pycocotools sorts them."""
    stem = os.path.splitext(os.path.basename(file))[0]
    subfolder = stem.removeprefix("captions_")
    captions: dict[Any, list[str]] = {image["id"]: [] for image in content["images"]}
    if len(captions) < len(content["images"]):
        raise UserError(f"{mask(file)}: two of its images have one id; give each its own")
    unknown = [row["image_id"] for row in content["annotations"] if row["image_id"] not in captions]
    if unknown:
        raise UserError(
            f"{mask(file)}: {len(unknown):,} captions are of pictures that are not among its images (first {unknown[0]}); take them out"
        )
    for row in content["annotations"]:
        captions[row["image_id"]].append(_text(row["caption"]))
    by_id = sorted(content["images"], key=lambda image: image["id"])
    return f"coco_{subfolder}", [(subfolder, _text(image["file_name"]), captions[image["id"]]) for image in by_id]


def _karpathy(content: dict[str, Any], split: str, file: str) -> tuple[str, list[_Said]]:
    """Pictures in the order of the file."""
    images = [image for image in content["images"] if image["split"] == split]
    if not images:
        splits = sorted({_text(image["split"]) for image in content["images"]})
        raise UserError(f"{mask(file)}: no pictures of split {split}; it has {', '.join(splits) or 'none'}; choose one of these")
    said = [
        (_text(image.get("filepath", "")), _text(image["filename"]), [_text(sentence["raw"]) for sentence in image["sentences"]])
        for image in images
    ]
    return f"{content['dataset']}_karpathy_{split}", said


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _files_below(path: str) -> dict[str, tuple[str, str]]:
    """Name of every file below a folder -> its path and identity, from one listing."""
    root, files = find_files(path, ("",))
    return {file.path: (join(root, file.path), file.identity) for file in files}


# ---- tars --------------------------------------------------------------------------------------------------------------


def _clip_benchmark_tars(path: str, split: str, where: str) -> tuple[list[Shard], list[str]]:
    """The tars that nshards.txt counts, and a note where there are more."""
    try:
        kind = read_bytes(join(path, "dataset_type.txt")).decode(errors="replace").strip().lower()
    except FileNotFoundError:
        kind = "classification"  # what CLIP_benchmark takes it for
    if kind != "retrieval":
        raise UserError(
            f"{where}: a set of classes (dataset_type.txt does not say retrieval); it is one for the evaluator imagenet"
        )
    root, files = find_files(join(path, split), (".tar", "nshards.txt"))
    found = {file.path: Shard(file.path, join(root, file.path), file.size, file.identity) for file in files}
    if found.pop("nshards.txt", None) is None:
        raise UserError(f"{where}: {split}/nshards.txt is not there; write the number of {split}'s tars into it")
    count = read_bytes(join(root, "nshards.txt")).decode(errors="replace").strip()
    expected = [f"{i}.tar" for i in range(int(count))] if count.isdecimal() else []
    if not expected or not set(expected) <= found.keys():
        has = ", ".join(sorted(found)) or "no tar"
        raise UserError(
            f"{where}: {split}/nshards.txt says {count}, tars 0.tar and so on, but {split} holds {has}; fetch what is missing"
        )
    more = sorted(found.keys() - set(expected))
    notes = [f"{split}/nshards.txt says {count} tars, so {more[0]} is not read ({len(more):,} are not)"] if more else []
    return [found[name] for name in expected], notes


def _tar_set(shards: list[Shard], *, txt_only: bool = False) -> Iterator[_Row]:
    """:param txt_only: CLIP_benchmark's; it knows no captions in a .json."""
    for shard in shards:
        try:
            with reading(shard.path) as file:
                for group in tars.sample_groups(file, end=None, read=False):
                    name = group.key if len(shards) == 1 else f"{unquote(shard.name)}/{group.key}"
                    if group.unsafe:
                        raise UserError(f"{mask(shard.path)}: sample {name}: {SAMPLE_REASONS[UNSAFE_NAME]}; rename it")
                    if group.image_suffix is None:
                        raise UserError(f"{mask(shard.path)}: sample {name} has no picture; mend it or take it out")
                    _, offset, size = group.members[group.image_suffix]
                    yield _Row(Picture(name, shard.path, offset, size), _tar_captions(group, file, txt_only), shard.identity)
        except DamagedShard as error:
            raise UserError(f"{mask(shard.path)}: a damaged tar ({error}); fetch it again") from error


def _tar_captions(group: tars.SampleGroup, file: BinaryIO, txt_only: bool) -> list[str]:
    def member(suffix: str) -> bytes:
        _, offset, size = group.members.get(suffix, (b"", 0, 0))
        file.seek(offset)
        return file.read(size)

    info = {} if txt_only else tars.metadata_of(member("json"))
    several = info.get("captions")
    if isinstance(several, list) and several:
        return [caption if isinstance(caption, str) else "" for caption in several]
    if "txt" in group.members:
        return member("txt").decode("utf-8", errors="surrogateescape").splitlines()
    return [info["caption"]] if isinstance(info.get("caption"), str) else []  # type: ignore[list-item]


# ---- as a corpus -------------------------------------------------------------------------------------------------------


def _corpus_set(shards: list[Shard], split: str | None, key: str) -> list[_Row]:
    kind = os.path.splitext(shards[0].path)[1]
    if kind == ".parquet":
        return _parquet_set(shards, split, key)
    if split is not None:
        raise UserError(f"{key}.split={split}: {mask(shards[0].path)} has no splits; leave the key out")
    if kind == ".tar":
        return list(_tar_set(shards))
    return [row for shard in shards for row in _folder(shard)]


def _folder(shard: Shard) -> Iterator[_Row]:
    """Pictures in the order in which the captions file first names them."""
    root = os.path.dirname(shard.path)
    captions: dict[str, list[str]] = {}
    try:
        with reading(shard.path) as file:
            rows = folder.csv_rows(file) if shard.path.endswith(".csv") else folder.json_rows(file)
            for number, (name, said, _) in enumerate(rows, 1):
                if name is None:
                    raise UserError(f"{mask(shard.path)}: its record {number} cannot be read; mend it or take it out")
                if is_unsafe(name) or "://" in name:
                    raise UserError(f"{mask(shard.path)}: {name}: {SAMPLE_REASONS[UNSAFE_NAME]}; rename it")
                captions.setdefault(os.path.normpath(name), []).extend(said)
    except DamagedShard as error:
        raise UserError(f"{mask(shard.path)}: {error}; mend the file") from error
    files = _files_below(root)
    missing = [name for name in captions if name not in files]
    if missing:
        raise UserError(
            f"{mask(shard.path)}: {missing[0]} is not there ({len(missing):,} of {len(captions):,} pictures are missing); "
            "fetch them, or take their lines out"
        )
    for name, said in captions.items():
        path, identity = files[name]
        yield _Row(Picture(os.path.join(os.path.dirname(unquote(shard.name)), name), path), said, identity)


def _parquet_set(shards: list[Shard], split: str | None, key: str) -> list[_Row]:
    """Of files that are named by their splits (``test-00000-of-00002.parquet``) or have a column ``split`` only that split."""
    wanted = split or DEFAULT_SPLIT
    matches = {shard: re.fullmatch(r"(.+)-\d+-of-\d+\.parquet", os.path.basename(shard.path)) for shard in shards}
    split_of = {shard: match[1] for shard, match in matches.items() if match}
    by_name = len(split_of) == len(shards) and (split is not None or len(set(split_of.values())) > 1)
    chosen = [shard for shard in shards if not by_name or split_of[shard] == wanted]
    splits = set(split_of.values()) if by_name else set()
    rows: list[_Row] = []
    for shard in chosen:
        for of, row in _parquet(shard, len(chosen) > 1):
            if of is not None:
                splits.add(of)
            if of is None or of == wanted:
                rows.append(row)
    known = ", ".join(sorted(splits))
    if known and not rows:
        raise UserError(f"{key}.path: no pictures of split {wanted} there; give {key}.split, one of {known}")
    if split is not None and not known:
        raise UserError(f"{key}.split={split}: {mask(shards[0].path)} has no splits; leave the key out")
    return rows


def _parquet(shard: Shard, several: bool) -> Iterator[tuple[str | None, _Row]]:
    """Every row and its split."""
    try:
        with reading(shard.path, ahead_bytes=0) as file:
            table = parquet.open_file(file)
            columns = parquet.columns_of(table.schema_arrow)
            if "caption" not in columns:
                raise UserError(
                    f"{mask(shard.path)}: no column of captions (text, named {', '.join(parquet.CAPTION_COLUMNS)}); name it so"
                )
            image, caption = columns["image"], columns["caption"]
            texts = [columns[role] for role in ("caption", "key") if role in columns] + [f"{image}.path", "split"]
            index = 0
            for group in range(table.num_row_groups):
                rows = table.read_row_group(group, columns=texts).to_pylist()  # names of columns that are not there do no harm
                for row, cells in enumerate(rows):
                    name = parquet.sample_of(index, {image: None} | cells, columns).key
                    picture = Picture(f"{unquote(shard.name)}/{name}" if several else name, shard.path, row_group=group, row=row)
                    said = cells[caption] if isinstance(cells[caption], list) else [cells[caption]]
                    captions = ["" if text is None else parquet.text_of(text) for text in said]
                    of = cells.get("split")
                    yield of if isinstance(of, str) else None, _Row(picture, captions, shard.identity)
                    index += 1
    except (DamagedShard, pa.ArrowException, OSError) as error:
        parquet.refuse_storage_error(error)
        raise UserError(f"{mask(shard.path)}: a damaged Parquet file ({error}); fetch it again") from error
