"""Formats of a corpus: tars, Parquet files, folders; what is odd in them has a reason, what is cut keeps its good part."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Members, noise_jpeg, sample, write_tar

from raysys.config import CorpusConfig, SourceConfig
from raysys.corpus.samples import DamagedShard, Part, Sample
from raysys.corpus.shards import Shard, iter_samples, open_corpus, plan_parts, read_image, refuse_output_in_corpus, shard_path
from raysys.corpus.tars import iter_spans
from raysys.errors import UserError

UID = "0123456789abcdef0123456789ABCDEF"
PICTURES = [noise_jpeg(i) for i in range(6)]


def good_part(path: Path) -> tuple[list[Sample], str]:
    found: list[Sample] = []
    try:
        for one in iter_samples(str(path)):
            found.append(one)
    except DamagedShard as error:
        return found, str(error)
    return found, ""


def essence(samples: list[Sample]) -> list[tuple[Any, ...]]:
    """What must not depend on the format."""
    return [(s.index, s.key, s.image, s.captions, s.uid, s.error) for s in samples]


# ---- tars ------------------------------------------------------------------------------------------------------------


def test_layouts_of_img2dataset_open_clip_and_datacomp(tmp_path: Path) -> None:
    members: Members = [
        ("000000001.jpg", PICTURES[0]),
        ("000000001.json", json.dumps({"caption": "from json", "url": "http://x", "uid": UID}).encode()),
        ("000000001.txt", b"img2dataset"),
        ("dir/b.webp", PICTURES[1]),
        ("dir/b.txt", b" open_clip\n"),
        (f"{UID}.png", PICTURES[2]),
        (f"{UID}.json", json.dumps({"captions": ["one", "two"]}).encode()),
    ]
    samples, damage = good_part(write_tar(tmp_path / "a.tar", members))
    assert essence(samples) == [
        (0, "000000001", PICTURES[0], ["img2dataset"], UID.lower(), None),
        (1, "dir/b", PICTURES[1], ["open_clip"], None, None),
        (2, UID, PICTURES[2], ["one", "two"], UID.lower(), None),
    ]
    assert damage == ""


def test_names_that_are_no_samples_are_passed_over(tmp_path: Path) -> None:
    members = [
        ("._a.jpg", b"mac"),
        ("README", b"text"),
        ("__meta__.json", b"{}"),
        (".hidden.jpg", b"x"),
        ("a.jpg", PICTURES[0]),
        ("a.txt", b"a"),
    ]
    samples, _ = good_part(write_tar(tmp_path / "a.tar", members))
    assert [s.key for s in samples] == ["a"]


def test_a_key_that_comes_again_at_once_is_a_sample_of_its_own(tmp_path: Path) -> None:
    samples, _ = good_part(write_tar(tmp_path / "a.tar", [*sample("a", PICTURES[0], "one"), *sample("a", PICTURES[1], "two")]))
    assert [(s.index, s.key, s.captions) for s in samples] == [(0, "a", ["one"]), (1, "a", ["two"])]


@pytest.mark.parametrize("name", ["../a", "/etc/a", "x/../../a"])
def test_a_name_that_climbs_is_unsafe(tmp_path: Path, name: str) -> None:
    samples, _ = good_part(write_tar(tmp_path / "a.tar", [*sample(name, PICTURES[0]), *sample("b/c", PICTURES[1])]))
    assert [(s.key, s.error) for s in samples] == [(name, "unsafe_name"), ("b/c", None)]


def test_a_caption_that_is_no_utf8_has_a_reason_and_a_good_one_beside_it_stays(tmp_path: Path) -> None:
    latin = "naïve café".encode("latin-1")
    both = b'{"captions": ["bad \\ud800", "good"]}'
    members: Members = [
        ("a.jpg", PICTURES[0]),
        ("a.txt", latin),
        ("b.jpg", PICTURES[1]),
        ("b.json", both),
        *sample("c", PICTURES[2], "  "),
    ]
    samples, _ = good_part(write_tar(tmp_path / "a.tar", members))
    assert [(s.captions, s.error) for s in samples] == [([], "caption_not_utf8"), (["good"], None), ([], None)]


def test_a_name_that_is_no_utf8_still_makes_a_key(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("é.jpg")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    samples, _ = good_part(tmp_path / "a.tar")
    assert [s.key for s in samples] == ["\\xe9"]
    pa.array([s.key for s in samples])


def whole_tar(path: Path) -> Path:
    return write_tar(path, [m for i, p in enumerate(PICTURES) for m in sample(str(i), p, f"caption {i}")])


def test_a_tar_cut_anywhere_gives_whole_samples_and_says_so(tmp_path: Path) -> None:
    path = whole_tar(tmp_path / "a.tar")
    data = path.read_bytes()
    everything, _ = good_part(path)
    ends = [end for _, _, end in iter_spans(str(path))]
    end_of_members = ends[-1]
    for cut in [0, 100, 512, *range(600, end_of_members, 997), end_of_members]:
        path.write_bytes(data[:cut])
        samples, damage = good_part(path)
        assert damage, cut
        assert essence(samples) == essence(everything)[: len(samples)], cut
        complete = sum(end - 512 + len(s.captions[0]) <= cut for s, end in zip(everything, ends, strict=True))
        assert len(samples) == complete, cut
    path.write_bytes(data)
    assert good_part(path)[1] == ""


def test_what_stands_behind_damage_or_the_end_mark_is_said(tmp_path: Path) -> None:
    path = whole_tar(tmp_path / "a.tar")
    data = path.read_bytes()
    third = list(iter_spans(str(path)))[3][1]
    path.write_bytes(data[:third] + b"junk" * 128 + data[third + 512 :])
    samples, damage = good_part(path)
    assert len(samples) == 3 and f"no tar header at byte {third}" in damage
    path.write_bytes(data + data)
    samples, damage = good_part(path)
    assert len(samples) == 6 and "one behind the other" in damage


def test_an_empty_tar_is_sound_and_an_empty_file_is_not(tmp_path: Path) -> None:
    assert good_part(write_tar(tmp_path / "a.tar", [])) == ([], "")
    (tmp_path / "b.tar").touch()
    assert good_part(tmp_path / "b.tar") == ([], "empty file")


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_parts_of_a_tar_give_its_samples(tmp_path: Path, kind: int) -> None:
    """Long names have headers of their own: a part that begins with one must begin before it."""
    with tarfile.open(tmp_path / "a.tar", "w", format=kind) as tar:
        for i, picture in enumerate(PICTURES):
            for suffix, data in (("jpg", picture), ("txt", b"x")):
                info = tarfile.TarInfo(f"{'long' * 60}ü{i}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    check_parts(tmp_path / "a.tar", 3000)


def check_parts(path: Path, part_bytes: int) -> None:
    plan = plan_parts(str(path), part_bytes)
    whole, damage = good_part(path)
    assert len(plan.parts) > 1 and plan.damaged == damage
    pieces = [list(iter_samples(str(path), part)) for part in plan.parts]
    assert [len(piece) for piece in pieces] == [part.count for part in plan.parts]
    assert [piece[0].index for piece in pieces] == [part.first for part in plan.parts]
    assert essence([s for piece in pieces for s in piece]) == essence(whole)
    for one in whole:
        if one.image is not None:
            assert read_image(str(path), index=one.index, offset=one.offset, size=one.size) == one.image


def test_parts_of_a_damaged_tar_end_with_its_good_part(tmp_path: Path) -> None:
    path = whole_tar(tmp_path / "a.tar")
    path.write_bytes(path.read_bytes()[:9000])
    check_parts(path, 2000)


# ---- the same corpus in every format ---------------------------------------------------------------------------------


def write_parquet(path: Path, samples: list[Sample], **options: Any) -> Path:
    """Hugging Face's layout: image: {bytes, path}."""
    rows = [{"image": {"bytes": s.image, "path": f"{s.key}.jpg"}, "caption": s.captions} for s in samples]
    schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("caption", pa.list_(pa.string()))])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, **options)
    return path


