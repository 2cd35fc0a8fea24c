"""What a corpus, a set or a model from somebody else must not do, and where secrets must not stand."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import tarfile
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY_VIT, noise_jpeg, sample, write_tar

import raysys
from raysys.cli import compose_config
from raysys.config import ClassSetConfig, CorpusConfig, SourceConfig
from raysys.corpus.samples import Sample
from raysys.corpus.shards import iter_samples
from raysys.errors import UserError
from raysys.evaluation.class_sets import read_class_set
from raysys.masking import INTERPOLATED, as_written, mask, resolved
from raysys.models import load_model
from raysys.output import open_output, settings_of
from raysys.policy.select import _corpus_words
from raysys.regions.annotations import open_annotations
from raysys.reporting.html import report
from raysys.storage import open_fs, read_json, write_json
from raysys.sweeping.results import points_of, row_of, write_tables
from raysys.training import checkpoint


class Payload:
    """Unpickled, it makes the file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.file),))


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    return tmp_path / "the-payload-ran"


@pytest.fixture(autouse=True)
def no_words_of_another_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INTERPOLATED, "")


# ---- files that could run code ----------------------------------------------------------------------------------------


def hostile_weights(kind: str, ran: Path) -> bytes:
    file = io.BytesIO()
    if kind == "pickle":
        pickle.dump({"state_dict": Payload(ran)}, file)
    elif kind == "torch":
        torch.save({"state_dict": {"logit_scale": Payload(ran)}}, file)
    elif kind == "npz":
        np.savez(file, **{"params/t": np.array([Payload(ran)], dtype=object)})
    elif kind == "torchscript":
        with zipfile.ZipFile(file, "w") as archive:  # what torch.load takes for an archive of TorchScript
            archive.writestr("a/constants.pkl", pickle.dumps((Payload(ran),)))
            archive.writestr("a/data.pkl", pickle.dumps(Payload(ran)))
            archive.writestr("a/version", "3")
    return file.getvalue()


SUFFIX = {"pickle": "pt", "torch": "pt", "npz": "npz", "torchscript": "pt"}


def tiny_json(folder: Path, **text_cfg: Any) -> str:
    file = folder / "tiny.json"
    file.write_text(json.dumps(TINY_VIT | {"text_cfg": TINY_VIT["text_cfg"] | text_cfg}))  # type: ignore[operator]
    return str(file)


def test_the_payload_would_run(ran: Path) -> None:
    for kind in SUFFIX:
        data = io.BytesIO(hostile_weights(kind, ran))
        if kind == "pickle":
            pickle.load(data)
        elif kind == "torch":
            torch.load(data, weights_only=False)
        elif kind == "npz":
            np.load(data, allow_pickle=True)["params/t"]
        else:
            continue  # torch.jit.load has an unpickler of its own
        assert ran.exists(), kind
        ran.rmdir()


@pytest.mark.parametrize("kind", SUFFIX)
def test_a_hostile_file_of_weights_does_not_run(kind: str, tmp_path: Path, ran: Path) -> None:
    file = tmp_path / f"weights.{SUFFIX[kind]}"
    file.write_bytes(hostile_weights(kind, ran))
    with pytest.raises(UserError) as caught:
        load_model(tiny_json(tmp_path), str(file))
    assert not ran.exists() and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "model.pth", "any.bin"])
@pytest.mark.parametrize("kind", ["pickle", "torch", "torchscript"])
def test_a_hostile_open_clip_folder_does_not_run(name: str, kind: str, tmp_path: Path, ran: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / name).write_bytes(hostile_weights(kind, ran))
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY_VIT, "preprocess_cfg": {}}))
    with pytest.raises(UserError):
        load_model(f"local-dir:{folder}", None)
    assert not ran.exists()


@pytest.mark.parametrize("kind", ["pickle", "torch", "torchscript"])
def test_a_hostile_checkpoint_does_not_run(kind: str, tmp_path: Path, ran: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-3"
    folder.mkdir(parents=True)
    (folder / "state.pt").write_bytes(hostile_weights(kind, ran))
    (folder / "info.json").write_text("{}")
    with pytest.raises(UserError, match="step-3"):
        checkpoint.load_newest(str(tmp_path))
    assert not ran.exists()


@pytest.mark.parametrize("asked", [{}, {"tokenizer_kwargs": {"trust_remote_code": True}}], ids=["", "trust_remote_code"])
def test_python_files_of_a_tokenizer_do_not_run(asked: Any, tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("builtins.input", lambda _: "y")  # who answers a question without reading it
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(ran)!r})\nclass Evil: ...\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}))
    with pytest.raises(UserError, match="tokenizer"):
        load_model(tiny_json(tmp_path, hf_tokenizer_name=str(folder), **asked), "random")
    assert not ran.exists()


