"""``model=`` and ``pretrained=`` -> an open_clip model; the one place that knows the ways to name one.

In: a spec (open_clip name, name in conf/models, JSON config file, ``local-dir:DIR``, ``hf-hub:ORG/REPO`` or a run folder)
and where the weights come from. Out: :class:`LoadedModel`, and folders that ``open_clip.create_model("local-dir:...")`` loads.
Nothing is random unless ``pretrained`` says ``random``. Leaves to others what the model is used for.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import pickle
import re
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import open_clip
import safetensors
import safetensors.torch
import torch
from huggingface_hub import constants as hub
from open_clip.transform import PreprocessCfg, image_transform_v2
from torchvision.transforms import Compose

from raysys.config import config_dir
from raysys.errors import UserError
from raysys.masking import mask
from raysys.output import fingerprint
from raysys.storage import absolute, exists, is_local, join, named_errors, open_fs, read_json, write_bytes, write_json

RANDOM = "random"
CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
HF_TOWER = "hf_text_tower"
"""Folder within an open_clip folder: the configuration of a text tower of Hugging Face, which open_clip knows by name only."""
_WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pth")  # what open_clip looks for in a folder
_CONFIG_KEYS = ("embed_dim", "vision_cfg", "text_cfg")
_UNREADABLE = (OSError, EOFError, AttributeError, pickle.UnpicklingError, safetensors.SafetensorError)
"""What torch.load and safetensors raise on a file that is no checkpoint."""
_UNFIT = (RuntimeError, TypeError, KeyError, ValueError, AssertionError)
"""What open_clip raises on a config with a wrong key or value, and load_state_dict on weights of another model."""


@dataclass
class LoadedModel:
    model: torch.nn.Module
    """In evaluation mode."""
    preprocess: Compose
    """open_clip's validation transform: PIL picture -> float32 [3, S, S]."""
    tokenizer: Any
    """list of texts -> int64 [B, context_length]."""
    config: dict[str, Any]
    """open_clip's ``model_cfg``."""
    preprocess_cfg: dict[str, Any]
    name: str
    """Short name for tables and files."""
    pretrained: str
    """``random``, a tag, or the file or folder that the weights came from."""


@dataclass(frozen=True)
class _Source:
    """A spec, looked up."""

    name: str
    config: dict[str, Any]
    builtin: str | None = None
    """open_clip's name, where it is one."""
    folder: str | None = None
    """A folder with its own weights."""
    preprocess_cfg: dict[str, Any] = field(default_factory=dict)


def model_config(spec: str) -> dict[str, Any]:
    """open_clip's ``model_cfg`` of a spec: embed_dim, vision_cfg, text_cfg, ...

    :raises UserError: where there is no such model.
    """
    return deepcopy(_look_up(spec).config)


def model_name(spec: str) -> str:
    """Short name of a spec for file names: letters, digits, ``.``, ``_`` and ``-``. :raises UserError: as :func:`model_config`."""
    return re.sub(r"[^\w.-]+", "-", _look_up(spec).name)


def portable(spec: str, pretrained: str | None) -> tuple[str, str | None]:
    """``model=`` and ``pretrained=`` as any process of this machine understands them: relative paths made absolute."""
    if spec.startswith("local-dir:"):
        spec = "local-dir:" + absolute(spec.removeprefix("local-dir:"))
    elif spec not in open_clip.list_models() and exists(spec):
        spec = absolute(spec)
    if pretrained is not None and pretrained not in (RANDOM, *_tags(spec)) and exists(pretrained):
        pretrained = absolute(pretrained)
    return spec, pretrained


def has_own_weights(spec: str) -> bool:
    """Whether the spec is a folder or a repository with weights. :raises UserError: as :func:`model_config`."""
    return _look_up(spec).folder is not None or spec.startswith("hf-hub:")


