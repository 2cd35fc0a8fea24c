"""Pictures with a wrong word on them: the ways in which RTA-100, PAINT, SCAM and own sets say what is what."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import noise_jpeg

from raysys.config import TypographicSetConfig
from raysys.errors import UserError
from raysys.evaluation.class_sets import ClassSet
from raysys.evaluation.typographic import read_typographic_set

PICTURES = [noise_jpeg(i, 16) for i in range(4)]
THREE = [(0, "cup", "dog"), (1, "dog", "traffic light"), (2, "cup", "cup")]
"""Number in PICTURES, what it shows, what stands on it."""


def write(root: Path, files: Mapping[str, bytes | str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def read(**cfg: Any) -> ClassSet:
    return read_typographic_set(TypographicSetConfig(**cfg))


def seen(found: ClassSet) -> list[tuple[int, str, str]]:
    assert found.written is not None and found.class_ids == found.class_names
    rows = zip(found.pictures, found.labels, found.written, strict=True)
    return [(PICTURES.index(p.read()), found.class_names[true], found.class_names[written]) for p, true, written in rows]


def refused(words: str, **cfg: Any) -> None:
    with pytest.raises(UserError) as error:
        read(**cfg)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "set", {f"{i}.jpg": PICTURES[i] for i in range(3)})


# ---- labels in the names -----------------------------------------------------------------------------------------------


def test_names_of_pictures_are_read_as_paint_and_rta_100_write_them(tmp_path: Path) -> None:
    write(tmp_path, {"label=cup_text=dog.png": PICTURES[0], "label=dog_text=traffic light.jpg": PICTURES[1]})
    write(tmp_path, {"b/label=cup_text=cup.JPG": PICTURES[2], "README.md": "label=a_text=b"})
    found = read(path=str(tmp_path))
    assert sorted(seen(found)) == THREE and found.class_names == ["cup", "dog", "traffic light"]
    assert found.templates == ["a photo of a {}."] and found.notes == []
    assert [p.name for p in found.pictures] == sorted(p.name for p in found.pictures)


def test_labels_are_told_by_their_words_alone(tmp_path: Path) -> None:
    write(
        tmp_path, {"label=Traffic_light_text=paper_ clip.png": PICTURES[0], "label= paper clip_text=traffic light.png": PICTURES[1]}
    )
    found = read(path=str(tmp_path))
    assert found.class_names == ["paper clip", "traffic light"]
    assert sorted(seen(found)) == [(0, "traffic light", "paper clip"), (1, "paper clip", "traffic light")]


def test_picture_that_is_not_named_so_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"label=cup_text=dog.png": PICTURES[0], "x.png": PICTURES[1], "label=cup_text=.png": PICTURES[2]})
    refused("label=cup_text=.png is not named label=TRUE_text=WRITTEN (2 of 3 are not)", path=str(tmp_path))
    refused("give typographic.labels=FILE", path=str(tmp_path))


# ---- labels in a table -------------------------------------------------------------------------------------------------

TABLES = {
    "a.csv": "file_name,label,attack_word,area\n2.jpg,cup,cup,1\n0.jpg,cup,dog,2\n1.jpg,dog,traffic light,3\n",
    "b.csv": 'id;true_class;text\n0; cup ;dog\n1;dog;"traffic  light"\n2;cup;cup\n',
    "c.tsv": "image\tobject\tattack\n0\tcup\tdog\n1\tdog\ttraffic light\n2\tcup\tcup\n",
    "d.jsonl": "".join(
        json.dumps({"picture": f"{i}.jpg", "object_label": true, "written_class": said}) + "\n\n" for i, true, said in THREE
    ),
}


@pytest.mark.parametrize("name", [*TABLES, "e.parquet"])
def test_tables_of_every_kind_say_the_same(name: str, folder: Path, tmp_path: Path) -> None:
    if name == "e.parquet":
        rows = [{"id": i, "true_label": true, "written_label": said} for i, true, said in THREE]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    else:
        write(tmp_path, {name: TABLES[name]})
    found = read(path=str(folder), labels=str(tmp_path / name))
    assert seen(found) == THREE and found.layout == "flat"


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_hugging_faces_metadata_lies_beside_the_pictures(name: str, tmp_path: Path) -> None:
    for part, rows in {"train": THREE[:2], "test/deep": THREE[2:]}.items():
        names = [f"x/{place}.jpg" for place in range(len(rows))]  # 0.jpg lies in both
        root = write(tmp_path / part, {name: PICTURES[row[0]] for name, row in zip(names, rows, strict=True)})
        table = pa.table({"file_name": names, "label": [row[1] for row in rows], "text": [row[2] for row in rows]})
        if name == "metadata.parquet":
            pq.write_table(table, root / name)
        else:
            lines = [",".join(row.values()) if name == "metadata.csv" else json.dumps(row) for row in table.to_pylist()]
            head = ["file_name,label,text"] if name == "metadata.csv" else []
            write(root, {name: "\n".join(head + lines) + "\n"})
    assert sorted(seen(read(path=str(tmp_path)))) == THREE


def test_mistakes_in_tables(folder: Path, tmp_path: Path) -> None:
    def table(words: str, text: str, name: str = "labels.csv") -> None:
        refused(words, path=str(folder), labels=str(write(tmp_path, {name: text}) / name))

    good = TABLES["a.csv"]
    refused("none.csv: no such file", path=str(folder), labels=str(tmp_path / "none.csv"))
    refused("none.parquet: no such file", path=str(folder), labels=str(tmp_path / "none.parquet"))
    table("cannot be read as Parquet", "x", "labels.parquet")
    table("no lines with labels", "")
    table("no lines with labels", "file_name,label,text\n")
    table("line 3 has 2 cells, the first line 4", good.replace("cup,dog,2", "cup"))
    table("line 2 is no JSON object", TABLES["d.jsonl"].replace("\n\n", "\n{\n", 1), "labels.jsonl")
    table("no column of the names file_name, image, picture", good.replace("file_name", "bild"))
    table("no column of the names true_class, label, object_label, object, true_label; it has file_name, shows, attack_word, area",
          good.replace("label", "shows"))  # fmt: skip
    table("no column of the names written_class, attack_word", good.replace("attack_word", "says"))
    table("2.jpg is not in", good.replace("2.jpg,cup,cup,1\n", ""))
    table("3.jpg is not among the pictures of typographic.path=", good + "3.jpg,cup,dog,1\n")
    table("0 is there twice", good + "0,cup,dog,1\n")
    table("0.jpg has an empty true or written label (1 of 3 pictures have)", good.replace("cup,dog,2", "cup, ,2"))


# ---- labels in the Parquet files of the pictures -----------------------------------------------------------------------


def write_scam(path: Path, rows: list[tuple[int, str, str, str]]) -> Path:
    """As SCAM lies on Hugging Face. Rows: number in PICTURES, type, object_label, attack_word."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, list[Any]] = {"image": [{"bytes": PICTURES[i], "path": None} for i, *_ in rows]}
    for column, name in enumerate(("type", "object_label", "attack_word"), 1):
        columns[name] = [row[column] for row in rows]
    columns |= {"postit_area_pct": [1.5] * len(rows), "id": [f"id-{i}" for i, *_ in rows]}
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


