"""Readers of retrieval sets: every layout gives the pictures, the captions and who belongs to whom; what is not whole is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Members, S3Server, noise_jpeg, sample, write_tar

from raysys.config import RetrievalSetConfig
from raysys.errors import UserError
from raysys.evaluation import retrieval_sets
from raysys.evaluation.retrieval_sets import RetrievalSet, read_retrieval_set
from raysys.storage import open_fs

PICTURES = [noise_jpeg(i) for i in range(4)]
KARPATHY = [
    ("val2014", "1.jpg", "test", ["a dog. ", "A DOG\n"]),
    ("train2014", "2.jpg", "restval", ["not asked"]),
    ("val2014", "0.jpg", "test", ["a cat"]),
    ("val2014", "3.jpg", "val", ["a bird"]),
]


def read(path: Path | str, key: str = "retrieval", **more: Any) -> RetrievalSet:
    return read_retrieval_set(RetrievalSetConfig(str(path), **more), key)


def by_name(found: RetrievalSet) -> dict[str, list[str]]:
    """Captions of every picture."""
    told: dict[str, list[str]] = {picture.name: [] for picture in found.pictures}
    for caption, image in zip(found.captions, found.image_of_text, strict=True):
        told[found.pictures[image].name].append(caption)
    return told


def write_pictures(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        (folder / name).write_bytes(PICTURES[i])


def write_coco(root: Path, images: list[tuple[int, str]], captions: list[tuple[int, str]], file: str = "captions_val2017") -> Path:
    content = {
        "images": [{"id": i, "file_name": name} for i, name in images],
        "annotations": [{"image_id": i, "caption": caption} for i, caption in captions],
    }
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    path = root / "annotations" / f"{file}.json"
    path.write_text(json.dumps(content))
    return path


def write_karpathy(path: Path, images: list[tuple[str, str, str, list[str]]] = KARPATHY, dataset: str = "coco") -> Path:
    rows = [
        {"filepath": folder, "filename": name, "split": split, "sentences": [{"raw": raw} for raw in raws]}
        for folder, name, split, raws in images
    ]
    if dataset != "coco":
        for row in rows:
            del row["filepath"]
    path.write_text(json.dumps({"dataset": dataset, "images": rows}))
    return path


def write_clip_benchmark(root: Path, shards: list[Members], *, nshards: str | None = None, kind: str | None = "retrieval") -> Path:
    for i, members in enumerate(shards):
        write_tar(root / "test" / f"{i}.tar", members)
    (root / "test" / "nshards.txt").write_text(nshards or f"{len(shards)}\n")
    if kind:
        (root / "dataset_type.txt").write_text(f"{kind}\n")
    return root


# ---- COCO --------------------------------------------------------------------------------------------------------------


def test_cocos_folder(tmp_path: Path) -> None:
    write_pictures(tmp_path / "val2017", "7.jpg", "3.jpg", "not_asked.jpg")
    write_coco(tmp_path, [(7, "7.jpg"), (3, "3.jpg")], [(7, "a "), (3, "b"), (7, "c\n")])
    found = read(tmp_path, "coco")
    assert [p.name for p in found.pictures] == ["3.jpg", "7.jpg"] and found.name == "coco_val2017"
    assert found.captions == ["b", "a ", "c\n"] and found.image_of_text == [0, 1, 1]
    assert [p.read() for p in found.pictures] == [PICTURES[1], PICTURES[0]]
    assert any("Karpathy" in note for note in found.notes) and "2 of 5,000 pictures" in found.notes


@pytest.mark.parametrize("folder", ["val2017", "."])
def test_cocos_captions_may_lie_elsewhere(tmp_path: Path, folder: str) -> None:
    write_pictures(tmp_path / "pictures" / folder, "3.jpg")
    file = write_coco(tmp_path / "elsewhere", [(3, "3.jpg")], [(3, "b")])
    found = read(tmp_path / "pictures", "coco", captions=str(file))
    assert found.name == "coco_val2017" and found.pictures[0].read() == PICTURES[0]


def test_another_file_of_cocos_format_is_not_called_val2017(tmp_path: Path) -> None:
    write_pictures(tmp_path, "3.jpg")
    file = write_coco(tmp_path, [(3, "3.jpg")], [(3, "b")], "captions_val2014")
    found = read(tmp_path, "coco", captions=str(file))
    assert found.name == "coco_val2014" and found.notes == []


def test_a_whole_val2017_is_not_called_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(retrieval_sets.NUM_PICTURES, "coco_val2017", 1)
    write_pictures(tmp_path / "val2017", "3.jpg")
    write_coco(tmp_path, [(3, "3.jpg")], [(3, "b")])
    assert read(tmp_path, "coco").notes == [retrieval_sets.VAL2017_NOTE]


@pytest.mark.parametrize(
    ("images", "captions", "words"),
    [
        (
            [(3, "3.jpg"), (4, "4.jpg"), (5, "5.jpg")],
            [(3, "b"), (4, "c"), (5, "d")],
            r"4\.jpg of .* is not there \(2 of 3 pictures",
        ),
        ([(3, "3.jpg")], [(3, "b"), (4, "c"), (9, "c")], r"2 captions are of pictures that are not among its images \(first 4\)"),
        ([(3, "3.jpg"), (4, "3.jpg")], [(3, "b"), (4, "c")], r"picture 3\.jpg is there twice"),
        ([(3, "3.jpg"), (3, "4.jpg")], [(3, "b")], "two of its images have one id"),
        ([(3, "3.jpg"), (7, "7.jpg")], [(3, "b")], r"7\.jpg has no caption"),
        ([(3, "3.jpg")], [(3, " \n")], r"3\.jpg has no caption"),
        ([(3, "3.jpg")], [(3, None)], "not COCO's format of captions"),
        ([(3, "3.jpg")], [(3, "caf\udce9")], r"a caption of 3\.jpg is not valid UTF-8"),
        ([], [], "no pictures there"),
    ],
)
def test_cocos_set_that_is_not_whole_is_refused(tmp_path: Path, images: Any, captions: Any, words: str) -> None:
    write_pictures(tmp_path / "val2017", "3.jpg", "7.jpg")
    write_coco(tmp_path, images, captions)
    with pytest.raises(UserError, match=words):
        read(tmp_path, "coco")


# ---- Karpathy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["val2014", "."])
def test_karpathys_test_split_of_coco(tmp_path: Path, folder: str) -> None:
    write_pictures(tmp_path / "coco" / folder, "1.jpg", "0.jpg")
    found = read(tmp_path / "coco", "coco", captions=str(write_karpathy(tmp_path / "dataset_coco.json")))
    assert found.name == "coco_karpathy_test" and found.notes == ["2 of 5,000 pictures"]
    assert list(by_name(found).items()) == [("1.jpg", ["a dog. ", "A DOG\n"]), ("0.jpg", ["a cat"])]
    assert [p.read() for p in found.pictures] == PICTURES[:2]


@pytest.mark.parametrize("dataset", ["flickr30k", "flickr8k"])
def test_karpathys_file_in_the_folder_of_the_pictures(tmp_path: Path, dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path, "1.jpg", "0.jpg")
    write_karpathy(tmp_path / f"dataset_{dataset}.json", dataset=dataset)
    found = read(tmp_path)
    assert found.name == f"{dataset}_karpathy_test" and found.notes == ["2 of 1,000 pictures"]
    monkeypatch.setitem(retrieval_sets.NUM_PICTURES, f"{dataset}_karpathy_test", 2)
    assert read(tmp_path).notes == []


def test_karpathys_splits_are_told_apart(tmp_path: Path) -> None:
    write_pictures(tmp_path / "train2014", "2.jpg")
    write_karpathy(tmp_path / "dataset_coco.json")
    found = read(tmp_path, "coco", split="restval")
    assert by_name(found) == {"2.jpg": ["not asked"]} and found.name == "coco_karpathy_restval"
    with pytest.raises(UserError, match="no pictures of split train; it has restval, test, val"):
        read(tmp_path, "coco", split="train")


def test_karpathys_mistakes(tmp_path: Path) -> None:
    write_pictures(tmp_path / "val2014", "1.jpg")
    file = write_karpathy(tmp_path / "dataset_coco.json")
    with pytest.raises(UserError, match=r"0\.jpg of .*dataset_coco\.json is not there \(1 of 2 pictures are missing\)"):
        read(tmp_path, "coco")
    write_karpathy(file, [KARPATHY[0], KARPATHY[0]])
    with pytest.raises(UserError, match=r"1\.jpg is there twice"):
        read(tmp_path, "coco")
    write_karpathy(file, [("val2014", "1.jpg", "test", [])])
    with pytest.raises(UserError, match=r"1\.jpg has no caption"):
        read(tmp_path, "coco")
    file.write_text(json.dumps({"dataset": "coco", "images": [{"filename": "1.jpg", "split": "test"}]}))
    with pytest.raises(UserError, match=r"not Karpathy's format of captions \(KeyError\('sentences'\)\)"):
        read(tmp_path, "coco")
    file.write_text("[]")
    with pytest.raises(UserError, match="neither COCO's captions"):
        read(tmp_path, "coco")


def test_a_folder_with_both_files_asks_which(tmp_path: Path) -> None:
    write_pictures(tmp_path / "val2017", "3.jpg")
    file = write_coco(tmp_path, [(3, "3.jpg")], [(3, "b")])
    write_karpathy(tmp_path / "dataset_coco.json")
    with pytest.raises(
        UserError, match=r"holds annotations/captions_val2017.json and dataset_coco.json; say which with coco\.captions="
    ):
        read(tmp_path, "coco")
    assert read(tmp_path, "coco", captions=str(file)).name == "coco_val2017"


# ---- CLIP_benchmark's WebDataset ---------------------------------------------------------------------------------------


def test_clip_benchmarks_webdataset(tmp_path: Path) -> None:
    first = sample("s0", PICTURES[0], "a dog \n two dogs") + sample("s1", PICTURES[1], "ein Hündchen\n", ["not this one"])
    write_clip_benchmark(tmp_path, [first, sample("s0", PICTURES[2], "a cat")])
    found = read(tmp_path)
    assert found.captions == ["a dog ", " two dogs", "ein Hündchen", "a cat"]  # str.splitlines, as CLIP_benchmark has them
    assert found.image_of_text == [0, 0, 1, 2] and found.notes == [] and found.name == "retrieval"
    assert [p.name for p in found.pictures] == ["0.tar/s0", "0.tar/s1", "1.tar/s0"]
    assert [p.read() for p in found.pictures] == PICTURES[:3]


def test_tars_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    write_clip_benchmark(tmp_path, [sample(str(i), PICTURES[0], f"no. {i}") for i in range(11)])
    assert read(tmp_path).captions == [f"no. {i}" for i in range(11)]


def test_empty_captions_are_counted(tmp_path: Path) -> None:
    write_clip_benchmark(tmp_path, [sample("0", PICTURES[0], "\na dog\n \n\ntwo dogs\n")])
    found = read(tmp_path)
    assert found.captions == ["a dog", "two dogs"] and found.notes == ["empty captions left out: 3"]


def test_another_split_of_a_webdataset(tmp_path: Path) -> None:
    write_clip_benchmark(tmp_path, [sample("0", PICTURES[0])])
    (tmp_path / "test").rename(tmp_path / "val")
    assert len(read(tmp_path, split="val").pictures) == 1
    with pytest.raises(UserError, match="test: no such file or folder"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("kind", "nshards", "words"),
    [
        ("classification", "2", "a set of classes .* evaluator imagenet"),
        ("multilabel", "2", "a set of classes .* evaluator imagenet"),
        (None, "2", "a set of classes .* evaluator imagenet"),
        ("retrieval", "3", r"says 3, .* but test holds 0\.tar, 1\.tar"),
        ("retrieval", "two", "says two"),
        ("retrieval", "0", "says 0"),
    ],
)
def test_clip_benchmarks_folder_that_is_not_a_whole_retrieval_set_is_refused(
    tmp_path: Path, kind: str | None, nshards: str, words: str
) -> None:
    shards = [sample(str(i), PICTURES[i]) for i in range(2)]
    write_clip_benchmark(tmp_path, shards, nshards=nshards, kind=kind)
    with pytest.raises(UserError, match=words):
        read(tmp_path)


def test_tars_beyond_the_count_are_not_read_as_clip_benchmark_does_and_a_note_says_so(tmp_path: Path) -> None:
    found = read(write_clip_benchmark(tmp_path, [sample(str(i), PICTURES[i], f"no. {i}") for i in range(3)], nshards="1"))
    assert found.captions == ["no. 0"] and found.notes == ["test/nshards.txt says 1 tars, so 1.tar is not read (2 are not)"]


def test_webdataset_without_count_is_refused(tmp_path: Path) -> None:
    (write_clip_benchmark(tmp_path, [sample("0", PICTURES[0])]) / "test" / "nshards.txt").unlink()
    with pytest.raises(UserError, match=r"test/nshards\.txt is not there"):
        read(tmp_path)


# ---- as a corpus -------------------------------------------------------------------------------------------------------


def test_tar_with_captions_in_json_and_txt(tmp_path: Path) -> None:
    members = sample("0", PICTURES[0], "not this one", ["one", "two"]) + sample("1", PICTURES[1], "drei\nvier \n\n")
    members += [*sample("2", PICTURES[2], "five"), ("2.json", b"{}"), ("3.jpg", PICTURES[3]), ("3.json", b'{"caption": "six"}')]
    found = read(write_tar(tmp_path / "t.tar", members))
    assert found.captions == ["one", "two", "drei", "vier ", "five", "six"] and found.image_of_text == [0, 0, 1, 1, 2, 3]
    assert [picture.read() for picture in found.pictures] == PICTURES
    assert found.name == "retrieval" and found.notes == ["empty captions left out: 1"]


def test_several_tars(tmp_path: Path) -> None:
    for name in ("b.tar", "sub/a.tar"):
        write_tar(tmp_path / name, sample("0", PICTURES[0], name))
    assert by_name(read(tmp_path)) == {"b.tar/0": ["b.tar"], "sub/a.tar/0": ["sub/a.tar"]}
    for pattern in ("{b,sub/a}.tar", "b*.tar"):
        assert read(tmp_path / pattern).captions[0] == "b.tar"


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (sample("0", PICTURES[0], None), "0 has no caption"),
        (sample("0", PICTURES[0], " \n"), "0 has no caption"),
        (sample("0", None, "a dog"), "sample 0 has no picture"),
        (sample("0", PICTURES[0]) + sample("1", PICTURES[1]) + sample("0", PICTURES[0]), "picture 0 is there twice"),
        ([("0.jpg", PICTURES[0]), ("0.txt", b"good\ncaf\xe9")], r"a caption of 0 is not valid UTF-8 \('caf\\udce9'\)"),
        (sample("../0", PICTURES[0]), "climbs out of its folder"),
        ([], "no pictures there"),
    ],
)
def test_tar_that_is_no_whole_set_is_refused(tmp_path: Path, members: Members, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read(write_tar(tmp_path / "t.tar", members))


def test_cut_tar_is_refused(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "t.tar", sample("0", PICTURES[0]) + sample("1", PICTURES[1]))
    whole.write_bytes(whole.read_bytes()[:-11_000])
    with pytest.raises(UserError, match=r"t\.tar: a damaged tar"):
        read(whole)


@pytest.mark.parametrize("name", ["captions.jsonl", "captions.csv"])
def test_lines_of_one_picture_are_merged_wherever_they_stand(tmp_path: Path, name: str) -> None:
    write_pictures(tmp_path / "sub", "b.jpg", "a.JPG")
    rows = [("sub/b.jpg", "one "), ("sub/a.JPG", "two"), ("./sub/b.jpg", "three, four")]
    lines = [json.dumps({"file_name": f, "text": t}) for f, t in rows]
    if name.endswith(".csv"):
        lines = ["file_name,caption", *(f'{f},"{t}"' for f, t in rows)]
    (tmp_path / name).write_text("\n".join(lines))
    found = read(tmp_path)
    assert list(by_name(found).items()) == [("sub/b.jpg", ["one ", "three, four"]), ("sub/a.JPG", ["two"])]
    assert [picture.read() for picture in found.pictures] == PICTURES[:2]


def test_jsonl_with_lists_of_captions_in_two_folders(tmp_path: Path) -> None:
    for part in ("x", "y"):
        write_pictures(tmp_path / part, "0.jpg")
        (tmp_path / part / "captions.jsonl").write_text(json.dumps({"image": "0.jpg", "captions": [part, "b"]}))
    assert by_name(read(tmp_path)) == {"x/0.jpg": ["x", "b"], "y/0.jpg": ["y", "b"]}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['{"image": "0.jpg", "text": "a"}', '{"image": "8.jpg", "text": "a"}', '{"image": "9.jpg", "text": "a"}'], r"8\.jpg is not there \(2 of 3"),
        (['{"image": "0.jpg", "text": "a"}', "{"], r"captions\.jsonl: its record 2 cannot be read"),
        (['{"image": "0.jpg", "text": ""}'], r"0\.jpg has no caption"),
        (['{"image": "../0.jpg", "text": "a"}'], "climbs out of its folder"),
        ([""], "no pictures there"),
    ],
)  # fmt: skip
def test_captions_file_that_is_no_whole_set_is_refused(tmp_path: Path, lines: list[str], words: str) -> None:
    write_pictures(tmp_path, "0.jpg")
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=words):
        read(tmp_path)


def write_parquet(path: Path, names: list[str], captions: list[Any], **columns: list[Any]) -> Path:
    images = [{"bytes": PICTURES[i % 4], "path": name} for i, name in enumerate(names)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": images, "caption": captions, **columns}), path, row_group_size=2)
    return path


@pytest.mark.parametrize("wrap", [lambda texts: texts, lambda texts: [{"raw": text, "id": 1} for text in texts]])
def test_parquet(tmp_path: Path, wrap: Callable[[list[str]], list[Any]]) -> None:
    file = write_parquet(tmp_path / "x.parquet", ["b.jpg", "a.jpg", "c.jpg"], [wrap(["one ", "two"]), wrap(["three"]), wrap(["4"])])
    found = read(file)
    assert by_name(found) == {"b": ["one ", "two"], "a": ["three"], "c": ["4"]} and found.notes == []
    assert [(p.row_group, p.row) for p in found.pictures] == [(0, 0), (0, 1), (1, 0)]
    assert [picture.read() for picture in found.pictures] == PICTURES[:3]


def test_parquet_with_plain_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"jpg": PICTURES[:2], "txt": ["one", "two"]}), tmp_path / "x.parquet")
    found = read(tmp_path)
    assert found.captions == ["one", "two"] and [picture.read() for picture in found.pictures] == PICTURES[:2]


def test_no_picture_of_a_parquet_file_is_read(tmp_path: Path) -> None:
    heavy = [bytes([i]) * 3_000_000 for i in range(2)]
    table = pa.table({"jpg": heavy, "txt": ["one", "two"]})
    pq.write_table(table, tmp_path / "x.parquet", compression="none", use_dictionary=False, write_statistics=False)
    data = bytearray((tmp_path / "x.parquet").read_bytes())
    data[10:5_000_000] = b"\xff" * (5_000_000 - 10)  # who reads the pictures finds no page there
    (tmp_path / "x.parquet").write_bytes(data)
    assert read(tmp_path).captions == ["one", "two"]


def test_splits_of_parquet_files(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet", ["a.jpg"], [[split]])
    assert read(tmp_path).captions == ["test"] and read(tmp_path, split="train").captions == ["train"]
    with pytest.raises(UserError, match=r"no pictures of split val there; give retrieval\.split, one of test, train"):
        read(tmp_path, split="val")
    (tmp_path / "data" / "test-00000-of-00001.parquet").unlink()
    assert read(tmp_path).captions == ["train"]  # the only one that is there


def test_split_column_of_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", ["a.jpg", "b.jpg", "c.jpg"], [["1"], ["2"], ["3"]], split=["train", "test", "train"])
    assert read(tmp_path).captions == ["2"] and read(tmp_path, split="train").captions == ["1", "3"]
    assert read(tmp_path).pictures[0].read() == PICTURES[1]


def test_parquet_mistakes(tmp_path: Path) -> None:
    write_parquet(tmp_path / "twice" / "x.parquet", ["a.jpg", "a.jpg"], ["1", "2"])
    write_parquet(tmp_path / "mute" / "x.parquet", ["a.jpg", "b.jpg"], ["1", None])
    pq.write_table(pa.table({"jpg": PICTURES[:1], "label": [1]}), write_parquet(tmp_path / "classes" / "x.parquet", [], []))
    whole = write_parquet(tmp_path / "cut" / "x.parquet", ["a.jpg"], ["1"])
    whole.write_bytes(whole.read_bytes()[:-100])
    (tmp_path / "broken").mkdir()
    broken = tmp_path / "broken" / "x.parquet"
    pq.write_table(pa.table({"txt": ["one"], "jpg": PICTURES[:1]}), broken, use_dictionary=False)
    broken.write_bytes(b"PAR1" + b"\xff" * 20 + broken.read_bytes()[24:])  # the page of the texts
    mistakes = [
        ("twice", "picture a is there twice"), ("mute", "b has no caption"), ("classes", "no column of captions"),
        ("cut", r"x\.parquet: a damaged Parquet file"), ("broken", r"x\.parquet: a damaged Parquet file"),
    ]  # fmt: skip
    for name, words in mistakes:
        with pytest.raises(UserError, match=words):
            read(tmp_path / name)


# ---- any layout --------------------------------------------------------------------------------------------------------


def test_mistakes_in_the_words(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "t.tar", sample("0", PICTURES[0]))
    write_parquet(tmp_path / "x.parquet", ["a.jpg"], ["1"])
    file = write_coco(tmp_path, [(3, "3.jpg")], [(3, "b")])
    mistakes: list[tuple[RetrievalSetConfig, str]] = [
        (RetrievalSetConfig(), r"coco\.path is missing"),
        (RetrievalSetConfig(str(tmp_path / "none")), "no such file or folder"),
        (RetrievalSetConfig(str(tmp_path / "none"), captions=str(file)), "no such folder"),
        (RetrievalSetConfig(str(tmp_path / "empty")), "no .tar or .parquet or captions"),
        (RetrievalSetConfig(str(tmp_path / "empty"), captions=str(tmp_path / "no.json")), r"no\.json: no such file"),
        (RetrievalSetConfig(str(tmp_path / "t.tar"), split="val"), r"coco\.split=val: .*t\.tar has no splits"),
        (RetrievalSetConfig(str(tmp_path / "x.parquet"), split="val"), r"coco\.split=val: .*x\.parquet has no splits"),
        (RetrievalSetConfig(str(tmp_path), split="val"), r"coco\.split=val: .*captions_val2017\.json has no splits"),
        (RetrievalSetConfig(str(tmp_path / "*.[tp]*")), r"coco\.path="),
    ]
    for cfg, words in mistakes:
        with pytest.raises(UserError, match=words) as error:
            read_retrieval_set(cfg, "coco")
        assert "\n" not in str(error.value)


def test_fingerprint_follows_pictures_and_captions(tmp_path: Path) -> None:
    write_pictures(tmp_path, "0.jpg", "1.jpg")
    lines = [{"image": "0.jpg", "text": "a"}, {"image": "1.jpg", "text": "b"}]

    def mark(rows: list[dict[str, str]]) -> str:
        (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return read(tmp_path).fingerprint

    before = mark(lines)
    assert mark(lines) == before
    marks = {before, mark(lines[::-1]), mark([lines[0], lines[1] | {"text": "c"}]), mark(lines[:1])}
    (tmp_path / "0.jpg").write_bytes(PICTURES[0][:-1] + b"\0")  # of the same size
    marks.add(mark(lines))
    assert len(marks) == 5


def test_fingerprint_of_parquet_follows_the_pictures(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "x.parquet", ["a.jpg"], ["1"])
    before = read(file).fingerprint
    assert read(file).fingerprint == before
    pq.write_table(pa.table({"image": [{"bytes": noise_jpeg(77), "path": "a.jpg"}], "caption": ["1"]}), file)
    assert read(file).fingerprint != before


def test_an_object_store_gives_what_a_folder_gives(tmp_path: Path, s3: S3Server) -> None:
    write_pictures(tmp_path / "coco" / "val2017", "3.jpg", "7.jpg")
    write_coco(tmp_path / "coco", [(3, "3.jpg"), (7, "7.jpg")], [(3, "b"), (7, "c")])
    write_pictures(tmp_path / "karpathy" / "val2014", "1.jpg", "0.jpg")
    write_karpathy(tmp_path / "karpathy" / "dataset_coco.json")
    write_clip_benchmark(tmp_path / "wds", [sample("0", PICTURES[0]), sample("1", PICTURES[1])])
    write_tar(tmp_path / "tars" / "t.tar", sample("0", PICTURES[0], "x", ["y", "z"]))
    write_pictures(tmp_path / "jsonl", "0.jpg")
    (tmp_path / "jsonl" / "captions.jsonl").write_text('{"image": "0.jpg", "text": "a"}')
    write_parquet(tmp_path / "parquet" / "x.parquet", ["a.jpg", "b.jpg", "c.jpg"], [["1"], ["2"], ["3"]])
    bucket = s3.new_bucket()
    open_fs(bucket)[0].put(f"{tmp_path}/", f"{bucket}/sets/", recursive=True)
    before = len(s3.requests())
    for name in ("coco", "karpathy", "wds", "tars", "jsonl", "parquet"):
        here, there = read(tmp_path / name), read(f"{bucket}/sets/{name}")
        assert by_name(here) == by_name(there) and here.notes == there.notes
        if name == "coco":
            assert not any("HEAD" in line and line.endswith(".jpg") for line in s3.requests()[before:])
        assert [picture.read() for picture in here.pictures] == [picture.read() for picture in there.pictures]