def check_model(spec: str, pretrained: str | None) -> None:
    """Refuse a model that cannot be loaded, before anything is built or fetched.

    :raises UserError: for an unknown name, or where the weights are neither said nor there.
    """
    own, tags = has_own_weights(spec), _tags(spec)
    if pretrained is None and not own:
        known = f" ({', '.join(tags[:3])}, ...)" if tags else ""
        raise UserError(
            f"model={mask(spec)} has no weights of its own; give pretrained=TAG{known}, pretrained=FILE or pretrained=random"
        )
    if pretrained is not None and pretrained not in (RANDOM, *tags) and not exists(pretrained):
        near = difflib.get_close_matches(pretrained, tags, n=3) or tags[:5]
        names = f"; tags of {spec}: {', '.join(near)}" if near else ""
        raise UserError(
            f"pretrained={mask(pretrained)} is neither a file nor a tag of model={mask(spec)} nor the word random{names}"
        )


def _tags(spec: str) -> list[str]:
    """open_clip's pretrained tags of a name."""
    return open_clip.list_pretrained_tags_by_model(spec) if spec in open_clip.list_models() else []


def load_model(
    spec: str,
    pretrained: str | None,
    *,
    device: str = "cpu",
    patch_dropout: float | None = None,
    init: Mapping[str, float] = MappingProxyType({}),
    stretch: bool = False,
) -> LoadedModel:
    """Build a model and load its weights (``weights_only``).

    :param pretrained: open_clip's tag, a file, or ``random``. None takes a folder's own weights; with a word or a file, a
        folder gives the architecture only.
    :param patch_dropout: of the built model only, in place of the config's; None leaves it.
    :param init: ``init_logit_scale`` and ``init_logit_bias`` that the config gets where it names none.
    :param stretch: let open_clip fit position embeddings to another image size or context length, as a training may start from.
    :raises UserError: for an unknown name, missing or unfit weights, or a download that fails.
    """
    check_model(spec, pretrained)
    source = _look_up(spec)
    how: dict[str, Any] = {"device": device, "pretrained_image": False, "pretrained_text": False}
    how["force_patch_dropout"] = patch_dropout
    for key, value in init.items():
        how[key] = source.config.setdefault(key, value)
    with ExitStack() as stack:
        stack.enter_context(quiet())
        if source.config["text_cfg"].get("hf_model_name"):
            stack.enter_context(_no_code_of_a_model())
        folder = weights = None
        if source.folder:
            local = stack.enter_context(_local_copy(source.folder, weights=pretrained is None))
            folder = f"local-dir:{local}"
            if os.path.isdir(os.path.join(local, HF_TOWER)):
                text_cfg = {"hf_model_name": os.path.join(local, HF_TOWER), "hf_model_pretrained": False}
                how["text_cfg"] = source.config["text_cfg"] | text_cfg
        name = source.builtin or _register(source.config)
        tokenizer = _tokenizer(spec, spec if spec.startswith("hf-hub:") else folder or name, source.config["text_cfg"])
        if pretrained is None and folder:
            model = _build(spec, folder, require_pretrained=True, **how)
            weights = os.path.join(folder.removeprefix("local-dir:"), WEIGHTS_FILE)
        elif pretrained is None:
            model = _download(spec, None, require_pretrained=True, **how)
        elif pretrained == RANDOM:
            model = _build(spec, name, load_weights=False, force_preprocess_cfg=source.preprocess_cfg, **how)
        elif pretrained in _tags(spec):
            # OpenAI's and a few more were trained with QuickGELU; open_clip 3 builds ViT-B-32 without it and only warns
            quick = bool(open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu"))
            model = _download(name, pretrained, force_quick_gelu=quick, **how)
            if quick:
                source.config["quick_gelu"] = True
        else:
            weights = stack.enter_context(_local_copy(pretrained))
            model = _build(spec, name, pretrained=weights, force_preprocess_cfg=source.preprocess_cfg, **how)
        if weights is not None and not stretch:
            _refuse_stretched(spec, weights, model)
    visual: Any = model.visual
    preprocess_cfg = dict(visual.preprocess_cfg)
    preprocess = image_transform_v2(PreprocessCfg(**preprocess_cfg), is_train=False)
    where = pretrained if pretrained is not None else source.folder or spec
    return LoadedModel(model.eval(), preprocess, tokenizer, deepcopy(source.config), preprocess_cfg, source.name, where)


def save_open_clip_folder(folder: str, loaded: LoadedModel, *, state_dict: dict[str, torch.Tensor], card: str) -> None:
    """Write a folder that ``open_clip.create_model_and_transforms("local-dir:FOLDER")`` and ``open_clip.get_tokenizer`` load, offline.

    Weights first, config last, each whole or not at all: a folder with a config is complete. Between them the tokenizer's files, where
    it is one of Hugging Face. A text tower of Hugging Face open_clip builds from ``AutoConfig.from_pretrained(hf_model_name)``: offline
    that takes hf_model_name to be a folder, or in the hub's cache (its config.json alone, no weights). Its configuration is written
    into :data:`HF_TOWER`, from which raysys always loads it, and open_clip with ``create_model("local-dir:FOLDER", text_cfg={...})``,
    the config's text_cfg with hf_model_name=FOLDER/hf_text_tower.

    :param loaded: as :func:`load_model` gave it; its model says what the tower is, its weights are not taken.
    :param card: Markdown, written as README.md.
    """
    config = deepcopy(loaded.config)
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False  # else a reader of the config may try the hub
    if "hf_model_name" in config["text_cfg"]:
        config["text_cfg"]["hf_model_pretrained"] = False
    # safetensors refuses tensors that share memory (tied weights): every one gets its own
    weights = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in state_dict.items()}
    write_bytes(join(folder, WEIGHTS_FILE), safetensors.torch.save(weights))
    for name, content in _hugging_face_files(loaded).items():
        write_bytes(join(folder, name), content)
    write_bytes(join(folder, "README.md"), card.encode())
    write_json(join(folder, CONFIG_FILE), {"model_cfg": config, "preprocess_cfg": loaded.preprocess_cfg})


