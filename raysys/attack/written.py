"""Which class is written on each picture.

In: a clean :class:`ClassSet` and :class:`AttackSettings`. Out: a class index for each picture. Never the true class's own name, but where a
file says so (four classes of the authors' do, "missile" and "sunglasses").
"""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysys.config import AttackSettings
from raysys.console import Progress
from raysys.errors import UserError
from raysys.evaluation.class_sets import ClassSet
from raysys.masking import mask
from raysys.storage import read_bytes, read_json

CONFUSIONS, NEAREST, RANDOM = "confusions", "nearest", "random"
PROMPTS_AT_ONCE = 256
"""As many as the evaluator encodes together by default."""
ROWS_AT_ONCE = 1024
"""Classes compared with all others together: 80 MB for 20,000 classes."""


def choose_written(settings: AttackSettings, class_set: ClassSet) -> list[int | None]:
    """The class whose name is written on each picture; None where the nearest text of ``settings.model`` decides (:func:`nearest_classes`).

    ``random`` draws one for each picture, everything else gives all pictures of a class the same.

    :raises UserError: for a file that does not fit the class list, or a class for which nothing decides.
    """
    names = class_set.class_names
    if settings.classes in (CONFUSIONS, NEAREST, RANDOM) and len(set(names)) < 2:
        raise UserError(
            f"attack.classes={settings.classes} needs two different class names, the set has {len(set(names))}; "
            "give a set of more classes as imagenet.path"
        )
    if settings.classes == RANDOM:
        rng = np.random.default_rng(settings.seed)
        return [_other(rng, label, names) for label in class_set.labels]
    by_class: dict[int, int] = {}
    if settings.classes == CONFUSIONS:
        by_class = _confusions(settings, class_set)
    elif settings.classes != NEAREST:
        by_class = _from_file(settings.classes, class_set)
    undecided = set(class_set.labels) - by_class.keys()
    if undecided:
        from raysys.models import check_model  # torch and open_clip: seconds

        assert settings.model is not None  # _confusions and check_attack
        check_model(settings.model, settings.pretrained)
    return [by_class.get(label) for label in class_set.labels]


def _other(rng: np.random.Generator, label: int, names: list[str]) -> int:
    while True:
        written = int(rng.integers(len(names)))
        if names[written] != names[label]:
            return written


# ---- a file ------------------------------------------------------------------------------------------------------------


def _from_file(file: str, class_set: ClassSet) -> dict[int, int]:
    where, content = f"attack.classes={mask(file)}", read_json(file)
    if isinstance(content, dict) and isinstance(content.get("written_class"), list):
        return dict(enumerate(_index_list(where, content["written_class"], len(class_set.class_names))))
    if not isinstance(content, dict) or not all(type(value) in (str, int) for value in content.values()):
        raise UserError(f'{where}: expected {{class: class}} or {{"written_class": [one class index for each class]}}')
    index_of = _Lookup(where, class_set)
    by_class: dict[int, int] = {}
    for true, written in content.items():
        label, value = index_of(true), index_of(str(written))
        if by_class.setdefault(label, value) != value:
            raise UserError(f"{where}: two different classes for '{true}', by its id and by its name; leave one out")
    without = sorted(set(class_set.labels) - by_class.keys())
    if without:
        first = class_set.class_ids[without[0]]
        raise UserError(
            f"{where}: {len(without):,} classes with pictures have no entry; add '{first}' ({class_set.class_names[without[0]]}) ..."
        )
    return by_class


def _index_list(where: str, indexes: list[Any], num_classes: int) -> list[int]:
    if len(indexes) != num_classes:
        raise UserError(f"{where}: {len(indexes)} written classes for {num_classes} classes; give one for each")
    if not all(type(index) is int and 0 <= index < num_classes for index in indexes):
        raise UserError(f"{where}: every written class must be a whole number from 0 to {num_classes - 1}")
    return indexes


class _Lookup:
    """A class's id, else its name -> its index."""

    def __init__(self, where: str, class_set: ClassSet) -> None:
        self._where, self._class_set = where, class_set
        self._by_id = {name: index for index, name in enumerate(class_set.class_ids)}
        self._by_name = {name: index for index, name in enumerate(class_set.class_names)}
        self._count = Counter(class_set.class_names)

    def __call__(self, word: str) -> int:
        if word in self._by_id:
            return self._by_id[word]
        if word not in self._by_name:
            first = f"'{self._class_set.class_ids[0]}' or '{self._class_set.class_names[0]}'"
            raise UserError(f"{self._where}: '{word}' is neither the id nor the name of a class of the set; the first is {first}")
        if self._count[word] > 1:
            pairs = zip(self._class_set.class_ids, self._class_set.class_names, strict=True)
            ids = " and ".join(class_id for class_id, name in pairs if name == word)
            raise UserError(f"{self._where}: '{word}' is the name of {self._count[word]} classes; write their ids ({ids})")
        return self._by_name[word]


# ---- a model's confusions ----------------------------------------------------------------------------------------------


