"""Rows for people: from all over the corpus, few, and exact where there are few."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysys.errors import UserError
from raysys.patience import StorageDown
from raysys.regions import gallery
from raysys.regions.gallery import groups_of_annotations, read_sample, show_rows

COLUMNS = ("shard", "index")


def write(folder: Path, sizes: dict[str, int], *, row_group: int = 10) -> Path:
    for name, size in sizes.items():
        table = pa.table({"shard": pa.array([name] * size, pa.string()), "index": pa.array(range(size), pa.int32())}).append_column(
            "other", pa.array([0.5] * size)
        )
        file = folder / f"{name}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.replace_schema_metadata({"raysys.identity": f"of {name}"}), file, row_group_size=row_group)
    return folder


def test_few_rows_are_all_read_in_order(tmp_path: Path) -> None:
    folder = write(tmp_path, {"b/1.tar": 25, "a.tar": 3, "empty.tar": 0})
    table, num_rows, num_files = read_sample(str(folder), COLUMNS)
    assert num_rows == table.num_rows == 28 and num_files == 3
    assert table["index"].to_pylist() == [*range(3), *range(25)]
    assert table["identity"].to_pylist() == ["of a.tar"] * 3 + ["of b/1.tar"] * 25


def test_many_rows_are_taken_from_all_over_the_shards_in_proportion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "MAX_ROWS", 62)
    monkeypatch.setattr(gallery, "MAX_SHARDS", 4)
    folder = write(tmp_path, {f"{i:02d}": 10 if i == 0 else 100 for i in range(10)})
    table, num_rows, num_files = read_sample(str(folder), COLUMNS)
    assert table.num_rows == 62 and num_rows == 310 and num_files == 10
    of_shard = {name: [row["index"] for row in table.to_pylist() if row["shard"] == name] for name in ("00", "03", "06", "09")}
    assert [len(rows) for rows in of_shard.values()] == [2, 20, 20, 20]
    assert of_shard["03"][0] == 0 and of_shard["03"][-1] >= 90  # both ends of a shard


class Down:
    """A store that gives nothing but errors, after some patience."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, row: dict[str, Any], roots: dict[str, str]) -> bytes:
        self.asked += 1
        raise StorageDown(errno.ECONNABORTED, "Service Unavailable", row["shard"])


def test_a_store_that_does_not_answer_is_not_asked_for_every_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "sample_bytes", down := Down())
    shown = show_rows([{"shard": "a.tar"}] * 500, {}, lambda row, data: data)
    assert (
        down.asked <= gallery.PICTURES_AT_ONCE and len(shown) == 500 and all(isinstance(one, OSError | ValueError) for one in shown)
    )


def test_pictures_that_cost_much_are_few() -> None:
    assert gallery.most_pictures(pa.table({"shard": ["a.tar", "b.tar"], "index": [9, 9999]})) == 12
    assert gallery.most_pictures(pa.table({"shard": ["a.tar", "captions.csv"], "index": [9, 999]}), 18) == 18
    assert gallery.most_pictures(pa.table({"shard": ["a.tar", "captions.csv"], "index": [9, 9999]}), 18) == 4


def test_one_huge_shard_is_not_read_from_its_beginning_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "MAX_ROWS", 30)
    table, _, _ = read_sample(str(write(tmp_path, {"a": 1000})), COLUMNS)
    assert [row // 10 for row in table["index"].to_pylist()[::10]] == [0, 50, 99]


def test_a_folder_without_files_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.parquet"):
        read_sample(str(tmp_path), COLUMNS)


def test_groups_go_from_the_least_text_to_the_most() -> None:
    area = [0.0, 0.5, None, *(0.01 * i for i in range(1, 30)), 0.0]
    table = pa.table({"text_area": pa.array(area, pa.float32()), "error": pa.array([None, None, "html", *[None] * 30])})
    groups = groups_of_annotations(table)
    assert groups["With text, the least first"].tolist() == list(range(3, 15))
    assert groups["With text, the most first"].tolist()[:2] == [1, 31]
    assert groups["Without text"].tolist() == [0, 32]
