"""The command line: words -> config -> verb -> exit status.

In: ``raysys VERB key=value ...``. Out: 0 when the work is done; 2 and one line on stderr for a mistake in the words or the input, 1 and
one line for work that cannot end well (a training that diverges).
Values of text keys (paths, model names) are taken to the letter; every other value is read by hydra's override grammar.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, Union, cast, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from raysys import console
from raysys.config import VERBS, TrainConfig, check, choices, config_dir
from raysys.errors import UserError, WorkFailed
from raysys.keys import fold, groups, read_group, read_keys, type_of
from raysys.masking import mask, remember_interpolated
from raysys.patience import explained, is_final, refused

# Verb -> (module and function, what it does, an example); in the order of the pipeline.
HELP: dict[str, tuple[str, str, str]] = {
    "annotate": (
        "raysys.regions.on_ray:annotate",
        "find and read the text in every picture of a corpus, once",
        "raysys annotate corpus.path='data/train-{00000..00099}.tar' output=A",
    ),
    "filter": (
        "raysys.policy.select:filter_annotations",
        "decide which samples are kept, with a reason for each",
        "raysys filter annotations=A policy=paper output=S",
    ),
    "train": (
        "raysys.training.on_ray:train",
        "train CLIP on what is kept, straight from the original shards",
        "raysys train corpus.path=data annotations=A policy=paper model=ViT-B-16 train.steps=20000 output=R",
    ),
    "attack": (
        "raysys.attack.on_ray:attack",
        "build ImageNet-Attr: write a wrong class name on every picture",
        "raysys attack imagenet.path=imagenet/val attack.classes=written_class.json output=O",
    ),
    "evaluate": (
        "raysys.evaluation.on_ray:evaluate",
        "ask a model the three questions: ImageNet, COCO, ImageNet-Attr",
        "raysys evaluate model=R 'evaluators=[imagenet,imagenet_attr]' imagenet.path=imagenet/val imagenet_attr.path=O output=E",
    ),
    "sweep": (
        "raysys.sweeping.on_ray:sweep",
        "try thresholds and augmentation factors on one set of annotations",
        "raysys sweep space=small corpus.path=data annotations=A model=ViT-B-32 train.steps=5000 "
        "'evaluators=[retrieval]' retrieval.path=test.tar output=W",
    ),
    "report": (
        "raysys.reporting.html:report_verb",
        "one self-contained HTML page of any output folder",
        "raysys report R",
    ),
    "doctor": (
        "raysys.doctor.examine:doctor",
        "what this machine or cluster has, and what is missing for which verb",
        "raysys doctor",
    ),
    "demo": (
        "raysys.demo:demo",
        "the whole pipeline on an embedded corpus, in some minutes",
        "raysys demo output=outputs/demo",
    ),
}


def _hints(schema: Any) -> dict[str, Any]:
    return get_type_hints(schema)


def _takes_text(hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return str in get_args(hint)
    return hint is str


def _value(key: str, raw: str, hint: Any) -> Any:
    """A word's value: text to the letter, everything else by hydra's grammar."""
    if _takes_text(hint):
        if raw == "null" and hint is not str:
            return None
        quoted = len(raw) >= 2 and raw[0] == raw[-1] and raw[0] in "'\""
        return raw[1:-1] if quoted else raw
    override = OverridesParser.create().parse_override(f"{key}={raw}")
    if override.is_sweep_override():
        raise UserError(f"{key}={raw}: several values; write a list as {key}=[{raw}], and sweeps with `raysys sweep`")
    return override.value()


def _read_words(verb: str, words: list[str]) -> dict[str, str]:
    """Words as key -> raw value, each key once."""
    given: dict[str, str] = {}
    for word in words:
        key, equals, raw = word.partition("=")
        if not equals:
            if verb == "report" and "path" not in given:
                key, raw = "path", word
            else:
                raise UserError(f"'{word}' is not key=value; `raysys {verb} --help` shows the keys")
        if key in given:
            raise UserError(
                f"{key} is given twice ('{given[key]}' and '{raw}'); if the shell made two words of a brace list, put it in quotes"
            )
        given[key] = raw
    return given


def compose_config(verb: str, words: list[str], *, complete: bool = True) -> Any:
    """Defaults, then the chosen groups, then ``experiment=NAME`` and ``config=FILE``, then the words.

    A group is chosen by a name of ``conf/`` or by a YAML file of its keys; either stands on the defaults of ``config.py``.

    :param complete: refuse missing and impossible values.
    :returns: the verb's dataclass, or a DictConfig where ``complete`` is False.
    :raises UserError: with one line.
    """
    schema = VERBS[verb]
    given = _read_words(verb, words)
    files = {f"{key}={given[key]}": _file_of(key, given.pop(key), schema) for key in ("experiment", "config") if key in given}
    merged = {word: read_keys(word, Path(file), schema) for word, file in files.items()}
    known = groups(schema)
    chosen: dict[str, str] = {}
    for keys in merged.values():  # a file may choose a group ("policy: paper"); words come after it
        chosen |= {key: keys.pop(key) for key in list(keys) if key in known and isinstance(keys[key], str)}
    chosen |= {key: given.pop(key) for key in list(given) if key in known}
    own = {group: read_group(group, name, schema) for group, name in chosen.items()}
    store = ConfigStore.instance()
    for name, dataclass in VERBS.items():
        store.store(name=f"{name}_schema", node=dataclass)
    try:
        with initialize_config_dir(config_dir=config_dir(), version_base="1.3"):
            cfg = compose(config_name=verb, overrides=[f"~{group}" for group in chosen])
        OmegaConf.set_struct(cfg, True)
        for key in ("corpus.sources", "models"):
            if OmegaConf.select(cfg, key) is not None:
                OmegaConf.set_struct(OmegaConf.select(cfg, key), False)  # its names are the user's
        for group, keys in own.items():
            cfg = _merge(cfg, {group: keys}, f"{group}={chosen[group]}")
        for word, keys in merged.items():
            cfg = _merge(cfg, keys, word)
        for key, raw in given.items():
            _make_named(cfg, schema, key)
            OmegaConf.update(cfg, key, _value(key, raw, type_of(schema, key)))
        if not complete:
            return cfg
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise UserError(f"missing: {', '.join(f'{key}=...' for key in missing)}")
        remember_interpolated(cast(dict[str, Any], OmegaConf.to_container(cfg)))
        result = OmegaConf.to_object(cfg)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(fold(error)) from error
    try:
        check(result)
    except ValueError as error:
        raise UserError(str(error)) from error
    return result


def _file_of(key: str, value: str, schema: type) -> str:
    """The YAML that ``config=FILE`` or ``experiment=NAME`` names. :raises UserError: for an experiment that is not there."""
    if key == "config":
        return value
    names = _experiments(schema)
    if value not in names:
        known = f"choose from {', '.join(names)}" if names else "only train and sweep have experiments"
        raise UserError(f"experiment={value} is not there; {known}")
    return str(Path(config_dir()) / "experiment" / f"{value}.yaml")


def _experiments(schema: type) -> list[str]:
    """Recipes of conf/experiment whose keys the verb knows: sweep knows all of train's, and its own."""
    if not issubclass(schema, TrainConfig):
        return []
    files = {name: Path(config_dir()) / "experiment" / f"{name}.yaml" for name in choices("experiment")}
    known = _hints(schema)
    return [name for name, file in files.items() if all(key in known for key in cast(DictConfig, OmegaConf.load(file)))]


