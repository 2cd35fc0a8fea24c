"""The words: what they mean, and that every mistake is one line and status 2."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from raysys.cli import HELP, compose_config
from raysys.config import VERBS, AugmentConfig, LookConfig, OcrConfig, PolicyConfig, choices
from raysys.errors import UserError
from raysys.sweeping.space import read_space
from raysys.training.model import check_training_model

Cli = Callable[..., tuple[int, str, str]]
SWEEPS = ("paper", "paper_small")
TRAIN = ["train", "corpus.path=x", "output=y", "model=z", "train.steps=10"]
SWEEP = ["sweep", *TRAIN[1:], "space=small", "evaluators=[imagenet]", "imagenet.path=i"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["anotate"], "did you mean annotate?"),
        (["annotate", "corpus.path=x"], "missing: output=..."),
        (["annotate", "corpus.pat=x", "output=y"], "did you mean corpus.path?"),
        (
            ["annotate", "ocr=quick", "corpus.path=x", "output=y"],
            "choose from default, fast, scenes, thorough, or give a YAML file",
        ),
        (["filter", "policy=mine.yaml", "annotations=x", "output=y"], "policy=mine.yaml: no such file"),
        (["annotate", "ocr=presets/mine", "corpus.path=x", "output=y"], "ocr=presets/mine: no such file"),
        (["annotate", "ocr.engine=tesseract", "corpus.path=x", "output=y"], "not one of onnx, openvino, paddle, torch"),
        (["annotate", "ocr.max_regions=wide", "corpus.path=x", "output=y"], "ocr.max_regions: Value 'wide'"),
        (["annotate", "ocr.max_regions=1,2", "corpus.path=x", "output=y"], "several values"),
        (["annotate", "ocr.store_score=1.5", "corpus.path=x", "output=y"], "must lie in 0..1"),
        (["annotate", "corpus.path=a", "corpus.path=b", "output=y"], "given twice ('a' and 'b')"),
        (["annotate", "corpus.path=/nowhere/at/all", "output=y"], "/nowhere/at/all: no such file or folder"),
        (["annotate", "output"], "'output' is not key=value"),
        (["annotate", "--verbose"], "unknown flag '--verbose'"),
        (
            ["train", "corpus.path=x", "output=y", "model=z", "train.steps=10", "num_workers=3"],
            "global_batch=256 is not a multiple",
        ),
        (["train", "corpus.path=x", "output=y", "model=z", "train.steps=0"], "train.steps=0 must be greater than 0"),
        (["train", "corpus.path=x", "output=y", "model=z", "train.steps=9", "augment.factor=-1"], "augment.factor=-1"),
        (["train", "corpus.path=x", "output=y", "model=z", "train.steps=9", "annotations=a", "selection=s"], "both given"),
        ([*TRAIN, "loss=sigmoid"], "loss=sigmoid is not one of clip, siglip"),
        ([*TRAIN, "towers.lock_image_unlocked_groups=1"], "needs towers.lock_image=true"),
        ([*TRAIN, "towers.patch_dropout=1"], "towers.patch_dropout=1.0 must be at least 0 and less than 1"),
        ([*TRAIN, "train.strategy=zero"], "train.strategy=zero is not one of ddp, fsdp"),
        ([*TRAIN, "train.strategy=fsdp", "num_workers=[1,2]"], "train.strategy=fsdp needs a fixed number of workers"),
        ([*TRAIN, "train.validate_every=5"], "train.validate_every needs evaluators=[...]"),
        ([*TRAIN, "evaluators=[retrieval]"], "evaluator retrieval needs retrieval.path=..."),
        ([*TRAIN, "optim.grad_clip_norm=0"], "optim.grad_clip_norm=0.0 must be greater than 0"),
        (
            [*SWEEP, "num_samples=3"],
            "num_samples is for search=random and search=tpe: a grid has every point once; seeds=N repeats each",
        ),
        ([*SWEEP, "search=random"], "search=random needs num_samples=N"),
        ([*SWEEP, "search=bayes"], "search=bayes is not one of grid, random, tpe"),
        ([*SWEEP, "seeds=0"], "seeds=0 must be greater than 0"),
        ([*SWEEP, "objective=coco"], "objective=coco is not one of mean, imagenet"),
        ([*SWEEP, "objective=front"], "objective=front is not one of mean, imagenet"),
        ([*SWEEP, "asha.grace_steps=5"], "asha.grace_steps=5 needs train.validate_every=N"),
        ([*SWEEP, "asha.grace_steps=5", "train.validate_every=5", "seeds=2"], "asha with seeds=2: one seed that is stopped"),
        ([*SWEEP, "asha.grace_steps=5", "train.validate_every=6"], "asha.grace_steps=5 comes before the first validation"),
        (
            ["sweep", *TRAIN[1:], "space=/no/space", "evaluators=[imagenet]", "imagenet.path=i"],
            "space=/no/space is neither a file nor one of paper, ",
        ),
        (SWEEP, "x: no such file"),
        (["train", "experiment=paper", "corpus.path=x", "output=y"], "experiment=paper is not there; choose from cpu_smoke, "),
        (["annotate", "experiment=cpu_smoke", "corpus.path=x", "output=y"], "only train and sweep have experiments"),
        (["train", "config=/no/file.yaml"], "config=/no/file.yaml: no such file"),
        (["filter", "annotations=/nowhere", "output=y"], "not a folder that `raysys annotate` wrote"),
        (["evaluate", "model=z", "output=y", "evaluators=[imagenet]"], "imagenet.path"),
        (["evaluate", "model=z", "output=y", "evaluators=[imagnet]"], "not one of imagenet, coco, retrieval, imagenet_attr"),
        (["report", "/nowhere"], "/nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = run_cli(*words)
    assert status == 2
    assert says in err
    assert err.count("\n") == 1 and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_text_is_taken_to_the_letter() -> None:
    path = "s3://b/a={00000..00005},é (1) [x].tar"
    cfg = compose_config("annotate", [f"corpus.path={path}", "output=1e3"])
    assert cfg.corpus.path == path
    assert cfg.output == "1e3"


@pytest.mark.parametrize("name", choices("experiment"))
def test_every_experiment_is_a_whole_recipe(name: str) -> None:
    words = [f"experiment={name}", "corpus.path=c", "output=o"]
    if name == "paper":  # whose pictures are the user's
        words += ["annotations=A", "imagenet.path=i", "coco.path=c", "imagenet_attr.path=a"]
    cfg = compose_config("sweep" if name in SWEEPS else "train", words)
    assert cfg.num_steps > 0 and cfg.pretrained == "random"
    check_training_model(cfg)
    if name in SWEEPS:
        assert read_space(cfg.space)


def test_experiments_of_sweeps_are_not_offered_to_train() -> None:
    with pytest.raises(UserError, match=r"experiment=paper_small is not there; choose from cpu_smoke, datacomp_large"):
        compose_config("train", ["experiment=paper_small", "output=o"])


def test_datacomp_recipes_are_datacomps() -> None:
    """facts: small 12.8M samples seen, 4096/5e-4/500/B-32; medium 128M, same; large 1.28B, 8192/5e-4/500/B-16."""
    found = {}
    for scale in ("small", "medium", "large"):
        cfg = compose_config("train", [f"experiment=datacomp_{scale}", "corpus.path=c", "output=o"])
        found[scale] = (cfg.train.samples_seen, cfg.global_batch, cfg.optim.lr, cfg.optim.warmup_steps, cfg.model)
    assert found == {
        "small": (12_800_000, 4096, 5e-4, 500, "ViT-B-32"),
        "medium": (128_000_000, 4096, 5e-4, 500, "ViT-B-32"),
        "large": (1_280_000_000, 8192, 5e-4, 500, "ViT-B-16"),
    }


def test_words_beat_a_config_file_and_that_beats_an_experiment(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {lr: 0.1, warmup_steps: 7}\npolicy: area\n")
    cfg = compose_config("train", [f"config={file}", "optim.lr=0.2", "experiment=paper_b16", "corpus.path=c", "output=o"])
    assert (cfg.optim.lr, cfg.optim.warmup_steps, cfg.policy.name, cfg.global_batch) == (0.2, 7, "area", 32768)


def test_config_file_stands_between_defaults_and_words(tmp_path: Path) -> None:
    file = tmp_path / "best.yaml"
    file.write_text("model: a\npolicy: area\noptim: {lr: 0.1, weight_decay: 0.3}\ntrain: {steps: 5}\n")
    cfg = compose_config("train", [f"config={file}", "corpus.path=c", "output=o", "optim.lr=0.2"])
    assert (cfg.model, cfg.policy.name, cfg.optim.lr, cfg.optim.weight_decay, cfg.train.steps) == ("a", "area", 0.2, 0.3, 5)


def test_config_file_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("optim: {lrr: 0.1}\n")
    with pytest.raises(UserError, match=r"unknown key 'optim.lrr'; did you mean optim.lr"):
        compose_config("train", [f"config={file}"])


def test_a_group_and_a_key_in_it() -> None:
    cfg = compose_config("filter", ["annotations=a", "output=o", "policy=parrot", "policy.max_caption_overlap=0.5"])
    assert (cfg.policy.name, cfg.policy.max_text_area, cfg.policy.max_caption_overlap) == ("parrot", 1.0, 0.5)


def test_a_group_from_a_file_stands_on_the_defaults_and_words_come_after_it(tmp_path: Path) -> None:
    file = tmp_path / "small-text.yaml"
    file.write_text("max_text_area: 0.2\nmax_regions: 3\n")
    cfg = compose_config("filter", ["policy.max_text_area=.1", f"policy={file}", "annotations=a", "output=o"])
    assert cfg.policy == PolicyConfig(name="small-text", max_text_area=0.1, max_regions=3)
    file.write_text("name: mine\n")
    assert compose_config("filter", [f"policy={file}", "annotations=a", "output=o"]).policy == PolicyConfig(name="mine")


def test_a_file_takes_the_place_of_the_verbs_own_choice(tmp_path: Path) -> None:
    ocr, augment = tmp_path / "ocr.yml", tmp_path / "augment.yaml"
    ocr.write_text("looks:\n  - {enlarge: 3, max_side_px: 640}\n")
    augment.write_text("")
    cfg = compose_config("demo", [f"ocr={ocr}", f"augment={augment}", "output=o"])  # demo's own: ocr=scenes, augment=scenes
    assert cfg.ocr == OcrConfig(looks=[LookConfig(enlarge=3.0, max_side_px=640)])
    assert cfg.augment == AugmentConfig()


def test_a_config_file_may_choose_a_group_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("max_regions: 5\n")
    Path("all.yaml").write_text("policy: my.yaml\nannotations: a\n")
    cfg = compose_config("filter", ["config=all.yaml", "output=o", "policy.min_score=0.6"])
    assert cfg.policy == PolicyConfig(name="my", max_regions=5, min_score=0.6)
    assert compose_config("filter", ["config=all.yaml", "output=o", "policy=area"]).policy.name == "area"


@pytest.mark.parametrize(
    ("yaml", "says"),
    [
        (
            "max_text_are: 0.1\n",
            "policy=my.yaml: unknown key 'policy.max_text_are'; did you mean policy.max_text_area, policy.min_text_score?",
        ),
        ("policy: {max_text_area: 0.1}\n", "policy=my.yaml: unknown key 'policy.policy'"),
        ("max_text_area: much\n", "policy=my.yaml: policy.max_text_area: Value 'much'"),
        ("max_text_area: [0.1]\n", "policy=my.yaml: policy.max_text_area: "),
        ("max_text_area: null\n", "policy=my.yaml: policy.max_text_area: "),
        ("max_text_area: {a: 1}\n", "policy=my.yaml: unknown key 'policy.max_text_area.a'"),
        ("- max_text_area\n", "policy=my.yaml: must hold keys and values"),
        ("max_text_area: [0.1\n", "policy=my.yaml: not valid YAML"),
        ("max_text_area: 2\n", "policy.max_text_area=2.0 must lie in 0..1"),
    ],
)
def test_a_mistake_in_a_groups_file_names_file_and_key(
    run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, yaml: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(yaml)
    status, _, err = run_cli("filter", "policy=my.yaml", "annotations=a", "output=o")
    assert status == 2
    assert says in err
    assert err.count("\n") == 1


def test_a_mistake_in_a_list_of_a_groups_file_names_file_and_key(tmp_path: Path) -> None:
    file = tmp_path / "ocr.yaml"
    file.write_text("looks:\n  - {enlarg: 3}\n")
    with pytest.raises(UserError, match=r"ocr=.*ocr.yaml: .*enlarg"):
        compose_config("annotate", [f"ocr={file}", "corpus.path=c", "output=o"])


def test_a_wrong_type_in_a_config_file_names_file_and_key(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("optim: {lr: fast}\n")
    with pytest.raises(UserError, match=r"config=.*bad.yaml: optim.lr: Value 'fast'"):
        compose_config("train", [f"config={file}"])


def test_help_says_that_a_group_may_be_a_file(run_cli: Cli) -> None:
    _, out, _ = run_cli("filter", "--help")
    assert "choices (group=one of these, or a YAML file of its keys: policy=my.yaml):\n  policy=area,none,paper,parrot\n" in out


@pytest.mark.parametrize("verb", VERBS)
def test_help_and_cfg_of_every_verb(run_cli: Cli, verb: str) -> None:
    status, out, _ = run_cli(verb, "--help")
    assert status == 0 and HELP[verb][1] in out
    status, out, _ = run_cli(verb, "--cfg", "job")
    assert status == 0 and ":" in out


def test_as_a_module_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "raysys", "annotate", "ocr.engin=x"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "raysys annotate: unknown key 'ocr.engin'; did you mean ocr.engine?\n"


def test_sources_are_named_by_the_user(tmp_path: Path) -> None:
    words = ["corpus.sources.a.path=/x/{0..1}.tar", "corpus.sources.b.path=/y", "output=O"]
    cfg = compose_config("annotate", words)
    assert {name: source.path for name, source in cfg.corpus.sources.items()} == {"a": "/x/{0..1}.tar", "b": "/y"}
    file = tmp_path / "c.yaml"
    file.write_text("corpus: {sources: {a: {path: /z}}}\n")
    cfg = compose_config("annotate", [f"config={file}", "corpus.sources.b.path=/y", "output=O"])
    assert sorted(cfg.corpus.sources) == ["a", "b"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "missing: corpus.path"),
        (["corpus.sources.a.pat=/x"], "did you mean corpus.sources.a.path"),
        (["corpus.sources.a.path=/x", "corpus.path=/y"], "both given"),
        (["corpus.sources.a/b.path=/x"], "without a slash"),
    ],
)
def test_a_corpus_that_is_not_clear_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compose_config("annotate", [*words, "output=O"])


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen([sys.executable, "-m", "raysys", "train", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1
