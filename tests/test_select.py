"""Annotations + policy -> selection, subset file and filtered tars. Real tars, annotations by a fake look, no Ray."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Members, jpeg, noise_jpeg, sample, write_tar
from PIL import Image

from raysys.config import CorpusConfig, FilterConfig, PolicyConfig, SourceConfig
from raysys.corpus.samples import Sample
from raysys.corpus.shards import open_corpus
from raysys.corpus.tars import iter_spans
from raysys.errors import UserError
from raysys.output import Output, open_output
from raysys.policy import export
from raysys.policy import select as select_module
from raysys.policy.select import decode_uids, filter_annotations, open_selection
from raysys.regions.annotations import AnnotationFiles
from raysys.regions.annotator import Look
from raysys.regions.units import look_at_shard
from raysys.storage import read_json

REGION = {"polygon": [0.0, 0.0, 1.0, 0.0, 1.0, 0.5, 0.0, 0.5], "score": 0.9, "area": 0.5, "text": "SALE", "text_score": 0.9}


class FakeAnnotator:
    """Sees text in samples whose caption says so."""

    def look_all(self, pictures: Iterable[tuple[Sample, bytes | None]]) -> Iterator[tuple[Sample, Look]]:
        for label, data in pictures:
            if data is None:
                yield label, Look(error="missing_image")
            elif any("text" in caption for caption in label.captions):
                yield label, Look(64, 64, [REGION], 0.5)
            else:
                yield label, Look(64, 64, [], 0.0)


@dataclass
class Work:
    """A corpus and what lies beside it."""

    folder: Path
    corpus: CorpusConfig

    @property
    def config(self) -> FilterConfig:
        return FilterConfig(output=str(self.folder / "S"), annotations=str(self.folder / "A"))

    def annotate(self) -> Output:
        """What raysys annotate writes."""
        corpus = open_corpus(self.corpus)
        ocr = {"store_score": 0.3, "recognize": True}
        words = asdict(self.corpus) | {"roots": corpus.roots}
        output = open_output(str(self.folder / "A"), "annotate", {"corpus": words, "ocr": ocr}, not_in_fingerprint=("corpus",))
        files = AnnotationFiles(output.path, output.fingerprint)
        samples = 0
        for shard in corpus.shards:
            table, made_of, damaged = look_at_shard(shard.path, shard.name, None, FakeAnnotator())  # type: ignore[arg-type]
            samples += files.write_shard(shard.name, table, made_of=made_of, damaged=damaged).counts.samples
        output.finish({"shards": len(corpus.shards), "samples": samples})
        return output

    def filter(self, **more: Any) -> None:
        filter_annotations(replace(self.config, **more))

    def export(self) -> Path:
        self.filter(shards=str(self.folder / "F"))
        return self.folder / "F"

    def verdicts(self, name: str) -> dict[str, str | None]:
        """Key -> reason; every key once."""
        table = pq.read_table(self.folder / "S" / "selection" / f"{name}.parquet")
        keys = table["key"].to_pylist()
        assert len(set(keys)) == len(keys)
        return dict(zip(keys, table["reason"].to_pylist(), strict=True))

    @property
    def counts(self) -> dict[str, Any]:
        return read_json(str(self.folder / "S" / "manifest.json"))["counts"]


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path, CorpusConfig(path=str(tmp_path / "corpus")))


@pytest.fixture
def two_folders(work: Work) -> Work:
    """a/0.tar and b/0.tar: of ten each, two with text, one without a picture, one without a caption."""
    for folder in "ab":
        members: Members = []
        for i in range(10):
            caption = f"{folder}{i}" + (" text" if i in (3, 4) else "")
            members += sample(f"{folder}{i}", None if i == 5 else noise_jpeg(i), None if i == 6 else caption)
        write_tar(work.folder / "corpus" / folder / "0.tar", members)
    work.annotate()
    return work


KEPT = ["0", "1", "2", "7", "8", "9"]
"""Of each folder."""


def members_of(path: Path) -> dict[str, bytes]:
    """Name -> content; every name once."""
    with tarfile.open(path) as tar:
        found = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    assert len(dict(found)) == len(found)
    return dict(found)


def keys_of(path: Path) -> list[str]:
    """As webdataset reads them."""
    import webdataset

    return [read["__key__"] for read in webdataset.WebDataset(str(path))]


def stamp_of(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_atime_ns, stat.st_mtime_ns


# ---- selection --------------------------------------------------------------------------------------------------------


def test_counts_by_reason_and_a_row_for_every_sample(two_folders: Work, capsys: pytest.CaptureFixture[str]) -> None:
    two_folders.filter()
    assert two_folders.counts == {"samples": 20, "kept": 12, "reasons": {"text_area": 4, "missing_image": 2, "no_caption": 2}}
    out = capsys.readouterr().out.splitlines()
    assert out[:4] == [
        "filter: policy paper keeps 12 of 20 samples (60.0%)",
        "filter: 4 dropped: text_area",
        "filter: 2 dropped: missing_image",
        "filter: 2 dropped: no_caption",
    ]
    assert out[4:] == [
        f"result: {two_folders.folder}/S",
        f"next:   raysys train corpus.path={two_folders.folder}/corpus selection={two_folders.folder}/S model=MODEL "
        "train.steps=N output=RUN",
    ]
    dropped = {"b3": "text_area", "b4": "text_area", "b5": "missing_image", "b6": "no_caption"}
    assert two_folders.verdicts("b%2F0.tar") == {f"b{i}": dropped.get(f"b{i}") for i in range(10)}


def test_the_folder_holds_the_selection_and_nothing_else(two_folders: Work) -> None:
    two_folders.filter()
    folder = two_folders.folder / "S"
    *files, board = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert files == [
        "manifest.json",
        "selection/a%2F0.tar.parquet",
        "selection/b%2F0.tar.parquet",
        "settings.json",
        "shards.arrow",
    ]
    assert board.startswith("tensorboard/events.out.tfevents.")
    assert not (folder / "_tmp").exists()
    schema = pq.read_schema(folder / "selection" / "a%2F0.tar.parquet")
    assert {field.name: str(field.type) for field in schema} == {
        "shard": "string",
        "index": "int32",
        "key": "string",
        "keep": "bool",
        "reason": "string",
    }
    selection = open_selection(str(folder))
    assert selection.annotations.names == ["a%2F0.tar", "b%2F0.tar"]
    assert np.flatnonzero(selection.keep("a%2F0.tar")).tolist() == [int(i) for i in KEPT]


def test_shards_are_counted_once_though_later_ones_end_first(two_folders: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    select, ended = select_module.select, []

    def slow_first(annotations: Any, name: str, policy: PolicyConfig) -> pa.Table:
        time.sleep(0.2 if name.startswith("a") else 0)
        ended.append(name[0])
        return select(annotations, name, policy)

    monkeypatch.setattr(select_module, "select", slow_first)
    two_folders.filter()
    assert ended == ["b", "a"] and two_folders.counts["kept"] == 12


def test_an_error_in_one_shard_leaves_no_manifest(two_folders: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select_module, "judge", lambda table, policy: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        two_folders.filter()
    monkeypatch.undo()
    assert not (two_folders.folder / "S" / "manifest.json").exists()
    two_folders.filter()
    assert two_folders.counts["kept"] == 12


def test_the_same_words_do_nothing_and_others_are_refused(two_folders: Work, capsys: pytest.CaptureFixture[str]) -> None:
    two_folders.filter()
    file = two_folders.folder / "S" / "selection" / "a%2F0.tar.parquet"
    before = file.stat()
    two_folders.filter()
    assert file.stat().st_ino == before.st_ino
    assert "nothing is left to do" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"policy\.max_text_area: 0\.0 -> 0\.6"):
        two_folders.filter(policy=PolicyConfig(max_text_area=0.6))


def test_a_policy_that_asks_for_what_was_not_stored_is_refused(two_folders: Work) -> None:
    with pytest.raises(UserError, match=r"below ocr\.store_score=0\.3"):
        two_folders.filter(policy=PolicyConfig(min_score=0.2))


def test_a_selection_of_other_annotations_is_refused_and_made_anew(two_folders: Work, capsys: pytest.CaptureFixture[str]) -> None:
    two_folders.filter()
    open_selection(two_folders.config.output)
    write_tar(two_folders.folder / "corpus" / "a" / "0.tar", sample("new", noise_jpeg(1), "new"))
    two_folders.annotate()
    with pytest.raises(UserError, match=r"annotations .* changed since it was made \(20.*\); run raysys filter again"):
        open_selection(two_folders.config.output)
    capsys.readouterr()
    two_folders.filter()
    assert "the annotations changed since this selection was made" in capsys.readouterr().out
    assert two_folders.counts["samples"] == 11 and open_selection(two_folders.config.output).keep("a%2F0.tar").tolist() == [True]


# ---- the corpus -------------------------------------------------------------------------------------------------------


def test_a_changed_or_missing_shard_is_refused_before_anything_is_written(two_folders: Work) -> None:
    write_tar(two_folders.folder / "corpus" / "b" / "0.tar", sample("x", noise_jpeg(1)))
    with pytest.raises(UserError, match=r"^1 of 2 annotated shards .*/corpus/b/0\.tar first \(size:time .*annotate again$"):
        two_folders.filter()
    (two_folders.folder / "corpus" / "a" / "0.tar").unlink()
    with pytest.raises(
        UserError,
        match=r"^2 of 2 annotated shards .*/corpus/a/0\.tar first \(it is not there\); bring it back, or delete .*/A/shards/a%2F0\.tar\.parquet and annotate again$",
    ):
        two_folders.filter()
    assert not (two_folders.folder / "S").exists()


def test_a_shard_that_is_not_annotated_yet_is_no_matter(two_folders: Work) -> None:
    write_tar(two_folders.folder / "corpus" / "c" / "0.tar", sample("x", noise_jpeg(1)))
    two_folders.filter()
    assert two_folders.counts["samples"] == 20


def test_a_corpus_out_of_reach_is_said_and_an_error_only_for_shards(two_folders: Work, capsys: pytest.CaptureFixture[str]) -> None:
    (two_folders.folder / "corpus").rename(two_folders.folder / "moved")
    says = r"shards= copies from the corpus; say with corpus\.path= where it lies now \(.*no such file or folder"
    with pytest.raises(UserError, match=says):
        two_folders.export()
    assert not (two_folders.folder / "S").exists() and not (two_folders.folder / "F").exists()
    two_folders.filter()
    assert "filter: could not check that the corpus is as it was annotated" in capsys.readouterr().err
    moved = CorpusConfig(path=str(two_folders.folder / "moved"))
    two_folders.filter(corpus=moved)
    assert f"corpus.path={moved.path} selection=" in capsys.readouterr().out
    two_folders.filter(corpus=moved, shards=str(two_folders.folder / "F"))
    assert keys_of(two_folders.folder / "F" / "a" / "0.tar") == [f"a{i}" for i in KEPT]
    assert f"next:   raysys train corpus.path={two_folders.folder}/F model=" in capsys.readouterr().out  # selected already


def test_filter_decides_without_a_shard(two_folders: Work) -> None:
    for folder in "ab":
        file = two_folders.folder / "corpus" / folder / "0.tar"
        size, stamps = file.stat().st_size, stamp_of(file)
        file.write_bytes(bytes(size))
        file.chmod(0)
        os.utime(file, ns=stamps)
    two_folders.filter()
    assert two_folders.counts["kept"] == 12


def test_several_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source in ("x", "y z"):
        write_tar(tmp_path / source / "0.tar", sample(source, noise_jpeg(1)) + sample(f"{source}-text", noise_jpeg(2), "text"))
    work = Work(
        tmp_path, CorpusConfig(sources={"one": SourceConfig(str(tmp_path / "x")), "two": SourceConfig(str(tmp_path / "y z"))})
    )
    work.annotate()
    folder = work.export()
    assert keys_of(folder / "one" / "0.tar") == ["x"] and keys_of(folder / "two" / "0.tar") == ["y z"]
    capsys.readouterr()
    work.filter()
    assert f"corpus.sources.one.path={tmp_path}/x corpus.sources.two.path='{tmp_path}/y z' " in capsys.readouterr().out
    (tmp_path / "x").rename(tmp_path / "gone")  # the other source is still compared
    os.utime(tmp_path / "y z" / "0.tar", (1, 1))
    with pytest.raises(UserError, match=r"1 of 2 annotated shards .*/y z/0\.tar first"):
        work.filter()
    with pytest.raises(UserError, match=r"was made of other sources \(one, two\)"):
        work.filter(corpus=CorpusConfig(path=str(tmp_path / "y z")))


def test_a_shard_that_begins_with_an_underscore_is_found_in_its_source(tmp_path: Path) -> None:
    write_tar(tmp_path / "x" / "_0.tar", sample("a", noise_jpeg(1)))
    write_tar(tmp_path / "y" / "_0.tar", sample("b", noise_jpeg(1)))
    sources = {"one": SourceConfig(str(tmp_path / "x")), "_two": SourceConfig(str(tmp_path / "y"))}
    work = Work(tmp_path, CorpusConfig(sources=sources))
    work.annotate()
    folder = work.export()
    assert keys_of(folder / "one" / "_0.tar") == ["a"] and keys_of(folder / "_two" / "_0.tar") == ["b"]


# ---- subset.npy -------------------------------------------------------------------------------------------------------


def datacomp_subset(uids: list[str]) -> np.ndarray:
    """As its documentation has it."""
    return np.unique(np.array([(int(uid[:16], 16), int(uid[16:32], 16)) for uid in uids], np.dtype("u8,u8")))


def test_uids_are_read_as_datacomp_does() -> None:
    rng = np.random.default_rng(0)
    uids = [rng.bytes(16).hex() for _ in range(2000)] + ["f" * 32, "0" * 32, "0" * 31 + "1"]
    column = pa.chunked_array([[None, "no uid", "F" * 32, *uids[:1000]], uids[1000:], [uids[5]]])
    read = decode_uids(column)
    assert len(read) == len(uids) + 2
    np.testing.assert_array_equal(np.unique(read), datacomp_subset(uids))
    assert len(decode_uids(pa.chunked_array([[None, "no"]], pa.string()))) == 0


def test_the_subset_file_holds_the_kept_uids(work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    uids = [np.random.default_rng(i).bytes(16).hex() for i in range(30)]
    for shard in range(3):
        members: Members = []
        for uid in uids[10 * shard : 10 * shard + 10]:
            caption = "text" if uid in uids[::7] else "a thing"
            members += [*sample(uid[:9], noise_jpeg(1), caption), (f"{uid[:9]}.json", json.dumps({"uid": uid}).encode())]
        write_tar(work.folder / "corpus" / f"{shard}.tar", members + sample("none", noise_jpeg(2)))
    work.annotate()
    work.filter()
    subset = np.load(work.folder / "S" / "subset.npy")
    assert subset.dtype == np.dtype("u8,u8")
    np.testing.assert_array_equal(subset, datacomp_subset([uid for uid in uids if uid not in uids[::7]]))
    printed = f"DataComp subset: {work.folder}/S/subset.npy (3 kept samples have no uid and are not in it)"
    assert printed in capsys.readouterr().out


def test_no_uids_no_subset_file(two_folders: Work) -> None:
    two_folders.filter()
    assert not (two_folders.folder / "S" / "subset.npy").exists()


# ---- filtered tars ----------------------------------------------------------------------------------------------------


def test_the_kept_members_byte_for_byte(two_folders: Work, capsys: pytest.CaptureFixture[str]) -> None:
    folder = two_folders.export()
    for name in "ab":
        source, target = (f / name / "0.tar" for f in (two_folders.folder / "corpus", folder))
        kept = {n: data for n, data in members_of(source).items() if n[1] in KEPT}
        assert members_of(target) == kept and target.stat().st_size % tarfile.RECORDSIZE == 0
        assert keys_of(target) == [f"{name}{i}" for i in KEPT]
    assert "filter: 12 samples in 2 shards in" in capsys.readouterr().out
    assert read_json(str(folder / "sizes.json")) == {"a/0.tar": 6, "b/0.tar": 6}
    assert read_json(str(folder / "a" / "sizes.json")) == {"0.tar": 6}
    assert read_json(str(folder / "manifest.json"))["counts"] == {"shards": 2, "samples": 12, "shards_without_kept": 0}
    assert not (folder / "_tmp").exists()


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
def test_long_names_and_headers_stay_as_they_are(work: Work, form: int) -> None:
    long = "folder.with.dots/" + "ü" * 120
    file = work.folder / "corpus" / "0.tar"
    file.parent.mkdir()
    with tarfile.open(file, "w", format=form) as tar:
        for i in range(4):
            for suffix, data in (("jpg", noise_jpeg(i)), ("txt", b"text" if i == 1 else b"fine")):
                info = tarfile.TarInfo(f"{long}{i}.{suffix}")
                info.size, info.mtime, info.uname, info.uid = (
                    len(data),
                    1234567890.5 if form == tarfile.PAX_FORMAT else 7,
                    "ann",
                    99,
                )
                tar.addfile(info, io.BytesIO(data))
    work.annotate()
    target = work.export() / "0.tar"
    assert keys_of(target) == [f"{long}{i}" for i in (0, 2, 3)]
    raw = file.read_bytes()
    spans = {index: raw[start:end] for index, start, end in joined(iter_spans(str(file)))}
    written = target.read_bytes()
    assert written.startswith(spans[0] + spans[2] + spans[3])
    assert not written[len(spans[0]) * 3 :].strip(b"\0") and len(written) % tarfile.RECORDSIZE == 0


def joined(spans: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Index, first byte of its first span, end of its last."""
    found: dict[int, tuple[int, int]] = {}
    for index, start, end in spans:
        found[index] = (found.get(index, (start, 0))[0], end)
    return [(index, *span) for index, span in found.items()]


