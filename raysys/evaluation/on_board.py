"""What ``raysys evaluate`` shows in TensorBoard: a model's numbers under the tags that training has for them, and attacked pictures.

In: E/results and E/predictions of a model. Out: E/tensorboard/MODEL. Numbers stand at the step after which the model was taken, so that
``tensorboard --logdir`` over runs and evaluations puts them into the charts of the validations.
"""

from __future__ import annotations

import re
from statistics import fmean
from typing import Any

import numpy as np

from raysys.board import draw_boxes, new_board
from raysys.config import ModelConfig
from raysys.console import say
from raysys.corpus.images import to_rgb
from raysys.evaluation.class_sets import ClassSet
from raysys.evaluation.evaluator import ATTACKED
from raysys.evaluation.metrics import PRIMARY
from raysys.evaluation.pictures import open_picture
from raysys.evaluation.results import read_predictions
from raysys.masking import mask
from raysys.output import Output
from raysys.storage import absolute, exists, join, read_json

MAX_PICTURES = 6
"""Attacked pictures of a group."""
NO_BOXES = np.zeros((0, 4, 2))


def write_board(output: Output, name: str, model: ModelConfig, results: list[dict[str, Any]], attacked: ClassSet | None) -> None:
    """
    :param name: of the model, in file names.
    :param results: of the model, as E/results has them.
    :param attacked: the set of the evaluator imagenet_attr, where it was asked.
    """
    step = trained_steps(model)
    numbers = {
        f"val/{result['evaluator']}/{metric}": value
        for result in results
        for metric, value in result["metrics"].items()
        if not metric.startswith("num_")
    }
    score = fmean(result["metrics"][PRIMARY[result["evaluator"]]] for result in results)
    pictures = _attacked_pictures(output, name, attacked) if attacked is not None else {}
    with new_board(output.join("tensorboard", name)) as board:
        board.scalars({"val/score": score} | numbers, step)
        for tag, drawn in pictures.items():
            board.pictures(tag, drawn, step)


def trained_steps(model: ModelConfig) -> int:
    """Optimisation steps of a run's model (``model=R``, ``local-dir:R/open_clip``, ``pretrained=R/checkpoints/step-N/state.pt``); 0 for others."""
    if model.pretrained is not None:
        checkpoint = re.fullmatch(r"(.*/checkpoints/step-(\d+))/state\.pt", absolute(model.pretrained))
        return int(checkpoint[2]) if checkpoint and exists(join(checkpoint[1], "info.json")) else 0
    run = absolute(model.model.removeprefix("local-dir:")).rstrip("/").removesuffix("/open_clip")
    if model.model.startswith("hf-hub:") or not exists(join(run, "manifest.json")):
        return 0
    manifest = read_json(join(run, "manifest.json"))
    return int(manifest["counts"]["steps"]) if manifest.get("verb") == "train" else 0


def _attacked_pictures(output: Output, name: str, attacked: ClassSet) -> dict[str, list[np.ndarray]]:
    """``attacked/read`` (answered with the word), ``attacked/seen`` (with the truth), ``attacked/neither``: some from all over the set."""
    table = read_predictions(output, ATTACKED, name)
    true, said, written = (table[f"{what}_class"].to_numpy() for what in ("true", "predicted", "written"))
    groups = {"read": (said == written) & (true != written), "seen": (said == true), "neither": (said != written) & (said != true)}
    of_name, names = {picture.name: picture for picture in attacked.pictures}, attacked.class_names
    drawn: dict[str, list[np.ndarray]] = {}
    for group, belongs in groups.items():
        rows = np.flatnonzero(belongs)
        for row in rows[np.unique(np.linspace(0, len(rows) - 1, min(MAX_PICTURES, len(rows))).astype(int))].tolist():
            notes = [
                f"said {names[said[row]]} ({table['score'][row].as_py():.2f})",
                f"is {names[true[row]]}, written {names[written[row]]}",
            ]
            try:
                pixels = np.asarray(to_rgb(open_picture(of_name[table["picture"][row].as_py()])))
            except (OSError, ValueError) as error:
                say(f"evaluate: a picture is not shown in TensorBoard: {mask(str(error))}")
                continue
            drawn.setdefault(f"attacked/{group}", []).append(draw_boxes(pixels, NO_BOXES, [], notes))
    return drawn
