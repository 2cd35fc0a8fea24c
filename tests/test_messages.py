"""Every message that a user can get says what is wrong, where, and what to do; ``messages.txt`` beside this file is the table of them.

The messages are taken from the source: the text that an exception of the package is made with, that a check of ``config.py`` ends with, and
that a warning says. A skeleton is such a text with ``{}`` for what a call fills in. Of a text with alternatives (``a if b else c``, a local
variable that holds text) every variant is one.
"""

from __future__ import annotations

import ast
import builtins
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
from conftest import TINY_VIT, noise_jpeg, write_tar

import raysys
from raysys.config import VERBS

PACKAGE = Path(raysys.__file__).parent
TABLE = Path(__file__).with_name("messages.txt")

NO_TEXT = {"BrokenImage", "_NodeLost", "StoppedEarly", "AttributeError"}
"""Exceptions whose arguments are data."""
OTHERS = {"_require": 1, "_end": 1, "warn": 0}
"""Functions that say or raise a text, and its place among their arguments."""
OWN_REQUIRE = "config.py"  # torch_graph.py has another _require; its texts are parts of one message
NO_MEND = {"wraps", "part", "bug", "warns", "tells"}

# ---- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    module: str
    where: str
    what: str
    """The skeleton, or how it begins and ``…``."""
    mends: tuple[str, ...]
    """Words of the message; none where ``NO_MEND`` says so."""

    def fits(self, skeleton: str) -> bool:
        begins = skeleton.startswith(self.what[:-1]) if self.what.endswith("…") else skeleton == self.what
        return begins and (not self.mends or any(mend in skeleton for mend in self.mends))


def read_table() -> list[Row]:
    rows, module = [], ""
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("== "):
            module = line[3:]
        elif line.strip() and not line.startswith("#"):
            where, what, mend = (cell.strip() for cell in line.split(" | "))
            rows.append(Row(module, where, what, () if mend == "-" else tuple(mend.split(" // "))))
    return rows


# ---- the source -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Message:
    module: str
    line: int
    skeletons: tuple[str, ...]

    def __str__(self) -> str:
        return f"raysys/{self.module}:{self.line}: {self.skeletons[0]}"


Texts = dict[str, list[ast.expr]]
"""Local variable -> what is assigned to it."""