def _make_named(cfg: DictConfig, schema: type, key: str) -> None:
    """Make the entry that a word names (``corpus.sources.NAME.path``): OmegaConf makes none of a dataclass by itself."""
    parts = key.split(".")
    for depth in range(1, len(parts) - 1):
        hint = type_of(schema, ".".join(parts[:depth]))
        if get_origin(hint) is dict:
            entries = OmegaConf.select(cfg, ".".join(parts[:depth]))
            if parts[depth] not in entries:
                entries[parts[depth]] = get_args(hint)[1]


def _merge(cfg: DictConfig, values: dict[str, Any], word: str) -> DictConfig:
    try:
        return cast(DictConfig, OmegaConf.merge(cfg, values))
    except OmegaConfBaseException as error:
        raise UserError(f"{word}: {fold(error)}") from error


def _usage() -> str:
    lines = ["raysys VERB key=value ...   (raysys VERB --help shows a verb's keys, --cfg job what the words make of them)", ""]
    for verb, (_, what, example) in HELP.items():
        lines += [f"  {verb:9} {what}", f"            {example}"]
    return "\n".join(lines)


def _verb_help(verb: str, words: list[str]) -> str:
    _, what, example = HELP[verb]
    lines = "\n".join(f"  {group}={','.join(choices(group))}" for group in groups(VERBS[verb]))
    text = f"raysys {verb}: {what}\n\nexample: {example}\n"
    if lines:
        text += f"\nchoices (group=one of these, or a YAML file of its keys: {groups(VERBS[verb])[0]}=my.yaml):\n{lines}\n"
    if _experiments(VERBS[verb]):
        text += f"  experiment={','.join(_experiments(VERBS[verb]))}: a whole recipe; words come after it\n"
    text += "  config=FILE merges a YAML file between the defaults and the words\n"
    return text + f"\nkeys and defaults (??? must be given; docs in raysys/config.py):\n{_yaml(verb, words)}"


