"""What other tools write, raysys takes, and what raysys writes, they take: each with the tool itself.

Two cannot stand beside raysys. img2dataset's pins (pandas < 3, albumentations < 2) do not go with constraints.txt: ``make test`` reads folders
that img2dataset 1.47.0 wrote (tests/img2dataset), and ``make test-long`` lets it write them anew, in an environment of its own. DataComp's
resharder is a script without a package: its look-up is written out here.

Elsewhere: R/open_clip in open_clip (test_training.py and test_models.py), and clip-benchmark's ``eval`` (test_clip_benchmark.py).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
import torch
import webdataset
from conftest import Members, free_port, noise_jpeg, sample, start_server, text_jpeg, write_tar
from PIL import Image
from test_training import config, train_alone

from raysys.config import ClassSetConfig, CorpusConfig, FilterConfig, ModelConfig, OcrConfig, RetrievalSetConfig, ServiceConfig
from raysys.corpus.samples import DamagedShard
from raysys.corpus.shards import iter_samples, open_corpus
from raysys.evaluation.evaluator import Evaluator
from raysys.evaluation.results import write_result
from raysys.models import load_model, save_open_clip_folder
from raysys.output import open_output
from raysys.policy.select import filter_annotations
from raysys.regions.annotations import SCHEMA, AnnotationFiles
from raysys.regions.annotator import Annotator
from raysys.regions.units import look_at_shard
from raysys.storage import shard_name
from raysys.training.checkpoint import load_newest

README = Path(__file__).parents[1] / "README.md"


def annotate(corpus: Path, folder: Path) -> None:
    """What raysys annotate writes, without Ray; the tests' engine reads SALE in bright pictures."""
    annotator = Annotator(OcrConfig())
    found = open_corpus(CorpusConfig(str(corpus)))
    settings = {"corpus": {"path": str(corpus), "roots": found.roots}, "ocr": {"store_score": 0.3, "recognize": True}}
    output = open_output(str(folder), "annotate", settings)
    files = AnnotationFiles(output.path, output.fingerprint)
    for shard in found.shards:
        table, made_of, damaged = look_at_shard(shard.path, shard.name, None, annotator)
        assert not damaged
        files.write_shard(shard.name, table, made_of=made_of, damaged=damaged)
    output.finish({"shards": len(found.shards)})


def kept(corpus: Path, work: Path) -> Path:
    """The shards that ``raysys filter shards=`` writes; the annotations lie in work/A, the selection in work/S."""
    annotate(corpus, work / "A")
    filter_annotations(FilterConfig(output=str(work / "S"), annotations=str(work / "A"), shards=str(work / "F")))
    return work / "F"


# ---- img2dataset ------------------------------------------------------------------------------------------------------

FILES = ["street.jpg", "sign.jpg", "gone.jpg", "page.jpg", "drawing.png", "hall.jpg"]
CAPTIONS = ["a street", "a sign", "a gap", "a page", 'a naïve "drawing", quoted', "a hall"]
UIDS = [f"beef{i:028x}" for i in range(6)]
DOWNLOADED = {"000000": 0, "000001": 1, "000011": 4, "000012": 5}
"""Key -> row: three rows a shard; gone.jpg is not there and page.jpg no picture."""


def picture(row: int) -> bytes:
    """What the site has; the sign alone is bright."""
    if row != 4:
        return text_jpeg("SALE", (64, 32), 20) if row == 1 else noise_jpeg(row)
    file = io.BytesIO()
    Image.new("RGB", (48, 40), (20, 120, 60)).save(file, "PNG")
    return file.getvalue()


