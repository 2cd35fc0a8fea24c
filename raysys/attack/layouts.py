"""An attacked set on disk, in the layout of its source: units of work that need nothing of each other, and the lists of the whole set.

In: a :class:`ClassSet`, and the class to write on each picture. Out: O/{pictures as the source has them, classes.json} and for each unit its rows of
attack.parquet. The same words give the same bytes. Leaves who does which unit to :mod:`raysys.attack.on_ray`.
"""

from __future__ import annotations

import csv
import functools
import io
import os
import tarfile
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raysys.attack.drawing import Font, draw_attack, to_jpeg
from raysys.config import AttackSettings
from raysys.corpus.parquet import columns_of
from raysys.corpus.prefetch import prefetch
from raysys.errors import UserError
from raysys.evaluation.class_sets import CLASSES_FILE, LABELS_FILE, ClassSet
from raysys.evaluation.pictures import Picture, open_picture
from raysys.storage import flush, is_local, join, reading, write_bytes, write_json, writing

Row = dict[str, Any]
"""Of attack.parquet."""
PARTS_FOLDER = "_parts"
"""Rows of finished units, and unfinished files."""
PICTURES_PER_UNIT = 64
"""Where each picture is a file of its own: a fifth of a second of work, of which some 20 ms are its beginning and end."""
THREADS, LOCAL_THREADS = 8, 2
"""Of a process that read, and that write: an object store answers in 30 ms and drawing takes 4; a disk needs fewer, which then disturb less."""
READ_AHEAD = 32
"""Encoded pictures that wait to be drawn on."""
ROWS_PER_GROUP = 64
"""Of the Parquet files that are written: some MB of pictures in memory."""
SCHEMA = pa.schema(
    {
        "picture": pa.string(),
        "true_class": pa.int32(),
        "written_class": pa.int32(),
        "text": pa.string(),
        "font": pa.string(),
        "font_sha256": pa.string(),
        "font_px": pa.int32(),
        "color": pa.list_(pa.uint8()),
        "x_px": pa.int32(),
        "y_px": pa.int32(),
        "rotation_deg": pa.float32(),
        "background": pa.list_(pa.uint8()),
        "visible_share": pa.float32(),
    }
)
"""Of attack.parquet; see :class:`raysys.attack.drawing.Drawn`."""


@dataclass(frozen=True)
class Job:
    """A picture, and what is to be written on it."""

    source: Picture
    target: str
    """Its name in the attacked set."""
    true_class: int
    written_class: int
    text: str


# ---- units -------------------------------------------------------------------------------------------------------------


