"""Units of annotation work, in a plain process: which are made, what they leave, and what happens when one is done twice or half."""

from __future__ import annotations

import errno
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from conftest import noise_jpeg, sample, text_jpeg, write_tar
from oddities import odd_corpus
from test_formats import write_folder, write_parquet

from raysys.config import CorpusConfig, OcrConfig
from raysys.corpus.samples import Sample
from raysys.corpus.shards import Shard, iter_samples, open_corpus, plan_parts
from raysys.errors import UserError
from raysys.regions import units
from raysys.regions.annotations import SCHEMA, AnnotationFiles, Counts, read_head
from raysys.regions.annotator import Annotator
from raysys.regions.on_ray import Done, counts_of
from raysys.regions.units import Unit, UnitResult, annotate_unit, large_shards, look_at_shard, plan_units, unit_bytes


@pytest.fixture
def annotator(fake_engine: None) -> Annotator:
    return Annotator(OcrConfig(decode_timeout_s=5))


@pytest.fixture
def files(tmp_path: Path) -> AnnotationFiles:
    return AnnotationFiles(str(tmp_path / "A"), "mark")


def tar_of(path: Path, number: int, first: int = 0) -> Path:
    return write_tar(path, [m for i in range(first, first + number) for m in sample(f"{i:04d}", noise_jpeg(i), f"caption {i}")])


def corpus_of(path: Path) -> list[Shard]:
    return open_corpus(CorpusConfig(str(path))).shards


def nothing(counts: Counts, num_bytes: int) -> None:
    pass


def rows(files: AnnotationFiles) -> pa.Table:
    """As anyone would read them."""
    return ds.dataset(os.path.join(files.folder, "shards"), format="parquet").to_table()


# ---- planning --------------------------------------------------------------------------------------------------------


def test_a_unit_is_small_enough_for_all_actors_and_never_larger_than_asked() -> None:
    huge = [Shard("a.tar", "a.tar", 10 << 30, "")]
    assert unit_bytes(huge, actors=2, unit_mb=64) == 64 << 20
    assert unit_bytes(huge, actors=64, unit_mb=1024) == (10 << 30) // (8 * 64)
    assert unit_bytes([Shard("a.tar", "a.tar", 1000, "")], actors=2, unit_mb=64) == 4 << 20


def test_small_shards_share_a_unit_and_keep_their_order(files: AnnotationFiles) -> None:
    shards = [Shard(f"{i}.tar", f"{i}.tar", 30, "") for i in range(7)]
    made = list(plan_units(shards, {}, files, 100))
    assert [[s.name[0] for s in unit.shards] for unit in made] == [["0", "1", "2"], ["3", "4", "5"], ["6"]]
    assert [unit.num_bytes for unit in made] == [90, 90, 30]
    assert all(Unit.from_json(unit.to_json()) == unit for unit in made)


def test_a_large_shard_becomes_parts_of_which_finished_ones_are_left_out(
    tmp_path: Path, files: AnnotationFiles, annotator: Annotator
) -> None:
    tar_of(tmp_path / "c" / "big.tar", 30)
    tar_of(tmp_path / "c" / "small.tar", 2)
    shards = corpus_of(tmp_path / "c")
    assert [s.name for s in large_shards(shards, 10_000)] == ["big.tar"]
    plans = {"big.tar": files.save_plan(shards[0], plan_parts(shards[0].path, 10_000))}
    made = list(plan_units(shards, plans, files, 10_000))
    assert len(made) > 3 and sum(unit.part.count for unit in made if unit.part) == 30
    assert all(Unit.from_json(unit.to_json()) == unit for unit in made)

    assert annotate_unit(made[1], annotator, files, nothing).done == {}
    assert files.plan(shards[0]) == plans["big.tar"]
    left = list(plan_units(shards, plans, files, 10_000))
    assert [u.part for u in left] == [u.part for i, u in enumerate(made) if i != 1]
    results = [annotate_unit(unit, annotator, files, nothing) for unit in left]
    assert [name for result in results for name in result.done] == ["big.tar", "small.tar"]
    assert all(UnitResult.from_json(result.to_json()) == result for result in results)
    assert not os.path.exists(os.path.join(files.folder, "_parts", "big.tar"))