def write_folder(path: Path, samples: list[Sample], kind: str) -> Path:
    for s in samples:
        file = path / f"{s.key}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        if s.image is not None:
            file.write_bytes(s.image)
    if kind == "jsonl":
        lines = [json.dumps({"file_name": f"{s.key}.jpg", "captions": s.captions}) + "\n" for s in samples]
    else:
        lines = ["image,caption\n"] + [f'{s.key}.jpg,"{c}"\n' for s in samples for c in s.captions or [""]]
    (path / f"captions.{kind}").write_text("".join(lines))
    return path / f"captions.{kind}"


@pytest.fixture
def samples_of_a_tar(tmp_path: Path) -> list[Sample]:
    members = [m for i, p in enumerate(PICTURES) for m in sample(f"d{i % 2}/{i}", p, f"caption, {i}", [f"caption, {i}", "über"])]
    members += sample("none", None, "no picture") + sample("mute", PICTURES[0], None)
    return good_part(write_tar(tmp_path / "plain.tar", members))[0]


def test_every_format_gives_the_same_samples(tmp_path: Path, samples_of_a_tar: list[Sample]) -> None:
    expected = essence(samples_of_a_tar)
    assert essence(good_part(write_parquet(tmp_path / "a.parquet", samples_of_a_tar))[0]) == expected
    for kind in ("jsonl", "csv"):
        assert essence(good_part(write_folder(tmp_path / kind, samples_of_a_tar, kind))[0]) == expected


