"""Labelled sets of every layout, clean and attacked: what is read, in which order, and the line for each mistake."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Members, S3Server, noise_jpeg, write_tar

from raysys.config import ClassSetConfig
from raysys.errors import UserError
from raysys.evaluation.class_sets import ClassSet, read_class_set
from raysys.evaluation.zero_shot import prompts
from raysys.storage import open_fs

PICTURES = [noise_jpeg(i, 16) for i in range(6)]
FRUIT = {"a": "apple", "b": "banana", "c": "cherry"}
WNIDS = ["n01440764", "n01443537", "n01484850"]  # ImageNet's classes 0, 1 and 2


def write(root: Path, files: Mapping[str, bytes | str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def classes_file(root: Path, classes: dict[str, str] | None = None) -> str:
    return str(write(root, {"fruit.json": json.dumps(classes or FRUIT)}) / "fruit.json")


def write_attack_file(root: Path, rows: list[tuple[str, int, int, str]]) -> None:
    names = ("picture", "true_class", "written_class", "text")
    pq.write_table(pa.table(dict(zip(names, zip(*rows, strict=True), strict=True))), root / "attack.parquet")


def refused(words: str, key: str = "imagenet", *, attacked: bool = False, **cfg: Any) -> None:
    with pytest.raises(UserError) as error:
        read_class_set(ClassSetConfig(**cfg), key, attacked=attacked)
    assert words in str(error.value) and "\n" not in str(error.value)


def read(**cfg: Any) -> ClassSet:
    return read_class_set(ClassSetConfig(**cfg))


def seen(found: ClassSet) -> list[tuple[int, int]]:
    """Number in PICTURES and label of every picture."""
    return [(PICTURES.index(p.read()), label) for p, label in zip(found.pictures, found.labels, strict=True)]


# ---- one folder a class ------------------------------------------------------------------------------------------------


@pytest.fixture
def fruit(tmp_path: Path) -> ClassSetConfig:
    """Three classes, one of them without pictures."""
    files = {"b/1.jpg": PICTURES[0], "b/2.PNG": PICTURES[1], "a/1.jpg": PICTURES[2], "b/notes.txt": "no picture"}
    root = write(tmp_path / "fruit", files)
    return ClassSetConfig(path=str(root), classes=classes_file(tmp_path), templates="simple")


def test_folders_are_classes_sorted_by_class_and_name(fruit: ClassSetConfig) -> None:
    found = read_class_set(fruit)
    assert found.layout == "folders" and seen(found) == [(2, 0), (0, 1), (1, 1)]
    assert [p.name for p in found.pictures] == ["a/1.jpg", "b/1.jpg", "b/2.PNG"]
    assert found.class_names == ["apple", "banana", "cherry"] and found.num_classes_with_pictures == 2
    assert found.templates == ["a photo of a {}."] and found.written is None
    assert found.notes == ["pictures of 2 of 3 classes"]


def test_fingerprint_follows_the_set(fruit: ClassSetConfig) -> None:
    before = read_class_set(fruit).fingerprint
    assert read_class_set(fruit).fingerprint == before
    write(Path(str(fruit.path)), {"a/1.jpg": noise_jpeg(9, 60)})
    assert read_class_set(fruit).fingerprint != before


def test_imagenet_folders_get_imagenets_order_names_and_prompts(tmp_path: Path) -> None:
    write(tmp_path, {"n04008634/x.JPEG": PICTURES[0], "n01440764/y.JPEG": PICTURES[1]})
    found = read(path=str(tmp_path))
    assert seen(found) == [(1, 0), (0, 744)] and len(found.class_names) == 1000 and len(found.templates) == 80
    assert found.class_names[0] == "tench" and found.templates[0] == "a bad photo of a {}."
    assert prompts(["tench"], found.templates) == [template("tench") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert found.notes == ["pictures of 2 of 1,000 classes; 2 pictures, ImageNet validation has 50,000"]


def test_classes_that_share_a_name_stay_two(tmp_path: Path) -> None:
    assert open_clip.IMAGENET_CLASSNAMES[657] == open_clip.IMAGENET_CLASSNAMES[744] == "missile"
    write(tmp_path, {"n03773504/x.JPEG": PICTURES[0], "n04008634/x.JPEG": PICTURES[1]})
    assert seen(read(path=str(tmp_path))) == [(0, 657), (1, 744)]


def test_hidden_files_are_left_out_and_links_are_followed(fruit: ClassSetConfig, tmp_path: Path) -> None:
    root = Path(str(fruit.path))
    write(root, {"a/._1.jpg": b"of macOS", ".cache/b/1.jpg": PICTURES[3]})
    (root / "c").symlink_to(write(tmp_path / "elsewhere", {"1.jpg": PICTURES[4]}))
    (root / "a" / "2.jpg").symlink_to(tmp_path / "elsewhere" / "1.jpg")
    for name, target in {"b/up": root, "a/same": root / "a", "../elsewhere/back": root}.items():  # without an end
        (root / name).symlink_to(target)
    assert seen(read_class_set(fruit)) == [(2, 0), (4, 0), (0, 1), (1, 1), (4, 2)]


def test_pictures_beside_class_folders_are_said_to_be_left_out(fruit: ClassSetConfig) -> None:
    write(Path(str(fruit.path)), {"preview.png": PICTURES[5]})
    found = read_class_set(fruit)
    assert len(found.pictures) == 3
    assert found.notes[0] == "pictures beside the class folders that are not used: 1 (first preview.png)"


def test_mistakes_in_a_set_of_folders(fruit: ClassSetConfig, tmp_path: Path) -> None:
    path, classes = str(fruit.path), fruit.classes
    write(tmp_path, {"bad.txt": "a photo of {}\na photo\n", "list.json": "[1]", "cut.json": "{", "latin.txt": b"caf\xe9 {}"})
    write(tmp_path, {"twice.json": '{"a": "apple", "a": "pear"}', "nameless.json": '{"a": " "}', "numbers.json": '{"a": 1}'})
    (tmp_path / "empty").mkdir()
    refused("imagenet.path is missing")
    refused("folder 'a' is not among ImageNet's 1,000 WNIDs; give imagenet.classes=FILE", path=path)
    refused(
        "folder '0' is not among ImageNet's 1,000 WNIDs", path=str(write(tmp_path / "numbers", {"0/1.jpg": b"x", "1/1.jpg": b"x"}))
    )
    refused("folder 'fruit' is not among", path=str(tmp_path), classes=classes)
    refused("give the folder 'fruit' as imagenet.path", path=str(tmp_path), classes=classes)
    refused("no such folder", path=str(tmp_path / "none"))
    refused("is a file; give the folder", path=classes)
    refused("no pictures there; expected FOLDER/CLASS/NAME.JPEG", path=str(tmp_path / "empty"))
    refused("no such file", path=path, classes=str(tmp_path / "none.json"))
    refused("cut.json: not valid JSON", path=path, classes=str(tmp_path / "cut.json"))
    refused("expected a JSON object {class id: class name}", path=path, classes=str(tmp_path / "list.json"))
    refused("expected a JSON object {class id: class name}", path=path, classes=str(tmp_path / "numbers.json"))
    refused("class 'a' is there twice", path=path, classes=str(tmp_path / "twice.json"))
    refused("class 'a' has no name", path=path, classes=str(tmp_path / "nameless.json"))
    refused("neither openai nor simple nor a file", path=path, classes=classes, templates="opnai")
    refused("'a photo' has none", path=path, classes=classes, templates=str(tmp_path / "bad.txt"))
    refused("latin.txt: not text in UTF-8", path=path, classes=classes, templates=str(tmp_path / "latin.txt"))
    refused("imagenet.split=val is for WebDataset and Parquet", path=path, classes=classes, split="val")


# ---- pictures and a label file -----------------------------------------------------------------------------------------


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    return write(tmp_path / "in" / "val", {f"ILSVRC2012_val_0000000{i}.JPEG": PICTURES[i] for i in (1, 2, 3)})


LABEL_FILES = {
    "LOC_val_solution.csv": "ImageId,PredictionString\n"
    + "".join(f"ILSVRC2012_val_0000000{i},{WNIDS[c]} 1 2 3 4 {WNIDS[c]} 5 6 7 8 \n" for i, c in [(3, 0), (1, 2), (2, 0)]),
    "val.txt": "ILSVRC2012_val_00000001.JPEG 2\nILSVRC2012_val_00000003.JPEG 0\nILSVRC2012_val_00000002.JPEG 0\n",
    "imagenet_2012_validation_synset_labels.txt": f"{WNIDS[2]}\n{WNIDS[0]}\n{WNIDS[0]}\n",
    "labels.csv": "picture,class\n" + "".join(f"ILSVRC2012_val_0000000{i}.JPEG,{WNIDS[c]}\n" for i, c in [(3, 0), (2, 0), (1, 2)]),
}
FLAT_LABELS = [(1, 2), (2, 0), (3, 0)]


@pytest.mark.parametrize("name", LABEL_FILES)
def test_label_file_of_every_kind_says_the_same(name: str, flat: Path, tmp_path: Path) -> None:
    given = write(tmp_path, {f"my_{name}": LABEL_FILES[name]}) / f"my_{name}"
    found = read(path=str(flat), labels=str(given))
    assert found.layout == "flat" and seen(found) == FLAT_LABELS and found.class_ids[:3] == WNIDS
    assert [p.name for p in found.pictures] == sorted(file.name for file in flat.iterdir()) and len(found.notes) == 1
    write(flat, {name: LABEL_FILES[name]})
    found = read(path=str(flat))
    assert seen(found) == FLAT_LABELS
    assert found.notes[:-1] == ([] if name == "labels.csv" else [f"classes of the pictures: {flat}/{name}"])


def test_usual_label_file_is_also_looked_for_one_folder_above(flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(flat.parent, {"val.txt": LABEL_FILES["val.txt"]})
    found = read(path=str(flat))
    assert seen(found) == FLAT_LABELS and found.notes[0] == f"classes of the pictures: {flat.parent}/val.txt"
    monkeypatch.chdir(flat)
    assert seen(read(path=".")) == FLAT_LABELS
    write(flat, {"val.txt": LABEL_FILES["val.txt"].replace("JPEG 0", "JPEG 1")})
    assert seen(read(path=str(flat))) == [(1, 2), (2, 1), (3, 1)]  # that beside the pictures goes first
    write(flat, {"labels.csv": LABEL_FILES["labels.csv"]})
    assert seen(read(path=str(flat))) == FLAT_LABELS  # and raysys's own before all others


def test_the_devkits_numbers_are_never_taken_for_classes(flat: Path, tmp_path: Path) -> None:
    name = "ILSVRC2012_validation_ground_truth.txt"
    write(tmp_path / "in", {name: "3\n1\n1\n"})
    words = f"{name}: bare numbers; ImageNet's devkit counts the classes in an order of its own"
    refused(words, path=str(flat))
    refused(words, path=str(flat), labels=str(tmp_path / "in" / name))
    found = read(path=str(flat), labels=str(tmp_path / "in" / name), classes=classes_file(tmp_path, {"1": "kit fox", "3": "apple"}))
    assert seen(found) == [(1, 1), (2, 0), (3, 0)]  # its own numbers, named


def test_foreign_labels_csv_beside_class_folders_is_not_asked(fruit: ClassSetConfig) -> None:
    root = write(Path(str(fruit.path)), {"labels.csv": "id,breed\n1,boxer\n"})
    assert read_class_set(fruit).layout == "folders"
    write(root, {"labels.csv": "picture,class\na/1.jpg,c\nb/1.jpg,a\nb/2.PNG,a\n"})  # what `raysys attack` leaves
    assert seen(read_class_set(fruit)) == [(2, 2), (0, 0), (1, 0)]


def test_labels_may_be_ids_numbers_or_names_of_other_classes(tmp_path: Path) -> None:
    root, classes = write(tmp_path / "set", {"x/1 1.jpg": PICTURES[0], "y/2.jpg": PICTURES[1]}), classes_file(tmp_path)
    for a, b in [("c", "a"), ("2", "0"), ("cherry", "apple")]:
        for text in (f"x/1 1.jpg {a}\ny/2.jpg {b}\n", f"filename,label\nx/1 1.jpg,{a}\n./y/2.jpg,{b}\n", f"2,{b}\n1 1,{a}\n"):
            write(tmp_path, {"labels": text})
            assert seen(read(path=str(root), labels=str(tmp_path / "labels"), classes=classes)) == [(0, 2), (1, 0)]


def test_name_that_several_pictures_share_says_nothing(tmp_path: Path) -> None:
    root = write(tmp_path / "set", {"x/1.jpg": PICTURES[0], "y/1.jpg": PICTURES[1], "y/2.jpg": PICTURES[2]})
    write(tmp_path, {"labels": "1.jpg a\n2.jpg b\ny/1.jpg c\n"})
    refused("x/1.jpg is not in", path=str(root), labels=str(tmp_path / "labels"), classes=classes_file(tmp_path))


def test_mistakes_in_labels_of_a_flat_folder(flat: Path, tmp_path: Path) -> None:
    def labels(words: str, text: str, **more: Any) -> None:
        refused(words, path=str(flat), labels=str(write(tmp_path, {"labels.txt": text}) / "labels.txt"), **more)

    good = LABEL_FILES["val.txt"]
    refused("pictures without class folders, and no labels.csv, LOC_val_solution.csv, val.txt", path=str(flat))
    refused("none.txt: no such file", path=str(flat), labels=str(tmp_path / "none.txt"))
    labels("labels.txt: is empty", "\n")
    labels("ILSVRC2012_val_00000003.JPEG is not in", good.replace("00000003", "00000004"))
    labels("(1 of 3 pictures are not)", good.replace("00000003", "00000004"))
    labels("x.JPEG is not among the pictures", good + "x.JPEG 1\ny.JPEG 1\n")
    labels("(2 of 5 lines name none)", good + "x.JPEG 1\ny.JPEG 1\n")
    labels("ILSVRC2012_val_00000001 is there twice", good + "ILSVRC2012_val_00000001 2\n")
    labels("label 1000 of ILSVRC2012_val_00000003.JPEG is not among ImageNet's 1,000 WNIDs; numbers go from 0 to 999",
           good.replace("3.JPEG 0", "3.JPEG 1000"))  # fmt: skip
    labels("label 'n1' of ILSVRC2012_val_00000001.JPEG is not among ImageNet's 1,000 WNIDs", good.replace("JPEG 2", "JPEG n1"))
    labels("2 classes have this name; label pictures by class ids", good.replace("JPEG 2", "JPEG missile"))
    labels("2 lines, but imagenet.path=", f"{WNIDS[0]}\n{WNIDS[1]}\n")
    labels("'n01443537' is unlike its first line", f"x.JPEG n1\n{WNIDS[1]}\n")
    labels("label '0' of ", "0\n1\n2\n".replace("1", "n1"))


# ---- CLIP_benchmark's WebDataset ---------------------------------------------------------------------------------------


def samples(*rows: tuple[int, int | str], suffix: str = "webp") -> Members:
    """Number in PICTURES, and label; as webdataset's writer sorts the members."""
    return [m for i, c in rows for m in sorted([(f"s{i:07d}.cls", str(c).encode()), (f"s{i:07d}.{suffix}", PICTURES[i])])]


