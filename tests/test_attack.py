"""What is written on a picture, and where."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raysys.config import AttackSettings
from raysys.evaluation.attack import attack_table, choose_written, draw_attack, font_file, output_name, to_jpeg
from raysys.evaluation.datasets import ClassSet, Picture
from raysys.storage import UserError


def class_set(labels: list[int], names: list[str]) -> ClassSet:
    pictures = [Picture(f"{label}/{i}.JPEG", f"/nowhere/{label}/{i}.JPEG") for i, label in enumerate(labels)]
    return ClassSet(pictures, labels, [str(i) for i in range(len(names))], names, ["{}"], "mark")


def listed(tmp_path: Path, content: object) -> AttackSettings:
    file = tmp_path / "written.json"
    file.write_text(json.dumps(content))
    return AttackSettings(classes=str(file))


def test_text_is_red_at_its_place_on_the_original_size() -> None:
    attacked = np.asarray(draw_attack(Image.new("RGB", (400, 200), "blue"), "hen", AttackSettings())).astype(int)
    assert attacked.shape == (200, 400, 3)
    touched = np.any(attacked != (0, 0, 255), axis=2)
    rows, columns = touched.any(axis=1).nonzero()[0], touched.any(axis=0).nonzero()[0]
    assert columns[0] in range(50, 58) and rows[0] in range(50, 65)  # (50, 50) is the corner of the line box, not of the ink
    assert 30 <= rows[-1] - rows[0] <= 50  # an ascender at 50 px
    assert np.all(attacked[touched] == (255, 0, 0), axis=1).mean() > 0.5  # the rest is smoothed


def test_settings_move_and_colour_the_text() -> None:
    settings = AttackSettings(font_px=12, x_px=3, y_px=20, color=[0, 255, 0])
    attacked = np.asarray(draw_attack(Image.new("RGB", (80, 60)), "hen", settings))
    rows, columns = np.nonzero(np.any(attacked, axis=2))
    assert columns.min() in range(3, 6) and rows.min() >= 20 and rows.max() < 36
    assert not attacked[..., [0, 2]].any()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    attacked = draw_attack(Image.new(mode, (200, 150)), "hen", AttackSettings())
    assert attacked.mode == "RGB" and attacked.size == (200, 150)


def test_first_frame_of_a_gif_is_attacked() -> None:
    file = io.BytesIO()
    Image.new("RGB", (120, 110), "green").save(file, "GIF", save_all=True, append_images=[Image.new("RGB", (120, 110), "red")])
    attacked = draw_attack(Image.open(file), "hen", AttackSettings())
    assert attacked.getpixel((5, 5)) == (0, 128, 0)


def test_source_picture_is_not_drawn_on() -> None:
    image = Image.new("RGB", (200, 150))
    draw_attack(image, "hen", AttackSettings())
    assert not np.asarray(image).any()


def test_jpeg_has_pillows_defaults() -> None:
    image = draw_attack(Image.new("RGB", (200, 150), "blue"), "hen", AttackSettings())
    plain = io.BytesIO()
    image.save(plain, "JPEG")
    assert to_jpeg(image) == plain.getvalue()


def test_file_gives_a_class_for_each_class(tmp_path: Path) -> None:
    settings = listed(tmp_path, {"written_class": [2, 0, 1]})
    assert choose_written(settings, class_set([0, 2, 2], ["a", "b", "c"])) == [2, 1, 1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 0], "expected"),
        ({"written_class": [1]}, "1 written classes for 2 classes"),
        ({"written_class": [1, 2]}, "from 0 to 1"),
        ({"written_class": [1, True]}, "from 0 to 1"),
        ({"written_class": [1, "a"]}, "from 0 to 1"),
    ],
)
def test_file_that_does_not_fit_is_refused(content: object, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        choose_written(listed(tmp_path, content), class_set([0], ["a", "b"]))


def test_random_is_repeatable_and_never_writes_the_true_name() -> None:
    names = ["missile", "hen", "missile", "fox"]
    clean = class_set([0, 1, 2, 3] * 50, names)
    first = choose_written(AttackSettings(classes="random", seed=1), clean)
    assert first == choose_written(AttackSettings(classes="random", seed=1), clean)
    assert first != choose_written(AttackSettings(classes="random", seed=2), clean)
    assert all(names[w] != names[t] for w, t in zip(first, clean.labels, strict=True))
    assert set(first) == {0, 1, 2, 3}


def test_random_with_one_name_is_refused_and_does_not_hang() -> None:
    with pytest.raises(UserError, match="two different"):
        choose_written(AttackSettings(classes="random"), class_set([0], ["missile", "missile"]))


def test_table_says_what_stands_where() -> None:
    settings = AttackSettings(classes="random", font_px=20)
    row = attack_table(class_set([1], ["hen", "fox"]), [0], settings).to_pylist()[0]
    assert row.pop("font_sha256").isalnum()
    assert row == {
        "picture": "1/0.JPEG", "true_class": 1, "written_class": 0, "text": "hen",
        "font": "DejaVuSans.ttf", "font_px": 20, "color": [255, 0, 0], "x_px": 50, "y_px": 50,
    }  # fmt: skip


def test_names_keep_jpegs_and_turn_the_rest() -> None:
    assert [output_name(n) for n in ("a/b.JPEG", "a/b.jpg", "a/b.x.png")] == ["a/b.JPEG", "a/b.jpg", "a/b.x.JPEG"]
    clash = class_set([0, 0], ["a", "b"])
    clash.pictures[:] = [Picture("a/1.gif", ""), Picture("a/1.png", "")]
    with pytest.raises(UserError, match=r"a/1\.JPEG: two source pictures"):
        attack_table(clash, [1, 1], AttackSettings(classes="random"))


def test_font_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        font_file(AttackSettings(font=str(tmp_path / "none.ttf")))
    (tmp_path / "odd.ttf").write_text("no font")
    with pytest.raises(UserError, match="not a TrueType font"):
        draw_attack(Image.new("RGB", (9, 9)), "a", AttackSettings(font=str(tmp_path / "odd.ttf")))