def test_names_that_climb_out_are_never_written(work: Work) -> None:
    members = sample("good", noise_jpeg(1)) + sample("../../evil", noise_jpeg(2)) + sample("/etc/evil", noise_jpeg(3))
    picture, caption = sample("twin", noise_jpeg(4))
    members += [
        picture,
        ("../.hidden", b"x"),
        ("../__evil__.sh", b"x"),
        caption,
    ]  # neighbours of a sample's members, and no part of it
    write_tar(work.folder / "corpus" / "0.tar", members)
    work.annotate()
    target = work.export() / "0.tar"
    assert work.verdicts("0.tar") == {"good": None, "../../evil": "unsafe_name", "/etc/evil": "unsafe_name", "twin": None}
    assert list(members_of(target)) == ["good.jpg", "good.txt", "twin.jpg", "twin.txt"]


def test_of_samples_with_one_key_the_first_is_written(work: Work) -> None:
    first, second = noise_jpeg(1), noise_jpeg(2)
    write_tar(work.folder / "corpus" / "0.tar", sample("x", first, "one") + sample("y", noise_jpeg(3)) + sample("x", second, "two"))
    work.annotate()
    members = members_of(work.export() / "0.tar")
    assert list(members) == ["x.jpg", "x.txt", "y.jpg", "y.txt"] and members["x.jpg"] == first and members["x.txt"] == b"one"
    assert work.counts["reasons"] == {"duplicate_key": 1}