@pytest.fixture
def wds(tmp_path: Path) -> Path:
    root = write(tmp_path / "wds", {"classnames.txt": "apple\nbanana\ncherry\n", "test/nshards.txt": "2\n"})
    write(root, {"zeroshot_classification_templates.txt": "a photo of {c}.\n{c}!\n"})
    write_tar(root / "test" / "0.tar", samples((2, 1), (0, 2)))
    write_tar(root / "test" / "1.tar", samples((1, 1), suffix="jpg"))
    return root


def test_webdataset_is_read_in_the_order_of_its_tars(wds: Path) -> None:
    found = read(path=str(wds))
    assert found.layout == "webdataset" and seen(found) == [(2, 1), (0, 2), (1, 1)]
    assert [p.name for p in found.pictures] == ["test/0.tar/s0000002", "test/0.tar/s0000000", "test/1.tar/s0000001"]
    assert found.class_ids == ["0", "1", "2"] and found.class_names == ["apple", "banana", "cherry"]
    assert found.templates == ["a photo of {}.", "{}!"] and found.notes == ["pictures of 2 of 3 classes"]


def test_given_classes_and_templates_take_the_place_of_the_webdatasets(wds: Path, tmp_path: Path) -> None:
    classes = classes_file(tmp_path, {"x": "Apfel", "y": "Banane", "z": "Kirsche"})
    found = read(path=str(wds), classes=classes, templates="simple")
    assert found.class_names == ["Apfel", "Banane", "Kirsche"] and found.labels == [1, 2, 1] and found.class_ids == ["x", "y", "z"]
    assert found.templates == ["a photo of a {}."]