def img2dataset(program: str, form: str, folder: Path) -> Path:
    """Download six rows from a site of our own. :returns: the folder that img2dataset wrote."""
    site = folder / "site"
    site.mkdir(parents=True)
    for row, file in enumerate(FILES):
        if file != "gone.jpg":
            (site / file).write_bytes(b"<html>moved</html>" if file == "page.jpg" else picture(row))
    port = free_port()
    with (folder / "urls.csv").open("w", newline="", encoding="utf-8") as file:
        rows = [(f"http://127.0.0.1:{port}/{name}", *more) for name, *more in zip(FILES, CAPTIONS, UIDS, strict=True)]
        csv.writer(file).writerows([("url", "caption", "uid"), *rows])
    server = start_server(["http.server", str(port), "--bind", "127.0.0.1", "--directory", str(site)], port, folder / "log")
    words = [
        "--input_format=csv",
        "--url_col=url",
        "--caption_col=caption",
        '--save_additional_columns=["uid"]',
        "--resize_mode=no",
    ]
    words += ["--number_sample_per_shard=3", "--processes_count=1", "--thread_count=1", f"--output_format={form}"]
    try:
        subprocess.run(
            [program, f"--url_list={folder / 'urls.csv'}", f"--output_folder={folder / form}", *words],
            env=os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"},
            check=True,
        )
    finally:
        server.terminate()
        server.wait()
    return folder / form


def check_that_it_goes_all_the_way(form: str, corpus: Path, work: Path) -> None:
    """A folder of img2dataset's, as it is, into annotations, a subset and filtered shards."""
    target = kept(corpus, work)
    assert [shard.name for shard in open_corpus(CorpusConfig(str(corpus))).shards] == [
        f"{shard}.{'tar' if form == 'webdataset' else 'parquet'}" for shard in ("00000", "00001")
    ]
    rows = ds.dataset(work / "A" / "shards").to_table().to_pylist()
    by_key = {row["key"]: row for row in rows}
    assert len(by_key) == len(rows) == (4 if form == "webdataset" else 6)  # its tars leave out what was not downloaded
    for key, row in by_key.items():
        number = DOWNLOADED.get(key)
        if number is None:
            assert row["error"] == "missing_image"
            continue
        with Image.open(io.BytesIO(picture(number))) as image:
            assert (row["width"], row["height"], row["error"]) == (*image.size, None)
        assert (row["caption"], row["uid"]) == ([CAPTIONS[number]], UIDS[number])
        assert [region["text"] for region in row["regions"]] == (["SALE"] if number == 1 else [])

    numbers = [number for number in DOWNLOADED.values() if number != 1]
    assert [f"beef{second:028x}"[16:] for _, second in np.load(work / "S" / "subset.npy")] == [UIDS[n][16:] for n in numbers]
    found = {one["__key__"]: one for one in webdataset.WebDataset(sorted(map(str, target.glob("*.tar"))), shardshuffle=False)}
    assert {key: one["txt"].decode() for key, one in found.items()} == {
        key: CAPTIONS[number] for key, number in DOWNLOADED.items() if number != 1
    }
    assert all(json.loads(one["json"])["uid"] == UIDS[DOWNLOADED[key]] for key, one in found.items())


@pytest.mark.parametrize("form", ["webdataset", "parquet"])
def test_img2datasets_folder_is_a_corpus_as_it_is(form: str, tmp_path: Path, fake_engine: None) -> None:
    """Also tars have Parquet files beside them, of metadata alone."""
    check_that_it_goes_all_the_way(form, Path(__file__).parent / "img2dataset" / form, tmp_path)