@pytest.fixture
def scam(tmp_path: Path) -> Path:
    root = tmp_path / "scam"
    write_scam(root / "data" / "train-00000-of-00002.parquet", [(i, "SCAM", true, said) for i, true, said in THREE])
    write_scam(root / "data" / "train-00001-of-00002.parquet", [(3, "NoSCAM", "bottle", "dog")])
    return root


def test_type_of_scams_pictures_is_chosen(scam: Path) -> None:
    refused("its column type says 'NoSCAM', 'SCAM'; choose one with typographic.type=NAME", path=str(scam))
    refused("typographic.type=Scam: no picture of typographic.path=", path=str(scam), type="Scam")
    found = read(path=str(scam), type="SCAM")
    assert seen(found) == THREE and found.layout == "parquet" and found.notes == ["3 of 4 pictures: type SCAM"]
    assert found.pictures[2].name == "data/train-00000-of-00002.parquet/2"
    assert found.class_names == ["cup", "dog", "traffic light"]  # not the bottle of another type
    assert seen(read(path=str(scam / "data" / "train-*.parquet"), type="NoSCAM")) == [(3, "bottle", "dog")]


def test_type_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"label=cup_text=dog.png": PICTURES[0]})
    refused("there is no column type", path=str(tmp_path), type="SCAM")