def skeletons(node: ast.expr, local: Texts) -> list[str]:
    """Every variant of a text; ``["{}"]`` for what is no text here."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.FormattedValue(value=value, conversion=-1, format_spec=None):
            return skeletons(value, local)
        case ast.JoinedStr(values=parts):
            return ["".join(parts) for parts in itertools.product(*(skeletons(part, local) for part in parts))]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            sides = skeletons(left, local), skeletons(right, local)
            return ["{}"] if sides == (["{}"], ["{}"]) else ["".join(parts) for parts in itertools.product(*sides)]
        case ast.IfExp(body=body, orelse=orelse):
            return list(dict.fromkeys(skeletons(body, local) + skeletons(orelse, local)))
        case ast.Name(id=name) if name in local:
            rest = {other: texts for other, texts in local.items() if other != name}
            return list(dict.fromkeys(s for text in local[name] for s in skeletons(text, rest)))
    return ["{}"]


def assigned_in(function: ast.AST) -> Texts:
    """What a loop binds is no text of its own."""
    found: Texts = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(node.value)
    bound = [node.target for node in ast.walk(function) if isinstance(node, ast.For | ast.comprehension | ast.AugAssign)]
    for target in bound:
        for name in ast.walk(target):
            if isinstance(name, ast.Name):
                found.pop(name.id, None)
    return found


def text_of(call: ast.Call, module: str, exceptions: set[str]) -> list[ast.expr]:
    """The arguments that a user may come to read."""
    name = ast.unparse(call.func).split(".")[-1]
    if name == "_row":  # of regions/on_ray.py: what an actor answers
        return [keyword.value for keyword in call.keywords if keyword.arg in ("refused", "ended")]
    if name == "_require" and module != OWN_REQUIRE:
        return []
    if name in OTHERS:
        return call.args[OTHERS[name] :][:1]
    if name in exceptions and name not in NO_TEXT and call.args:
        return [call.args[1 if len(call.args) > 1 else 0]]  # OSError(number, text, file)
    return []


def exceptions_of(trees: list[ast.Module]) -> set[str]:
    """Python's own, libraries' that raysys raises, and classes of the package that stand on one of them."""
    found = {name for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, BaseException)}
    found |= {node.exc.func.attr for tree in trees for node in ast.walk(tree)
              if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Attribute)}  # fmt: skip
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    for _ in range(3):  # a class may stand on one that comes later
        found |= {node.name for node in classes if any(ast.unparse(base) in found for base in node.bases)}
    return found


def read_messages() -> Iterator[Message]:
    trees = {file.relative_to(PACKAGE).as_posix(): ast.parse(file.read_text(encoding="utf-8")) for file in PACKAGE.rglob("*.py")}
    exceptions = exceptions_of(list(trees.values()))

    def walk(node: ast.AST, module: str, local: Texts) -> Iterator[Message]:
        for child in ast.iter_child_nodes(node):
            inside = local | assigned_in(child) if isinstance(child, ast.FunctionDef) else local
            if isinstance(child, ast.Call):
                for text in text_of(child, module, exceptions):
                    yield Message(module, child.lineno, tuple(skeletons(text, inside)))
            yield from walk(child, module, inside)

    for module, tree in sorted(trees.items()):
        yield from walk(tree, module, {})


def keys_of(schema: type, prefix: str = "") -> Iterator[str]:
    for name, hint in get_type_hints(schema).items():
        yield prefix + name
        if is_dataclass(hint):
            yield from keys_of(hint, f"{prefix}{name}.")  # type: ignore[arg-type]


KEYS = {key for schema in VERBS.values() for key in keys_of(schema)}
MESSAGES = list(read_messages())
ROWS = read_table()


def rows_of(message: Message, skeleton: str) -> list[Row]:
    return [row for row in ROWS if row.module == message.module and row.fits(skeleton)]


# ---- what holds -------------------------------------------------------------------------------------------------------


def test_every_message_has_its_row() -> None:
    """Who adds a message says in the table where it is and which of its words are the mend; who takes the mend out of one hears of it."""
    without = [f"{m}\n    {s}" for m in MESSAGES for s in m.skeletons if not rows_of(m, s)]
    assert not without, f"no row of {TABLE.name} begins so and has words of it as mend:\n" + "\n".join(without)


def test_every_row_and_every_mend_has_its_message() -> None:
    said = [(row, s) for m in MESSAGES for s in m.skeletons for row in rows_of(m, s)]
    assert [row for row in ROWS if row not in {row for row, _ in said}] == []
    assert [(row, mend) for row in ROWS for mend in row.mends if not any(of == row and mend in s for of, s in said)] == []


def test_no_row_stands_for_two_messages() -> None:
    """A beginning that fits two messages would let a third in that nobody has looked at."""
    of_row: dict[Row, set[tuple[str, ...]]] = {}
    for m in MESSAGES:
        for row in {row for s in m.skeletons for row in rows_of(m, s)}:
            of_row.setdefault(row, set()).add(m.skeletons)
    assert {row: texts for row, texts in of_row.items() if row.mends and len(texts) > 1} == {}
    assert [row for row, count in Counter(ROWS).items() if count > 1] == []


def test_only_what_is_no_message_by_itself_has_no_mend() -> None:
    assert [row for row in ROWS if bool(row.mends) == (row.where in NO_MEND)] == []


def test_every_message_says_where() -> None:
    """By what a call fills in, or by a key."""

    def names_a_place(skeleton: str) -> bool:
        words = {word.rstrip(".:") for word in re.findall(r"[\w.]+", skeleton)}
        return "{}" in skeleton or not words.isdisjoint(KEYS) or "--" in skeleton

    places = [(m, s, row) for m in MESSAGES for s in m.skeletons for row in rows_of(m, s) if row.where not in NO_MEND]
    assert [str(m) for m, s, _ in places if not names_a_place(s)] == []
    assert [str(m) for m, s, row in places if row.where not in ("key", "word") and "{}" not in s] == []


def test_every_message_is_one_line() -> None:
    assert [str(m) for m in MESSAGES if any("\n" in s or "  " in s for s in m.skeletons)] == []


def test_places_are_those_that_the_table_explains() -> None:
    explained = re.findall(r"^#   (\w+)", TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    assert {row.where for row in ROWS} == set(explained)


# ---- provoked ---------------------------------------------------------------------------------------------------------


def folder_of(verb: str, path: Path, *, finished: bool) -> None:
    """As a verb leaves it, less the work."""
    path.mkdir()
    settings = {"corpus": {"path": "c", "roots": {"": "c"}}, "ocr": {"store_score": 0.3, "recognize": True}}
    (path / "settings.json").write_text(json.dumps({"verb": verb, "fingerprint": "0", "settings": settings}))
    if finished:
        (path / "manifest.json").write_text(json.dumps({"verb": verb}))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a corpus, a set of pictures, a model, and what is often taken for one of them."""
    write_tar(tmp_path / "corpus" / "0.tar", [("a.jpg", noise_jpeg(0)), ("a.txt", b"a thing")])
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_VIT))
    for name in ("cup", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "0.jpg").write_bytes(noise_jpeg(1))
    (tmp_path / "names.json").write_text(json.dumps({"cup": "cup", "dog": "dog"}))
    (tmp_path / "note.txt").write_text("a note")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "note.txt").write_text("a note")
    (tmp_path / "attacked").mkdir()
    (tmp_path / "attacked" / "attack.parquet").write_bytes(b"")
    (tmp_path / "space.yaml").write_text("train.steps: [1, 2]\n")
    folder_of("annotate", tmp_path / "A", finished=True)
    folder_of("annotate", tmp_path / "A_half", finished=False)
    folder_of("filter", tmp_path / "S", finished=True)
    folder_of("train", tmp_path / "R_half", finished=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


TRAIN = "train corpus.path=corpus model=tiny.json train.steps=1 global_batch=2"
ATTACK = "attack imagenet.path=set imagenet.classes=names.json attack.classes=random"
EVALUATE = "evaluate evaluators=[imagenet] imagenet.classes=names.json pretrained=random"
SWEEP = f"sweep{TRAIN.removeprefix('train')} space=space.yaml evaluators=[imagenet] imagenet.path=set imagenet.classes=names.json"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            "annotate corpus.path=foreign",
            "foreign: no .tar or .parquet or captions.csv or captions.jsonl files there; check the path",
        ),
        ("annotate corpus.path=note.txt", "note.txt is not an uncompressed .tar, a .parquet or a captions file"),
        ("annotate corpus.path=corpus output=note.txt", "output=note.txt is a file; give a folder"),
        (
            "annotate corpus.path=corpus output=foreign",
            "output=foreign is not empty and has no settings.json of raysys; give a new",
        ),
        (
            "annotate corpus.path=corpus output=note.txt/A",
            "note.txt/A: Not a directory; a part of the path is a file: check the path",
        ),
        ("annotate corpus.path=corpus output=A", "output=A was begun with other settings"),
        ("annotate corpus.path=corpus output=S", "output=S belongs to another program or verb; give a new folder"),
        ("annotate corpus.path=corpus output=corpus/A", "give a folder elsewhere, or name the shards with a glob (corpus/*.tar)"),
        ("annotate corpus.path=corpus ocr.model_dir=foreign", "ocr.model_dir=foreign: PP-OCR"),
        ("filter annotations=corpus", "corpus: not a folder that `raysys annotate` wrote (no settings.json); give its output"),
        ("filter annotations=note.txt", "note.txt: not a folder that `raysys annotate` wrote"),
        ("filter annotations=A_half", "A_half: `raysys annotate` has not finished there; run it again with the same words"),
        ("filter annotations=S", "S: written by `raysys filter`, not by `raysys annotate`; give the output of `raysys annotate`"),
        ("filter annotations=A policy.min_score=0.1", "is below ocr.store_score=0.3 of"),
        (f"{TRAIN} corpus.path=nowhere", "nowhere: no such file or folder; check the path"),
        (f"{TRAIN} annotations=nowhere", "nowhere: not a folder that `raysys annotate` wrote"),
        (f"{TRAIN} selection=A", "A: written by `raysys annotate`, not by `raysys filter`; give the output of `raysys filter`"),
        (f"{TRAIN} model=ViT-B-33", "model=ViT-B-33 is no open_clip name, no model of conf/models, no JSON file and no run folder"),
        (f"{TRAIN} model=nowhere.json", "nowhere.json: no such file; check the path"),
        (f"{TRAIN} model=note.txt", "model=note.txt is no open_clip name"),
        (
            f"{TRAIN} pretrained=nowhere.pt",
            "pretrained=nowhere.pt is neither a file nor a tag of model=tiny.json nor the word random",
        ),
        (f"{TRAIN} global_batch=4", "loosen the policy or take a smaller batch"),
        (f"{TRAIN} output=foreign", "output=foreign is not empty and has no settings.json of raysys; give a new folder"),
        (f"{ATTACK} imagenet.path=nowhere", "imagenet.path=nowhere: no such folder; check the path"),
        (f"{ATTACK} imagenet.path=note.txt", "imagenet.path=note.txt: is a file; give the folder"),
        (f"{ATTACK} imagenet.path=foreign", "imagenet.path=foreign: no pictures there; expected FOLDER/CLASS/NAME.JPEG"),
        (f"{ATTACK} imagenet.path=attacked", "it is a set for the evaluator imagenet_attr; give the clean one"),
        (f"{ATTACK} imagenet.classes=nowhere.json", "nowhere.json: no such file; check the path"),
        (f"{ATTACK} attack.classes=nowhere.json", "nowhere.json: no such file; check the path"),
        (f"{ATTACK} attack.classes=confusions attack.predictions=note.txt", "give the E/predictions/imagenet_MODEL.parquet of"),
        (f"{ATTACK} attack.fonts=[note.txt]", "note.txt is not a TrueType font"),
        (f"{EVALUATE} model=foreign imagenet.path=set", "model=foreign is no open_clip name"),
        (f"{EVALUATE} model=A imagenet.path=set", "model=A: a folder, but not of `raysys train`; give a run's folder"),
        (f"{EVALUATE} model=R_half imagenet.path=set", "model=R_half: this run is not finished; run the same `raysys train` again"),
        (f"{EVALUATE} model=local-dir:foreign imagenet.path=set", "so it is no open_clip folder; give one that has it"),
        (f"{EVALUATE} model=tiny.json imagenet.path=nowhere", "imagenet.path=nowhere: no such folder; check the path"),
        (f"{EVALUATE} model=tiny.json imagenet.path=attacked", "give the clean one"),
        (f"{EVALUATE} model=tiny.json imagenet.path=set imagenet.templates=note.txt", "each line needs {} (or {c})"),
        (f"{SWEEP} space=note.txt", "must be a list of values (one value is a list too"),
        (f"{SWEEP} space=foreign", "space=foreign is neither a file nor one of "),
        (f"{SWEEP} annotations=S", "S: written by `raysys filter`, not by `raysys annotate`"),
        (f"{SWEEP} imagenet.path=note.txt", "imagenet.path=note.txt: is a file; give the folder"),
        (f"{SWEEP} output=foreign", "output=foreign is not empty and has no settings.json of raysys; give a new folder"),
        ("report foreign", "foreign: not a folder of raysys (no settings.json there); give the output of a verb"),
        ("report note.txt", "note.txt: not a folder of raysys"),
        ("demo output=foreign", "output=foreign is not empty and has no settings.json of raysys; give a new folder"),
        ("demo num_scenes=10", "num_scenes=10 must be at least 1000"),
    ],
)
def test_what_is_given_in_place_of_what_is_asked_for_is_one_line_and_leaves_nothing(
    run_cli: Callable[..., tuple[int, str, str]], place: Path, words: str, says: str
) -> None:
    """The last of a key's words counts here; ``out`` is where nothing else is said."""
    verb, *given = words.split()
    keys = dict(word.partition("=")[::2] for word in given if "=" in word)
    if verb != "report":
        keys = {"output": "out"} | keys
    before = sorted(place.rglob("*"))
    status, _, err = run_cli(verb, *(word for word in given if "=" not in word), *(f"{k}={v}" for k, v in keys.items()))
    assert status == 2 and says in err.replace(f"{place}/", "")
    assert err.startswith(f"raysys {verb}: ") and err.count("\n") == 1
    assert sorted(place.rglob("*")) == before