def test_parts_of_every_format(tmp_path: Path, samples_of_a_tar: list[Sample]) -> None:
    check_parts(write_parquet(tmp_path / "a.parquet", samples_of_a_tar, row_group_size=3), 1)
    check_parts(write_folder(tmp_path / "f", samples_of_a_tar, "csv"), 150_000)


def test_other_parquet_layouts(tmp_path: Path) -> None:
    flat = pa.table({"jpg": [PICTURES[0], None], "txt": ["a", None], "__key__": ["k0", "k1"], "uid": [UID, None]})
    pq.write_table(flat, tmp_path / "a.parquet")
    assert essence(good_part(tmp_path / "a.parquet")[0]) == [
        (0, "k0", PICTURES[0], ["a"], UID.lower(), None),
        (1, "k1", None, [], None, None),
    ]
    coco = pa.table(
        {"image": [PICTURES[0]], "sentences": [[{"raw": "one"}, {"raw": "two"}]], "text": pa.array([b"\xff"], pa.binary())}
    )
    pq.write_table(coco, tmp_path / "b.parquet")
    assert [(s.key, s.captions, s.error) for s in good_part(tmp_path / "b.parquet")[0]] == [("000000000", [], "caption_not_utf8")]
    pq.write_table(coco.drop(["text"]), tmp_path / "c.parquet")
    assert good_part(tmp_path / "c.parquet")[0][0].captions == ["one", "two"]


def test_a_parquet_file_that_is_cut_or_has_no_pictures_is_said(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [Sample(0, "a", PICTURES[0])])
    path.write_bytes(path.read_bytes()[:-20])
    assert "no Parquet file, or cut off" in good_part(path)[1]
    pq.write_table(pa.table({"url": ["x"]}), path)
    assert "no column of pictures" in good_part(path)[1]