def _hugging_face_files(loaded: LoadedModel) -> dict[str, bytes]:
    """Names in the folder -> contents, of what open_clip takes from Hugging Face; nothing for open_clip's own towers and tokenizer."""
    text_cfg, model = loaded.config["text_cfg"], loaded.model
    with tempfile.TemporaryDirectory() as scratch:
        if text_cfg.get("hf_tokenizer_name"):
            loaded.tokenizer.save_pretrained(scratch)
        if text_cfg.get("hf_model_name"):
            model.text.config.save_pretrained(os.path.join(scratch, HF_TOWER))  # type: ignore[union-attr,operator]
        files = (path for path in Path(scratch).rglob("*") if path.is_file())
        return {path.relative_to(scratch).as_posix(): path.read_bytes() for path in files}


def _look_up(spec: str) -> _Source:
    if spec.startswith("local-dir:"):
        return _folder(spec.removeprefix("local-dir:"))
    if spec.startswith("hf-hub:"):
        return _Source(_last_part(spec), _hub_config(spec))
    if spec in open_clip.list_models():
        return _Source(spec, open_clip.get_model_config(spec), builtin=spec)
    ours = os.path.join(config_dir(), "models", f"{spec}.json")
    if re.fullmatch(r"[\w.-]+", spec) and os.path.isfile(ours):
        return _Source(spec, _checked(read_json(ours), ours))
    if spec.endswith(".json"):
        return _Source(Path(spec).stem, _checked(read_json(spec), spec))
    if exists(join(spec, "settings.json")):
        settings = read_json(join(spec, "settings.json"))
        if not isinstance(settings, dict) or settings.get("verb") != "train":
            raise UserError(f"model={mask(spec)}: a folder, but not of `raysys train`; give a run's folder, or local-dir:DIR")
        if not exists(join(spec, "manifest.json")):
            raise UserError(f"model={mask(spec)}: this run is not finished; run the same `raysys train` again to end it")
        found = _folder(join(spec, "open_clip"))
        return _Source(_last_part(spec), found.config, folder=found.folder, preprocess_cfg=found.preprocess_cfg)
    if exists(join(spec, CONFIG_FILE)):
        raise UserError(f"model={mask(spec)} is an open_clip folder; write model=local-dir:{mask(spec)}")
    names = [*_our_models(), *(n for n in open_clip.list_models() if not n.startswith("raysys-"))]
    near = difflib.get_close_matches(spec, names, n=3)
    raise UserError(
        f"model={mask(spec)} is no open_clip name, no model of conf/models, no JSON file and no run folder"
        + (f"; did you mean {' or '.join(near)}?" if near else f"; for example {', '.join(names[:2])}")
    )