@pytest.mark.parametrize("cut", ["in the last picture", "in the last caption", "in the last json", "after the last byte"])
def test_the_good_part_of_a_truncated_shard_is_written(work: Work, cut: str) -> None:
    members = [m for i in range(5) for m in sample(str(i), noise_jpeg(i), f"caption {i}", [f"caption {i}", "another"])]
    file = write_tar(work.folder / "corpus" / "0.tar", members)
    with tarfile.open(file) as tar:
        picture, caption, info = tar.getmembers()[-3:]
    end = {"picture": picture.offset_data + 100, "caption": caption.offset_data + 3, "json": info.offset_data + 3}
    file.write_bytes(file.read_bytes()[: end.get(cut.split()[-1], info.offset_data + info.size)])
    work.annotate()
    target = work.export() / "0.tar"
    good = 4 if cut in ("in the last picture", "in the last caption") else 5
    assert keys_of(target) == [str(i) for i in range(good)]
    whole = members[: 14 if cut == "in the last json" else 3 * good]
    assert members_of(target) == dict(whole) and target.stat().st_size % tarfile.RECORDSIZE == 0


def test_open_clip_reads_every_kept_sample_once(two_folders: Work) -> None:
    from open_clip_train.data import get_wds_dataset

    folder = two_folders.export()
    args = SimpleNamespace(
        train_data=str(folder / "b" / "0.tar"),
        train_num_samples=None,  # from sizes.json
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=1,
        workers=0,
        world_size=1,
    )
    loader = get_wds_dataset(args, lambda image: np.asarray(image).shape, is_train=True, tokenizer=lambda text: [text]).dataloader
    assert loader.num_samples == 6
    read = [(image, text) for images, texts in loader for image, text in zip(images, texts, strict=True)]
    assert sorted(text for _, text in read) == [f"b{i}" for i in KEPT]
    assert all(tuple(image) == (64, 64, 3) for image, _ in read)