def test_parts_merge_into_what_one_look_gives(tmp_path: Path, files: AnnotationFiles, annotator: Annotator) -> None:
    odd_corpus(tmp_path / "c" / "odd.tar")
    [shard] = corpus_of(tmp_path / "c")
    whole = AnnotationFiles(str(tmp_path / "whole"), "mark")
    annotate_unit(Unit([shard]), annotator, whole, nothing)
    plan = files.save_plan(shard, plan_parts(shard.path, 5_000))
    assert len(plan.parts) > 3
    for unit in plan_units([shard], {shard.name: plan}, files, 5_000):
        annotate_unit(unit, annotator, files, nothing)
    assert rows(files).equals(rows(whole))
    heads = [read_head(f.shard_file(shard.name)) for f in (files, whole)]
    assert heads[0] == heads[1] and heads[0].counts.errors["duplicate_key"] == 1


def test_all_parts_there_but_not_merged_is_a_unit_of_its_own(tmp_path: Path, files: AnnotationFiles, annotator: Annotator) -> None:
    """The actor died between its last part and the merge."""
    tar_of(tmp_path / "c" / "big.tar", 10)
    [shard] = corpus_of(tmp_path / "c")
    plan = files.save_plan(shard, plan_parts(shard.path, 5_000))
    for part in plan.parts:
        files.write_part(shard.name, plan, part, look_at_shard(shard.path, shard.name, part, annotator)[0], damaged="")
    [unit] = plan_units([shard], {shard.name: plan}, files, 5_000)
    assert unit.part is None and unit.merge
    assert annotate_unit(unit, annotator, files, nothing).done["big.tar"].counts.samples == 10


