"""The words: what they mean, and that every mistake is one line and status 2."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from raysys.cli import HELP, compose_config
from raysys.config import VERBS
from raysys.storage import UserError

Cli = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["anotate"], "did you mean annotate?"),
        (["annotate", "corpus.path=x"], "missing: output=..."),
        (["annotate", "corpus.pat=x", "output=y"], "did you mean corpus.path?"),
        (["annotate", "ocr=quick", "corpus.path=x", "output=y"], "choose from default, fast, scenes, thorough"),
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