def _our_models() -> list[str]:
    return sorted(path.stem for path in (Path(config_dir()) / "models").glob("*.json"))


def _last_part(spec: str) -> str:
    return re.split(r"[/:]", spec.rstrip("/"))[-1]


def _checked(config: Any, path: str) -> dict[str, Any]:
    missing = [key for key in _CONFIG_KEYS if key not in config] if isinstance(config, dict) else list(_CONFIG_KEYS)
    if missing:
        raise UserError(
            f"{mask(path)}: not an open_clip model config ({', '.join(missing)} missing); add them, or give another file"
        )
    return config


def _folder(folder: str) -> _Source:
    """A folder in open_clip's format. :raises UserError: without weights (open_clip itself would go on with random ones)."""
    config_file = join(folder, CONFIG_FILE)
    if not exists(config_file):
        raise UserError(
            f"local-dir:{mask(folder)}: no {CONFIG_FILE} there, so it is no open_clip folder; give one that has it, as RUN/open_clip"
        )
    content = read_json(config_file)
    config = _checked(content.get("model_cfg") if isinstance(content, dict) else None, config_file)
    fs, inner = open_fs(folder)
    with named_errors(folder):
        names = fs.ls(inner, detail=False)
    if not any(name.endswith(_WEIGHTS_SUFFIXES) for name in names):
        raise UserError(f"{mask(folder)}: no weights there ({WEIGHTS_FILE} is missing); copy the whole folder, or train again")
    parts = folder.rstrip("/").split("/")
    name = parts[-2] if parts[-1] == "open_clip" and len(parts) > 1 and parts[-2] else parts[-1]
    return _Source(name, config, folder=folder, preprocess_cfg=content.get("preprocess_cfg", {}))


def _register(config: dict[str, Any]) -> str:
    """Make a config known to open_clip, under a name of its own: a file called ViT-B-32.json must not replace open_clip's."""
    name = f"raysys-{fingerprint(config)}"
    if name not in open_clip.list_models():
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{name}.json"
            file.write_text(json.dumps(config))
            open_clip.add_model_config(file)
    return name


def _build(spec: str, name: str, *, pretrained: str | None = None, **how: Any) -> torch.nn.Module:
    """Build a model, with the weights of a local file or folder or without any."""
    try:
        return open_clip.create_model(name, pretrained, **how)
    except (*_UNREADABLE, *_UNFIT) as error:
        first = " ".join(str(error).split())[:200]
        weights = f" with the weights of {mask(pretrained)}" if pretrained else ""
        mend = "give weights that fit it" if pretrained else "mend its config, or copy its files again"
        raise UserError(f"model={mask(spec)}{weights} cannot be built ({first}); {mend}") from error


def _refuse_stretched(spec: str, weights: str, model: torch.nn.Module) -> None:
    """open_clip stretches position embeddings that do not fit, and says so in its log only: another model under the same name."""
    there = _shapes(weights)
    for key, tensor in model.state_dict().items():
        if key.endswith("positional_embedding") and there.get(key, tensor.shape) != tensor.shape:
            what = "image size" if key.startswith("visual") else "context length"
            raise UserError(
                f"model={mask(spec)}: its {what} gives {tensor.shape[0]} positions, the weights of {mask(weights)} have {there[key][0]}; "
                f"name the model that they were trained as"
            )


