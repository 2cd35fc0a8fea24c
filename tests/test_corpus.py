"""Pictures, shards, order."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import jpeg, noise_jpeg, sample, write_tar
from PIL import Image

from raysys.corpus.images import BrokenImage, decode
from raysys.corpus.index import PictureReader, ShardRows, build_index
from raysys.corpus.order import Order
from raysys.corpus.prefetch import prefetch
from raysys.corpus.shards import DamagedShard, iter_samples, open_corpus
from raysys.storage import UserError


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, "missing_image"),
        (b"", "empty"),
        (b"<html></html>", "not_an_image"),
        (noise_jpeg(1, 200)[:700], "undecodable"),
        (_saved(Image.new("L", (20_000, 10_000)), "PNG"), "too_large"),
    ],
)
def test_a_broken_picture_has_a_reason(data: bytes | None, reason: str) -> None:
    with pytest.raises(BrokenImage) as caught:
        decode(data)
    assert caught.value.reason == reason


def test_exif_rotation_is_applied() -> None:
    image = Image.new("RGB", (60, 30), (200, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = decode(_saved(image, "JPEG", exif=exif))
    assert (picture.width, picture.height) == (30, 60)
    assert picture.pixels.shape == (60, 30, 3)


def test_transparency_lies_on_white_and_16_bits_are_scaled() -> None:
    clear = decode(_saved(Image.new("RGBA", (2, 2), (0, 0, 0, 0)), "PNG")).pixels
    assert (clear == 255).all()
    deep = decode(_saved(Image.fromarray(np.full((2, 2), 0x80FF, np.uint16)), "PNG")).pixels
    assert (deep == 0x80).all()


def test_reduced_decode_keeps_the_pictures_size() -> None:
    picture = decode(noise_jpeg(3, 640), min_side_px=100)
    assert (picture.width, picture.height) == (640, 640)
    assert 100 <= picture.pixels.shape[0] < 640


def test_samples_their_places_and_captions(tmp_path: Path) -> None:
    first, second = noise_jpeg(1), noise_jpeg(2)
    path = write_tar(
        tmp_path / "a.tar",
        sample("x/1", first, "one", ["uno", "eins"])
        + sample("x/2", second, "two")
        + sample("3", None, "no picture")
        + [("4.webp", second)],
    )
    samples = list(iter_samples(str(path)))
    assert [s.key for s in samples] == ["x/1", "x/2", "3", "4"]
    assert [s.index for s in samples] == [0, 1, 2, 3]
    assert [s.captions for s in samples] == [["uno", "eins"], ["two"], ["no picture"], []]
    raw = path.read_bytes()
    assert raw[samples[0].offset : samples[0].offset + samples[0].size] == first == samples[0].image
    assert (samples[2].offset, samples[2].size, samples[2].image) == (-1, -1, None)


def test_a_truncated_shard_gives_its_good_part(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [m for i in range(5) for m in sample(str(i), noise_jpeg(i))])
    path.write_bytes(path.read_bytes()[:4000])
    seen = []
    with pytest.raises(DamagedShard):
        seen.extend(iter_samples(str(path)))
    found = []
    try:
        for s in iter_samples(str(path)):
            found.append(s.key)
    except DamagedShard:
        pass
    assert found and found == [str(i) for i in range(len(found))]


def test_what_is_no_tar_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x" * 2000)
    with pytest.raises(DamagedShard):
        list(iter_samples(str(tmp_path / "a.tar")))


def test_compressed_tars_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").touch()
    with pytest.raises(UserError, match="uncompressed"):
        open_corpus(f"{tmp_path}/*.tar.gz")


def test_index_reads_the_original_bytes(tmp_path: Path) -> None:
    import pyarrow as pa

    pictures = [noise_jpeg(i) for i in range(3)]
    path = write_tar(tmp_path / "a.tar", [m for i, p in enumerate(pictures) for m in sample(str(i), p, f"caption {i}")])
    samples = list(iter_samples(str(path)))
    rows = ShardRows(
        str(path),
        np.array([s.offset for s in samples]),
        np.array([s.size for s in samples]),
        pa.array([s.captions for s in samples]),
        np.array([True, False, True]),
    )
    index = build_index([rows])
    assert len(index) == 2 and index.num_samples_before == 3
    assert [PictureReader(index).read(i) for i in range(2)] == [pictures[0], pictures[2]]
    assert index.captions_of(1) == ["caption 2"]


@pytest.mark.parametrize(("n", "b"), [(100, 32), (64, 32), (65, 32), (1000, 7), (33, 32), (96, 32)])
def test_no_sample_twice_in_a_batch(n: int, b: int) -> None:
    order = Order(n, b, seed=3, factor=0)
    for step in range(3 * n // b + 2):
        samples, _ = order.batch(step)
        assert len(set(samples.tolist())) == b


@pytest.mark.parametrize(("n", "b"), [(100, 32), (65, 32), (1000, 7), (96, 32)])
def test_every_pass_sees_every_sample_once(n: int, b: int) -> None:
    order = Order(n, b, seed=1, factor=0)
    stream = np.concatenate([order.batch(step)[0] for step in range(5 * n // b)])
    for p in range(4):
        assert sorted(stream[p * n : (p + 1) * n].tolist()) == list(range(n))


def test_views_cycle_with_the_factor_and_0_never_repeats() -> None:
    by_factor = {k: [int(Order(64, 32, 0, k).batch(step)[1][0]) for step in range(0, 8, 2)] for k in (0, 1, 2)}
    assert by_factor == {0: [0, 1, 2, 3], 1: [0, 0, 0, 0], 2: [0, 1, 0, 1]}


def test_order_is_a_function_of_seed_and_step() -> None:
    a, b, c = Order(100, 10, 0, 1), Order(100, 10, 0, 1), Order(100, 10, 1, 1)
    for step in (57, 3, 0):
        assert (a.batch(step)[0] == b.batch(step)[0]).all()
    assert (a.batch(3)[0] != c.batch(3)[0]).any()


def test_a_batch_larger_than_the_corpus_is_refused() -> None:
    with pytest.raises(ValueError, match="global_batch=11 is larger than the 10 samples"):
        Order(10, 11, 0, 1)


def test_json_that_is_damaged_does_not_hide_the_caption(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("1.jpg", jpeg(np.zeros((8, 8, 3), np.uint8))), ("1.txt", b"good"), ("1.json", b"{")])
    assert next(iter_samples(str(path))).captions == ["good"]
    path = write_tar(tmp_path / "b.tar", [("1.json", json.dumps({"caption": "from json"}).encode())])
    assert next(iter_samples(str(path))).captions == ["from json"]


# ---- prefetch --------------------------------------------------------------------------------------------------------


def test_prefetch_keeps_order_and_stays_ahead_by_so_many() -> None:
    drawn: list[int] = []

    def source() -> Iterator[int]:
        for number in range(20):
            drawn.append(number)
            yield number

    results = prefetch(source(), lambda number: number * number, threads=3, ahead=5)
    deadline = time.monotonic() + 10
    while len(drawn) < 5 and time.monotonic() < deadline:  # begins before the first result is asked for
        time.sleep(0.01)
    time.sleep(0.05)
    assert drawn == list(range(5))
    assert list(results) == [number * number for number in range(20)]


def test_prefetch_raises_where_the_result_would_have_come() -> None:
    def work(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number

    results = prefetch(range(9), work, threads=2, ahead=4)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
