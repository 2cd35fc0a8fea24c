"""Spaces of a sweep: what a file may say, the points it makes, and the config at a point."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raysys.cli import compose_config
from raysys.config import AugmentConfig, CorpusConfig, LoopConfig, PolicyConfig, SourceConfig, TrainConfig, choices
from raysys.errors import UserError
from raysys.sweeping.space import (
    NAME_CHARS,
    Point,
    Space,
    Trial,
    at_trial,
    check_space,
    draw,
    grid,
    group_contents,
    read_space,
)

Write = Callable[[str], str]


@pytest.fixture
def base() -> TrainConfig:
    return TrainConfig(output="W", model="test_resnet-64", corpus=CorpusConfig(path="data"), train=LoopConfig(steps=10))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def file(text: str) -> str:
        (tmp_path / "space.yaml").write_text(text)
        return str(tmp_path / "space.yaml")

    return file


def _at(base: TrainConfig, **values: Any) -> TrainConfig:
    return at_trial(base, Trial(Point(0, {key.replace("__", "."): value for key, value in values.items()}), 0), "out")


# ---- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", choices("space"))
def test_every_packaged_space_holds(name: str, base: TrainConfig) -> None:
    check_space(read_space(name), base, "tpe")


def test_numbers_that_yaml_1_1_takes_for_text_are_numbers(write: Write) -> None:
    space = read_space(write("optim.lr: [5e-4, 1e-3]\noptim.eps: {low: 1e-8, high: 1e-6, log: true}\n"))
    assert space == {"optim.lr": [0.0005, 0.001], "optim.eps": {"low": 1e-8, "high": 1e-6, "log": True}}


def test_ends_of_a_range_have_the_type_of_the_key(write: Write) -> None:
    text = "optim.lr: {low: 1, high: 2}\ntrain.micro_batch: {low: 1.0, high: 4}\noptim.grad_clip_norm: {low: 1, high: 2}\n"
    ends = {key: (span["low"], span["high"]) for key, span in read_space(write(text)).items() if isinstance(span, dict)}
    assert repr(ends) == "{'optim.lr': (1.0, 2.0), 'train.micro_batch': (1, 4), 'optim.grad_clip_norm': (1.0, 2.0)}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; give keys of train"),
        ("- 1\n", "must hold keys and values"),
        ("a: [1\n", "not valid YAML"),
        ("optim.lr: [1]\noptim.lr: [2]\n", "found duplicate key optim.lr"),
        ("optim.lr: 0.1\n", "space: optim.lr=0.1: must be a list of values (one value is a list too: [0.1])"),
        ("optim.lr: []\n", "space: optim.lr: the list is empty"),
        ("optim.lr: [[1]]\n", "space: optim.lr: [1] is not one plain value"),
        ("optim.lr: [.inf]\n", "space: optim.lr: inf is not one plain value"),
        ("policy: {max_text_area: [0]}\n", "space: policy: unknown max_text_area"),
        ("optim.lr: {low: 1, hihg: 2}\n", "space: optim.lr: unknown hihg; a range is {low: a, high: b}"),
        ("optim.lr: {high: 2}\n", "space: optim.lr: low is missing"),
        ("optim.lr: {low: 1, high: 1}\n", "space: optim.lr: low=1 must be less than high=1; a single value is a list: [1]"),
        ("optim.lr: {low: 2, high: 1}\n", "low=2 must be less than high=1"),
        ("optim.lr: {low: .nan, high: 1}\n", "space: optim.lr.low=nan: must be a number"),
        ("optim.lr: {low: 1, high: .inf}\n", "space: optim.lr.high=inf: must be a number"),
        ("optim.lr: {low: false, high: 1}\n", "space: optim.lr.low=False: must be a number"),
        ("optim.lr: {low: 0, high: 1, log: true}\n", "space: optim.lr.low=0: must be greater than 0 where log is true"),
        ("optim.lr: {low: 1, high: 2, log: 1}\n", "space: optim.lr.log=1: must be true or false"),
        ("augment.factor: {low: 0.5, high: 2}\n", "space: augment.factor.low=0.5: must be a whole number"),
        ("train.compile: {low: 0, high: 1}\n", "space: train.compile: takes no numbers; give a list of values"),
        ("augment.schedule: {low: 0, high: 1}\n", "space: augment.schedule: takes no numbers"),
        ("policy: {low: 0, high: 1}\n", "space: policy: takes no numbers"),
        ("optim.lrr: {low: 0, high: 1}\n", "space: optim.lrr: unknown key 'optim.lrr'; did you mean optim.lr"),
        ("seed: {low: 0, high: 9}\n", "space: seed: is not swept"),
    ],
)
def test_malformed_file_is_refused_by_name(text: str, message: str, write: Write) -> None:
    with pytest.raises(UserError) as refused:
        read_space(write(text))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_space_that_is_not_there_names_the_packaged_ones() -> None:
    with pytest.raises(UserError, match=r"space=smal is neither a file nor one of paper, .*small, thresholds"):
        read_space("smal")


def test_settings_tell_when_the_file_of_a_swept_policy_was_changed(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("max_text_area: 0.1\n")
    space: Space = {"policy": ["none", str(mine)], "augment.factor": [1]}
    said = {"policy=none": {"name": "none", "max_text_area": 1.0}, f"policy={mine}": {"name": "mine", "max_text_area": 0.1}}
    assert group_contents(space) == said
    mine.write_text("max_text_area: 0.2\n")
    assert group_contents(space) != said


# ---- checks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            {"policy.max_txt_area": [0.0]},
            "space: policy.max_txt_area: unknown key 'policy.max_txt_area'; did you mean policy.max_text_area",
        ),
        ({"num_samples": [1]}, "space: num_samples: unknown key"),
        ({"policy.max_text_area": [0.0, 2.0]}, "space: policy.max_text_area=2.0 must lie in 0..1"),
        ({"policy.max_text_area": {"low": 0.0, "high": 2.0, "log": False}}, "space: policy.max_text_area=2.0 must lie in 0..1"),
        ({"optim.lr": {"low": 0.0, "high": 1.0, "log": False}}, "space: optim.lr=0.0 must be greater than 0"),
        ({"towers.lock_image_unlocked_groups": [1]}, "space: towers.lock_image_unlocked_groups=1 needs towers.lock_image=true"),
        ({"augment.factor": [1, 1.5]}, "space: augment.factor=1.5: "),
        ({"augment.factor": [True]}, "space: augment.factor=True: "),
        ({"augment.factor": [None]}, "space: augment.factor=None: "),
        ({"optim.lr": ["fast"]}, "space: optim.lr=fast: "),
        ({"model": [False]}, "space: model=False: must be text; put it in quotes"),
        ({"pretrained": [1000.0]}, "space: pretrained=1000.0: must be text"),
        ({"model": ["${nowhere}"]}, "space: model=${nowhere}: "),
        (
            {"policy": ["none", "pper"]},
            "space: policy=pper is not there; choose from area, none, paper, parrot, or give a YAML file",
        ),
        ({"policy": ["gone.yaml"]}, "space: policy=gone.yaml: no such file"),
        ({"policy": [False]}, "space: policy=False: must be a name of conf/policy or a YAML file"),
        ({"optim": [1]}, "space: optim: is not one value; sweep keys below it (optim.lr, "),
        ({"corpus.sources": ["a"]}, "space: corpus.sources: is not one value"),
        ({"corpus.sources.web.weight": [1.0]}, "space: corpus.sources.web.weight: the sweep's own words name no such source"),
        ({"output": ["a"]}, "space: output: is not swept"),
        ({"num_workers": [1, 2]}, "space: num_workers: is not swept"),
        ({"use_gpu": [True]}, "space: use_gpu: is not swept"),
        ({"ray.num_cpus": [1]}, "space: ray.num_cpus: is not swept"),
        ({"seed": [0, 1]}, "space: seed: is not swept; seeds=N repeats every point"),
        ({"evaluators": ["coco"]}, "space: evaluators: is not swept; all points must be asked the same"),
        ({"imagenet.path": ["a"]}, "space: imagenet.path: is not swept; all points"),
        ({"service.precision": ["fp32"]}, "space: service.precision: is not swept; all points"),
        ({"optim.lr": [1, 1.0]}, "space: optim.lr=1.0: says the same as 1 before it"),
        ({"optim.lr": [0.1, "0.1"]}, "space: optim.lr=0.1: says the same as 0.1 before it"),
        ({"train.channels_last": [True, 1]}, "space: train.channels_last=1: says the same as True before it"),
        ({"policy": ["none", "none"]}, "space: policy=none: says the same as none before it"),
    ],
)
def test_bad_key_or_value_is_refused_by_name(space: Space, message: str, base: TrainConfig) -> None:
    with pytest.raises(UserError) as refused:
        check_space(space, base, "random")
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


def test_range_is_refused_in_a_grid(base: TrainConfig) -> None:
    space: Space = {"optim.lr": {"low": 0.1, "high": 1.0, "log": False}}
    check_space(space, base, "random")
    with pytest.raises(UserError, match=r"space: optim\.lr: a grid needs lists; use search=random or search=tpe"):
        check_space(space, base, "grid")


def test_weight_of_a_source_that_the_words_name_is_swept(base: TrainConfig) -> None:
    source = SourceConfig(path="a", weight=1.0)
    base = replace(base, corpus=CorpusConfig(sources={"web": source}))
    check_space({"corpus.sources.web.weight": [1.0, 2.0]}, base, "grid")
    assert _at(base, corpus__sources__web__weight=2.0).corpus.sources["web"] == SourceConfig(path="a", weight=2.0)
    assert source.weight == 1.0


def test_word_that_a_swept_group_would_swallow_is_refused(base: TrainConfig) -> None:
    space: Space = {"policy": ["none", "paper"]}
    base = replace(base, policy=PolicyConfig(min_score=0.3))
    with pytest.raises(UserError, match=r"space: policy: its choices replace policy.min_score=0.3 of the words"):
        check_space(space, base, "grid")
    check_space(space | {"policy.min_score": [0.3]}, base, "grid")
    check_space(
        space, replace(base, policy=_at(base, policy="parrot").policy), "grid"
    )  # policy=parrot among the words: a choice as well


# ---- points -----------------------------------------------------------------------------------------------------------


def test_grid_is_every_combination_the_last_key_fastest() -> None:
    points = grid({"policy": ["none", "paper"], "augment.factor": [1, 4, 0]})
    assert [p.number for p in points] == [0, 1, 2, 3, 4, 5]
    assert [tuple(p.values.values()) for p in points] == [
        ("none", 1), ("none", 4), ("none", 0), ("paper", 1), ("paper", 4), ("paper", 0),
    ]  # fmt: skip
    assert all(list(p.values) == ["policy", "augment.factor"] for p in points)


def test_names_are_words_that_a_folder_may_have() -> None:
    values = {"policy": "conf/mine.yaml", "optim.lr": 0.00012345678, "pretrained": None, "model": "local-dir:a b/é"}
    assert Point(7, values).name == "007_policy=mine_lr=0.0001235_pretrained=None_model=local-dir-a-b--"
    assert Trial(Point(12, {"augment.factor": 0}), 3).name == "012_factor=0_seed=3"


def test_long_names_are_cut_and_still_differ_by_their_number() -> None:
    names = {Point(i, {"corpus.path": "x" * 300}).name for i in range(3)}
    assert len(names) == 3
    assert {len(name) for name in names} == {NAME_CHARS}


RANGES: Space = {
    "augment.factor": [1, 4, 0],
    "optim.lr": {"low": 1e-5, "high": 1e-1, "log": True},
    "optim.beta1": {"low": 0.5, "high": 0.9, "log": False},
    "optim.warmup_steps": {"low": 3, "high": 5, "log": False},
    "train.micro_batch": {"low": 1, "high": 100, "log": True},
}


def test_drawn_point_depends_on_seed_and_number_alone() -> None:
    ten = [draw(RANGES, 0, i) for i in range(10)]
    assert [draw(RANGES, 0, i) for i in reversed(range(10))] == ten[::-1]
    assert len({repr(p.values) for p in ten}) == 10
    assert draw(RANGES, 1, 0).values != ten[0].values


def test_drawn_values_are_uniform_over_lists_ranges_and_logarithms() -> None:
    points = [draw(RANGES, 0, i).values for i in range(3000)]
    factors = Counter(p["augment.factor"] for p in points)
    assert all(factors[f] == pytest.approx(1000, abs=130) for f in (1, 4, 0))  # 5 standard deviations: sqrt(3000 * 2/9) = 26
    steps = Counter(p["optim.warmup_steps"] for p in points)
    assert set(steps) == {3, 4, 5}
    assert all(count == pytest.approx(1000, abs=130) for count in steps.values())
    decades = Counter(math.floor(math.log10(p["optim.lr"])) for p in points)
    assert all(decades[d] == pytest.approx(750, abs=120) for d in (-5, -4, -3, -2))
    beta = [p["optim.beta1"] for p in points]
    assert min(beta) >= 0.5
    assert max(beta) <= 0.9
    assert sum(b < 0.6 for b in beta) == pytest.approx(750, abs=120)
    micro = [p["train.micro_batch"] for p in points]
    assert all(type(m) is int and 1 <= m <= 100 for m in micro)
    ones = math.log(1.5 / 0.5) / math.log(100.5 / 0.5)  # share of [.5, 1.5] in the logarithm of [.5, 100.5]
    assert micro.count(1) == pytest.approx(3000 * ones, abs=120)
    assert micro.count(100) > 0


# ---- the config of a trial --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["policy", "augment"])
def test_choice_of_a_group_is_what_the_command_line_makes_of_it(group: str, base: TrainConfig, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text({"policy": "min_score: 0.7\n", "augment": "flip: 0.25\n"}[group])
    for choice in [*choices(group), str(mine)]:
        words = ["output=W", "model=test_resnet-64", "corpus.path=data", "train.steps=10", f"{group}={choice}"]
        assert getattr(_at(base, **{group: choice}), group) == getattr(compose_config("train", words), group)


def test_group_is_applied_before_its_keys_whatever_their_order(base: TrainConfig) -> None:
    for values in ({"policy__max_text_area": 0.2, "policy": "parrot"}, {"policy": "parrot", "policy__max_text_area": 0.2}):
        assert _at(base, **values).policy == PolicyConfig(name="parrot", max_text_area=0.2, max_caption_overlap=0.3)


def test_trial_has_its_values_its_seed_and_its_output_and_the_rest_of_the_base(base: TrainConfig) -> None:
    before = deepcopy(base)
    cfg = at_trial(base, Trial(Point(3, {"optim.lr": "5e-4", "augment": "none", "optim.grad_clip_norm": None}), 9), "W/trials/3")
    expected = replace(
        base,
        output="W/trials/3",
        seed=9,
        optim=replace(base.optim, lr=0.0005),
        augment=AugmentConfig(crop_scale_min=1.0, crop_ratio_max=1.0, caption="first"),
    )
    assert cfg == expected
    assert type(cfg) is TrainConfig
    assert base == before


def test_values_that_go_alone_and_not_together_are_refused_at_the_point(base: TrainConfig) -> None:
    pair: Space = {"annotations": ["A"], "selection": ["S"]}
    check_space(pair, base, "grid")
    with pytest.raises(UserError, match=r"space: point 000_annotations=A_selection=S: annotations and selection are both given"):
        at_trial(base, Trial(grid(pair)[0], 0), "out")


def test_unknown_key_at_a_point_is_refused(base: TrainConfig) -> None:
    with pytest.raises(UserError, match=r"space: policy\.max_txt_area=0: "):
        _at(base, policy__max_txt_area=0)