@pytest.fixture(scope="session")
def img2dataset_program(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of an environment of its own."""
    folder = tmp_path_factory.mktemp("img2dataset")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", "img2dataset==1.47.0"], check=True)
    return str(folder / "bin" / "img2dataset")


@pytest.mark.long
@pytest.mark.parametrize("form", ["webdataset", "parquet", "files"])
def test_what_img2dataset_writes_today(form: str, img2dataset_program: str, tmp_path: Path, fake_engine: None) -> None:
    corpus = img2dataset(img2dataset_program, form, tmp_path)
    if form == "files":  # pictures without a captions file: only the metadata is a Parquet file
        with pytest.raises(DamagedShard, match="no column of pictures"):
            list(iter_samples(str(corpus / "00000.parquet")))
    else:
        check_that_it_goes_all_the_way(form, corpus, tmp_path)


# ---- webdataset and open_clip's trainer -------------------------------------------------------------------------------


@pytest.fixture
def filtered(tmp_path: Path, fake_engine: None) -> Path:
    """Two tars of six kept samples each; two of each were dropped, one for its text and one that has no caption."""
    for shard in range(2):
        members: Members = []
        for i in range(8):
            image = text_jpeg("SALE", (64, 64), 20) if i == 3 else noise_jpeg(10 * shard + i)
            members += sample(
                f"{shard}{i:03d}", image, f"picture {shard} {i}" if i != 5 else None, [f"other words {i}"] if i != 5 else None
            )
        write_tar(tmp_path / "corpus" / f"{shard:05d}.tar", members)
    return kept(tmp_path / "corpus", tmp_path)


KEPT = [(shard, i) for shard in range(2) for i in (0, 1, 2, 4, 6, 7)]


def test_webdataset_reads_and_decodes_the_kept_samples(filtered: Path) -> None:
    pipeline = webdataset.WebDataset(f"{filtered}/{{00000..00001}}.tar", shardshuffle=False).decode("rgb8")
    found = list(pipeline.to_tuple("__key__", "jpg", "txt", "json"))
    assert [(key, said, info) for key, _, said, info in found] == [
        (f"{shard}{i:03d}", f"picture {shard} {i}", {"captions": [f"other words {i}"]}) for shard, i in KEPT
    ]
    for (_, image, _, _), (shard, i) in zip(found, KEPT, strict=True):
        with Image.open(io.BytesIO(noise_jpeg(10 * shard + i))) as expected:
            assert np.array_equal(image, np.asarray(expected))


LOADS = """
import hashlib, json, sys
from open_clip_train.data import get_data
from open_clip_train.params import parse_args
from raysys.models import load_model

model, shards = sys.argv[1:]
loaded = load_model(model, "random")
words = ["--train-data", shards, "--val-data", shards, "--dataset-type", "webdataset", "--batch-size", "3", "--workers", "2"]
args = parse_args(words)
args.world_size, args.rank, args.distributed = 1, 0, False  # its main takes them from the environment
data = get_data(args, (loaded.preprocess, loaded.preprocess), epoch=0, tokenizer=loaded.tokenizer)
pairs = {
    split: [
        [hashlib.sha256(image.numpy().tobytes()).hexdigest(), text.tolist()]
        for images, texts in data[split].dataloader
        for image, text in zip(images, texts, strict=True)
    ]
    for split in ("train", "val")
}
print(json.dumps({"num_samples": data["train"].dataloader.num_samples} | pairs))
"""
"""In a process of its own: the loader's workers are forked, which a process with Arrow's and DuckDB's threads may not survive."""


def test_open_clips_trainer_loads_the_kept_samples(filtered: Path, tiny_model: str) -> None:
    shards = f"{filtered}/{{00000..00001}}.tar"  # their sizes stand in sizes.json
    done = subprocess.run([sys.executable, "-c", LOADS, tiny_model, shards], stdout=subprocess.PIPE, text=True, check=True)
    loaded = load_model(tiny_model, "random")
    expected = []
    for shard, i in KEPT:
        with Image.open(io.BytesIO(noise_jpeg(10 * shard + i))) as image:
            pixels = loaded.preprocess(image).numpy().tobytes()
        expected.append([hashlib.sha256(pixels).hexdigest(), loaded.tokenizer([f"picture {shard} {i}"])[0].tolist()])
    read = json.loads(done.stdout.splitlines()[-1])
    assert read["num_samples"] == 12
    for split in ("train", "val"):  # in any order, each once
        assert sorted(read[split]) == sorted(expected)


# ---- DataComp ---------------------------------------------------------------------------------------------------------


def test_datacomps_resharder_finds_the_kept_uids(tmp_path: Path, fake_engine: None) -> None:
    """As resharder.py does: the array mapped, of ``u8,u8``; a uid cut in two numbers; a sample taken as often as it is found there."""
    uids = [np.random.default_rng(i).bytes(16).hex() for i in range(40)] + ["0" * 31 + "1", "f" * 32, "80" + "0" * 30]
    with_text = uids[::5]
    for shard in range(2):
        members: Members = []
        for number, uid in list(enumerate(uids))[shard::2]:
            image = text_jpeg("SALE", (64, 64), 20) if uid in with_text else noise_jpeg(number)
            members += [*sample(f"{number:012d}", image), (f"{number:012d}.json", json.dumps({"uid": uid}).encode())]
        write_tar(tmp_path / "corpus" / f"{shard:08d}.tar", members)
    kept(tmp_path / "corpus", tmp_path)

    u16 = np.dtype("u8,u8")
    subset = np.load(tmp_path / "S" / "subset.npy", mmap_mode="r")
    assert subset.dtype == u16
    taken = {}
    for read in webdataset.WebDataset(f"{tmp_path}/corpus/{{00000000..00000001}}.tar", shardshuffle=False):
        uid = json.loads(read["json"])["uid"]
        key = np.array([divmod(int(uid, 16), 2**64)], u16)[0]
        taken[uid] = int(np.searchsorted(subset, key, "right") - np.searchsorted(subset, key, "left"))
    assert taken == {uid: int(uid not in with_text) for uid in uids}


# ---- CLIP_benchmark ---------------------------------------------------------------------------------------------------


def test_clip_benchmark_builds_its_table_from_the_results(tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from clip_benchmark import cli

    for i, name in enumerate(["cat", "dog", "fish"] * 2):
        (tmp_path / "val" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "val" / name / f"{i}.jpg").write_bytes(noise_jpeg(i))
    (tmp_path / "classes.json").write_text(json.dumps({name: name for name in ("cat", "dog", "fish")}))
    write_tar(tmp_path / "pairs.tar", [m for i in range(6) for m in sample(str(i), noise_jpeg(i), f"no. {i}")])
    asked = {
        "imagenet": ClassSetConfig(str(tmp_path / "val"), classes=str(tmp_path / "classes.json"), templates="simple"),
        "retrieval": RetrievalSetConfig(str(tmp_path / "pairs.tar")),
    }
    service = ServiceConfig(cache_dir=str(tmp_path / "cache"))
    saved = load_model(tiny_model, "random")
    save_open_clip_folder(str(tmp_path / "saved"), saved, state_dict=saved.model.state_dict(), card="")
    models = [ModelConfig(tiny_model, "random"), ModelConfig(f"local-dir:{tmp_path / 'saved'}")]  # the latter names no weights
    output = open_output(str(tmp_path / "E"), "evaluate", {})
    evaluator, said = Evaluator(asked, service), {}
    for number, model in enumerate(models):
        for result in evaluator.results(model.model, model.pretrained):
            write_result(output, f"model-{number}", model, service, result, "mark")
            said[result.dataset, f"{model.model} {model.pretrained or ''}"] = result.metrics

    monkeypatch.setattr(sys, "argv", ["clip_benchmark", "build", output.join("results"), "--output", str(tmp_path / "table.csv")])
    cli.main()
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(said) == 4
    for row in rows:
        metrics = said[row["dataset"], row["model_fullname"]]
        assert {metric: float(row[metric]) for metric in metrics} == metrics


# ---- whatever reads Parquet: the section of the README ----------------------------------------------------------------


def region(text: str | None, text_score: float | None, *, left: float = 0.25) -> dict[str, Any]:
    """All numbers are whole in float32."""
    return {"polygon": [left, 0, 1, 0, 1, 0.5, left, 0.5], "score": 0.875, "area": 0.375, "text": text, "text_score": text_score}


LOOKS: dict[str, list[tuple[list[str], list[dict[str, Any]], float | None, str | None]]] = {
    "a b/[0].tar": [
        (["a big sale", "reductions"], [region("SALE", 0.96875), region("50%", 0.875, left=0.5)], 0.375, None),
        (["a wall"], [], 0.0, None),
    ],
    "_c/00000.tar": [  # pandas and Arrow pass over files that begin with an underscore
        (["a shop"], [region("Sale", 0.75), region("sale", 0.125)], 0.03125, None),
        ([], [], None, "undecodable"),
    ],
    "ü.tar": [(["a cat"], [region(None, None)], 0.125, None), (["a dog"], [], 0.0, None)],
}
"""Shard -> captions, regions, text_area and error of its samples."""


@pytest.fixture
def annotations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A/shards in the working folder, by raysys's own writer. :returns: its rows."""
    files, rows = AnnotationFiles(str(tmp_path / "A"), "mark"), []
    for shard, looks in LOOKS.items():
        name = shard_name(shard)
        of_shard = [
            {"shard": name, "index": i, "key": f"{i:04d}", "uid": None, "offset": 512, "size": 99, "caption": captions, "width": 40, "height": 30,
             "regions": regions, "text_area": area, "error": error} for i, (captions, regions, area, error) in enumerate(looks)
        ]  # fmt: skip
        files.write_shard(name, pa.Table.from_pylist(of_shard, SCHEMA), made_of="1:2", damaged="")
        rows += of_shard
    monkeypatch.chdir(tmp_path)
    return rows


def in_order(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tools list the files each in an order of its own."""
    return sorted(rows, key=lambda row: (row["shard"], row["index"]))


def readmes_code() -> dict[str, str]:
    """Package -> the code that the README shows for it, by its first import."""
    section = README.read_text(encoding="utf-8").split("## With other tools\n")[1].split("\n## ")[0]
    blocks = re.findall(r"(?:^ {4}.*\n(?:\n(?= {4}))*)+", section, re.MULTILINE)
    code = [textwrap.dedent(block) for block in blocks]
    return {match[1]: text for text in code if (match := re.match(r"(?:import|from) (\w+)", text))}


def run_readmes_code(package: str) -> dict[str, Any]:
    """:returns: the variables that it leaves."""
    left: dict[str, Any] = {}
    exec(readmes_code()[package], left)
    return left


def test_the_readme_shows_no_other_code_than_is_run_here() -> None:
    assert list(readmes_code()) == ["open_clip", "pandas", "duckdb", "polars", "datasets"]


def test_readmes_open_clip_gives_the_embeddings_of_the_run(
    tmp_path: Path, plain_corpus: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(tmp_path, plain_corpus, tiny_model, output=str(tmp_path / "R"))
    train_alone(cfg)
    ours, state = load_model(tiny_model, "random"), load_newest(cfg.output)
    assert state is not None
    ours.model.load_state_dict(state["state_dict"])
    monkeypatch.chdir(tmp_path)
    theirs = run_readmes_code("open_clip")
    with Image.open(io.BytesIO(noise_jpeg(1, 50))) as image, torch.no_grad():
        embeddings = []
        for model, preprocess, tokenizer in (
            (theirs["model"], theirs["preprocess"], theirs["tokenizer"]),
            (ours.model, ours.preprocess, ours.tokenizer),
        ):
            model.eval()
            of_image = model.encode_image(preprocess(image).unsqueeze(0))
            embeddings.append(torch.cat([of_image, model.encode_text(tokenizer(["a red dog", "a cat"]))]))
    assert torch.equal(*embeddings)


def test_readmes_pandas_counts_pictures_by_text_area(annotations: list[dict[str, Any]]) -> None:
    shares = run_readmes_code("pandas")["shares"]
    assert shares.to_dict() == pytest.approx({"none": 2 / 5, "to 5 %": 1 / 5, "to 20 %": 1 / 5, "more": 1 / 5})


def test_readmes_duckdb_counts_texts(annotations: list[dict[str, Any]]) -> None:
    assert run_readmes_code("duckdb")["texts"].fetchall() == [("sale", 2), ("50%", 1)]


def test_readmes_polars_finds_captions_of_pictures_that_say_so(annotations: list[dict[str, Any]]) -> None:
    found = run_readmes_code("polars")["found"].to_dicts()
    assert Counter((row["shard"], row["key"], *row["caption"]) for row in found) == Counter(
        [("a%20b%2F%5B0%5D.tar", "0000", "a big sale", "reductions"), ("%5Fc%2F00000.tar", "0000", "a shop")]
    )


def test_readmes_datasets_has_every_row_with_its_regions(
    annotations: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert in_order(run_readmes_code("datasets")["rows"]) == in_order(annotations)


@pytest.mark.parametrize("package", ["pandas", "duckdb", "polars"])
def test_every_column_of_every_row_is_there(package: str, annotations: list[dict[str, Any]]) -> None:
    """What stands in the files, not only what the README asks for."""
    import duckdb
    import pandas
    import polars

    table: pa.Table = {
        "pandas": lambda: pa.Table.from_pandas(pandas.read_parquet("A/shards"), SCHEMA),
        "duckdb": lambda: duckdb.sql("FROM 'A/shards/*.parquet'").to_arrow_table(),
        "polars": lambda: polars.read_parquet("A/shards/*.parquet").to_arrow(),
    }[package]()
    assert in_order(table.to_pylist()) == in_order(annotations)