def test_python_files_of_a_text_tower_do_not_run(tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("builtins.input", lambda _: "y")
    folder = tmp_path / "tower"
    folder.mkdir()
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(ran)!r})\nclass Evil: ...\n")
    auto = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    with pytest.raises(UserError, match="cannot be built"):
        load_model(tiny_json(tmp_path, hf_model_name=str(folder)), "random")
    assert not ran.exists()


def test_no_source_file_loads_what_could_run() -> None:
    unsafe = re.compile(
        r"pickle\.loads?\(|joblib|marshal|shelve|jit\.load|allow_pickle|trust_remote_code\W+True|\byaml\.(?:load|full_load|unsafe_load)\("
        r"|hydra\.utils|instantiate\(|\beval\((?=.)|\bexec\(|os\.system|shell=True|torch\.load\((?!.*weights_only=True)"
    )
    found = []
    for file in Path(raysys.__file__).parent.rglob("*.py"):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if unsafe.search(line) and not re.search(r"\.eval\(\)", line):
                found.append(f"{file.name}:{number}: {line.strip()}")
    assert found == []


@pytest.mark.parametrize("word", ["+corpus._target_=os.mkdir", "corpus._target_=os.mkdir", "corpus.sources.a._target_=os.mkdir"])
def test_a_target_in_the_words_is_an_unknown_key(word: str) -> None:
    with pytest.raises(UserError, match="unknown key"):
        compose_config("annotate", [word, "corpus.path=c", "output=o"])