def _yaml(verb: str, words: list[str]) -> str:
    return OmegaConf.to_yaml(compose_config(verb, words, complete=False))


def run(argv: list[str]) -> None:
    """Do what the words say. :raises UserError: for a mistake in them."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return
    if argv[0] == "--version":
        from importlib.metadata import version

        print(version("raysys"))
        return
    verb, words = argv[0], argv[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        raise UserError(f"unknown verb '{verb}'; " + (f"did you mean {near[0]}?" if near else f"choose from {', '.join(VERBS)}"))
    if "--help" in words or "-h" in words:
        print(_verb_help(verb, [w for w in words if w not in ("--help", "-h")]))
        return
    if "--cfg" in words:
        at = words.index("--cfg")
        if words[at + 1 : at + 2] != ["job"]:
            raise UserError("--cfg takes the word job; write --cfg job")
        print(_yaml(verb, words[:at] + words[at + 2 :]), end="")
        return
    flag = next((w for w in words if w.startswith("-")), None)
    if flag:
        raise UserError(f"unknown flag '{flag}'; there are --help and --cfg job")
    console.begin(verb, "json" if "verbosity=json" in words else "normal")  # of a mistake in the other words too
    cfg = compose_config(verb, words)
    console.begin(verb, cfg.verbosity)
    module, function = HELP[verb][0].split(":")
    getattr(importlib.import_module(module), function)(cfg)


def main() -> None:
    argv = sys.argv[1:]
    name = " ".join(["raysys", *argv[:1]]) if argv and argv[0] in VERBS else "raysys"
    try:
        run(argv)
        sys.stdout.flush()
    except UserError as error:
        _end(name, getattr(error, "cause", error), 2)  # Ray wraps an error of a worker; its own text holds a traceback
    except WorkFailed as error:
        _end(name, getattr(error, "cause", error), 1)
    except BrokenPipeError:  # of `raysys ... | head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if is_final(error):
            _end(name, explained(error), 1)
        mistake = refused(error)
        if mistake is None:
            _end_in_bug(name, error)
        _end(name, mistake, 2)
    except KeyboardInterrupt:
        _end(name, "stopped; the same words take it up again", 130)
    except Exception as error:
        _end_in_bug(name, error)


def _end_in_bug(name: str, error: Exception) -> NoReturn:
    """What nobody foresaw keeps its traceback; in JSON it is a line all the same."""
    if not console.is_json():
        raise error
    console.tell_error(name, mask("".join(traceback.format_exception(error))), 1)
    sys.exit(1)


def _end(name: str, why: object, status: int) -> NoReturn:
    """One line, whatever it was."""
    console.tell_error(name, mask(" ".join(str(why).split())), status)
    sys.exit(status)


if __name__ == "__main__":
    main()