def test_webdataset_of_imagenets_names_gets_its_ids(wds: Path) -> None:
    write(wds, {"classnames.txt": "\n".join(open_clip.IMAGENET_CLASSNAMES)})
    found = read(path=str(wds))
    assert found.class_ids[:3] == WNIDS and found.labels == [1, 2, 1] and "ImageNet validation has 50,000" in found.notes[-1]
    (wds / "classnames.txt").unlink()
    assert read(path=str(wds)).notes[0] == "the set has no class names; ImageNet's 1,000 are taken"
    assert read(path=str(wds)).class_names == found.class_names


def test_first_picture_of_a_sample_is_clip_benchmarks(wds: Path) -> None:
    two = [("a.b.jpg", b"x"), ("s1.cls", b" 1\n"), ("s1.jpg", PICTURES[0]), ("s1.png", PICTURES[1])]
    write_tar(wds / "test" / "0.tar", two[1:])
    assert seen(read(path=str(wds)))[0] == (1, 1)
    write_tar(wds / "test" / "0.tar", two)
    refused("0.tar: sample a has no picture", path=str(wds))


def test_fingerprint_of_a_webdataset_follows_its_pictures(wds: Path) -> None:
    before = read(path=str(wds)).fingerprint
    write_tar(wds / "test" / "1.tar", [("s0000001.cls", b"1"), ("s0000001.jpg", PICTURES[3])])
    assert len(PICTURES[3]) != len(PICTURES[1]) and read(path=str(wds)).fingerprint != before