def target_names(class_set: ClassSet) -> list[str]:
    """Names of the attacked pictures: the source's, and of files .JPEG where that was no JPEG.

    :raises UserError: where two pictures would get one name.
    """
    names = [picture.name for picture in class_set.pictures]
    if class_set.layout in ("webdataset", "parquet"):
        return names
    targets = [jpeg_name(name) for name in names]
    twice = next((name for name, count in Counter(targets).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"{twice}: two source pictures would get this name as JPEG; rename one")
    return targets


def jpeg_name(name: str) -> str:
    stem, suffix = os.path.splitext(name)
    return name if suffix.lower() in (".jpg", ".jpeg") else f"{stem}.JPEG"


def units_of(class_set: ClassSet, written: Sequence[int]) -> list[list[Job]]:
    """Work that one process does alone: a tar, a Parquet file, or some pictures."""
    targets, names = target_names(class_set), class_set.class_names
    rows = zip(class_set.pictures, targets, class_set.labels, written, strict=True)
    jobs = [Job(picture, target, label, index, names[index]) for picture, target, label, index in rows]
    if class_set.layout in ("webdataset", "parquet"):
        by_file: dict[str, list[Job]] = {}
        for job in jobs:
            by_file.setdefault(_file_of(job, class_set.layout), []).append(job)
        return list(by_file.values())
    return [jobs[start : start + PICTURES_PER_UNIT] for start in range(0, len(jobs), PICTURES_PER_UNIT)]


def _file_of(job: Job, layout: str) -> str:
    """The tar or Parquet file of a picture, relative to the set: SPLIT/0.tar/KEY, FILE/ROW."""
    if layout == "webdataset":
        return job.target.partition(".tar/")[0] + ".tar"
    return job.target.rpartition("/")[0]


def write_unit(unit: list[Job], layout: str, folder: str, settings: AttackSettings, fonts: Sequence[Font]) -> list[Row]:
    """Write the unit's pictures below ``folder``. :returns: their rows of attack.parquet."""
    rows: list[Row] = []
    tmp_folder = join(folder, PARTS_FOLDER)
    with closing(_attacked(unit, settings, fonts, rows)) as pictures:
        if layout in ("webdataset", "parquet"):
            with writing(join(folder, _file_of(unit[0], layout)), tmp_folder=tmp_folder) as file:
                (_write_tar if layout == "webdataset" else _write_parquet)(file, pictures, unit[0].source.path)
            return rows
        with ThreadPoolExecutor(_threads(folder)) as pool:
            write = functools.partial(write_bytes, tmp_folder=tmp_folder, durable=False)
            for written in [pool.submit(write, join(folder, job.target), jpeg) for job, jpeg in pictures]:
                written.result()
            list(pool.map(flush, (join(folder, job.target) for job in unit)))
    return rows


def _threads(path: str) -> int:
    return LOCAL_THREADS if is_local(path) else THREADS


def _attacked(
    unit: list[Job], settings: AttackSettings, fonts: Sequence[Font], rows: list[Row]
) -> Generator[tuple[Job, bytes], None, None]:
    """Each picture as JPEG, in order; its row is added to ``rows``."""
    with closing(prefetch(unit, lambda job: job.source.read(), threads=_threads(unit[0].source.path), ahead=READ_AHEAD)) as read:
        for job, data in zip(unit, read, strict=True):
            image = open_picture(_Fetched(**vars(job.source), data=data))
            attacked, drawn = draw_attack(image, job.text, name=job.source.name, settings=settings, fonts=fonts)
            what = {"picture": job.target, "true_class": job.true_class, "written_class": job.written_class, "text": job.text}
            rows.append(what | asdict(drawn))
            yield job, to_jpeg(attacked)


@dataclass(frozen=True)
class _Fetched(Picture):
    """A picture whose bytes are there."""

    data: bytes = b""

    def read(self) -> bytes:
        return self.data


def _write_tar(target: Any, pictures: Iterator[tuple[Job, bytes]], _: str) -> None:
    with tarfile.open(fileobj=target, mode="w") as tar:
        for job, jpeg in pictures:
            key = job.target.partition(".tar/")[2]
            _add(tar, f"{key}.jpg", jpeg)
            _add(tar, f"{key}.cls", str(job.true_class).encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # time, owner and group are 0
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _write_parquet(target: Any, pictures: Iterator[tuple[Job, bytes]], source_file: str) -> None:
    """The source file with its pictures replaced, row group by row group."""
    with reading(source_file, ahead_bytes=0) as file:
        source = pq.ParquetFile(file, pre_buffer=False)
        schema = source.schema_arrow
        image = schema.field(columns_of(schema)["image"])
        children = [child.name for child in image.type] if pa.types.is_struct(image.type) else []
        beside = [f"{image.name}.{child}" for child in children if child != "bytes"]
        columns = [name for name in schema.names if name != image.name] + beside
        with pq.ParquetWriter(target, schema) as writer:
            for group in range(source.num_row_groups):
                table = source.read_row_group(group, columns=columns)
                for start in range(0, table.num_rows, ROWS_PER_GROUP):
                    rows = table.slice(start, ROWS_PER_GROUP).combine_chunks()
                    jpegs = []
                    for row, (job, jpeg) in zip(range(start, start + rows.num_rows), pictures, strict=False):
                        assert (job.source.row_group, job.source.row) == (group, row)  # every row is a picture of the set, in order
                        jpegs.append(jpeg)
                    rest = rows[image.name].combine_chunks() if beside else None
                    arrays = [_image_array(image.type, jpegs, rest) if name == image.name else rows[name] for name in schema.names]
                    writer.write_table(pa.table(arrays, schema=schema))


def _image_array(kind: pa.DataType, pictures: list[bytes], rest: pa.StructArray | None) -> pa.Array:
    """The column of pictures: bytes alone, or a struct with the source's other fields, ``path`` with JPEG's suffix."""
    if not pa.types.is_struct(kind):
        return pa.array(pictures, kind)
    arrays = []
    for child in kind:
        if child.name == "bytes":
            arrays.append(pa.array(pictures, child.type))
        else:
            assert rest is not None
            values = rest.field(child.name)
            if child.name == "path":
                values = pa.array([path and jpeg_name(path) for path in values.to_pylist()], child.type)
            arrays.append(values)
    return pa.StructArray.from_arrays(arrays, fields=list(kind))


# ---- lists of the whole set --------------------------------------------------------------------------------------------


def write_lists(class_set: ClassSet, folder: str) -> None:
    """What a reader needs beside the pictures; every class is listed, with pictures or without."""
    write_json(join(folder, CLASSES_FILE), dict(zip(class_set.class_ids, class_set.class_names, strict=True)))
    if class_set.layout == "flat":
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(["picture", "class"])
        lines.writerows(zip(target_names(class_set), (class_set.class_ids[label] for label in class_set.labels), strict=True))
        write_bytes(join(folder, LABELS_FILE), text.getvalue().encode())
    if class_set.layout == "webdataset":
        tars = dict.fromkeys(picture.name.partition(".tar/")[0] for picture in class_set.pictures)
        for split, count in Counter(tar.rpartition("/")[0] for tar in tars).items():
            write_bytes(join(folder, split, "nshards.txt"), _lines([str(count)]))
        write_bytes(join(folder, "classnames.txt"), _lines(class_set.class_names))
        templates = [template.replace("{}", "{c}") for template in class_set.templates]
        write_bytes(join(folder, "zeroshot_classification_templates.txt"), _lines(templates))


def _lines(texts: Iterable[str]) -> bytes:
    return "".join(f"{text}\n" for text in texts).encode()


def to_parquet(rows: list[Row]) -> bytes:
    """Rows of attack.parquet as a file. Tables with the same values need not give the same bytes; made anew from values, they do."""
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), file)
    return file.getvalue()


def from_parquet(data: bytes) -> list[Row]:
    return pq.read_table(io.BytesIO(data)).to_pylist()