def test_a_part_that_is_damaged_keeps_its_good_rows_and_the_others_theirs(
    tmp_path: Path, files: AnnotationFiles, annotator: Annotator
) -> None:
    """A row group in the middle of a Parquet file is garbage; the index of the rows behind it stays what it was."""
    samples = [Sample(i, f"{i}", noise_jpeg(i), captions=["x"]) for i in range(30)]
    (tmp_path / "c").mkdir()
    path = write_parquet(tmp_path / "c" / "a.parquet", samples, row_group_size=10, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    at = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data[at : at + 200] = b"\xff" * 200
    path.write_bytes(data)
    [shard] = corpus_of(tmp_path / "c")
    plan = files.save_plan(shard, plan_parts(shard.path, 1))
    for unit in plan_units([shard], {shard.name: plan}, files, 1):
        assert annotate_unit(unit, annotator, files, nothing).failed == {}
    assert rows(files)["index"].to_pylist() == [*range(10), *range(20, 30)]
    whole = AnnotationFiles(str(tmp_path / "whole"), "mark")
    annotate_unit(Unit([shard]), annotator, whole, nothing)
    assert rows(whole).equals(rows(files))
    assert "rows 10 to 19 cannot be read" in read_head(files.shard_file(shard.name)).damaged


def test_a_part_done_again_after_the_merge_changes_nothing(tmp_path: Path, files: AnnotationFiles, annotator: Annotator) -> None:
    """The actor died between the merge and its answer, and Ray gives the unit to another."""
    tar_of(tmp_path / "c" / "big.tar", 10)
    [shard] = corpus_of(tmp_path / "c")
    plan = files.save_plan(shard, plan_parts(shard.path, 5_000))
    made = list(plan_units([shard], {shard.name: plan}, files, 5_000))
    for unit in made:
        annotate_unit(unit, annotator, files, nothing)
    reported: list[Counts] = []
    again = annotate_unit(made[-1], annotator, files, lambda counts, _: reported.append(counts))
    assert again.done["big.tar"].counts.samples == 10 and reported == []
    assert not os.path.exists(os.path.join(files.folder, "_parts", "big.tar"))


# ---- the work --------------------------------------------------------------------------------------------------------


def test_every_odd_sample_has_its_reason_and_every_good_one_is_there(
    tmp_path: Path, files: AnnotationFiles, annotator: Annotator
) -> None:
    expected = odd_corpus(tmp_path / "c" / "odd.tar")
    result = annotate_unit(Unit(corpus_of(tmp_path / "c")), annotator, files, nothing)
    table = rows(files)
    assert table.schema.names == SCHEMA.names
    found = list(zip(table["key"].to_pylist(), table["error"].to_pylist(), strict=True))
    assert found[:-1] == [(key, reason) for key, reason in expected.items()]
    assert found[-1] == ("good0", "duplicate_key")
    counts = result.done["odd.tar"].counts
    assert counts.samples == len(found) and counts.without_caption == 1
    assert counts.errors == Counter(reason for _, reason in found if reason)
    looked_at = table.filter(pa.compute.is_null(table["error"]))
    assert min(looked_at["width"].to_pylist()) > 0
    turned = next(row for row in table.to_pylist() if row["key"] == "turned")
    assert (turned["width"], turned["height"]) == (48, 64)


def test_reports_add_up_to_the_counts(
    tmp_path: Path, files: AnnotationFiles, annotator: Annotator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "REPORT_EVERY_S", 0.0)
    pictures = [noise_jpeg(0), text_jpeg("BIG SALE"), b"junk", text_jpeg("HELLO")]
    write_tar(tmp_path / "c" / "a.tar", [m for i, p in enumerate(pictures) for m in sample(str(i), p)])
    total, seen_bytes = Counts(), 0

    def report(counts: Counts, num_bytes: int) -> None:
        nonlocal total, seen_bytes
        total += counts
        seen_bytes += num_bytes

    result = annotate_unit(Unit(corpus_of(tmp_path / "c")), annotator, files, report)
    assert total == result.done["a.tar"].counts == Counts(4, 2, 2, 2, 0, Counter(not_an_image=1))
    assert seen_bytes == sum(map(len, pictures))


def test_a_shard_done_before_in_the_same_unit_is_not_looked_at_again(
    tmp_path: Path, files: AnnotationFiles, annotator: Annotator
) -> None:
    for name in "ab":
        tar_of(tmp_path / "c" / f"{name}.tar", 2)
    unit = Unit(corpus_of(tmp_path / "c"))
    annotate_unit(replace(unit, shards=unit.shards[:1]), annotator, files, nothing)
    before = os.stat(files.shard_file("a.tar")).st_mtime_ns
    reported = Counts()
    result = annotate_unit(unit, annotator, files, lambda counts, _: reported.__iadd__(counts))
    assert list(result.done) == ["a.tar", "b.tar"] and reported.samples == 2
    assert os.stat(files.shard_file("a.tar")).st_mtime_ns == before


def test_a_shard_that_changes_while_it_is_read_fails_alone(tmp_path: Path, files: AnnotationFiles, annotator: Annotator) -> None:
    for name in "ab":
        tar_of(tmp_path / "c" / f"{name}.tar", 3)
    unit = Unit(corpus_of(tmp_path / "c"))

    def still_writing(counts: Counts, num_bytes: int) -> None:
        with open(unit.shards[0].path, "ab") as file:
            file.write(b"\0" * 512)

    result = annotate_unit(unit, annotator, files, still_writing)
    assert list(result.done) == ["b.tar"]
    assert "a.tar changed while it was read" in result.failed["a.tar"]
    assert os.listdir(os.path.join(files.folder, "shards")) == ["b.tar.parquet"]
    assert os.listdir(os.path.join(files.folder, "_tmp")) == []


def test_a_shard_that_changed_since_it_was_cut_is_cut_anew(tmp_path: Path, files: AnnotationFiles, annotator: Annotator) -> None:
    tar_of(tmp_path / "c" / "big.tar", 10)
    [old] = corpus_of(tmp_path / "c")
    plan = files.save_plan(old, plan_parts(old.path, 5_000))
    first, *others = plan_units([old], {old.name: plan}, files, 5_000)
    annotate_unit(first, annotator, files, nothing)
    tar_of(tmp_path / "c" / "big.tar", 12)
    for unit in others:
        assert "changed since it was cut" in annotate_unit(unit, annotator, files, nothing).failed["big.tar"]
    [new] = corpus_of(tmp_path / "c")
    assert files.plan(new) is None
    plan = files.save_plan(new, plan_parts(new.path, 5_000))
    for unit in plan_units([new], {new.name: plan}, files, 5_000):
        annotate_unit(unit, annotator, files, nothing)
    assert rows(files)["key"].to_pylist() == [f"{i:04d}" for i in range(12)]


def test_a_shard_that_is_gone_fails_alone(tmp_path: Path, files: AnnotationFiles, annotator: Annotator) -> None:
    for name in "ab":
        tar_of(tmp_path / "c" / f"{name}.tar", 2)
    unit = Unit(corpus_of(tmp_path / "c"))
    os.unlink(unit.shards[0].path)
    result = annotate_unit(unit, annotator, files, nothing)
    assert list(result.done) == ["b.tar"] and "a.tar" in result.failed["a.tar"]


def test_a_file_of_other_settings_is_refused_and_never_counted(
    tmp_path: Path, files: AnnotationFiles, annotator: Annotator
) -> None:
    """As a late actor of an earlier run would leave it in a folder that was emptied since."""
    for name in "ab":
        tar_of(tmp_path / "c" / f"{name}.tar", 2)
    shards = corpus_of(tmp_path / "c")
    done = Done()
    done.add("a.tar", annotate_unit(Unit(shards[:1]), annotator, files, nothing).done["a.tar"])
    annotate_unit(Unit(shards[1:]), annotator, replace(files, fingerprint="other"), nothing)
    with pytest.raises(UserError, match=r"b\.tar\.parquet: made with other settings; delete it"):
        counts_of(files, done)
    assert list(annotate_unit(Unit(shards), annotator, files, nothing).done) == ["a.tar", "b.tar"]  # looked at again
    assert counts_of(files, Done())["samples"] == 4


def test_a_full_disk_ends_the_work(
    tmp_path: Path, files: AnnotationFiles, annotator: Annotator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar_of(tmp_path / "c" / "a.tar", 2)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.ParquetWriter.write_table", full)
    with pytest.raises(OSError, match="No space left"):
        annotate_unit(Unit(corpus_of(tmp_path / "c")), annotator, files, nothing)


def test_what_dies_while_writing_leaves_no_file(tmp_path: Path, files: AnnotationFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyarrow.parquet.ParquetWriter.write_table", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        files.write_shard("a.tar", SCHEMA.empty_table(), made_of="1:2", damaged="")
    assert os.listdir(os.path.join(files.folder, "shards")) == []


def test_a_damaged_and_an_empty_shard_have_a_file_that_says_so(
    tmp_path: Path, files: AnnotationFiles, annotator: Annotator
) -> None:
    tar_of(tmp_path / "c" / "a.tar", 4)
    data = (tmp_path / "c" / "a.tar").read_bytes()
    (tmp_path / "c" / "a.tar").write_bytes(data[: len(data) // 2])
    write_tar(tmp_path / "c" / "b.tar", [])
    done = annotate_unit(Unit(corpus_of(tmp_path / "c")), annotator, files, nothing).done
    assert 0 < done["a.tar"].counts.samples < 4 and done["a.tar"].damaged
    assert (done["b.tar"].counts.samples, done["b.tar"].damaged) == (0, "")
    assert rows(files).num_rows == done["a.tar"].counts.samples


def test_the_same_corpus_in_every_format_gives_the_same_annotations(
    tmp_path: Path, annotator: Annotator, files: AnnotationFiles
) -> None:
    """But for shard, offset and size."""
    pictures = [noise_jpeg(0), text_jpeg("SALE"), b"<html>", noise_jpeg(3)]
    write_tar(tmp_path / "tar" / "a.tar", [m for i, p in enumerate(pictures) for m in sample(f"d/{i}", p, f"caption {i}")])
    samples = list(iter_samples(str(tmp_path / "tar" / "a.tar")))
    (tmp_path / "parquet").mkdir()
    write_parquet(tmp_path / "parquet" / "a.parquet", samples)
    for kind in ("csv", "jsonl"):
        write_folder(tmp_path / kind, samples, kind)
    found = {}
    for kind in ("tar", "parquet", "csv", "jsonl"):
        here = AnnotationFiles(str(tmp_path / "A" / kind), "mark")
        assert annotate_unit(Unit(corpus_of(tmp_path / kind)), annotator, here, nothing).failed == {}
        found[kind] = rows(here).drop_columns(["shard", "offset", "size"])
    assert found["tar"]["error"].to_pylist() == [None, None, "html", None]
    assert pa.compute.list_value_length(found["tar"]["regions"]).to_pylist() == [0, 1, 0, 0]
    assert all(table.equals(found["tar"]) for table in found.values())
