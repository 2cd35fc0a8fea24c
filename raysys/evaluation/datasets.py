"""Labelled folders and retrieval sets: which pictures, which answers, and the pictures as uint8.

In: :class:`ClassSetConfig`, :class:`RetrievalSetConfig`, and a model's own transform. Out: :class:`ClassSet`,
:class:`RetrievalSet`, and decoded pictures uint8 [N, H, W, 3]: the transform up to its ToTensor. :func:`normalise` on the device
then gives what open_clip's transform gives, to the bit. Leaves the questions to :mod:`zero_shot` and :mod:`retrieval`.
"""

from __future__ import annotations

import importlib.resources
import io
import os
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms import Compose, Normalize, ToTensor

from raysys.config import ClassSetConfig, RetrievalSetConfig
from raysys.corpus.samples import DamagedShard
from raysys.corpus.shards import iter_samples
from raysys.storage import UserError, exists, fingerprint, is_local, join, list_files, mask, open_fs, read_bytes, read_json

PICTURE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".gif", ".bmp")
ATTACK_FILE = "attack.parquet"
CLASSES_FILE = "classes.json"
_BROKEN = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, struct.error, Image.DecompressionBombError)
"""What Pillow's decoders are seen to raise on damaged files."""


@dataclass(frozen=True)
class Picture:
    """Where a picture lies: a file, or a range of a tar."""

    name: str
    """Unique within the set."""
    path: str
    offset: int = -1
    """First byte in the file; -1 is the whole file."""
    size: int = -1

    def read(self) -> bytes:
        if self.offset < 0:
            return read_bytes(self.path)
        fs, inner = open_fs(self.path)
        return fs.cat_file(inner, start=self.offset, end=self.offset + self.size)


@dataclass(frozen=True)
class ClassSet:
    pictures: list[Picture]
    labels: list[int]
    """True class of each picture."""
    folders: list[str]
    """Folder name of every class, with pictures or without."""
    class_names: list[str]
    """Every class is a possible answer, also one without pictures."""
    templates: list[str]
    fingerprint: str
    written: list[int] | None = None
    """The class whose name is written on each picture; None for a clean set."""

    @property
    def num_classes_with_pictures(self) -> int:
        return len(set(self.labels))


@dataclass(frozen=True)
class RetrievalSet:
    name: str
    pictures: list[Picture]
    captions: list[str]
    image_of_text: list[int]
    """Index of the picture that each caption belongs to; every picture has at least one."""
    fingerprint: str


def read_class_set(cfg: ClassSetConfig, key: str = "imagenet", *, attacked: bool = False) -> ClassSet:
    """List a folder of pictures by class, sorted by class and name.

    :param key: where the config stands in the user's words, for messages.
    :param attacked: the folder is what ``raysys attack`` wrote; its attack.parquet says what is written where.
    :raises UserError: for a folder that is missing, empty, or holds a class that is not in the list.
    """
    if cfg.path is None:
        raise UserError(f"{key}.path is missing: a folder with one folder of pictures a class")
    classes_file = cfg.classes
    if classes_file is None and attacked and exists(join(cfg.path, CLASSES_FILE)):
        classes_file = join(cfg.path, CLASSES_FILE)
    folders, class_names = _read_classes(classes_file)
    templates = _read_templates(cfg.templates, key)
    index = {folder: label for label, folder in enumerate(folders)}
    fs, root = open_fs(cfg.path)
    if not fs.isdir(root):
        raise UserError(f"{key}.path={mask(cfg.path)}: no such folder")
    prefix = "" if is_local(cfg.path) else cfg.path.split("://")[0] + "://"
    found: list[tuple[int, Picture, int]] = []
    for path, info in fs.find(root, detail=True).items():
        name = os.path.relpath(path, root)
        folder, _, rest = name.partition("/")
        if not rest or name.startswith(".") or not name.lower().endswith(PICTURE_SUFFIXES):
            continue
        if folder not in index:
            known = "ImageNet's 1,000 WNIDs" if classes_file is None else mask(classes_file)
            mend = f"give {key}.classes=FILE, JSON {{folder: name}}"
            raise UserError(f"{key}.path={mask(cfg.path)}: folder '{folder}' is not among {known}; {mend}")
        found.append((index[folder], Picture(name, prefix + path), info["size"]))
    if not found:
        raise UserError(f"{key}.path={mask(cfg.path)}: no pictures there; expected FOLDER/CLASS/NAME.JPEG")
    found.sort(key=lambda item: (item[0], item[1].name))
    labels = [label for label, _, _ in found]
    pictures = [picture for _, picture, _ in found]
    mark = fingerprint([[(picture.name, size, label) for label, picture, size in found], class_names, templates])
    written = _read_written(cfg.path, pictures, labels, class_names, key) if attacked else None
    return ClassSet(pictures, labels, folders, class_names, templates, mark, written)


