"""What a run knows of itself -> the model card: README.md of its open_clip folder, in Hugging Face's format.

In: plain values. Out: Markdown with a YAML header. Leaves to others where they come from and where the card goes. No licence is claimed:
raysys does not know the pictures'. Paths, names and reasons may hold anything: credentials are hidden, Markdown's signs escaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from raysys.config import TowersConfig, TrainConfig
from raysys.masking import mask

_HEADER = """\
---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
tags:
- clip
- raysys
---
"""
_USE = """\
    import open_clip
    model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
    tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")

FOLDER is where this file lies. `raysys evaluate model=local-dir:FOLDER ...` takes it too.
"""
_NO_RESULTS = """\
None yet. To get them:

    raysys evaluate model=local-dir:FOLDER 'evaluators=[imagenet]' imagenet.path=PICTURES output=RESULTS
"""


def model_card(
    cfg: TrainConfig,
    *,
    start: str,
    parameters: tuple[int, int],
    samples: int,
    kept: int,
    reasons: Mapping[str, int],
    policy: Mapping[str, Any],
    results: Mapping[str, Mapping[str, float]],
    versions: Mapping[str, str],
) -> str:
    """The card of a run that ended.

    :param start: where the weights came from: ``random``, a tag, a file or a folder.
    :param parameters: how many numbers are trained, and all.
    :param samples: of the corpus, of which ``kept`` were trained on; ``reasons`` counts the others.
    :param policy: the filter's words and numbers, empty where there was none.
    :param results: evaluator -> metric -> value.
    """
    recipe = {
        "model": cfg.model,
        "start weights": start,
        "parameters": f"{parameters[0]:,} trained of {parameters[1]:,}",
        "towers": _words(_changed(cfg.towers)) or "trained whole",
        "loss": cfg.loss,
        "steps": f"{cfg.num_steps:,}",
        "global batch": f"{cfg.global_batch:,}",
        "samples seen": f"{cfg.num_steps * cfg.global_batch:,}",
        "optimiser": f"AdamW, linear warm-up, then cosine to 0: {_words(asdict(cfg.optim))}",
        "precision": cfg.train.precision,
        "augmentation": _words(asdict(cfg.augment)),
        "seed": cfg.seed,
    }
    corpora = [cfg.corpus.path] if cfg.corpus.path else [source.path for source in cfg.corpus.sources.values()]
    share = f"{kept:,} of {samples:,} samples kept ({kept / max(samples, 1):.1%})"
    dropped = [(reason, f"{count:,}") for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))]
    measured = [(name, metric, f"{value:.4f}") for name, metrics in results.items() for metric, value in metrics.items()]
    lines = [f"- {_plain(path)}" for path in corpora]
    parts = [
        f"{_HEADER}\n# {_plain(cfg.model)}, trained by raysys\n\nA CLIP model in open_clip's format.",
        f"## Use\n\n{_USE}",
        f"## Recipe\n\n{_table(('what', 'value'), recipe.items())}",
        "## Data\n\n" + "\n".join(lines),
        f"Filter: {_plain(_words(policy)) if policy else 'none'}. {share}.",
        _table(("dropped for", "samples"), dropped) if dropped else "",
        f"## Results\n\n{_table(('set', 'metric', 'value'), measured) if measured else _NO_RESULTS}",
        f"## Versions\n\n{_plain(_words(versions))}",
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts if part) + "\n"


def library_versions() -> dict[str, str]:
    """Of what the numbers of a run may depend on."""
    return {name: version(name) for name in ("raysys", "torch", "torchvision", "open_clip_torch")}


def _changed(towers: TowersConfig) -> dict[str, Any]:
    usual = asdict(TowersConfig())
    return {key: value for key, value in asdict(towers).items() if value != usual[key]}


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(_plain(cell) for cell in line)} |" for line in lines)


def _plain(value: Any) -> str:
    """Text that Markdown takes as it is, in one line and without credentials."""
    return re.sub(r"([\\`*<>\[\]|#])", r"\\\1", " ".join(mask(str(value)).split()))
