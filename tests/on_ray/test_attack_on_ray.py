"""``raysys attack`` as a user runs it: two layouts, twice, taken up, and what it says."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import noise_jpeg, write_tar

from raysys.cli import compose_config
from raysys.evaluation.class_sets import read_class_set
from raysys.models import load_model

pytestmark = pytest.mark.ray
Cli = Callable[..., tuple[int, str, str]]
NAMES = {"c0": "hen", "c1": "red fox", "c2": "cat", "c3": "ñandú"}


def folders(root: Path, count: int = 12) -> list[str]:
    """:returns: the words that name the set."""
    for i in range(count):
        file = root / f"c{i % 4}" / f"{i:03d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(noise_jpeg(i, 120))
    (root.parent / "classes.json").write_text(json.dumps(NAMES))
    return [f"imagenet.path={root}", f"imagenet.classes={root.parent / 'classes.json'}"]


def webdataset(root: Path) -> list[str]:
    for shard in range(3):
        members = [
            (f"s{shard}{i}.{suffix}", data)
            for i in range(4)
            for suffix, data in (("jpg", noise_jpeg(shard * 4 + i, 120)), ("cls", str(i).encode()))
        ]
        write_tar(root / "test" / f"{shard}.tar", members)
    (root / "test" / "nshards.txt").write_text("3")
    (root / "classnames.txt").write_text("\n".join(NAMES.values()))
    return [f"imagenet.path={root}"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def next_words(out: str) -> list[str]:
    line = next(line for line in out.splitlines() if line.startswith("next:"))
    return shlex.split(line.removeprefix("next:"))


@pytest.mark.parametrize("layout", [folders, webdataset])
def test_same_bytes_whatever_the_number_of_actors(
    layout: Callable[[Path], list[str]], ray_cluster: None, run_cli: Cli, tmp_path: Path
) -> None:
    words = ["attack", *layout(tmp_path / "val"), "attack=varied", "attack.classes=random", "attack.seed=3"]
    for actors in (1, 2):
        status, out, err = run_cli(*words, f"num_actors={actors}", f"output={tmp_path / f'O{actors}'}")
        assert status == 0, err
    one, two = (files_of(tmp_path / f"O{actors}") for actors in (1, 2))
    assert one.pop("manifest.json") != two.pop("manifest.json")  # times
    assert one == two and not any(name.startswith("_parts") for name in one)
    lines = out.splitlines()
    assert lines[0] == "attack: 12 attacked pictures of 4 classes; written class: random, seed 3"
    assert lines[1] == "attack: 0 of them carry their own class's name"
    assert lines[2] == "attack: text cut off at the edge on 0, nothing of it to be seen on 0"
    assert lines[3].startswith("attack: fonts: DejaVu") and lines[-2] == f"result: {tmp_path / 'O2'}"
    # the call that it prints finds the set, and its classes
    cfg = compose_config(next_words(out)[1], next_words(out)[2:])
    again = read_class_set(cfg.imagenet_attr, "imagenet_attr", attacked=True)
    assert again.class_names == list(NAMES.values()) and again.labels == read_class_set(cfg.imagenet).labels
    assert again.written is not None and all(w != label for w, label in zip(again.written, again.labels, strict=True))

    before = files_of(tmp_path / "O1")
    status, out, _ = run_cli(*words, "num_actors=2", f"output={tmp_path / 'O1'}")
    assert status == 0 and out.splitlines()[0] == "attack: nothing is left to do, all 12 attacked pictures are there"
    assert files_of(tmp_path / "O1") == before


def test_broken_picture_is_one_line_and_finished_units_stay(ray_cluster: None, run_cli: Cli, tmp_path: Path) -> None:
    words = ["attack", *folders(tmp_path / "val", 132), "attack.classes=random", "num_actors=1"]
    last = tmp_path / "val" / "c3" / "131.jpg"  # of the third unit: the set is sorted by class
    whole = last.read_bytes()
    last.write_bytes(b"no picture")
    out = tmp_path / "O"
    status, _, err = run_cli(*words, f"output={out}")
    assert status == 2 and "Traceback" not in err
    assert "c3/131.jpg: cannot be read as a picture" in err.splitlines()[-1] and "mend it" in err.splitlines()[-1]
    assert sorted(file.name for file in (out / "_parts").iterdir()) == ["00000.parquet", "00001.parquet"]
    drawn = {name: (out / name).stat().st_mtime_ns for name in ("c0/000.jpg", "c1/001.jpg", "c3/003.jpg")}
    assert not (out / "attack.parquet").exists()

    last.write_bytes(whole)
    assert run_cli(*words, f"output={out}")[0] == 0
    for name in ("c0/000.jpg", "c1/001.jpg"):
        assert (out / name).stat().st_mtime_ns == drawn[name]
    assert run_cli(*words, f"output={tmp_path / 'fresh'}")[0] == 0
    taken_up, fresh = files_of(out), files_of(tmp_path / "fresh")
    assert taken_up.pop("manifest.json") and fresh.pop("manifest.json") and taken_up == fresh

    last.write_bytes(whole + b" ")
    status, _, err = run_cli(*words, f"output={out}")
    assert status == 2 and "its source has changed since; give a new folder" in err


def test_confusions_then_nearest_text(ray_cluster: None, run_cli: Cli, tmp_path: Path, tiny_model: str) -> None:
    set_words = folders(tmp_path / "val")
    rows = {"picture": ["c0/000.jpg", "c0/004.jpg", "c1/001.jpg"], "true_class": [0, 0, 1], "predicted_class": [3, 3, 1]}
    pq.write_table(pa.table(rows), tmp_path / "imagenet_m.parquet")
    torch.save(load_model(tiny_model, "random").model.state_dict(), tmp_path / "weights.pt")
    words = ["attack", *set_words, "attack.classes=confusions", f"attack.predictions={tmp_path / 'imagenet_m.parquet'}"]
    words += ["imagenet.templates=simple", "attack.font_px=20", "attack.x_px=5", "attack.y_px=90"]
    status, _, err = run_cli(*words, f"output={tmp_path / 'O'}")
    assert status == 2 and "3 of 4 classes are never taken for another" in err and not (tmp_path / "O").exists()
    model = [f"attack.model={tiny_model}", f"attack.pretrained={tmp_path / 'weights.pt'}"]
    status, out, err = run_cli(*words, *model, f"output={tmp_path / 'O'}")
    assert status == 0, err
    assert out.splitlines()[0].endswith("written class: confusions for 1 classes, nearest text for 3")
    assert "imagenet.templates=simple" in next_words(out) and "imagenet_attr.templates=simple" in next_words(out)
    counts = json.loads((tmp_path / "O" / "manifest.json").read_text())["counts"]
    assert (counts["classes_by_confusions"], counts["classes_by_nearest_text"], counts["self_attacks"]) == (1, 3, 0)
    written = {(row["true_class"], row["written_class"]) for row in pq.read_table(tmp_path / "O" / "attack.parquet").to_pylist()}
    assert len(written) == 4 and (0, 3) in written


def test_what_cannot_be_seen_or_drawn_is_said(ray_cluster: None, run_cli: Cli, tmp_path: Path) -> None:
    words = ["attack", *folders(tmp_path / "val")]
    (tmp_path / "map.json").write_text(json.dumps({"hen": "hen", "red fox": "hen", "cat": "red fox", "ñandú": "cat"}))
    for name in ("c0/000.jpg", "c1/001.jpg"):
        (tmp_path / "val" / name).write_bytes(noise_jpeg(7, 40))
    words.append(f"attack.classes={tmp_path / 'map.json'}")
    status, out, _ = run_cli(*words, f"output={tmp_path / 'O'}")
    assert status == 0 and "3 of them carry their own class's name" in out
    assert "nothing of it to be seen on 2" in out
    manifest = json.loads((tmp_path / "O" / "manifest.json").read_text())
    assert manifest["counts"]["invisible"] == 2 and manifest["counts"]["self_attacks"] == 3
    assert [(font["name"], font["pictures"]) for font in manifest["fonts"]] == [("DejaVuSans.ttf", 12)]

    (tmp_path / "map.json").write_text(json.dumps({"hen": "ñandú", "red fox": "hen", "cat": "hen", "ñandú": "cat"}))
    status, _, err = run_cli(*words, "attack.fonts=[cmr10]", f"output={tmp_path / 'P'}")
    assert status == 2 and "cmr10.ttf has no character 'ñ' (U+00F1), which 'ñandú' needs; give attack.fonts" in err
    assert not (tmp_path / "P").exists()