def test_a_kill_leaves_no_part_of_a_tar_and_the_same_words_finish(two_folders: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = export._copy

    def killed(file: Any, start: int, end: int, out: Any) -> int:
        if "/b/" in file.path and start > 0:  # its second span: 7 to 9
            out.write(b"half")
            raise KeyboardInterrupt
        return copy(file, start, end, out)

    monkeypatch.setattr(export, "_copy", killed)
    monkeypatch.setattr(export, "SHARDS_AT_ONCE", 1)
    with pytest.raises(KeyboardInterrupt):
        two_folders.export()
    folder = two_folders.folder / "F"
    done = folder / "a" / "0.tar"
    assert list(folder.rglob("*.tar")) == [done] and not (folder / "manifest.json").exists()
    before = done.stat().st_ino
    (folder / "_tmp" / ".tmp-1").write_bytes(b"left by a process that could not tidy up")
    monkeypatch.undo()
    two_folders.export()
    assert done.stat().st_ino == before
    assert [keys_of(folder / name / "0.tar") for name in "ab"] == [[f"{name}{i}" for i in KEPT] for name in "ab"]
    assert not (folder / "_tmp").exists() and read_json(str(folder / "manifest.json"))["counts"]["samples"] == 12


def test_a_shard_that_changes_while_it_is_copied_is_refused(two_folders: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, source = export._copy, two_folders.folder / "corpus" / "a" / "0.tar"

    def touched(file: Any, start: int, end: int, out: Any) -> int:
        os.utime(source, (1, 1))
        return copy(file, start, end, out)

    monkeypatch.setattr(export, "_copy", touched)
    with pytest.raises(UserError, match=r"a/0\.tar: changed since it was annotated"):
        two_folders.export()
    assert not (two_folders.folder / "F" / "a").exists() or not list((two_folders.folder / "F" / "a").iterdir())


def test_a_tar_that_was_deleted_is_written_again(two_folders: Work) -> None:
    folder = two_folders.export()
    before = (folder / "b" / "0.tar").read_bytes()
    (folder / "b" / "0.tar").unlink()
    two_folders.export()
    assert (folder / "b" / "0.tar").read_bytes() == before


def test_a_folder_of_another_selection_is_refused(two_folders: Work) -> None:
    folder = two_folders.export()
    with pytest.raises(UserError, match="other settings"):
        two_folders.filter(output=str(two_folders.folder / "S2"), policy=PolicyConfig(max_text_area=0.6), shards=str(folder))
    with pytest.raises(UserError, match="lies in the corpus"):
        two_folders.filter(shards=str(two_folders.folder / "corpus"))


def test_a_shard_without_kept_samples_is_not_written(work: Work) -> None:
    write_tar(work.folder / "corpus" / "0.tar", sample("a", noise_jpeg(1), "text"))
    write_tar(work.folder / "corpus" / "1.tar", sample("b", noise_jpeg(1), "fine"))
    work.annotate()
    folder = work.export()
    assert [p.name for p in folder.glob("*.tar")] == ["1.tar"]
    assert read_json(str(folder / "sizes.json")) == {"1.tar": 1}
    assert read_json(str(folder / "manifest.json"))["counts"]["shards_without_kept"] == 1


def picture(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 10, 10)).save(buffer, form)
    return buffer.getvalue()


def test_good_rows_behind_damaged_ones_become_a_tar(work: Work) -> None:
    rows = [
        {"image": {"bytes": picture("JPEG"), "path": f"{i}.jpg"}, "caption": ["text" if i % 5 == 0 else "x"]} for i in range(15)
    ]
    path = work.folder / "corpus" / "a.parquet"
    path.parent.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    at = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data[at : at + 200] = b"\xff" * 200
    path.write_bytes(data)
    work.annotate()
    assert keys_of(work.export() / "a.tar") == ["1", "2", "3", "4", "11", "12", "13", "14"]


def test_parquet_becomes_tars(work: Work) -> None:
    uid = "0123456789abcdef" * 2
    rows = [
        {"image": {"bytes": picture("JPEG"), "path": "a.jpg"}, "caption": ["one", "two"], "uid": None},
        {"image": {"bytes": picture("PNG"), "path": "b.c.png"}, "caption": ["dots"], "uid": None},
        {"image": {"bytes": picture("WEBP"), "path": "d.jpg"}, "caption": ["misnamed ü"], "uid": uid},
        {"image": {"bytes": picture("JPEG"), "path": "e.jpg"}, "caption": ["text"], "uid": None},
        {"image": {"bytes": None, "path": "f.jpg"}, "caption": ["no picture"], "uid": None},
    ]
    (work.folder / "corpus" / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), work.folder / "corpus" / "data" / "train-0.parquet", row_group_size=2)
    work.annotate()
    target = work.export() / "data" / "train-0.tar"
    assert members_of(target) == {
        "a.jpg": picture("JPEG"),
        "a.txt": b"one",
        "a.json": b'{"captions": ["one", "two"]}',
        "b%2Ec.png": picture("PNG"),
        "b%2Ec.txt": b"dots",
        f"{uid}.webp": picture("WEBP"),
        f"{uid}.txt": "misnamed ü".encode(),
        f"{uid}.json": json.dumps({"captions": ["misnamed ü"], "uid": uid}, ensure_ascii=False).encode(),
    }
    assert keys_of(target) == ["a", "b%2Ec", uid]
    with tarfile.open(target) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in tar} == {(0, 0, 0, "")}
    again = Work(work.folder / "again", CorpusConfig(path=str(target.parent)))  # raysys reads what it wrote
    again.annotate()
    again.filter()
    assert again.verdicts("train-0.tar") == {"a": None, "b%2Ec": None, uid: None}
    assert len(np.load(again.folder / "S" / "subset.npy")) == 1


