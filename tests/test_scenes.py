"""The embedded corpus: pure functions of (seed, index), the promised shares, and readable files."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raysys.corpus import scenes


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def test_draw_scene_same_seed_and_index_same_pixels_whatever_was_drawn_before() -> None:
    first = scenes.draw_scene(3, 7)
    scenes.draw_scene(3, 8)
    again = scenes.draw_scene(3, 7)
    assert np.array_equal(first.image, again.image)
    assert (first.caption, first.written, first.has_object) == (again.caption, again.written, again.has_object)
    assert first.image.shape == (scenes.SIDE_PX, scenes.SIDE_PX, 3) and first.image.dtype == np.uint8


@pytest.mark.parametrize(("seed", "index"), [(3, 8), (4, 7)])
def test_draw_scene_other_seed_or_index_other_pixels(seed: int, index: int) -> None:
    assert not np.array_equal(scenes.draw_scene(3, 7).image, scenes.draw_scene(seed, index).image)


def test_draw_scene_keeps_the_shares_of_text_and_of_text_only() -> None:
    drawn = [scenes.draw_scene(0, i) for i in range(600)]
    with_text = [scene for scene in drawn if scene.written]
    assert len(with_text) / len(drawn) == pytest.approx(scenes.TEXT_SHARE, abs=0.06)
    only_text = [scene for scene in with_text if not scene.has_object]
    assert len(only_text) / len(with_text) == pytest.approx(scenes.TEXT_ONLY_SHARE, abs=0.08)
    assert all(scene.has_object for scene in drawn if not scene.written)
    assert {scene.kind for scene in drawn} == set(scenes.KINDS)


def test_written_words_stand_in_the_caption_and_name_the_kind() -> None:
    for i in range(60):
        scene = scenes.draw_scene(1, i, text_share=1.0)
        assert scene.kind in scene.written.lower().split()
        assert set(scene.written.lower().split()) <= set(scene.caption.split())


def test_text_shares_of_zero_and_one_are_exact() -> None:
    assert not any(scenes.draw_scene(0, i, text_share=0.0).written for i in range(40))
    only_text = [scenes.draw_scene(0, i, text_share=1.0, text_only_share=1.0) for i in range(40)]
    assert all(scene.written and not scene.has_object for scene in only_text)


def test_object_and_text_change_the_picture_of_the_same_seed() -> None:
    """The flags are true of the pixels: the same index without its text or its object is another picture."""
    index = next(i for i in range(100) if scenes.draw_scene(0, i).written and scenes.draw_scene(0, i).has_object)
    both = scenes.draw_scene(0, index).image
    text_only = scenes.draw_scene(0, index, text_only_share=1.0).image
    assert not np.array_equal(both, text_only)


def test_caption_of_says_what_it_is_given() -> None:
    assert scenes.caption_of("apple") == "an apple"
    assert scenes.caption_of("apple", "red", "on the grass") == "a red apple on the grass"
    assert scenes.caption_of("cup", colour="orange") == "an orange cup"


def test_evaluation_streams_are_disjoint_from_training() -> None:
    train = {scenes.draw_scene(0, i, text_share=0.0).image.tobytes() for i in range(60)}
    clean = [scenes.draw_clean_scene(0, i) for i in range(60)]
    assert train.isdisjoint(scene.image.tobytes() for scene in clean)
    assert all(scene.has_object and not scene.written for scene in clean)


def test_write_corpus_shards_are_readable_and_complete(tmp_path: Path) -> None:
    paths = scenes.write_corpus(tmp_path, num_samples=7, seed=5, samples_per_shard=3)
    assert [path.name for path in paths] == ["train-00000.tar", "train-00001.tar", "train-00002.tar"]
    files = {name: data for path in paths for name, data in members(path).items()}
    assert sorted(files) == sorted(f"{i:08d}.{extension}" for i in range(7) for extension in ("jpg", "txt", "json"))
    expected = scenes.draw_scene(5, 4)
    truth = json.loads(files["00000004.json"])
    assert truth == {"caption": expected.caption, "kind": expected.kind, "written": expected.written,
                     "has_object": expected.has_object}  # fmt: skip
    assert files["00000004.txt"].decode() == expected.caption
    decoded = np.asarray(Image.open(io.BytesIO(files["00000004.jpg"])), dtype=int)
    assert np.abs(decoded - expected.image).mean() < 12  # JPEG


def test_write_shard_alone_gives_the_same_bytes_as_within_the_corpus(tmp_path: Path) -> None:
    whole = scenes.write_corpus(tmp_path / "whole", num_samples=7, seed=5, samples_per_shard=3)
    path, first_index, count = scenes.shard_plan(tmp_path / "alone", num_samples=7, samples_per_shard=3)[2]
    scenes.write_shard(path, first_index, count, seed=5)
    assert (first_index, count) == (6, 1)
    assert path.read_bytes() == whole[2].read_bytes()
    assert not list(path.parent.glob("*.tmp"))


def test_write_evaluation_sets_folders_classes_and_distinct_captions(tmp_path: Path) -> None:
    scenes.write_evaluation_sets(tmp_path, seed=0, per_kind=2, num_retrieval=40)
    classes = json.loads((tmp_path / "classes.json").read_text())
    assert sorted(classes) == sorted(path.name for path in (tmp_path / "val").iterdir()) == sorted(scenes.KINDS)
    assert all(len(list((tmp_path / "val" / folder).glob("*.jpg"))) == 2 for folder in classes)
    files = members(tmp_path / "retrieval-00000.tar")
    captions = [json.loads(data)["captions"] for name, data in files.items() if name.endswith(".json")]
    assert len(captions) == 40 == len({caption for [caption] in captions})
    assert [[files[name].decode()] for name in files if name.endswith(".txt")] == captions
    with pytest.raises(ValueError, match="512"):
        scenes.write_evaluation_sets(tmp_path, seed=0, per_kind=0, num_retrieval=513)