def test_another_split_and_tars_that_are_not_counted(wds: Path) -> None:
    (wds / "test").rename(wds / "val")
    refused("no test/nshards.txt; it has the splits val; give imagenet.split=val", path=str(wds))
    write(wds, {"val/nshards.txt": "1"})
    found = read(path=str(wds), split="val")
    assert found.pictures[0].name == "val/0.tar/s0000002" and len(found.pictures) == 2
    assert found.notes[0] == "tars that are not read, as val/nshards.txt says 1: 1 (first val/1.tar)"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dataset_type.txt": "retrieval\n"}, "it is a set for the evaluator retrieval"),
        ({"dataset_type.txt": "multilabel\n"}, "one class a picture only"),
        ({"test/nshards.txt": "4"}, "test/nshards.txt says 4 tars, test/2.tar is not there (2 are missing)"),
        ({"test/nshards.txt": "?"}, "test/nshards.txt holds '?'"),
        ({"test/nshards.txt": "0"}, "no pictures there"),
        ({"classnames.txt": "apple\n\ncherry"}, "line 2 of classnames.txt is empty"),
        (
            {"classnames.txt": "apple\nbanana"},
            "label 2 of test/0.tar/s0000000 is not among the 2 classes of the set; numbers go from 0 to 1",
        ),
        ({"zeroshot_classification_templates.txt": "a photo\n"}, "'a photo' has none"),
        ({"test/1.tar": samples((1, "x"))}, "label 'x' of test/1.tar/s0000001 is not among the 3 classes"),
        ({"test/1.tar": samples((1, 1))[:1]}, "1.tar: sample s0000001 has no picture"),
        ({"test/1.tar": samples((1, 1))[1:]}, "1.tar: sample s0000001 has no label (.cls)"),
        ({"test/1.tar": samples((1, 1), (2, 1), (1, 0))}, "two pictures are called test/1.tar/s0000001"),
        ({"test/1.tar": b"\1" * 2000}, "1.tar: a damaged tar"),
        ({"nshards.txt": "2"}, "the folder of one split; give the folder above and imagenet.split=wds"),
    ],
)
def test_mistakes_in_a_webdataset(change: dict[str, Any], words: str, wds: Path) -> None:
    for name, content in change.items():
        if isinstance(content, list):
            write_tar(wds / name, content)
        else:
            write(wds, {name: content})
    refused(words, path=str(wds))


