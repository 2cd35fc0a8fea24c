"""An attacked set has the layout of its source, and the same words give the same bytes."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import S3Server, jpeg, noise_jpeg, write_tar
from PIL import Image

from raysys.attack.drawing import draw_attack, read_fonts, to_jpeg
from raysys.attack.layouts import jpeg_name, target_names, to_parquet, units_of, write_lists, write_unit
from raysys.config import AttackSettings, ClassSetConfig
from raysys.errors import UserError
from raysys.evaluation.class_sets import ClassSet, read_class_set
from raysys.evaluation.pictures import Picture
from raysys.storage import read_bytes, write_bytes, write_json

SETTINGS = AttackSettings(font_px=12, x_px=4, y_px=4)
NAMES = ["hen", "red fox", "cat, domestic"]


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(noise_jpeg(seed))).save(file, "PNG")
    return file.getvalue()


def folders(root: Path) -> ClassSetConfig:
    for i, (folder, name) in enumerate([("b", "2.PNG"), ("a", "1.jpg"), ("c", "x/3.JPEG"), ("a", "0.webp")]):
        file = root / folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(noise_jpeg(i) if name.lower().endswith("g") and "PNG" not in name else png(i))
    write_json(str(root.parent / "mine.json"), {"a": "hen", "b": "red fox", "c": "cat, domestic"})
    return ClassSetConfig(path=str(root), classes=str(root.parent / "mine.json"))


def flat(root: Path) -> ClassSetConfig:
    root.mkdir()
    for i, name in enumerate(["2.png", "1, first.jpg", "3.jpg"]):
        (root / name).write_bytes(noise_jpeg(i))
    (root / "labels.csv").write_text('picture,class\n2.png,b\n"1, first.jpg",a\n3.jpg,b\n')
    write_json(str(root.parent / "mine.json"), {"a": "hen", "b": "red fox", "c": "cat, domestic"})
    return ClassSetConfig(path=str(root), classes=str(root.parent / "mine.json"))


def webdataset(root: Path) -> ClassSetConfig:
    for shard in range(2):
        members = []
        for i in range(3):
            key = f"s{shard}{i:04d}"
            members += [
                (f"{key}.cls", str((i + shard) % 3).encode()),
                (f"{key}.webp" if i else f"{key}.jpg", noise_jpeg(i + 5 * shard)),
            ]
        write_tar(root / "test" / f"{shard}.tar", members)
    (root / "test" / "nshards.txt").write_text("2")
    (root / "classnames.txt").write_text("\n".join(NAMES))
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\nart of {c}")
    return ClassSetConfig(path=str(root))


def parquet(root: Path) -> ClassSetConfig:
    features = {"image": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}}
    for part in range(2):
        images = [{"bytes": noise_jpeg(i + 9 * part), "path": f"v{i}.png" if i else None} for i in range(5)]
        columns = {"label": [0, 1, 2, 1, 0], "note": list("äbcde"), "image": images}
        table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        (root / "data").mkdir(parents=True, exist_ok=True)
        pq.write_table(table, root / "data" / f"validation-0000{part}-of-00002.parquet", row_group_size=2)
    return ClassSetConfig(path=str(root))


LAYOUTS: dict[str, Callable[[Path], ClassSetConfig]] = {
    "folders": folders, "flat": flat, "webdataset": webdataset, "parquet": parquet,
}  # fmt: skip


def attack(clean: ClassSet, out: Path, settings: AttackSettings = SETTINGS) -> list[int]:
    """The whole set, as the verb writes it. :returns: the written classes."""
    written = [(label + 1) % 3 for label in clean.labels]
    units = [write_unit(unit, clean.layout, str(out), settings, read_fonts([])) for unit in reversed(units_of(clean, written))]
    write_lists(clean, str(out))
    (out / "attack.parquet").write_bytes(to_parquet([row for rows in reversed(units) for row in rows]))
    return written


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attacked_set_is_read_as_its_source_is(layout: str, tmp_path: Path) -> None:
    cfg = LAYOUTS[layout](tmp_path / "clean")
    clean = read_class_set(cfg)
    assert clean.layout == layout
    written = attack(clean, tmp_path / "out")
    again = read_class_set(ClassSetConfig(path=str(tmp_path / "out")), "imagenet_attr", attacked=True)
    assert (again.layout, again.labels, again.written) == (layout, clean.labels, written)
    assert (again.class_ids, again.class_names) == (clean.class_ids, clean.class_names)
    assert layout != "webdataset" or again.templates == clean.templates == ["a photo of a {}.", "art of {}"]
    assert [picture.name for picture in again.pictures] == target_names(clean)
    rows = {row["picture"]: row for row in pq.read_table(tmp_path / "out" / "attack.parquet").to_pylist()}
    for source, target, index in zip(clean.pictures, again.pictures, written, strict=True):
        text = NAMES[index]
        image, how = draw_attack(
            Image.open(io.BytesIO(source.read())), text, name=source.name, settings=SETTINGS, fonts=read_fonts([])
        )
        assert target.read() == to_jpeg(image)
        assert rows[target.name]["text"] == text and rows[target.name]["visible_share"] == pytest.approx(how.visible_share)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_words_give_the_same_bytes(layout: str, tmp_path: Path) -> None:
    clean = read_class_set(LAYOUTS[layout](tmp_path / "clean"))
    varied = replace(SETTINGS, random_place=True, random_color=True, max_rotation_deg=20, background=0.5, overflow="wrap")
    for out in ("one", "two"):
        attack(clean, tmp_path / out, varied)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_a_picture_is_attacked_alike_whatever_others_there_are(tmp_path: Path) -> None:
    clean = read_class_set(folders(tmp_path / "clean"))
    varied = replace(SETTINGS, random_place=True, random_color=True, max_rotation_deg=20)
    attack(clean, tmp_path / "all", varied)
    attack(replace(clean, pictures=clean.pictures[2:3], labels=clean.labels[2:3]), tmp_path / "one", varied)
    assert (tmp_path / "one" / "b" / "2.JPEG").read_bytes() == (tmp_path / "all" / "b" / "2.JPEG").read_bytes()


# ---- what lies there ---------------------------------------------------------------------------------------------------


def test_folders_hold_jpegs_under_the_sources_names(tmp_path: Path) -> None:
    attack(read_class_set(folders(tmp_path / "clean")), tmp_path / "out")
    assert list(files_of(tmp_path / "out")) == ["a/0.JPEG", "a/1.jpg", "attack.parquet", "b/2.JPEG", "c/x/3.JPEG", "classes.json"]
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == {"a": "hen", "b": "red fox", "c": "cat, domestic"}


def test_rows_say_what_stands_where(tmp_path: Path) -> None:
    attack(read_class_set(folders(tmp_path / "clean")), tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "attack.parquet")
    assert [row["picture"] for row in table.to_pylist()] == ["a/0.JPEG", "a/1.jpg", "b/2.JPEG", "c/x/3.JPEG"]
    row = table.to_pylist()[2]
    assert len(row.pop("font_sha256")) == 64
    assert 0.5 < row.pop("visible_share") < 1  # 64 px are too narrow
    assert row == {
        "picture": "b/2.JPEG", "true_class": 1, "written_class": 2, "text": "cat, domestic", "font": "DejaVuSans.ttf", "font_px": 12,
        "color": [255, 0, 0], "x_px": 4, "y_px": 4, "rotation_deg": 0, "background": None,
    }  # fmt: skip
    kinds = {name: str(table.schema.field(name).type) for name in ("color", "background", "rotation_deg", "visible_share")}
    assert (
        kinds["color"] == kinds["background"] == "list<element: uint8>"
        and kinds["visible_share"] == kinds["rotation_deg"] == "float"
    )


def test_flat_set_gets_a_label_file(tmp_path: Path) -> None:
    attack(read_class_set(flat(tmp_path / "clean")), tmp_path / "out")
    with (tmp_path / "out" / "labels.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["picture", "class"], ["1, first.jpg", "a"], ["2.JPEG", "b"], ["3.jpg", "b"]]


def test_webdataset_keeps_keys_order_and_lists(tmp_path: Path) -> None:
    attack(read_class_set(webdataset(tmp_path / "clean")), tmp_path / "out")
    out = tmp_path / "out"
    assert (out / "test" / "nshards.txt").read_text() == "2\n" and (out / "classnames.txt").read_text().splitlines() == NAMES
    assert (out / "zeroshot_classification_templates.txt").read_text().splitlines() == ["a photo of a {c}.", "art of {c}"]
    with tarfile.open(out / "test" / "1.tar") as tar:
        members = tar.getmembers()
        names = ["s10000.jpg", "s10000.cls", "s10001.jpg", "s10001.cls", "s10002.jpg", "s10002.cls"]
        assert [member.name for member in members] == names
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
        labels = [tar.extractfile(name).read() for name in names[1::2]]  # type: ignore[union-attr]
    assert labels == [b"1", b"2", b"0"]


def test_parquet_keeps_all_but_the_pictures(tmp_path: Path) -> None:
    attack(read_class_set(parquet(tmp_path / "clean")), tmp_path / "out")
    name = "data/validation-00001-of-00002.parquet"
    before, after = (pq.read_table(tmp_path / folder / name) for folder in ("clean", "out"))
    assert after.schema.equals(before.schema, check_metadata=True) and b"huggingface" in after.schema.metadata
    assert after.drop_columns("image").equals(before.drop_columns("image"))
    assert [image["path"] for image in after["image"].to_pylist()] == [None, "v1.JPEG", "v2.JPEG", "v3.JPEG", "v4.JPEG"]


def test_parquet_with_plain_bytes_stays_so(tmp_path: Path) -> None:
    (tmp_path / "clean").mkdir()
    schema = pa.schema({"jpg": pa.large_binary(), "label": pa.int16()})
    pq.write_table(pa.table({"jpg": [noise_jpeg(1), noise_jpeg(2)], "label": [0, 2]}, schema), tmp_path / "clean" / "val.parquet")
    write_json(str(tmp_path / "mine.json"), {"a": "hen", "b": "red fox", "c": "cat, domestic"})
    attack(read_class_set(ClassSetConfig(path=str(tmp_path / "clean"), classes=str(tmp_path / "mine.json"))), tmp_path / "out")
    after = pq.read_table(tmp_path / "out" / "val.parquet")
    assert after.schema.equals(schema) and after["label"].to_pylist() == [0, 2]
    assert not np.array_equal(pixels(after["jpg"][1].as_py()), pixels(noise_jpeg(2)))


# ---- units -------------------------------------------------------------------------------------------------------------


def test_units_are_tars_and_parquet_files_or_64_pictures(tmp_path: Path) -> None:
    for make, sizes in ((webdataset, [3, 3]), (parquet, [5, 5])):
        clean = read_class_set(make(tmp_path / make.__name__))
        assert [len(unit) for unit in units_of(clean, [0] * len(clean.labels))] == sizes
    pictures = [Picture(f"a/{i}.jpg", "") for i in range(130)]
    many = ClassSet(pictures, [0] * 130, ["a"], ["hen"], ["{}"], "mark")
    units = units_of(many, [0] * 130)
    assert [len(unit) for unit in units] == [64, 64, 2]
    assert [job.target for unit in units for job in unit] == [picture.name for picture in pictures]


def test_names_keep_jpegs_and_turn_the_rest() -> None:
    assert [jpeg_name(n) for n in ("a/b.JPEG", "a/b.jpg", "a/b.x.png", "a.b/c")] == [
        "a/b.JPEG",
        "a/b.jpg",
        "a/b.x.JPEG",
        "a.b/c.JPEG",
    ]
    clash = ClassSet([Picture("a/1.gif", ""), Picture("a/1.png", "")], [0, 0], ["a"], ["hen"], ["{}"], "mark")
    with pytest.raises(UserError, match=r"a/1\.JPEG: two source pictures"):
        target_names(clash)


def test_broken_picture_is_named(tmp_path: Path) -> None:
    clean = read_class_set(folders(tmp_path / "clean"))
    (tmp_path / "clean" / "a" / "1.jpg").write_bytes(jpeg(np.zeros((9, 9, 3), np.uint8))[:-9])
    with pytest.raises(UserError, match=r"a/1.jpg: cannot be read as a picture .* mend it or take it out"):
        attack(clean, tmp_path / "out")


# ---- on an object store ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["folders", "webdataset", "parquet"])
def test_set_on_an_object_store_is_the_one_on_disk(layout: str, s3: S3Server, tmp_path: Path) -> None:
    cfg = LAYOUTS[layout](tmp_path / "clean")
    clean = read_class_set(cfg)
    attack(clean, tmp_path / "out")
    bucket = s3.new_bucket()
    for name, data in files_of(tmp_path / "clean").items():
        write_bytes(f"{bucket}/clean/{name}", data)
    far = read_class_set(replace(cfg, path=f"{bucket}/clean"))
    for unit in units_of(far, [(label + 1) % 3 for label in far.labels]):
        write_unit(unit, layout, f"{bucket}/out", SETTINGS, read_fonts([]))
    write_lists(far, f"{bucket}/out")
    for name, data in files_of(tmp_path / "out").items():
        assert name == "attack.parquet" or read_bytes(f"{bucket}/out/{name}") == data