def test_folders_of_pictures_become_tars(work: Work) -> None:
    for name, caption in (("en", "captions.csv"), ("de", "captions.jsonl")):
        folder = work.folder / "corpus" / name
        (folder / "sub").mkdir(parents=True)
        for i in range(4):
            (folder / "sub" / f"{i}.jpg").write_bytes(noise_jpeg(i))
        lines = [(f"sub/{i}.jpg", "text" if i == 1 else f"{name} {i}") for i in range(4)] + [("gone.jpg", "gone")]
        if caption.endswith("csv"):
            (folder / caption).write_text("\n".join(["file_name,caption", *(f"{file},{said}" for file, said in lines)]))
        else:
            (folder / caption).write_text("\n".join(json.dumps({"image": file, "text": said}) for file, said in lines))
    work.annotate()
    folder = work.export()
    for name in ("en", "de"):
        expected = {f"sub/{i}.{s}": d for i in (0, 2, 3) for s, d in (("jpg", noise_jpeg(i)), ("txt", f"{name} {i}".encode()))}
        assert members_of(folder / name / "captions.tar") == expected


def test_two_captions_files_in_a_folder_become_two_tars(work: Work) -> None:
    folder = work.folder / "corpus"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(noise_jpeg(1))
    (folder / "captions.csv").write_text("file_name,caption\na.jpg,from csv")
    (folder / "captions.jsonl").write_text('{"image": "a.jpg", "text": "from json"}')
    work.annotate()
    written = work.export()
    assert members_of(written / "captions.csv.tar")["a.txt"] == b"from csv"
    assert members_of(written / "captions.jsonl.tar")["a.txt"] == b"from json"