def test_tars_without_their_number_and_labels_for_tars_are_refused(wds: Path) -> None:
    refused("imagenet.labels is for a folder of pictures", path=str(wds), labels="x.csv")
    (wds / "test" / "nshards.txt").unlink()
    refused("test/0.tar lies there, but no SPLIT/nshards.txt", path=str(wds))


# ---- Parquet -----------------------------------------------------------------------------------------------------------


def write_parquet(
    path: Path, rows: list[int], labels: list[Any], names: list[str] | None = None, column: str = "label", row_group: int = 2
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": [{"bytes": PICTURES[i], "path": f"{i}.jpg"} for i in rows], column: labels})
    if names is not None:
        features = {"image": {"_type": "Image"}, column: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=row_group)
    return path


NAMES = ["apple", "banana", "cherry"]


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """As `datasets` writes it."""
    root = tmp_path / "hub"
    write_parquet(root / "data" / "validation-00000-of-00002.parquet", [3, 0, 2], [2, 0, 2], NAMES)
    write_parquet(root / "data" / "validation-00001-of-00002.parquet", [1], [0], NAMES)
    return write(root, {"README.md": "# fruit"})


def test_parquet_is_read_in_the_order_of_files_and_rows(hub: Path) -> None:
    found = read(path=str(hub))
    assert found.layout == "parquet" and seen(found) == [(3, 2), (0, 0), (2, 2), (1, 0)]
    assert found.pictures[2].name == "data/validation-00000-of-00002.parquet/2" and found.pictures[2].row_group == 1
    assert found.class_names == NAMES and found.class_ids == ["0", "1", "2"] and found.notes == ["pictures of 2 of 3 classes"]
    for path in (hub / "data", hub / "data" / "*.parquet", hub / "data" / "validation-{00000..00001}-of-00002.parquet"):
        again = read(path=str(path), split="validation")
        assert seen(again) == seen(found) and again.pictures[3].name == "validation-00001-of-00002.parquet/0"


def test_part_of_the_files_is_said_to_be_one(hub: Path) -> None:
    file = str(hub / "data" / "validation-00001-of-00002.parquet")
    assert read(path=file).notes[0] == "1 of 2 Parquet files of validation-*-of-00002"


def test_split_is_chosen_by_the_name_of_the_file(hub: Path) -> None:
    write_parquet(hub / "data" / "train-00000-of-00001-1a2b.parquet", [4], [1], NAMES)
    refused("its files are of the splits train, validation; say which with imagenet.split=NAME", path=str(hub))
    refused("imagenet.split=val: the files of imagenet.path=", path=str(hub), split="val")
    assert seen(read(path=str(hub), split="train")) == [(4, 1)] and len(read(path=str(hub), split="validation").pictures) == 4


@pytest.mark.parametrize("name", ["default/test/0000.parquet", "test.parquet", "test/part-7.parquet", "test_cut.parquet"])
def test_other_names_of_splits(name: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / name, [0], [1], NAMES)
    write_parquet(tmp_path / "default" / "train" / "0000.parquet", [1], [1], NAMES)
    assert seen(read(path=str(tmp_path), split="test")) == [(0, 1)]


def test_imagenets_names_in_parquet_become_the_fields(tmp_path: Path) -> None:
    """Hugging Face's are WordNet's ("tench, Tinca tinca")."""
    info = importlib.resources.files("timm") / "data" / "_info"
    wordnets_of = dict(line.split("\t") for line in (info / "imagenet_synset_to_lemma.txt").read_text().splitlines())
    wordnets = [wordnets_of[wnid] for wnid in (info / "imagenet_synsets.txt").read_text().split()]
    wordnets[3:9] = ["other", "words", "for", "six", "of", "them"]
    write_parquet(tmp_path / "a.parquet", [0, 1], [1, 744], wordnets)
    found = read(path=str(tmp_path))
    assert found.class_names == list(open_clip.IMAGENET_CLASSNAMES) and found.class_ids[:3] == WNIDS and found.labels == [1, 744]
    assert found.notes[0] == "class names: open_clip's (tench), not those in the Parquet files (tench, Tinca tinca)"
    write_parquet(tmp_path / "a.parquet", [0, 1], [1, 744], [f"thing {i}" for i in range(1000)])
    assert read(path=str(tmp_path)).class_names[1] == "thing 1"  # not every set of 1,000 classes is ImageNet


def test_wnids_as_names_in_parquet_become_words(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [0, 1], [1, 0], [WNIDS[2], WNIDS[0]])
    found = read(path=str(tmp_path))
    assert (
        found.class_ids == [WNIDS[2], WNIDS[0]] and found.class_names == ["great white shark", "tench"] and found.labels == [1, 0]
    )


def test_labels_in_parquet_may_be_words_or_have_no_names(tmp_path: Path) -> None:
    classes = classes_file(tmp_path)
    write_parquet(tmp_path / "set" / "a.parquet", [0, 1], ["cherry", "apple"], column="class")
    assert seen(read(path=str(tmp_path / "set"), classes=classes)) == [(0, 2), (1, 0)]
    refused("label 'cherry' of a.parquet/0 is not among ImageNet's 1,000 WNIDs", path=str(tmp_path / "set"))
    write_parquet(tmp_path / "set" / "a.parquet", [0, 1], [2, 0], column="cls")
    assert seen(read(path=str(tmp_path / "set"), classes=classes)) == [(0, 2), (1, 0)]
    assert read(path=str(tmp_path / "set")).notes[0] == "the set has no class names; ImageNet's 1,000 are taken"


def test_first_known_column_of_labels_is_taken(tmp_path: Path) -> None:
    table = pa.table({"class": ["x"], "image": [PICTURES[0]], "label": [2]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert seen(read(path=str(tmp_path), classes=classes_file(tmp_path))) == [(0, 2)]


def test_fingerprint_of_parquet_follows_its_pictures(hub: Path) -> None:
    before = read(path=str(hub)).fingerprint
    assert read(path=str(hub)).fingerprint == before
    write_parquet(hub / "data" / "validation-00001-of-00002.parquet", [4], [0], NAMES)
    assert read(path=str(hub)).fingerprint != before


def test_mistakes_in_parquet(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    refused("a.parquet: no such file or folder", path=str(file))
    refused("no .parquet files there", path=str(tmp_path / "*.parquet"))
    write(tmp_path, {"a.parquet": b"PAR1 cut off"})
    refused("a.parquet: no Parquet file, or cut off", path=str(file))
    pq.write_table(pa.table({"label": [1]}), file)
    refused("a.parquet: no column of pictures", path=str(file))
    write_parquet(file, [0], [1], column="answer")
    refused("a.parquet: no column of labels (one of label, labels, cls", path=str(file))
    write_parquet(file, [0, 1, 2], [1, -1, -1], NAMES)
    refused("column label is -1 (Hugging Face hides the labels of a test set) in row 1 (2 of 3 rows)", path=str(file))
    write_parquet(file, [0, 1], [1, None], NAMES)
    refused("column label is empty in row 1", path=str(file))
    write_parquet(file, [0], [[1, 2]])
    refused("column label is of type list<", path=str(file))
    write_parquet(file, [0], [3], NAMES)
    refused("label 3 of a.parquet/0 is not among the 3 classes of the set; numbers go from 0 to 2", path=str(file))
    write(tmp_path, {"x.jpg": PICTURES[0]})
    refused("holds pictures (x.jpg) and Parquet files (a.parquet)", path=str(tmp_path))
    refused("x.jpg is no Parquet file", path=str(tmp_path / "*.*"))


# ---- attacked sets -----------------------------------------------------------------------------------------------------


def test_attacked_set_knows_what_is_written(fruit: ClassSetConfig) -> None:
    root = Path(str(fruit.path))
    write_attack_file(root, [("b/2.PNG", 1, 2, "cherry"), ("a/1.jpg", 0, 1, "banana"), ("b/1.jpg", 1, 0, "apple")])
    assert read_class_set(fruit, "imagenet_attr", attacked=True).written == [1, 0, 2]
    write(root, {"classes.json": json.dumps(FRUIT)})  # as `raysys attack` leaves it
    assert read_class_set(ClassSetConfig(path=fruit.path), "imagenet_attr", attacked=True).class_names[0] == "apple"


def test_fingerprint_of_an_attacked_set_follows_what_is_written(fruit: ClassSetConfig) -> None:
    marks = set()
    for written, text in enumerate(NAMES):
        write_attack_file(
            Path(str(fruit.path)), [(name, int(name[0] == "b"), written, text) for name in ("a/1.jpg", "b/1.jpg", "b/2.PNG")]
        )
        marks.add(read_class_set(fruit, "imagenet_attr", attacked=True).fingerprint)
    assert len(marks) == 3


@pytest.mark.parametrize("layout", ["flat", "wds", "hub"])
def test_every_layout_may_be_attacked(layout: str, request: pytest.FixtureRequest) -> None:
    """classes.json of the attack goes before the set's own names and ImageNet's."""
    root: Path = request.getfixturevalue(layout)
    write(root, {"labels.csv": LABEL_FILES["labels.csv"], "classes.json": json.dumps(dict(zip([*WNIDS], NAMES, strict=True)))})
    clean = read_class_set(ClassSetConfig(path=str(root), classes=str(root / "classes.json")))
    rows = [(p.name, label, (label + 1) % 3, NAMES[(label + 1) % 3]) for p, label in zip(clean.pictures, clean.labels, strict=True)]
    write_attack_file(root, rows[::-1])
    found = read_class_set(ClassSetConfig(path=str(root)), "imagenet_attr", attacked=True)
    assert found.layout == clean.layout and found.pictures == clean.pictures and found.labels == clean.labels
    assert found.written == [(label + 1) % 3 for label in clean.labels] and found.class_names == NAMES


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("a/1.jpg", 0, 1, "banana")], "b/1.jpg is not in attack.parquet (2 of 3 pictures are not)"),
        ([(name, int(name[0] == "b"), 2, "cherry") for name in ("a/1.jpg", "b/1.jpg", "b/2.PNG", "c/1.jpg")], "4 rows in attack.parquet but 3"),
        ([("a/1.jpg", 0, 1, "pear"), ("b/1.jpg", 1, 0, "apple"), ("b/2.PNG", 1, 0, "apple")], "another class list"),
        ([("a/1.jpg", 2, 1, "banana"), ("b/1.jpg", 1, 0, "apple"), ("b/2.PNG", 1, 0, "apple")], "another class list"),
        ([("a/1.jpg", 0, 3, "banana"), ("b/1.jpg", 1, 0, "apple"), ("b/2.PNG", 1, 0, "apple")], "another class list"),
    ],
)  # fmt: skip
def test_attack_file_that_does_not_fit_is_refused(rows: list[Any], words: str, fruit: ClassSetConfig) -> None:
    write_attack_file(Path(str(fruit.path)), rows)
    refused(words, "imagenet_attr", attacked=True, path=fruit.path, classes=fruit.classes)


