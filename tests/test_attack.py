"""Which class is written on a picture, and how its name is drawn."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from raysys.attack.drawing import (
    MIN_FONT_PX,
    Drawn,
    Font,
    check_characters,
    contrast,
    draw_attack,
    luminance,
    read_fonts,
    to_jpeg,
)
from raysys.attack.written import choose_written, nearest_classes, nearest_rows
from raysys.config import AttackSettings
from raysys.errors import UserError
from raysys.evaluation.class_sets import ClassSet
from raysys.evaluation.pictures import Picture
from raysys.models import load_model

RED = (255, 0, 0)
VARIED = AttackSettings(
    fonts=["DejaVuSans", "DejaVuSerif-Bold"], font_frac=[0.1, 0.2], random_place=True, random_color=True, max_rotation_deg=20,
    background=0.5, overflow="wrap",
)  # fmt: skip


def class_set(labels: list[int], names: list[str]) -> ClassSet:
    pictures = [Picture(f"c{label}/{i}.JPEG", f"/nowhere/c{label}/{i}.JPEG") for i, label in enumerate(labels)]
    return ClassSet(pictures, labels, [f"c{i}" for i in range(len(names))], names, ["{}"], "mark")


def drawn(image: Image.Image, text: str, settings: AttackSettings, name: str = "a.jpg") -> tuple[np.ndarray, Drawn]:
    attacked, how = draw_attack(image, text, name=name, settings=settings, fonts=read_fonts(settings.fonts))
    return np.asarray(attacked).astype(int), how


def touched(pixels: np.ndarray, plain: tuple[int, int, int]) -> np.ndarray:
    return np.any(pixels != plain, axis=2)


# ---- the authors' recipe -----------------------------------------------------------------------------------------------


def test_text_is_red_at_its_place_on_the_original_size() -> None:
    attacked, _ = drawn(Image.new("RGB", (400, 200), "blue"), "hen", AttackSettings())
    assert attacked.shape == (200, 400, 3)
    ink = touched(attacked, (0, 0, 255))
    rows, columns = ink.any(axis=1).nonzero()[0], ink.any(axis=0).nonzero()[0]
    assert columns[0] in range(50, 58) and rows[0] in range(50, 65)  # (50, 50) is the corner of the line box, not of the ink
    assert 30 <= rows[-1] - rows[0] <= 50  # an ascender at 50 px
    assert np.all(attacked[ink] == RED, axis=1).mean() > 0.5  # the rest is smoothed


@pytest.mark.parametrize("text", ["hen", "Staffordshire Bull Terrier", "jjj ýÑ", "CD-ROM"])
@pytest.mark.parametrize("size", [(400, 300), (90, 70), (52, 300), (40, 40)])
def test_authors_preset_is_pillows_own_text_to_the_byte(text: str, size: tuple[int, int]) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    attacked, _ = draw_attack(picture, text, name="a", settings=AttackSettings(), fonts=read_fonts([]))
    plain = picture.copy()
    font = ImageFont.truetype(io.BytesIO(read_fonts([])[0].data), 50)
    ImageDraw.Draw(plain).text((50, 50), text, fill=RED, font=font)
    assert attacked.tobytes() == plain.tobytes()


def test_settings_move_and_colour_the_text() -> None:
    settings = AttackSettings(font_px=12, x_px=3, y_px=20, color=[0, 255, 0])
    attacked, how = drawn(Image.new("RGB", (80, 60)), "hen", settings)
    rows, columns = touched(attacked, (0, 0, 0)).nonzero()
    assert columns.min() in range(3, 6) and rows.min() >= 20 and rows.max() < 36
    assert not attacked[..., [0, 2]].any()
    assert (how.x_px, how.y_px, how.font_px, how.color) == (3, 20, 12, (0, 255, 0))
    assert (how.font, how.rotation_deg, how.background, how.visible_share) == ("DejaVuSans.ttf", 0, None, 1)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16", "1"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    attacked, _ = draw_attack(Image.new(mode, (200, 150)), "hen", name="a", settings=AttackSettings(), fonts=read_fonts([]))
    assert attacked.mode == "RGB" and attacked.size == (200, 150)


def test_first_frame_of_a_gif_is_attacked() -> None:
    file = io.BytesIO()
    Image.new("RGB", (120, 110), "green").save(file, "GIF", save_all=True, append_images=[Image.new("RGB", (120, 110), "red")])
    attacked, _ = drawn(Image.open(file), "hen", AttackSettings())
    assert tuple(attacked[5, 5]) == (0, 128, 0)


def test_source_picture_is_not_drawn_on() -> None:
    image = Image.new("RGB", (200, 150))
    drawn(image, "hen", AttackSettings())
    assert not np.asarray(image).any()


def test_jpeg_has_pillows_defaults() -> None:
    image, _ = draw_attack(Image.new("RGB", (200, 150), "blue"), "hen", name="a", settings=AttackSettings(), fonts=read_fonts([]))
    plain = io.BytesIO()
    image.save(plain, "JPEG")
    assert to_jpeg(image) == plain.getvalue()


def test_picture_too_small_for_the_text_says_that_nothing_can_be_seen() -> None:
    attacked, how = drawn(Image.new("RGB", (40, 40)), "hen", AttackSettings())
    assert not attacked.any() and how.visible_share == 0


def test_visible_share_is_the_ink_inside_the_picture() -> None:
    text = "Staffordshire Bull Terrier"
    whole, how = drawn(Image.new("RGB", (900, 200)), text, AttackSettings())
    assert how.visible_share == 1
    cut, how = drawn(Image.new("RGB", (300, 200)), text, AttackSettings())
    assert how.visible_share == pytest.approx(cut.sum() / whole.sum(), abs=0.001) and 0.3 < how.visible_share < 0.5


# ---- varied ------------------------------------------------------------------------------------------------------------


def test_streams_are_functions_of_seed_and_name() -> None:
    image = Image.new("RGB", (300, 200), "gray")
    first, how = drawn(image, "hen", VARIED, "x/1.jpg")
    drawn(image, "fox", VARIED, "x/2.jpg")
    again, how_again = drawn(image, "hen", VARIED, "x/1.jpg")
    assert np.array_equal(first, again) and how == how_again
    assert drawn(image, "hen", VARIED, "x/3.jpg")[1] != how
    assert drawn(image, "hen", replace(VARIED, seed=1), "x/1.jpg")[1] != how


def test_one_setting_does_not_change_what_another_draws() -> None:
    image = Image.new("RGB", (300, 200), "gray")
    how = drawn(image, "hen", VARIED)[1]
    steady = drawn(image, "hen", replace(VARIED, max_rotation_deg=0, background=0, random_color=False))[1]
    assert (steady.font, steady.font_px) == (how.font, how.font_px) and steady.rotation_deg == 0 and steady.color == RED


def test_everything_varies_within_its_range() -> None:
    seen = [drawn(Image.new("RGB", (300, 200), "gray"), "hen", VARIED, f"{i}.jpg")[1] for i in range(60)]
    assert {how.font for how in seen} == {"DejaVuSans.ttf", "DejaVuSerif-Bold.ttf"}
    assert {how.font_px for how in seen} <= set(range(20, 41)) and len({how.font_px for how in seen}) > 10
    assert all(-20 <= how.rotation_deg <= 20 for how in seen) and len({how.rotation_deg for how in seen}) > 30
    assert 10 <= sum(how.background is not None for how in seen) <= 50  # a chance of a half
    assert len({(how.x_px, how.y_px) for how in seen}) > 50 and all(how.visible_share == 1 for how in seen)
    for how in seen:
        beneath = how.background or (128, 128, 128)
        assert contrast(luminance(how.color), luminance(beneath)) >= 3


def test_contrast_is_that_of_wcag() -> None:
    def of(one: tuple[int, int, int], other: tuple[int, int, int]) -> float:
        return float(contrast(luminance(one), luminance(other)))

    assert of((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert of((119, 119, 119), (255, 255, 255)) == pytest.approx(4.48, abs=0.005)  # #777 on white, a well-known near miss of 4.5
    assert of(RED, RED) == 1


def test_colour_stands_out_from_a_picture_of_two_halves() -> None:
    halves = np.zeros((200, 300, 3), np.uint8)
    halves[:100] = 255
    settings = replace(VARIED, background=0, random_place=False, x_px=0, y_px=60, font_frac=[], font_px=80)  # across the edge
    color = drawn(Image.fromarray(halves), "hen", settings)[1].color
    assert min(contrast(luminance(color), luminance(half)) for half in ((0, 0, 0), (255, 255, 255))) >= 3


def test_background_is_a_box_around_the_whole_text() -> None:
    settings = replace(AttackSettings(), background=1.0, color=[255, 255, 0])
    attacked, how = drawn(Image.new("RGB", (400, 200), "gray"), "hen", settings)
    assert how.background == (0, 0, 0)  # yellow differs more from black than from white
    box = touched(attacked, (128, 128, 128))
    rows, columns = box.any(axis=1).nonzero()[0], box.any(axis=0).nonzero()[0]
    assert box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    ink = attacked[..., 0] > 128
    above, below = ink.any(axis=1).nonzero()[0][0] - rows[0], rows[-1] - ink.any(axis=1).nonzero()[0][-1]
    assert above == pytest.approx(10, abs=1) and below == pytest.approx(10, abs=1)  # a fifth of 50 px
    assert ink.any(axis=0).nonzero()[0][0] - columns[0] in range(9, 17)  # there an h keeps some distance itself


def test_rotation_is_counter_clockwise_about_the_middle() -> None:
    straight, _ = drawn(Image.new("RGB", (400, 400)), "lllllllll", AttackSettings(x_px=100, y_px=150))
    turned_by = AttackSettings(x_px=100, y_px=150, max_rotation_deg=60)
    turned, how = drawn(Image.new("RGB", (400, 400)), "lllllllll", turned_by, "2.jpg")
    rows, columns = touched(turned, (0, 0, 0)).nonzero()
    centre = [touched(p, (0, 0, 0)).nonzero() for p in (straight, turned)]
    assert np.allclose(centre[0][0].mean(), rows.mean(), atol=1) and np.allclose(centre[0][1].mean(), columns.mean(), atol=1)
    slope = np.degrees(np.arctan2(-np.polyfit(columns, rows, 1)[0], 1))
    assert abs(how.rotation_deg) > 5 and np.sign(slope) == np.sign(how.rotation_deg)
    assert (how.x_px, how.y_px, how.visible_share) == (100, 150, 1)


# ---- long names, small pictures ------------------------------------------------------------------------------------------


def ink_box(pixels: np.ndarray) -> tuple[int, int]:
    rows, columns = touched(pixels, (0, 0, 0)).nonzero()
    return int(columns.max() - columns.min() + 1), int(rows.max() - rows.min() + 1)


def test_fit_shrinks_until_it_fits() -> None:
    text = "Staffordshire Bull Terrier"  # 626 px wide in DejaVu Sans at 50 px
    attacked, how = drawn(Image.new("RGB", (320, 200)), text, AttackSettings(overflow="fit"))
    assert 20 <= how.font_px <= 25 and how.visible_share == 1
    assert 270 <= ink_box(attacked)[0] <= 320  # not smaller than it must be
    large = drawn(Image.new("RGB", (900, 200)), text, AttackSettings(overflow="fit"))[1]
    assert (large.font_px, large.x_px, large.y_px) == (50, 50, 50)


def test_wrap_breaks_at_spaces_and_keeps_the_letters_large() -> None:
    text = "Staffordshire Bull Terrier"
    attacked, how = drawn(Image.new("RGB", (400, 300)), text, AttackSettings(overflow="wrap"))
    assert how.font_px == 50 and how.visible_share == 1
    rows = touched(attacked, (0, 0, 0)).any(axis=1)
    assert np.sum(np.diff(rows.astype(int)) == 1) == 2  # two lines with a gap between: "Staffordshire / Bull Terrier"
    assert drawn(Image.new("RGB", (400, 300)), "Staffordshire", AttackSettings(overflow="wrap"))[1].font_px == 50
    assert drawn(Image.new("RGB", (200, 300)), "Staffordshire", AttackSettings(overflow="wrap"))[1].font_px < 50  # one word


@pytest.mark.parametrize("overflow", ["fit", "wrap"])
@pytest.mark.parametrize("size", [(64, 48), (30, 30), (17, 200), (8, 8), (1, 1)])
@pytest.mark.parametrize("varied", [False, True])
def test_small_pictures_never_fail(overflow: str, size: tuple[int, int], varied: bool) -> None:
    settings = replace(VARIED if varied else AttackSettings(), overflow=overflow)
    attacked, how = drawn(Image.new("RGB", size), "red fox", settings)
    assert attacked.shape == (size[1], size[0], 3) and how.font_px >= MIN_FONT_PX and 0 <= how.visible_share <= 1
    if size == (64, 48):
        assert how.visible_share == 1
    if size == (8, 8):
        assert how.font_px == MIN_FONT_PX and how.visible_share < 1  # no smaller: it is cut off, and says so


def test_empty_name_draws_nothing_and_says_so() -> None:
    assert drawn(Image.new("RGB", (99, 99)), "", VARIED)[1].visible_share == 0


# ---- fonts -------------------------------------------------------------------------------------------------------------


def test_fonts_are_files_or_names_in_the_wheel(tmp_path: Path) -> None:
    serif = read_fonts(["DejaVuSerif-Bold"])[0]
    (tmp_path / "mine.ttf").write_bytes(serif.data)
    mine = read_fonts([str(tmp_path / "mine.ttf")])[0]
    assert (serif.name, mine.name) == ("DejaVuSerif-Bold.ttf", "mine.ttf")
    assert mine.sha256 == serif.sha256 == hashlib.sha256(serif.data).hexdigest()
    assert [font.name for font in read_fonts([])] == ["DejaVuSans.ttf"]


def test_font_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"attack.fonts: Arial is neither a file nor a font of the matplotlib wheel \(DejaVuSans,"):
        read_fonts(["Arial"])
    (tmp_path / "odd.ttf").write_text("no font")
    with pytest.raises(UserError, match=r"odd.ttf is not a TrueType font"):
        read_fonts([str(tmp_path / "odd.ttf")])


def test_unicode_names_are_drawn_where_the_font_has_them() -> None:
    fonts = read_fonts([])
    check_characters(fonts, ["ñandú", "Käse", "Заяц", "λύκος"])
    plain, accent = (drawn(Image.new("RGB", (400, 200)), text, AttackSettings())[0] for text in ("nandu", "ñandú"))
    assert accent.sum() > plain.sum()
    with pytest.raises(UserError, match=r"DejaVuSans.ttf has no character '子' \(U\+5B50\), which '子犬' needs; give attack.fonts"):
        check_characters(fonts, ["hen", "子犬"])


def test_every_font_must_have_every_character() -> None:
    with pytest.raises(UserError, match=r"cmr10.ttf has no character 'ñ'"):
        check_characters(read_fonts(["DejaVuSans", "cmr10"]), ["ñandú"])


def test_font_travels_with_its_bytes() -> None:
    data = read_fonts([])[0].data
    attacked, how = draw_attack(
        Image.new("RGB", (200, 120)), "hen", name="a", settings=AttackSettings(), fonts=[Font("nowhere.ttf", "abc", data)]
    )
    assert np.asarray(attacked).any() and (how.font, how.font_sha256) == ("nowhere.ttf", "abc")


# ---- which class: files ------------------------------------------------------------------------------------------------


def listed(tmp_path: Path, content: object) -> AttackSettings:
    file = tmp_path / "written.json"
    file.write_text(json.dumps(content))
    return AttackSettings(classes=str(file))


def test_file_gives_a_class_for_each_class(tmp_path: Path) -> None:
    settings = listed(tmp_path, {"written_class": [2, 0, 1]})
    assert choose_written(settings, class_set([0, 2, 2], ["a", "b", "c"])) == [2, 1, 1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 0], "expected"),
        ({"a": ["b"]}, "expected"),
        ({"written_class": [1]}, "1 written classes for 2 classes"),
        ({"written_class": [1, 2]}, "from 0 to 1"),
        ({"written_class": [1, True]}, "from 0 to 1"),
        ({"written_class": [1, "a"]}, "from 0 to 1"),
        ({"a": "b", "z": "a"}, "'z' is neither the id nor the name of a class"),
        ({"b": "a"}, r"1 classes with pictures have no entry; add 'c0' \(a\)"),
        ({"a": "b", "c0": "a"}, "two different classes for 'c0'"),
    ],
)
def test_file_that_does_not_fit_is_refused(content: object, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        choose_written(listed(tmp_path, content), class_set([0], ["a", "b"]))


def test_mapping_takes_ids_first_then_names(tmp_path: Path) -> None:
    a_set = class_set([0, 1, 2], ["hen", "fox", "c0"])  # the third is called as the first's id
    assert choose_written(listed(tmp_path, {"c0": "c2", "fox": "c0", "c2": "fox"}), a_set) == [2, 0, 1]


def test_mapping_needs_no_entry_for_a_class_without_pictures(tmp_path: Path) -> None:
    assert choose_written(listed(tmp_path, {"hen": "fox"}), class_set([0, 0], ["hen", "fox", "cat"])) == [1, 1]


def test_ambiguous_name_needs_ids(tmp_path: Path) -> None:
    a_set = class_set([0, 1], ["hen", "missile", "missile"])
    with pytest.raises(UserError, match=r"'missile' is the name of 2 classes; write their ids \(c1 and c2\)"):
        choose_written(listed(tmp_path, {"hen": "missile", "c1": "hen"}), a_set)
    assert choose_written(listed(tmp_path, {"hen": "c2", "c1": "c2"}), a_set) == [2, 2]  # its own name, as a file may say


# ---- which class: random -----------------------------------------------------------------------------------------------


def test_random_is_repeatable_and_never_writes_the_true_name() -> None:
    names = ["missile", "hen", "missile", "fox"]
    clean = class_set([0, 1, 2, 3] * 50, names)
    first = choose_written(AttackSettings(classes="random", seed=1), clean)
    assert first == choose_written(AttackSettings(classes="random", seed=1), clean)
    assert first != choose_written(AttackSettings(classes="random", seed=2), clean)
    assert all(w is not None and names[w] != names[t] for w, t in zip(first, clean.labels, strict=True))
    assert set(first) == {0, 1, 2, 3}


@pytest.mark.parametrize("classes", ["random", "nearest", "confusions"])
def test_one_name_only_is_refused_and_does_not_hang(classes: str) -> None:
    with pytest.raises(UserError, match="two different"):
        choose_written(AttackSettings(classes=classes, model="ViT-B-32"), class_set([0], ["missile", "missile"]))


# ---- which class: confusions -------------------------------------------------------------------------------------------


def predictions(tmp_path: Path, rows: list[tuple[str, int, int]], **more: list[int]) -> AttackSettings:
    columns = dict(zip(("picture", "true_class", "predicted_class"), map(list, zip(*rows, strict=True)), strict=True))
    file = tmp_path / "imagenet_m.parquet"
    pq.write_table(pa.table(columns | more), file)
    return AttackSettings(classes="confusions", predictions=str(file))


def test_confusions_give_the_wrong_class_predicted_most_often(tmp_path: Path) -> None:
    names = ["hen", "missile", "fox", "missile", "cat"]
    rows = [("a", 0, 2), ("b", 0, 4), ("c", 0, 4), ("d", 0, 0), ("e", 0, 0), ("f", 0, 0)]  # 4 twice; right answers do not count
    rows += [("g", 1, 3), ("h", 1, 3), ("i", 1, 0)]  # 3 is the same name
    rows += [("j", 2, 4), ("k", 2, 1)]  # a tie: the lower index
    settings = predictions(tmp_path, rows)
    assert choose_written(settings, class_set([0, 1, 2, 2], names)) == [4, 0, 1, 1]


def test_classes_never_confused_need_a_model(tmp_path: Path, tiny_model: str) -> None:
    settings = predictions(tmp_path, [("x", 0, 1), ("y", 1, 1)])
    clean = class_set([0, 1, 2], ["hen", "fox", "cat"])
    with pytest.raises(UserError, match=r"2 of 3 classes are never taken for another there; give attack.model=MODEL"):
        choose_written(settings, clean)
    assert choose_written(replace(settings, model=tiny_model, pretrained="random"), clean) == [1, None, None]
    with pytest.raises(UserError, match="no weights"):  # before anything is built
        choose_written(replace(settings, model=tiny_model), clean)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("c0/0.JPEG", 0, 7)], "holds class 7, the set has 2 classes"),
        ([("c0/0.JPEG", 1, 0)], r"c0/0.JPEG is of class c1 there and of c0 here"),
    ],
)
def test_predictions_of_another_class_list_are_refused(rows: list[tuple[str, int, int]], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        choose_written(predictions(tmp_path, rows), class_set([0], ["a", "b"]))


def test_files_that_are_no_predictions_are_refused(tmp_path: Path) -> None:
    clean = class_set([0], ["a", "b"])
    with pytest.raises(UserError, match="answers on attacked pictures"):
        choose_written(predictions(tmp_path, [("x", 0, 1)], written_class=[1]), clean)
    with pytest.raises(UserError, match="no such file; `raysys evaluate`"):
        choose_written(AttackSettings(classes="confusions", predictions=str(tmp_path / "none.parquet")), clean)
    file = tmp_path / "odd.parquet"
    file.write_text("no Parquet")
    with pytest.raises(UserError, match="no Parquet file"):
        choose_written(AttackSettings(classes="confusions", predictions=str(file)), clean)
    pq.write_table(pa.table({"picture": ["x"], "caption": ["y"], "rank": [1]}), file)
    with pytest.raises(UserError, match="column true_class is missing"):
        choose_written(AttackSettings(classes="confusions", predictions=str(file)), clean)


# ---- which class: nearest text -----------------------------------------------------------------------------------------


def test_nearest_row_is_of_another_name_and_the_first_of_equals() -> None:
    rows = np.array([[1, 0], [1, 0], [0.6, 0.8], [0.6, 0.8], [0, 1]], np.float32)
    names = ["missile", "missile", "hen", "fox", "cat"]
    # 0 and 1 share a name and a text, so 2 (before 3, as near); 2 and 3 are each other's; 4 is as near to both
    assert nearest_rows(rows, [0, 1, 2, 3, 4], names) == {0: 2, 1: 2, 2: 3, 3: 2, 4: 2}
    assert nearest_rows(rows, [3], names) == {3: 2}


def test_nearest_class_is_by_the_models_prompts(tmp_path: Path, tiny_model: str) -> None:
    loaded = load_model(tiny_model, "random")
    weights = tmp_path / "weights.pt"
    torch.save(loaded.model.state_dict(), weights)
    names = ["hen", "red fox", "cat", "great white shark", "cat", "dog"]
    clean = replace(class_set([0, 2], names), templates=["a photo of a {}.", "{}", "art of the {}"])
    rows = []
    with torch.inference_mode():
        for name in names:  # one prompt after the other
            each = [loaded.model.encode_text(loaded.tokenizer([t.replace("{}", name)]))[0] for t in clean.templates]  # type: ignore[operator]
            mean = torch.stack([e / e.norm() for e in each]).mean(0)
            rows.append(mean / mean.norm())
    expected = {}
    for label in (0, 2):
        others = [i for i in range(len(names)) if names[i] != names[label]]
        expected[label] = max(others, key=lambda i: float(rows[label] @ rows[i]))
    assert nearest_classes([0, 2], clean, model=tiny_model, pretrained=str(weights)) == expected


def test_weights_that_give_no_numbers_are_refused(tmp_path: Path, tiny_model: str) -> None:
    state = load_model(tiny_model, "random").model.state_dict()
    torch.save({k: v * float("nan") for k, v in state.items()}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="not finite"):
        nearest_classes([0], class_set([0], ["a", "b"]), model=tiny_model, pretrained=str(tmp_path / "weights.pt"))