@pytest.mark.parametrize("where", ["{_target_: os.mkdir, _args_: [%s]}", "{corpus: {_target_: os.mkdir, path: '%s'}}"])
@pytest.mark.parametrize("word", ["config", "ocr"])
def test_a_target_in_a_file_is_an_unknown_key(word: str, where: str, tmp_path: Path, ran: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(where % ran)
    with pytest.raises(UserError, match="unknown key"):
        compose_config("annotate", [f"{word}={file}", "corpus.path=c", "output=o"])
    assert not ran.exists()


def test_a_python_tag_in_a_file_is_no_yaml(tmp_path: Path, ran: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(f"output: !!python/object/apply:os.mkdir ['{ran}']\n")
    with pytest.raises(UserError, match="not valid YAML"):
        compose_config("annotate", [f"config={file}", "corpus.path=c"])
    assert not ran.exists()


# ---- names that climb -------------------------------------------------------------------------------------------------


def essence(path: Path) -> list[tuple[str, bool, str | None]]:
    found: list[Sample] = list(iter_samples(str(path)))
    return [(s.key, s.image is not None, s.error) for s in found]


@pytest.mark.parametrize("name", ["../secret.jpg", "{}", "a/../../secret.jpg", "..\\secret.jpg", "file://{}", "http://127.0.0.1/a"])
def test_a_captions_file_opens_no_picture_outside_of_its_folder(name: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(noise_jpeg(0))
    (tmp_path / "corpus" / "a").mkdir(parents=True)
    file = tmp_path / "corpus" / "captions.jsonl"
    file.write_text(json.dumps({"file_name": name.format(secret), "text": "mine"}))
    assert [(has_image, error) for _, has_image, error in essence(file)] == [(False, "unsafe_name")]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_no_pictures(kind: bytes, tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(noise_jpeg(0))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("0.jpg")
        link.type, link.linkname = kind, str(secret)
        tar.addfile(link)
        text = tarfile.TarInfo("0.txt")
        text.size = 4
        tar.addfile(text, io.BytesIO(b"mine"))
    assert essence(tmp_path / "a.tar") == [("0", False, None)]


@pytest.mark.parametrize("column", ["__key__", "path"])
def test_a_key_of_parquet_that_climbs_is_unsafe(column: str, tmp_path: Path) -> None:
    picture: Any = {"bytes": noise_jpeg(0), "path": "../../x.jpg"} if column == "path" else noise_jpeg(0)
    table = {"image": [picture], "text": ["a"]} | ({"__key__": ["../../x"]} if column == "__key__" else {})
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert [(key, error) for key, _, error in essence(tmp_path / "a.parquet")] == [("../../x", "unsafe_name")]


# ---- secrets ----------------------------------------------------------------------------------------------------------

SECRET = "geheim-7f3a"


def config_file(folder: Path, text: str) -> str:
    file = folder / "words.yaml"
    file.write_text(text)
    return f"config={file}"


def everything_in(folder: Path) -> str:
    return "".join(file.read_text() for file in sorted(folder.rglob("*")) if file.is_file())


@pytest.mark.parametrize("secret", [SECRET, "s3c"])
def test_a_variable_is_used_and_never_written(secret: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", secret)
    words = config_file(tmp_path, "corpus: {path: '/data/${oc.env:TOKEN}/a.tar'}\n")
    cfg = compose_config("annotate", [words, f"output={tmp_path}/A"])
    assert cfg.corpus.path == f"/data/{secret}/a.tar"
    settings = settings_of(cfg)
    settings["corpus"] |= {"roots": {"": f"/data/{secret}"}}
    output = open_output(cfg.output, "annotate", settings)
    output.finish({}, made_of=f"corpus.path=/data/{SECRET}/a.tar")
    written = read_json(output.join("settings.json"))["settings"]
    assert written["corpus"]["path"] == "/data/${oc.env:TOKEN}/a.tar"
    assert written["corpus"]["roots"] == {"": "/data/${oc.env:TOKEN}"}
    assert resolved(written)["corpus"] == settings["corpus"]
    if secret == SECRET:
        assert secret not in everything_in(tmp_path / "A") and secret not in mask(f"/data/{secret}/b.tar: no such file")


def test_a_variable_in_the_words_and_by_way_of_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "s3c")
    words = ["imagenet.path=/x/${oc.env:TOKEN}", "coco.path=${imagenet.path}/coco", "model=M", "evaluators=[imagenet,coco]"]
    cfg = compose_config("evaluate", [*words, f"output={tmp_path}/E"])
    assert cfg.coco.path == "/x/s3c/coco"
    written = as_written(settings_of(cfg))
    assert (written["imagenet"]["path"], written["coco"]["path"]) == ("/x/${oc.env:TOKEN}", "/x/${oc.env:TOKEN}/coco")


def test_what_is_no_secret_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONE", "1")
    cfg = compose_config("annotate", ["corpus.path=/a/${oc.env:ONE}", "output=o"])
    assert as_written(settings_of(cfg))["ocr"] == asdict(cfg.ocr) and mask("step 1 of 10") == "step 1 of 10"
    compose_config("annotate", ["corpus.path=/a/1", "output=o"])  # the words of one call only
    assert as_written({"corpus": "/a/1"}) == {"corpus": "/a/1"}


def test_a_variable_that_is_not_set_is_named_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"corpus\.path.*'NOT_SET_HERE' not found") as caught:
        compose_config("annotate", [config_file(tmp_path, "corpus: {path: '${oc.env:NOT_SET_HERE}'}"), "output=o"])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="variable NOT_SET_HERE is not set"):
        resolved({"corpus": {"path": "${oc.env:NOT_SET_HERE}/a"}})


def test_a_value_that_settings_of_another_call_name_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of annotations: the words of filter and report hold no variable."""
    monkeypatch.setenv("TOKEN", SECRET)
    monkeypatch.setenv("SHORT", "0.3")
    where = {"path": "/data/${oc.env:TOKEN}/c", "sources": {}, "roots": {"": "/data/${oc.env:TOKEN}/c/${oc.env:SHORT}"}}
    head = {"verb": "annotate", "fingerprint": "f", "settings": {"corpus": where, "ocr": {}}}
    write_json(f"{tmp_path}/A/settings.json", head)
    write_json(f"{tmp_path}/A/manifest.json", {"verb": "annotate"})
    annotations = open_annotations(str(tmp_path / "A"))
    assert annotations.roots == {"": f"/data/{SECRET}/c/0.3"}
    assert mask(f"{annotations.roots['']}/0.tar: no such file") == "/data/${oc.env:TOKEN}/c/0.3/0.tar: no such file"
    assert _corpus_words(annotations.corpus) == "corpus.path='/data/${oc.env:TOKEN}/c'"
    sources = {"a": SourceConfig("sftp://k:s3c@h/c"), "b": SourceConfig(f"/{SECRET}")}
    assert (
        _corpus_words(CorpusConfig(None, sources))
        == "corpus.sources.a.path='sftp://***@h/c' corpus.sources.b.path='/${oc.env:TOKEN}'"
    )
    assert as_written({"corpus": "/a/0.3"}) == {"corpus": "/a/0.3"}  # a short value counts under keys of this call's words only
    told = os.environ[INTERPOLATED]  # what the workers get
    assert "TOKEN" in told and SECRET not in told
    compose_config("annotate", ["corpus.path=${oc.env:TOKEN}", "output=o"])
    resolved(where)
    assert as_written({"corpus": SECRET}) == {"corpus": "${oc.env:TOKEN}"} and os.environ[INTERPOLATED] == "corpus:TOKEN :SHORT"


def test_a_folder_of_another_value_is_not_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(value: str) -> None:
        monkeypatch.setenv("DATA", value)
        cfg = compose_config("annotate", ["corpus.path=${oc.env:DATA}", f"output={tmp_path}/A"])
        open_output(cfg.output, "annotate", settings_of(cfg))

    begin("/first/corpus")
    begin("/first/corpus")
    with pytest.raises(UserError, match=r"\$\{oc.env:DATA\} has another value") as caught:
        begin("/second/corpus")
    assert "/second" not in str(caught.value)


def test_credentials_are_not_written_and_a_new_password_is_no_new_run(tmp_path: Path) -> None:
    def begin(password: str) -> str:
        cfg = compose_config("annotate", [f"corpus.path=sftp://ann:{password}@host/c", f"output={tmp_path}/A"])
        return open_output(cfg.output, "annotate", settings_of(cfg)).fingerprint

    assert begin(SECRET) == begin("rotated")
    settings = read_json(f"{tmp_path}/A/settings.json")["settings"]
    assert settings["corpus"]["path"] == "sftp://***@host/c" and SECRET not in everything_in(tmp_path)
    with pytest.raises(UserError, match=r"sftp://\*\*\*@host/c: its credentials were not stored.*corpus\.path=") as caught:
        open_fs(settings["corpus"]["path"])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError) as other:
        cfg = compose_config("annotate", [f"corpus.path=sftp://ann:{SECRET}@elsewhere/c", f"output={tmp_path}/A"])
        open_output(cfg.output, "annotate", settings_of(cfg))
    assert "sftp://***@elsewhere/c" in str(other.value) and SECRET not in str(other.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (
            "https://h/a.tar?X-Amz-Credential=AK%2F1&X-Amz-Signature=ab12",
            "https://h/a.tar?X-Amz-Credential=***&X-Amz-Signature=***",
        ),
        ("https://h/a?sv=2022&sig=a%2Bb%3D&se=2030", "https://h/a?sv=2022&sig=***&se=2030"),
        ("GET https://h/a?x-amz-security-token=T&b=1: 403", "GET https://h/a?x-amz-security-token=***&b=1: 403"),
        ("https://h/a?AWSAccessKeyId=A&Signature=b", "https://h/a?AWSAccessKeyId=***&Signature=***"),
        ("https://h/a?page=2&monkey=3", "https://h/a?page=2&monkey=3"),
        ("data/a-?.tar", "data/a-?.tar"),
        ("abfs://container@account.dfs.core.windows.net/a", "abfs://container@account.dfs.core.windows.net/a"),
        ("abfs://user:secret@account/a", "abfs://***@account/a"),
        ("https://token@host/a", "https://***@host/a"),
    ],
)
def test_masked(url: str, shown: str) -> None:
    assert mask(url) == shown and mask(shown) == shown


def test_a_report_shows_no_credentials(tmp_path: Path) -> None:
    url = f"sftp://ann:{SECRET}@host/c"
    folder = tmp_path / "W"
    settings = {"corpus": {"path": url}, "annotations": None}
    write_json(f"{folder}/settings.json", {"verb": "train", "settings": settings})  # of a version that wrote them
    more = {"counts": {}, "made_of": url, "notes": [url], "versions": {"raysys": url}}
    write_json(f"{folder}/manifest.json", {"verb": "train", **more})
    page = Path(report(str(folder))).read_text()
    assert SECRET not in page and page.count("sftp://***@host/c") == 4


def test_a_page_of_a_sweep_shows_no_credentials(tmp_path: Path) -> None:
    write_json(f"{tmp_path}/settings.json", {"verb": "sweep", "settings": {"space": {}, "evaluators": ["coco"]}})
    row = {"trial": "000000", "point": 0, "seed": 0, "status": "crashed", "reason": f"sftp://a:{SECRET}@h/c: broke", "steps": None}
    row |= {"kept_share": None, "samples_per_s": None, "seconds": None, "score": None, "num_samples": None}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "results.parquet")
    (tmp_path / "best.yaml").write_text(f"corpus: {{path: 'sftp://a:{SECRET}@h/c'}}")
    assert SECRET not in Path(report(str(tmp_path))).read_text()


# ---- files that are meant to break ------------------------------------------------------------------------------------


def test_deep_json_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "deep.json"
    file.write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"deep\.json: not valid JSON"):
        read_json(str(file))


def test_a_sparse_member_does_not_grow_in_memory(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", sample("0", noise_jpeg(0)))
    data = bytearray((tmp_path / "a.tar").read_bytes())
    with tarfile.open(tmp_path / "a.tar") as tar:
        first = next(iter(tar)).offset
    data[first + 156 : first + 157] = tarfile.GNUTYPE_SPARSE
    data[first + 257 : first + 265] = b"ustar  \0"
    data[first + 483 : first + 495] = b"%011o\0" % (1 << 32)  # 4 GiB when it is unpacked
    data[first + 148 : first + 156] = b" " * 8
    data[first + 148 : first + 156] = b"%06o\0 " % sum(data[first : first + 512])
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ValueError, match="cut off"):
        list(iter_samples(str(tmp_path / "a.tar")))


def test_hostile_json_costs_its_sample_at_most(tmp_path: Path) -> None:
    deep = b'{"a":' + b"[" * 100_000
    members = [*sample("deep", noise_jpeg(0), "good"), ("deep.json", deep), *sample("next", noise_jpeg(1))]
    assert essence(write_tar(tmp_path / "a.tar", members)) == [("deep", True, None), ("next", True, None)]
    (tmp_path / "captions.jsonl").write_bytes(deep + b'\n{"image": "0.jpg", "text": "good"}\n')
    assert essence(tmp_path / "captions.jsonl") == [("line-0", False, "bad_record"), ("0", False, None)]


@pytest.mark.parametrize("suffix", ["txt", "json"])
def test_an_endless_caption_is_not_read(suffix: str, tmp_path: Path) -> None:
    members = [("0.jpg", noise_jpeg(0)), (f"0.{suffix}", b" " * ((16 << 20) + 1)), *sample("1", noise_jpeg(1))]
    [long, other] = iter_samples(str(write_tar(tmp_path / "a.tar", members)))
    assert (long.error, long.captions, long.metadata, other.error) == ("bad_record", [], b"", None)


def test_a_set_with_a_key_that_climbs_is_refused(tmp_path: Path) -> None:
    """Else `raysys attack` would write the name into a tar of its own."""
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "nshards.txt").write_text("1")
    (tmp_path / "classnames.txt").write_text("cat\n")
    write_tar(tmp_path / "test" / "0.tar", [("../../x.jpg", noise_jpeg(0)), ("../../x.cls", b"0")])
    with pytest.raises(UserError, match=r"sample \.\./\.\./x: its name is absolute or climbs"):
        read_class_set(ClassSetConfig(path=str(tmp_path)), "imagenet")


def test_annotations_of_a_corpus_behind_a_variable_are_read_with_its_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "/data/here")
    cfg = compose_config("annotate", ["corpus.path=${oc.env:DATA}/a.tar", f"output={tmp_path}/A"])
    settings = settings_of(cfg)
    settings["corpus"] |= {"roots": {"": "/data/here"}}
    open_output(cfg.output, "annotate", settings).finish({})
    found = open_annotations(cfg.output)
    assert found.roots == {"": "/data/here"} and found.corpus.path == "/data/here/a.tar"
    monkeypatch.delenv("DATA")
    with pytest.raises(UserError, match="variable DATA is not set"):
        open_annotations(cfg.output)


def test_tables_of_a_sweep_hold_no_credentials(tmp_path: Path) -> None:
    names = {"objectives": ["coco/recall"], "objective": "mean"}
    row = row_of("000000", 0, 0, {"corpus.path": f"sftp://a:{SECRET}@h/c"}, None, **names)  # type: ignore[arg-type]
    write_tables(str(tmp_path), [row], points_of([row], ["corpus.path"], ["coco/recall"]), ["coco/recall"])  # type: ignore[arg-type]
    assert pq.read_table(tmp_path / "results.parquet")["corpus.path"].to_pylist() == ["sftp://***@h/c"]