def test_attacked_set_is_no_clean_one(fruit: ClassSetConfig) -> None:
    (Path(str(fruit.path)) / "attack.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="words stand on its pictures"):
        read_class_set(fruit)


def test_attack_file_that_is_missing_or_foreign_is_refused(fruit: ClassSetConfig) -> None:
    refused("no attack.parquet there; build the set with", "imagenet_attr", attacked=True, path=fruit.path, classes=fruit.classes)
    for content in (b"no Parquet", b""):
        write(Path(str(fruit.path)), {"attack.parquet": content})
        refused("attack.parquet cannot be read", "imagenet_attr", attacked=True, path=fruit.path, classes=fruit.classes)
    pq.write_table(pa.table({"picture": ["a/1.jpg"]}), Path(str(fruit.path)) / "attack.parquet")
    refused("attack.parquet cannot be read", "imagenet_attr", attacked=True, path=fruit.path, classes=fruit.classes)


# ---- object stores -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["flat", "wds", "hub"])
def test_sets_on_an_object_store_are_as_local_ones(layout: str, s3: S3Server, request: pytest.FixtureRequest) -> None:
    root: Path = request.getfixturevalue(layout)
    write(root.parent, {"val.txt": LABEL_FILES["val.txt"]})
    url = f"{s3.new_bucket()}/sets/{root.name}"
    fs, inner = open_fs(url)
    fs.put(str(root.parent), inner.rpartition("/")[0], recursive=True)

    there, here = read(path=url), read(path=str(root))
    assert seen(there) == seen(here) and there.class_names == here.class_names
    refused("no such folder", path=f"{url}-none")
