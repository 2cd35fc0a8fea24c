"""The model card: what it says, and that nothing from outside breaks it."""

from __future__ import annotations

from typing import Any

import yaml

from raysys.config import AugmentConfig, CorpusConfig, LoopConfig, OptimConfig, SourceConfig, TowersConfig, TrainConfig
from raysys.training.card import library_versions, model_card

FACTS: dict[str, Any] = {
    "start": "random",
    "parameters": (10, 1000),
    "samples": 1000,
    "kept": 700,
    "reasons": {"error": 100, "text": 200},
    "policy": {"name": "paper", "min_score": 0.4},
    "results": {"imagenet": {"acc1": 0.12345, "acc5": 0.5}},
    "versions": {"torch": "2.15.0"},
}


def card(cfg: TrainConfig | None = None, **facts: Any) -> str:
    return model_card(cfg or config(), **(FACTS | facts))


def config(**words: Any) -> TrainConfig:
    usual = {"model": "ViT-B-32", "corpus": CorpusConfig(path="data/train"), "train": LoopConfig(steps=72), "global_batch": 1000}
    return TrainConfig(**(usual | words))


def test_header_is_that_of_an_open_clip_model_and_claims_no_licence() -> None:
    _, header, body = card().split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "open_clip",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip", "raysys"],
    }
    assert body.startswith("\n# ViT-B-32, trained by raysys\n")


def test_recipe_data_and_results_are_the_runs() -> None:
    cfg = config(
        seed=7,
        towers=TowersConfig(lock_image=True, lock_image_unlocked_groups=2),
        augment=AugmentConfig(factor=3, schedule="ramp"),
        optim=OptimConfig(lr=1e-3),
    )
    lines = card(cfg).splitlines()
    for line in (
        "| start weights | random |",
        "| parameters | 10 trained of 1,000 |",
        "| towers | lock_image=True, lock_image_unlocked_groups=2 |",
        "| steps | 72 |",
        "| samples seen | 72,000 |",
        "| seed | 7 |",
        "- data/train",
        "Filter: name=paper, min_score=0.4. 700 of 1,000 samples kept (70.0%).",
        "| imagenet | acc1 | 0.1235 |",
        "| imagenet | acc5 | 0.5000 |",
        "torch=2.15.0",
    ):
        assert line in lines, line
    assert lines.index("| text | 200 |") + 1 == lines.index("| error | 100 |")
    text = "\n".join(lines)
    assert "lr=0.001, weight_decay=0.2, beta1=0.9" in text
    assert "| augmentation | factor=3, schedule=ramp, " in text


def test_without_results_it_says_how_to_get_them() -> None:
    text = card(results={})
    assert "    raysys evaluate model=local-dir:FOLDER" in text and "| set |" not in text


def test_without_a_filter_it_says_so() -> None:
    text = card(policy={}, reasons={}, kept=1000)
    assert "Filter: none. 1,000 of 1,000 samples kept (100.0%)." in text
    assert "dropped for" not in text


def test_nothing_from_outside_breaks_a_table_or_shows_a_secret() -> None:
    corpus = CorpusConfig(sources={"a": SourceConfig(path="s3://key:secret@bucket/x"), "b": SourceConfig(path="b\n# c")})
    cfg = config(corpus=corpus, model="m\n---\n| `x`")
    text = card(cfg, start="https://me:hunter2@host/w.pt", reasons={"a|b\n| <img src=x>": 3})
    assert "secret" not in text and "hunter2" not in text and "s3://\\*\\*\\*@bucket/x" in text
    assert "| a\\|b \\| \\<img src=x\\> | 3 |" in text
    assert [line for line in text.splitlines() if line.startswith("# ")] == ["# m --- \\| \\`x\\`, trained by raysys"]
    assert "- b \\# c" in text.splitlines()


def test_versions_are_those_installed() -> None:
    import torch

    assert torch.__version__.startswith(library_versions()["torch"].split("+")[0])
    assert set(library_versions()) == {"raysys", "torch", "torchvision", "open_clip_torch"}