def test_a_picture_that_is_gone_since_is_named(work: Work) -> None:
    folder = work.folder / "corpus"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(noise_jpeg(1))
    (folder / "captions.csv").write_text("file_name,caption\na.jpg,a thing")
    work.annotate()
    (folder / "a.jpg").unlink()
    with pytest.raises(UserError, match="the picture of a is gone since it was annotated"):
        work.export()
    assert not list((work.folder / "F").rglob("*.tar"))


@pytest.mark.parametrize(
    ("form", "suffix"),
    [
        ("JPEG", "jpg"),
        ("PNG", "png"),
        ("WEBP", "webp"),
        ("GIF", "gif"),
        ("BMP", "bmp"),
        ("TIFF", "tif"),
        ("AVIF", "avif"),
        ("ICO", "jpg"),
    ],
)
def test_suffixes_go_by_the_first_bytes(form: str, suffix: str) -> None:
    assert export._image_suffix(picture(form)) == suffix


def test_memory_stays_small_however_large_the_shard(work: Work) -> None:
    import tracemalloc

    data = jpeg(np.zeros((8, 8, 3), np.uint8)) + bytes(2 << 20)
    write_tar(work.folder / "corpus" / "0.tar", [m for i in range(30) for m in sample(str(i), data)])
    work.annotate()
    work.filter()
    tracemalloc.start()
    work.export()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 << 20, "60 MB are copied"