def read_retrieval_set(cfg: RetrievalSetConfig, key: str = "retrieval") -> RetrievalSet:
    """List pictures and captions of WebDataset tars, or of COCO's folder (annotations/captions_val2017.json, val2017/).

    Captions of a tar: ``captions`` of KEY.json, else KEY.txt, one a line. val2017 is not the Karpathy split of the literature; its
    name says so.

    :raises UserError: for a set that is missing or damaged, or a picture without a caption.
    """
    if cfg.path is None:
        raise UserError(f"{key}.path is missing: a WebDataset tar or COCO's folder")
    coco = join(cfg.path, "annotations", "captions_val2017.json")
    if exists(coco):
        name, rows = "coco_val2017", list(_coco(cfg.path, coco))
    else:
        name, rows = key, list(_tars(cfg.path))
    without = next((picture.name for picture, captions in rows if not captions), None)
    if without is not None:
        raise UserError(f"{key}.path={mask(cfg.path)}: {without} has no caption")
    if not rows:
        raise UserError(f"{key}.path={mask(cfg.path)}: no pictures there")
    captions = [caption for _, several in rows for caption in several]
    image_of_text = [image for image, (_, several) in enumerate(rows) for _ in several]
    pictures = [picture for picture, _ in rows]
    mark = fingerprint([[(p.name, p.offset, p.size) for p in pictures], captions, image_of_text])
    return RetrievalSet(name, pictures, captions, image_of_text, mark)


def decode(pictures: Sequence[Picture], preprocess: Compose, *, threads: int) -> np.ndarray:
    """Every picture through the model's transform up to its ToTensor: uint8 [N, H, W, 3].

    EXIF orientation is not applied and transparency is dropped, as open_clip does.

    :raises UserError: naming the file that is no picture.
    """
    to_uint8 = _before_tensor(preprocess)

    def one(picture: Picture) -> np.ndarray:
        return np.asarray(to_uint8(open_picture(picture)))

    first = one(pictures[0])
    pixels_NHWC = np.empty((len(pictures), *first.shape), np.uint8)
    with ThreadPoolExecutor(threads) as pool:  # Pillow lets go of the GIL while it decodes and resizes
        for i, pixels in enumerate(pool.map(one, pictures)):
            pixels_NHWC[i] = pixels
    return pixels_NHWC


def open_picture(picture: Picture) -> Image.Image:
    """The picture, decoded whole. :raises UserError: naming the file."""
    try:
        image = Image.open(io.BytesIO(picture.read()))
        image.load()
    except _BROKEN as error:
        why = "no format that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        where = picture.path if picture.offset < 0 else f"{picture.path}: {picture.name}"
        raise UserError(f"{mask(where)}: cannot be read as a picture ({why}); mend it or take it out of the set") from error
    return image