def _confusions(settings: AttackSettings, class_set: ClassSet) -> dict[int, int]:
    """For each class the wrong class that its pictures were most often taken for, the first of several; never one of the same name."""
    assert settings.predictions is not None  # check_attack
    where = f"attack.predictions={mask(settings.predictions)}"
    table = _read_predictions(settings.predictions, where)
    true, predicted = (np.asarray(table[column]) for column in ("true_class", "predicted_class"))
    _check_same_classes(table, true, predicted, class_set, where)
    number = {name: i for i, name in enumerate(dict.fromkeys(class_set.class_names))}  # equal names have one number
    name_of = np.array([number[name] for name in class_set.class_names])
    wrong = name_of[true] != name_of[predicted]
    num_classes = len(class_set.class_names)
    pairs, counts = np.unique(true[wrong].astype(np.int64) * num_classes + predicted[wrong], return_counts=True)
    by_class: dict[int, int] = {}
    for i in np.lexsort((pairs, -counts)):  # most often first, then the lowest index
        by_class.setdefault(int(pairs[i]) // num_classes, int(pairs[i]) % num_classes)
    with_pictures = set(class_set.labels)
    undecided = len(with_pictures - by_class.keys())
    if undecided and settings.model is None:
        raise UserError(
            f"{where}: {undecided:,} of {len(with_pictures):,} classes are never taken for another there; give attack.model=MODEL, "
            "and they get the class of the nearest text"
        )
    return by_class


def _read_predictions(file: str, where: str) -> pa.Table:
    try:
        table = pq.read_table(io.BytesIO(read_bytes(file)))
    except FileNotFoundError as error:
        raise UserError(f"{where}: no such file; `raysys evaluate` with evaluators=[imagenet] writes it") from error
    except pa.ArrowException as error:
        raise UserError(
            f"{where}: no Parquet file ({error}); give the E/predictions/imagenet_MODEL.parquet of `raysys evaluate`"
        ) from error
    if "written_class" in table.column_names:
        raise UserError(f"{where}: answers on attacked pictures; give those on clean ones (E/predictions/imagenet_MODEL.parquet)")
    kinds = {"picture": pa.types.is_string, "true_class": pa.types.is_integer, "predicted_class": pa.types.is_integer}
    for column, fits in kinds.items():
        if column not in table.column_names or not fits(table.schema.field(column).type):
            raise UserError(
                f"{where}: no predictions of a labelled set (its column {column} is missing, or of another type); "
                "give the E/predictions/imagenet_MODEL.parquet of `raysys evaluate`"
            )
    return table


def _check_same_classes(table: pa.Table, true: np.ndarray, predicted: np.ndarray, class_set: ClassSet, where: str) -> None:
    """:raises UserError: where the predictions were made under another class list."""
    num_classes = len(class_set.class_names)
    outside = next((int(i) for i in np.concatenate([true, predicted]) if not 0 <= i < num_classes), None)
    if outside is not None:
        raise UserError(f"{where}: holds class {outside}, the set has {num_classes} classes; both need the same class list")
    labels = {picture.name: label for picture, label in zip(class_set.pictures, class_set.labels, strict=True)}
    for name, label in zip(table["picture"].to_pylist(), true.tolist(), strict=True):
        if labels.get(name, label) != label:
            there, here = class_set.class_ids[label], class_set.class_ids[labels[name]]
            raise UserError(f"{where}: {name} is of class {there} there and of {here} here; both need the same class list")


# ---- a model's texts ---------------------------------------------------------------------------------------------------


def nearest_classes(classes: list[int], class_set: ClassSet, *, model: str, pretrained: str | None) -> dict[int, int]:
    """For each of ``classes`` the class whose prompts lie nearest by cosine, of another name; the first of several.

    Encodes the prompts of all classes: 80,000 of ImageNet with ViT-B-32 take 25 minutes on two cores, seconds on a GPU.
    """
    import torch

    from raysys.evaluation.zero_shot import class_embeddings, prompts
    from raysys.models import load_model

    loaded = load_model(model, pretrained, device="cuda" if torch.cuda.is_available() else "cpu")
    encode: Any = loaded.model.encode_text
    device = next(loaded.model.parameters()).device
    names, templates = class_set.class_names, class_set.templates
    found = []
    at_once = max(PROMPTS_AT_ONCE // len(templates), 1)
    with torch.inference_mode(), Progress("attack: nearest texts", len(names), "classes") as progress:
        for start in range(0, len(names), at_once):
            some = names[start : start + at_once]
            tokens_CTL = loaded.tokenizer(prompts(some, templates)).unflatten(0, (len(some), len(templates)))
            found.append(class_embeddings(lambda tokens: encode(tokens).float(), tokens_CTL.to(device)).cpu())
            progress.advance(len(some))
    text_CD = torch.cat(found).numpy()
    if not np.isfinite(text_CD).all():
        raise UserError(
            f"attack.model={mask(model)} gives embeddings that are not finite: its weights are damaged; "
            "give another model, or fetch its weights again"
        )
    return nearest_rows(text_CD, classes, names)


def nearest_rows(text_CD: np.ndarray, classes: list[int], names: list[str]) -> dict[int, int]:
    """Row -> the other row of highest cosine whose name differs; rows have length 1."""
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    name_of = np.array([number[name] for name in names])
    nearest: dict[int, int] = {}
    for start in range(0, len(classes), ROWS_AT_ONCE):
        some = np.array(classes[start : start + ROWS_AT_ONCE])
        cosine_BC = text_CD[some] @ text_CD.T
        cosine_BC[name_of[some][:, None] == name_of] = -np.inf
        nearest |= zip(some.tolist(), cosine_BC.argmax(axis=1).tolist(), strict=True)
    return nearest