def _shapes(weights: str) -> dict[str, torch.Size]:
    """Of the tensors in a file; none of a format that only open_clip reads."""
    if weights.endswith(".safetensors"):
        if not os.path.isfile(weights):
            return {}
        with safetensors.safe_open(weights, "pt") as file:
            return {key: torch.Size(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118  # no dict
    try:
        content = torch.load(weights, map_location="cpu", weights_only=True, mmap=True)
    except (*_UNREADABLE, RuntimeError):
        return {}
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    return {key.removeprefix("module."): value.shape for key, value in state.items() if isinstance(value, torch.Tensor)}


def _download(name: str, tag: str | None, **how: Any) -> torch.nn.Module:
    try:
        with _no_waiting_offline():
            return open_clip.create_model(name, pretrained=tag, **how)
    except (RuntimeError, OSError) as error:
        first = " ".join(str(error).split())[:200]
        what = f"pretrained={tag} of model={name}" if tag else f"model={name}"
        raise UserError(
            f"{what} cannot be downloaded ({first}); on a machine without network fetch the file elsewhere and give pretrained=FILE"
        ) from error


def _hub_config(spec: str) -> dict[str, Any]:
    try:
        with _no_waiting_offline():
            return open_clip.get_model_config(spec)
    except (RuntimeError, OSError) as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(f"model={spec} cannot be downloaded ({first}); copy the folder and give model=local-dir:DIR") from error


def _tokenizer(spec: str, name: str, text_cfg: dict[str, Any]) -> Any:
    # a config's tokenizer_kwargs reach transformers, and what is given here stands before them
    how = {"trust_remote_code": False} if text_cfg.get("hf_tokenizer_name") else {}
    why = f"model={mask(spec)}: its tokenizer comes from Hugging Face"
    try:
        with _no_waiting_offline():
            return open_clip.get_tokenizer(name, **how)
    except ImportError as error:
        raise UserError(f"{why}; pip install 'raysys[hf]'") from error
    except (RuntimeError, OSError, AssertionError, ValueError) as error:
        first = " ".join(str(error).split())[:200]
        mend = (
            "on a machine without network fetch its files elsewhere, and give their folder, an absolute path, as hf_tokenizer_name"
        )
        raise UserError(f"{why} and cannot be had ({first}); {mend}") from error


@contextmanager
def _local_copy(path: str, *, weights: bool = True) -> Iterator[str]:
    """A path that open_clip, which only opens local files, can read; what lies elsewhere is fetched for the time being.

    :param weights: fetch a folder's weights too.
    """
    if is_local(path):
        yield os.path.abspath(open_fs(path)[1])
        return
    fs, inner = open_fs(path)
    with tempfile.TemporaryDirectory() as scratch:
        target = os.path.join(scratch, _last_part(path))
        with named_errors(path):
            if weights or not fs.isdir(inner):
                fs.get(inner, target, recursive=fs.isdir(inner))
            else:
                files = [file for file in fs.find(inner) if not file.endswith(_WEIGHTS_SUFFIXES)]
                fs.get(files, [os.path.join(target, os.path.relpath(file, inner)) for file in files])
        yield target


@contextmanager
def quiet() -> Iterator[None]:
    """open_clip and the hub log what we raise or intend."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _no_code_of_a_model() -> Iterator[None]:
    """At a terminal transformers asks whether Python files beside a model may run; here the answer is no."""
    try:
        from transformers import dynamic_module_utils
    except ImportError:  # open_clip says so
        yield
        return
    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = before


@contextmanager
def _no_waiting_offline() -> Iterator[None]:
    """Where the hub's name does not resolve, take its cache only: it would try for 23 s a file otherwise (measured)."""
    before = hub.HF_HUB_OFFLINE
    if not getproxies():
        try:
            socket.getaddrinfo(urlsplit(hub.ENDPOINT).hostname, 443)
        except socket.gaierror:
            hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before