def normalise(pixels_BHWC: torch.Tensor, preprocess: Compose) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] on the same device: ToTensor and Normalize of the transform."""
    _before_tensor(preprocess)
    end: Normalize = preprocess.transforms[-1]
    image_BCHW = pixels_BHWC.permute(0, 3, 1, 2).contiguous().to(torch.float32).div_(255)
    mean, std = (torch.tensor(v, dtype=torch.float32, device=image_BCHW.device).view(3, 1, 1) for v in (end.mean, end.std))
    return image_BCHW.sub_(mean).div_(std)


def _before_tensor(preprocess: Compose) -> Compose:
    steps = preprocess.transforms
    assert isinstance(steps[-2], ToTensor) and isinstance(steps[-1], Normalize), "open_clip's transforms end so"
    return Compose(steps[:-2])


def _read_classes(file: str | None) -> tuple[list[str], list[str]]:
    """Folder names and class names, in class order."""
    if file is None:
        import open_clip

        synsets = importlib.resources.files("timm") / "data" / "_info" / "imagenet_synsets.txt"
        return synsets.read_text().split(), list(open_clip.IMAGENET_CLASSNAMES)
    content = read_json(file)
    if not isinstance(content, dict) or not content or not all(isinstance(name, str) for name in content.values()):
        raise UserError(f"{mask(file)}: expected a JSON object {{folder: class name}}")
    return list(content), list(content.values())


def _read_templates(templates: str, key: str) -> list[str]:
    if templates == "openai":
        import open_clip

        return [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    if templates == "simple":
        return ["a photo of a {}."]
    if not exists(templates):
        raise UserError(f"{key}.templates={mask(templates)} is neither openai nor simple nor a file")
    lines = [line.strip() for line in read_bytes(templates).decode("utf-8", errors="replace").splitlines() if line.strip()]
    bad = next((line for line in lines if "{}" not in line), None)
    if bad is not None or not lines:
        which = f", '{bad}' has none" if bad else ""
        raise UserError(f"{key}.templates={mask(templates)}: each line needs {{}} for the class name{which}")
    return lines


def _read_written(path: str, pictures: list[Picture], labels: list[int], class_names: list[str], key: str) -> list[int]:
    """The written class of every picture, from attack.parquet."""
    file = join(path, ATTACK_FILE)
    if not exists(file):
        raise UserError(f"{key}.path={mask(path)}: no {ATTACK_FILE} there; build the set with `raysys attack` (or let it finish)")
    fs, inner = open_fs(file)
    with fs.open(inner, "rb") as handle:
        table = pq.read_table(handle, columns=["picture", "true_class", "written_class", "text"]).to_pydict()
    rows = {row[0]: row[1:] for row in zip(*table.values(), strict=True)}
    missing = next((p.name for p in pictures if p.name not in rows), None)
    if missing or len(rows) != len(pictures):
        what = (
            f"{missing} is not in {ATTACK_FILE}" if missing else f"{len(rows)} rows in {ATTACK_FILE} but {len(pictures)} pictures"
        )
        raise UserError(f"{key}.path={mask(path)}: {what}; build the set again with `raysys attack`")
    for picture, label in zip(pictures, labels, strict=True):
        true, written, text = rows[picture.name]
        if true != label or not 0 <= written < len(class_names) or class_names[written] != text:
            raise UserError(
                f"{key}.path={mask(path)}: {picture.name} was attacked under another class list; give {key}.classes of then"
            )
    return [rows[picture.name][1] for picture in pictures]


def _coco(root: str, file: str) -> Iterator[tuple[Picture, list[str]]]:
    content = read_json(file)
    try:
        captions: dict[Any, list[str]] = {image["id"]: [] for image in content["images"]}
        for row in content["annotations"]:
            captions[row["image_id"]].append(row["caption"])
        for image in sorted(content["images"], key=lambda image: image["id"]):
            yield Picture(image["file_name"], join(root, "val2017", image["file_name"])), captions[image["id"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{mask(file)}: not COCO's caption format ({error!r})") from error


def _tars(path: str) -> Iterator[tuple[Picture, list[str]]]:
    root, tars = list_files(path, ".tar")
    for tar in tars:
        file = join(root, tar)
        try:
            for sample in iter_samples(file):
                if sample.offset < 0:
                    raise UserError(f"{mask(file)}: sample {sample.key} has no picture")
                # one caption may be a text file of several lines
                captions = sample.captions[0].splitlines() if len(sample.captions) == 1 else sample.captions
                name = sample.key if len(tars) == 1 else f"{tar}/{sample.key}"
                yield Picture(name, file, sample.offset, sample.size), [c.strip() for c in captions if c.strip()]
        except DamagedShard as error:
            raise UserError(f"{mask(file)}: a damaged tar ({error}); fetch it again") from error