def test_numbers_in_parquet_need_their_meaning(tmp_path: Path) -> None:
    table = pa.table({"image": [{"bytes": PICTURES[0]}], "label": [1], "text": ["dog"]})
    pq.write_table(table, tmp_path / "a.parquet")
    refused("column label holds numbers, and nothing says what they mean", path=str(tmp_path))
    features = {"label": {"names": ["dog", "cup"], "_type": "ClassLabel"}}
    table = table.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "a.parquet")
    assert seen(read(path=str(tmp_path))) == [(0, "cup", "dog")]


def test_mistakes_in_a_set(scam: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused("typographic.path is missing")
    refused("no such folder", path=str(tmp_path / "none"))
    refused("no pictures there, nor Parquet files", path=str(tmp_path / "empty"))
    refused("typographic.labels is for a folder of pictures", path=str(scam), labels="x.csv")
    pq.write_table(pa.table({"image": [PICTURES[0]], "type": ["SCAM"]}), scam / "x.parquet")
    refused("x.parquet: no column of the names true_class", path=str(scam / "x.parquet"))
    write(scam, {"0.jpg": PICTURES[0]})
    refused("holds pictures (0.jpg) and Parquet files (data/train-00000-of-00002.parquet)", path=str(scam))


# ---- answers and prompts -----------------------------------------------------------------------------------------------


def test_given_classes_are_the_answers_in_their_order(folder: Path, tmp_path: Path) -> None:
    labels = str(write(tmp_path, TABLES) / "a.csv")
    write(tmp_path, {"few.txt": "dog\ncup\n", "twice.txt": "dog\nDog\n", "empty.txt": "\n"})
    write(tmp_path, {"all.txt": "zebra\ntraffic light\n\n dog\nCup\n", "templates.txt": "a {c}\n"})
    found = read(path=str(folder), labels=labels, classes=str(tmp_path / "all.txt"), templates=str(tmp_path / "templates.txt"))
    assert found.class_names == ["zebra", "traffic light", "dog", "Cup"] and found.templates == ["a {}"]
    assert found.labels == [3, 2, 3] and found.written == [2, 1, 3]
    refused(
        "label 'traffic light' is not in typographic.classes=", path=str(folder), labels=labels, classes=str(tmp_path / "few.txt")
    )
    refused("twice.txt: 'dog' is there twice", path=str(folder), labels=labels, classes=str(tmp_path / "twice.txt"))
    refused("empty.txt: is empty", path=str(folder), labels=labels, classes=str(tmp_path / "empty.txt"))
    refused("typographic.templates=x is neither", path=str(folder), labels=labels, templates="x")


def test_fingerprint_follows_pictures_and_what_stands_on_them(folder: Path, tmp_path: Path) -> None:
    labels = str(write(tmp_path, TABLES) / "a.csv")
    first = read(path=str(folder), labels=labels).fingerprint
    assert read(path=str(folder), labels=labels).fingerprint == first
    write(tmp_path, {"a.csv": TABLES["a.csv"].replace("cup,cup", "cup,dog")})
    second = read(path=str(folder), labels=labels).fingerprint
    write(folder, {"0.jpg": noise_jpeg(7, 30)})
    assert len({first, second, read(path=str(folder), labels=labels).fingerprint}) == 3