def test_lines_of_a_captions_file(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(PICTURES[0])
    lines = [
        b'{"image": "a.jpg", "caption": "one"}',
        b"not json",
        b'{"image": "../etc.jpg", "caption": "up"}',
        b'{"image": "gone.jpg", "caption": "\xff"}',
        b'["a list"]',
    ]
    (tmp_path / "captions.jsonl").write_bytes(b"\n".join(lines))
    assert [(s.key, s.image is not None, s.error) for s in good_part(tmp_path / "captions.jsonl")[0]] == [
        ("a", True, None),
        ("line-1", False, "bad_record"),
        ("../etc", False, "unsafe_name"),
        ("gone", False, "caption_not_utf8"),
        ("line-4", False, "bad_record"),
    ]
    (tmp_path / "captions.csv").write_bytes(b'\xef\xbb\xbffilepath\ttitle\na.jpg\tone "quoted"\nb.jpg\na.jpg\t\xe9\n')
    assert [(s.key, s.captions, s.error) for s in good_part(tmp_path / "captions.csv")[0]] == [
        ("a", ['one "quoted"'], None),
        ("line-1", [], "bad_record"),
        ("a", [], "caption_not_utf8"),
    ]
    (tmp_path / "captions.csv").write_text("url,alt\n")
    assert "must name a picture" in good_part(tmp_path / "captions.csv")[1]


# ---- which shards ----------------------------------------------------------------------------------------------------


def test_the_format_is_told_from_the_files(tmp_path: Path) -> None:
    for name in (
        "w/0.tar",
        "w/0.parquet",
        "w/0_stats.json",
        "p/a.parquet",
        "f/captions.csv",
        "f/a.jpg",
        "m/0.tar",
        "m/uids.parquet",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def names(path: str) -> list[str]:
        return [shard.name for shard in open_corpus(CorpusConfig(f"{tmp_path}/{path}")).shards]

    assert (names("w"), names("p"), names("f")) == (["0.tar"], ["a.parquet"], ["captions.csv"])  # 0.parquet: img2dataset's metadata
    assert names("f/captions.csv") == ["captions.csv"]
    with pytest.raises(UserError, match=r"holds 1 .tar files and 1 .parquet files; say which"):
        names("m")
    assert names("m/*.tar") == ["0.tar"]


def test_several_sources_and_folders_keep_names_apart(tmp_path: Path) -> None:
    for name in ("x/a/0.tar", "x/b/0.tar", "y/a/0.tar"):
        whole_tar(tmp_path / name)
    sources = {name: SourceConfig(str(tmp_path / name)) for name in ("x", "y")}
    corpus = open_corpus(CorpusConfig(sources=sources))
    assert [shard.name for shard in corpus.shards] == ["x%2Fa%2F0.tar", "x%2Fb%2F0.tar", "y%2Fa%2F0.tar"]
    assert [shard_path(corpus.roots, shard.name) for shard in corpus.shards] == [shard.path for shard in corpus.shards]
    braces = open_corpus(CorpusConfig(f"{tmp_path}/{{x,y}}/a/0.tar"))
    assert [shard.name for shard in braces.shards] == ["x%2Fa%2F0.tar", "y%2Fa%2F0.tar"]


def test_a_name_too_long_for_a_file_is_refused(tmp_path: Path) -> None:
    whole_tar(tmp_path / ("ü" * 40) / "0.tar")
    with pytest.raises(UserError, match="too long"):
        open_corpus(CorpusConfig(str(tmp_path)))


def test_a_missing_name_of_a_brace_list_is_refused(tmp_path: Path) -> None:
    whole_tar(tmp_path / "0.tar")
    with pytest.raises(UserError, match=r"1\.tar: no such file"):
        open_corpus(CorpusConfig(f"{tmp_path}/{{0..1}}.tar"))


def test_a_captions_file_weighs_what_its_pictures_do() -> None:
    assert Shard("a", "a.jsonl", 100, "").picture_bytes == 50_000
    assert Part(0, 1, 0, 1) == Part(0, 1, 0, 1)


def test_an_output_in_the_folder_of_the_corpus_is_refused(tmp_path: Path) -> None:
    """The next call would take its files for shards."""
    folder = CorpusConfig(str(tmp_path))
    with pytest.raises(UserError, match=r"output=.*/A lies in the corpus .*with a glob"):
        refuse_output_in_corpus("output", str(tmp_path / "A"), folder)
    with pytest.raises(UserError, match="shards="):
        refuse_output_in_corpus("shards", str(tmp_path), CorpusConfig(sources={"x": SourceConfig(f"{tmp_path}/")}))
    refuse_output_in_corpus("output", f"{tmp_path}-annotations", folder)
    refuse_output_in_corpus("output", str(tmp_path / "A"), CorpusConfig(f"{tmp_path}/*.tar"))
    refuse_output_in_corpus("output", str(tmp_path / "A"), CorpusConfig(f"{tmp_path}/{{0..3}}.tar"))
