"""One page a verb, made from small folders written as the verbs write them: is what matters there, escaped, and all inside the page?"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import re
import tarfile
from html import unescape
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raysys.config import ModelConfig, ServiceConfig
from raysys.errors import UserError
from raysys.evaluation.evaluator import SetResult
from raysys.evaluation.metrics import CLASSIFICATION, metrics
from raysys.evaluation.results import read_results, write_comparison, write_result
from raysys.output import open_output
from raysys.regions import gallery
from raysys.regions.annotations import SCHEMA, AnnotationFiles
from raysys.reporting.html import report, series_of
from raysys.storage import identity, write_json
from raysys.sweeping.results import points_of, row_of, write_tables

HOSTILE = '<script>alert("caption")</script>"><img onerror=alert(1)>'
REGION = {
    "polygon": [0.1, 0.2, 0.5, 0.2, 0.5, 0.4, 0.1, 0.4],
    "score": 0.9,
    "area": 0.08,
    "text": "<b>SALE</b>",
    "text_score": 0.95,
}
FAINT = {**REGION, "text_score": 0.1}  # a box that no policy counts


def folder(path: Path, verb: str, settings: dict[str, Any] | None = None, counts: dict[str, Any] | None = None) -> Path:
    """An output folder's settings, and its manifest where counts are given."""
    path.mkdir(parents=True, exist_ok=True)
    write_json(str(path / "settings.json"), {"verb": verb, "fingerprint": "f", "settings": settings or {}})
    if counts is not None:
        write_json(str(path / "manifest.json"), {"verb": verb, "counts": counts, "seconds": 1.5, "versions": {"raysys": "0.1"}})
    return path


def jpeg(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(file, "JPEG")
    return file.getvalue()


def write_parquet(path: Path, rows: list[dict[str, Any]], metadata: dict[str, str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    pq.write_table(table.replace_schema_metadata(metadata), path)


def annotated(root: Path) -> Path:
    """Two shards: hostile caption without text, a sign, a faint box; and a broken picture."""
    (root / "corpus").mkdir(parents=True)
    out = folder(
        root / "annotations",
        "annotate",
        {"corpus": {"path": str(root / "corpus"), "roots": {"": str(root / "corpus")}}},
        {"samples": 4321, "shards": 2, "regions": 2, "with_regions": 2, "errors": {"undecodable": 17}, "damaged_shards": {}},
    )
    for shard, looks in (("a b.tar", [(HOSTILE, []), ("a sign", [REGION])]), ("c.tar", [("a wall", [FAINT]), ("broken", None)])):
        with tarfile.open(root / "corpus" / shard, "w") as tar:
            for i, _ in enumerate(looks):
                data = jpeg(("red", "lime")[i])
                info = tarfile.TarInfo(f"{i}.jpg")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        with tarfile.open(root / "corpus" / shard) as tar:
            members = [(m.offset_data, m.size) for m in tar]
        name = shard.replace(" ", "%20")
        rows = [
            {
                "shard": name,
                "index": i,
                "key": f"k{i}",
                "offset": members[i][0],
                "size": members[i][1],
                "caption": [caption],
                "width": 40,
                "height": 30,
                "regions": regions or [],
                "text_area": None if regions is None else 0.08 * len(regions),
                "error": "undecodable" if regions is None else None,
            }
            for i, (caption, regions) in enumerate(looks)
        ]
        made_of = identity(str(root / "corpus" / shard))
        AnnotationFiles(str(out), "mark").write_shard(name, pa.Table.from_pylist(rows, schema=SCHEMA), made_of=made_of, damaged="")
    return out


def selection(root: Path, source: Path) -> Path:
    out = folder(
        root / "selection", "filter", {"annotations": str(source), "policy": {"name": "paper"}},
        {"samples": 4, "kept": 2, "reasons": {"text_area": 1, "undecodable": 1}},
    )  # fmt: skip
    for shard, reasons in (("a%20b.tar", [None, "text_area"]), ("c.tar", [None, "undecodable"])):
        rows = [{"shard": shard, "index": i, "key": f"k{i}", "keep": r is None, "reason": r} for i, r in enumerate(reasons)]
        write_parquet(out / "selection" / f"{shard}.parquet", rows)
    return out


def run(path: Path) -> Path:
    out = folder(path, "train", {"model": "tiny"}, {"steps": 30, "samples_seen": 960})
    steps = [(10, 3.0), (20, 2.0), (20, 1.5), (30, 1.0)]  # 20 was done again after a resume
    lines = [json.dumps({"step": s, "loss": v, "image_accuracy": 0.1, "note": "x", "new_metric": 7}) for s, v in steps]
    (out / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4']))  # the last line was cut by a kill
    return out


def attack(path: Path) -> Path:
    out = folder(path, "attack", {}, {"pictures": 2})
    rows = [
        {"picture": f"n{i}/x.JPEG", "true_class": i, "written_class": 1 - i, "text": ("goldfish", "tench")[i],
         "font": "DejaVuSans.ttf", "font_sha256": "0", "font_px": 50, "color": [255, 0, 0], "x_px": 50, "y_px": 50,
         "rotation_deg": (0.0, -7.25)[i], "background": None, "visible_share": (1.0, 0.4)[i]}
        for i in range(2)
    ]  # fmt: skip
    write_parquet(out / "attack.parquet", rows)
    for i in range(2):
        (out / f"n{i}").mkdir()
        (out / f"n{i}" / "x.JPEG").write_bytes(jpeg("blue"))
    write_json(str(out / "classes.json"), {"n0": "tench", "n1": "goldfish"})
    return out


SURE = {"acc1": (0.5, [0.0, 1.0]), "attack_success_rate": (0.25, [0.125, 0.375])}


def evaluation(path: Path, attacked: Path, *models: str) -> Path:
    """Each model names both pictures "tench"; the attacked set and a retrieval set of one's own."""
    models = models or ("my-model",)
    specs = {name: {"model": f"/runs/{name}", "pretrained": None} for name in models}
    out = folder(
        path, "evaluate", {"models": specs, "imagenet_attr": {"path": str(attacked)}}, {"imagenet_attr": 2, "retrieval": 3}
    )
    for name in models:
        for evaluator, shares in (("imagenet_attr", SURE), ("retrieval", {"mean_recall@1": (0.4321, [0.4, 0.5])})):
            result = {
                "dataset": evaluator,
                "model": f"/runs/{name}",
                "pretrained": "",
                "task": "t",
                "metrics": {metric: value for metric, (value, _) in shares.items()} | {"num_pictures": 2},
                "language": "en",
                "name": name,
                "evaluator": evaluator,
                "precision": "fp32",
                "intervals": {metric: ends for metric, (_, ends) in shares.items()},
                "notes": [f"pictures of <2> of 1,000 classes of {evaluator}"],
            }
            if evaluator == "imagenet_attr":
                result["drop"] = {"value": 0.125, "low": -0.0625, "high": 0.3125}
            write_json(str(out / "results" / f"{evaluator}_{name}.json"), result)
        predictions = [
            {"picture": "n0/x.JPEG", "true_class": 0, "predicted_class": 0, "written_class": 1},
            {"picture": "n1/x.JPEG", "true_class": 1, "predicted_class": 0, "written_class": 0},
        ]
        write_parquet(out / "predictions" / f"imagenet_attr_{name}.parquet", predictions)
    if len(models) > 1:
        difference = {"difference": 0.25, "low": 0.125, "high": 0.375, "p": 0.0312}
        who = {"evaluator": "imagenet_attr", "first": models[0], "second": models[1]}
        write_json(str(out / "comparison.json"), [who | {"metric": m} | difference for m in SURE])
    return out


GRID = {"policy": ["none", "paper"], "augment.factor": [1, 0]}
SHARES = [(0.5, 0.2), (0.8, 0.3), (0.7, 0.5), (0.9, 0.9)]
"""imagenet and imagenet_attr at each point of GRID; the last one lacks a seed."""


def trial(seed: int, shares: tuple[float, ...] | None, *, kept: float = 0.5) -> dict[str, Any]:
    """result.json of a trial that finished, or of one that failed. Seeds 0, 1, 2 are a point lower, equal, a point higher."""
    if shares is None:
        return {"status": "failed", "reason": "out of <memory>"}
    metrics = {
        name: {"acc1": share + 0.01 * (seed - 1)} for name, share in zip(("imagenet", "imagenet_attr"), shares, strict=False)
    }
    return {"status": "finished", "steps": 600, "kept_share": kept, "metrics": metrics, "seconds": 10.0, "samples_per_s": 64.0}


def sweep(
    path: Path, space: dict[str, Any], points: list[dict[str, Any]], results: dict[tuple[int, int], dict[str, Any] | None],
    *, num_objectives: int = 2, manifest: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """A sweep's folder with the results of (point, seed)."""
    evaluators = ["imagenet", "imagenet_attr"][:num_objectives]
    out = folder(path, "sweep", {"space": space, "evaluators": evaluators, "objective": "mean"})
    objectives = [f"{name}/acc1" for name in evaluators]
    rows = [
        row_of(f"p{n}s{seed}", n, seed, points[n], result, objectives=objectives, objective="mean")
        for (n, seed), result in results.items()
    ]
    write_tables(str(out), rows, points_of(rows, list(space), objectives), objectives)
    (out / "best.yaml").write_text("policy:\n  name: <paper>\n")
    if manifest is not None:
        write_json(str(out / "manifest.json"), {"verb": "sweep", "counts": {"trials": len(rows)}} | manifest)
    return out


def grid_of(space: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]


def grid_sweep(path: Path, *, num_seeds: int = 3) -> Path:
    """Every point finished but the luckiest one, whose last seed failed."""
    results: dict[tuple[int, int], dict[str, Any] | None] = {
        (n, seed): trial(seed, SHARES[n], kept=(1.0, 1.0, 0.5, 0.5)[n]) for n in range(4) for seed in range(num_seeds)
    }
    results[3, num_seeds - 1] = trial(num_seeds - 1, None)
    return sweep(path, GRID, grid_of(GRID), results, manifest={"seconds": 600.0, "decoded": {"imagenet": 1234}, "best": 2})


def section_of(page: str, title: str) -> str:
    return page[page.index(f"<h2>{title}</h2>") :].split("<h2>")[1]


def plot_of(page: str, section: str, title: str) -> str:
    """The SVG under a heading and a title."""
    of_section = section_of(page, section)
    return of_section[of_section.index(f"<figcaption>{title}</figcaption>") :].split("</figure>")[0]


def error_bars(svg: str) -> int:
    return sum(lines.count("<path d=") for lines in re.findall(r'<g id="LineCollection_\d+">.*?</g>', svg, re.DOTALL))


def cell_texts(svg: str) -> list[str]:
    """Numbers in the cells of a heat map: they are black or white, every other text has the page's colour."""
    texts = re.findall(r"<text ([^>]*)>([^<]*)</text>", svg)
    return [text for style, text in texts if "currentColor" not in style]


def page_of(path: Path) -> str:
    """The report, checked for what holds of every page: no request to the outside, no script but the slider's."""
    target = report(str(path))
    assert target == str(path / "report.html")
    page = Path(target).read_text()
    assert not re.search(r"""(?:src|href|action|data)\s*=\s*["']?(?!data:|#)[a-z]*:?//""", page)
    assert not re.search(r"(?:src|href)=[\"'](?!data:|#)", page) and "@import" not in page and not re.search(r"url\((?!#)", page)
    assert page.count("<script") == 1 and "default-src 'none'" in page
    return page


def test_annotations_show_counts_pictures_with_polygons_and_errors(tmp_path: Path) -> None:
    page = page_of(annotated(tmp_path))
    assert "<td>4,321</td>" in page
    assert re.search(r"<td>undecodable</td>\s*<td>17</td>\s*<td>0.4%</td>", page)
    assert 'points="0.1000,0.2000 0.5000,0.2000 0.5000,0.4000 0.1000,0.4000"' in page
    assert section_of(page, "Pictures").count("data:image/jpeg;base64,") == 3  # the broken one has none
    assert "not shown" not in page
    assert re.search(
        r"<td>paper</td>\s*<td>2</td>\s*<td>50.0%</td>", page
    )  # of 4 rows: the sign and the broken one go, the faint box does not count
    assert re.search(r"<td>none</td>\s*<td>3</td>", page)


def test_hostile_caption_and_recognised_text_stay_text(tmp_path: Path) -> None:
    source = annotated(tmp_path)
    for page in (page_of(source), page_of(selection(tmp_path, source))):
        assert "&lt;script&gt;alert(&#34;caption&#34;)&lt;/script&gt;" in page
        assert "<script>alert" not in page and "<img onerror" not in page
        assert "&lt;b&gt;SALE&lt;/b&gt;" in page and "<b>SALE" not in page


def sliders(page: str) -> dict[str, list[tuple[str, str, float]]]:
    """Threshold -> (value, what it keeps, place of the cursor) at each stop."""
    found = re.findall(r'<div class="threshold" data-stops="([^"]*)">.*?<code>([\w.]+)=', page, re.DOTALL)
    return {key: json.loads(unescape(stops)) for stops, key in found}


def kept_at(page: str) -> dict[str, dict[float, int]]:
    """Threshold -> value (infinite: any) -> samples kept, of the whole corpus."""
    number = {
        key: [(value, text.removeprefix("about ").split()[0]) for value, text, _ in stops] for key, stops in sliders(page).items()
    }
    return {
        key: {float("inf" if value == "null" else value): int(n.replace(",", "")) for value, n in stops}
        for key, stops in number.items()
    }


def test_sliders_carry_what_the_policy_keeps_at_each_value_of_every_threshold(tmp_path: Path) -> None:
    kept = kept_at(page_of(annotated(tmp_path)))
    # 4 rows stand for 4,321: a sign of 8 %, read with .95 in four letters; a faint box, read with .1; a plain picture; a broken one
    half, three = 2160, 3240
    area = kept["policy.max_text_area"]
    assert {n for value, n in area.items() if value < 0.08} == {half} and {n for value, n in area.items() if value > 0.081} == {
        three
    }
    assert kept["policy.min_text_score"][0.0] == 1080 and kept["policy.min_text_score"][0.5] == half
    assert kept["policy.min_text_score"][0.975] == three
    assert kept["policy.min_text_chars"][4] == half and kept["policy.min_text_chars"][10] == three
    assert kept["policy.max_regions"][0] == half and kept["policy.max_regions"][math.inf] == three  # on the policy none
    assert "policy.max_caption_overlap" not in kept  # no caption's word stands on its picture


def test_pictures_beside_a_slider_say_where_their_verdict_changes(tmp_path: Path) -> None:
    page = page_of(selection(tmp_path, annotated(tmp_path)))
    area = next(part for part in page.split('<div class="threshold"') if "<code>policy.max_text_area=" in part)
    [near] = re.findall(r'data-flip="(\d+)" data-before="(\w+)".*?<div class="caption">([^<]*)<', area, re.DOTALL)
    stops = [float(value) for value, _, _ in sliders(page)["policy.max_text_area"]]
    assert near[1:] == ("dropped", "a sign") and stops[int(near[0]) - 1] < 0.08 <= stops[int(near[0])]


def test_large_annotations_are_read_in_part_and_the_page_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "MAX_ROWS", 3)
    page = page_of(annotated(tmp_path))
    assert "look at 3 rows from shards all over the 2;" in page and "<td>4,321</td>" in page


def with_ocr(source: Path, **ocr: Any) -> Path:
    """The annotations as if made with these settings."""
    settings = json.loads((source / "settings.json").read_text())
    settings["settings"]["ocr"] = ocr
    write_json(str(source / "settings.json"), settings)
    return source


def test_annotations_that_stored_no_faint_boxes_are_asked_for_none(tmp_path: Path) -> None:
    page = page_of(with_ocr(annotated(tmp_path), store_score=0.5))
    assert "Boxes below ocr.store_score=0.5 were not stored" in page
    assert min(kept_at(page)["policy.min_score"]) == 0.5 and "<code>policy.min_score=<b>0.5</b>" in page


def test_annotations_without_readings_say_what_a_policy_can_ask(tmp_path: Path) -> None:
    page = page_of(with_ocr(annotated(tmp_path), recognize=False, store_score=0.3))
    assert "Nothing was read (ocr.recognize=false)" in page
    assert re.search(r"<td>paper</td>\s*<td>1</td>\s*<td>25.0%</td>", page)  # of 4 rows two have a box and one is broken
    assert "policy.min_text_score=" not in page and "policy.max_text_area=" in page


def test_a_table_of_a_sample_says_of_how_many_rows_it_is(tmp_path: Path) -> None:
    assert '<th scope="col">kept of the 4 rows looked at</th>' in page_of(annotated(tmp_path))


def test_a_caption_that_looks_like_a_url_with_a_secret_is_shown_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caption = "see http://shop.example/?key=abc"
    monkeypatch.setattr("test_report.HOSTILE", caption)
    assert caption in page_of(annotated(tmp_path))


def test_a_shard_that_changed_is_not_read_as_pictures(tmp_path: Path) -> None:
    source = annotated(tmp_path)
    with (tmp_path / "corpus" / "c.tar").open("ab") as file:
        file.write(b"more")
    page = page_of(source)
    assert section_of(page, "Pictures").count("data:image/jpeg;base64,") == 2
    assert "its shard has changed since it was annotated" in page


def test_selection_groups_pictures_by_reason(tmp_path: Path) -> None:
    page = page_of(selection(tmp_path, annotated(tmp_path)))
    assert "Kept 2 of 4" in page
    assert [page.index(f"<h3>{title}</h3>") for title in ("kept", "text_area", "undecodable")]
    kept = page[page.index("<h3>kept</h3>") : page.index("<h3>text_area</h3>")]
    assert kept.index("a wall") < kept.index("&lt;script&gt;")  # borderline first: the wall has a box, read with .1
    assert "the other verdict at policy.min_text_score=0.1<" in kept


def test_selection_whose_annotations_changed_says_so(tmp_path: Path) -> None:
    out = selection(tmp_path, annotated(tmp_path))
    manifest = json.loads((out / "manifest.json").read_text())
    write_json(str(out / "manifest.json"), manifest | {"annotations_sha256": "0" * 64})
    assert "The annotations changed since this selection was made" in page_of(out)
    own = hashlib.sha256((tmp_path / "annotations" / "manifest.json").read_bytes()).hexdigest()
    write_json(str(out / "manifest.json"), manifest | {"annotations_sha256": own})
    assert "The annotations changed" not in page_of(out)


def test_selection_counts_are_those_of_its_manifest(tmp_path: Path) -> None:
    page = page_of(selection(tmp_path, annotated(tmp_path)))
    assert re.search(r"<td>text_area</td>\s*<td>1</td>\s*<td>25.0%</td>", page)


def test_selection_without_its_annotations_says_so(tmp_path: Path) -> None:
    page = page_of(selection(tmp_path, tmp_path / "gone"))
    assert "Nothing to show" in page and "gone" in page and "Kept 2 of 4" in page


def test_run_shows_every_metric_and_a_repeated_step_counts_once(tmp_path: Path) -> None:
    out = run(tmp_path / "run")
    assert series_of(str(out))["loss"] == ([10, 20, 30], [3.0, 1.5, 1.0])
    page = page_of(out)
    assert "<figcaption>loss</figcaption><svg" in page
    assert "<td>image_accuracy</td><td>0.1</td>" in page and "<td>new_metric</td><td>7</td>" in page  # plots of nothing
    assert "<figcaption>note" not in page


def test_run_without_metrics_says_so(tmp_path: Path) -> None:
    page = page_of(folder(tmp_path / "run", "train"))
    assert "metrics.jsonl is missing" in page and "Not finished" in page


def test_attack_shows_pictures_with_both_names_and_how_each_was_drawn(tmp_path: Path) -> None:
    page = page_of(attack(tmp_path / "attacked"))
    assert page.count("data:image/jpeg;base64,") == 2
    assert "shows tench" in page and "says “goldfish”" in page
    assert "<td>font</td><td>DejaVuSans.ttf</td>" in page and "<td>rotation_deg</td><td>-7.2 to 0.0</td>" in page
    assert (
        "<div>rotation_deg -7.2 · visible_share 40%</div>" in page
    )  # of the second picture; what never varies stands in the table only


def test_attacked_pictures_in_parquet_are_shown_too(tmp_path: Path) -> None:
    out = attack(tmp_path / "attacked")
    rows = pq.read_table(out / "attack.parquet").to_pylist()
    pictures = [{"image": {"bytes": jpeg("blue"), "path": None}, "label": i} for i in range(2)]
    for i in range(2):
        (out / f"n{i}" / "x.JPEG").unlink()
        (out / f"n{i}").rmdir()
        rows[i]["picture"] = f"test.parquet/{i}"
    write_parquet(out / "test.parquet", pictures)
    write_parquet(out / "attack.parquet", rows)
    page = page_of(out)
    assert page.count("data:image/jpeg;base64,") == 2 and "not shown" not in page


def test_an_attack_that_has_not_ended_says_so(tmp_path: Path) -> None:
    out = attack(tmp_path / "attacked")
    (out / "attack.parquet").unlink()
    page = page_of(out)
    assert "Nothing to show" in page and "attack.parquet" in page


def test_evaluation_stands_next_to_the_reference_rows_and_answers(tmp_path: Path) -> None:
    page = page_of(evaluation(tmp_path / "evaluation", attack(tmp_path / "attacked")))
    assert "<td>my-model</td><td>/runs/my-model</td>" in page
    assert "<td>50.00% [0.00,\u00a0100.00]</td>" in page and "<td>25.00% [12.50,\u00a037.50]</td>" in page
    assert "<td>12.50% [-6.25,\u00a031.25]</td>" in page  # the drop
    assert "<td>68.78%</td>" in page
    assert "<td>43.21% [40.00,\u00a050.00]</td>" in page and "77.00" not in page  # no reference for a set of one's own
    assert "pictures of &lt;2&gt; of 1,000 classes of imagenet_attr" in page
    assert "my-model: tench ✓" in page and "my-model: tench ✗ read it" in page
    assert "<figcaption>What stands for each set</figcaption>" in page and "Models compared" not in page


def test_what_evaluate_writes_is_what_the_page_reads(tmp_path: Path) -> None:
    attacked = attack(tmp_path / "attacked")
    output = open_output(str(tmp_path / "E"), "evaluate", {"models": {"b": {}, "a": {}}, "imagenet_attr": {"path": str(attacked)}})
    for name, rank in (("b", [1, 1]), ("a", [1, 2])):
        for evaluator in ("imagenet", "imagenet_attr"):
            table = pa.table({
                "picture": [f"n{i}/x.JPEG" for i in range(2)], "true_class": pa.array([0, 1], pa.int32()),
                "predicted_class": pa.array([0, 2 - rank[1]], pa.int32()), "true_rank": pa.array(rank, pa.int32()),
            })  # fmt: skip
            if evaluator == "imagenet_attr":
                written = {"written_class": pa.array([1, 0], pa.int32()), "written_rank": pa.array([2, 3 - rank[1]], pa.int32())}
                for column, values in (written | {"self_attack": pa.array([False, False])}).items():
                    table = table.append_column(column, values)
            result = SetResult(evaluator, evaluator, CLASSIFICATION, metrics(CLASSIFICATION, table), table, ["a note"])
            write_result(output, name, ModelConfig(f"/runs/{name}"), ServiceConfig(), result, "mark")
    write_comparison(output, read_results(output, ["imagenet", "imagenet_attr"], ["b", "a"]))
    page = page_of(tmp_path / "E")
    assert page.index("<td>b</td><td>/runs/b</td>") < page.index("<td>a</td><td>/runs/a</td>")
    assert "<td>imagenet_attr</td><td>acc1</td><td>a - b</td><td>-50.00</td>" in page
    assert "acc1 drop (clean - attacked)" in page and "b: goldfish ✓" in page and "a: tench ✗ read it" in page


def test_other_classes_than_imagenets_have_no_reference_rows(tmp_path: Path) -> None:
    out = evaluation(tmp_path / "evaluation", attack(tmp_path / "attacked"))
    file = out / "results" / "imagenet_attr_my-model.json"
    result = json.loads(file.read_text())
    result["metrics"]["num_classes"] = 2
    write_json(str(file), result)
    page = page_of(out)
    assert "68.78%" not in page and '<p class="note">2 pictures, 2 classes</p>' in page


def test_models_of_an_evaluation_are_compared_in_the_order_in_which_they_were_named(tmp_path: Path) -> None:
    page = page_of(evaluation(tmp_path / "evaluation", attack(tmp_path / "attacked"), "raw", "<b>filtered"))
    table = page[page.index("<h2>imagenet_attr</h2>") : page.index("<h2>retrieval</h2>")]
    assert table.index("<td>raw</td>") < table.index("<td>&lt;b&gt;filtered</td>")
    row = "<td>imagenet_attr</td><td>{}</td><td>&lt;b&gt;filtered - raw</td><td>+25.00</td><td>[12.50,\u00a037.50]</td><td>0.0312</td>"
    assert f'<tr class="marked">{row.format("acc1")}' in page and f"<tr>{row.format('attack_success_rate')}" in page
    assert "raw: tench ✗ read it" in page and "&lt;b&gt;filtered: tench ✗ read it" in page
    assert "<b>filtered" not in page


def test_a_model_without_predictions_and_a_set_that_is_gone_are_said(tmp_path: Path) -> None:
    out = evaluation(tmp_path / "evaluation", attack(tmp_path / "attacked"), "raw", "filtered")
    (out / "predictions" / "imagenet_attr_raw.parquet").unlink()
    page = page_of(out)
    assert "No answers of raw: imagenet_attr_raw.parquet is missing." in page and "filtered: tench ✓" in page
    gone = page_of(evaluation(tmp_path / "other", tmp_path / "gone"))
    assert "Nothing to show" in gone and "<td>50.00% [" in gone


def test_results_of_another_program_are_said_not_shown(tmp_path: Path) -> None:
    out = evaluation(tmp_path / "evaluation", attack(tmp_path / "attacked"))
    write_json(str(out / "results" / "theirs.json"), {"dataset": "imagenet1k", "model": "ViT-B-32", "metrics": {"acc1": 0.6}})
    page = page_of(out)
    assert "theirs.json was not written by this version" in page and "shows tench" in page


def test_sweep_shows_a_point_as_the_mean_over_its_seeds_with_an_interval(tmp_path: Path) -> None:
    page = page_of(grid_sweep(tmp_path / "W"))
    # .69, .70, .71: s = .01, t(.975, 2) = 4.3027, 4.3027 * .01 / sqrt(3) = .0248
    best = "<td>★</td><td>2</td><td>paper</td><td>1</td><td>3/3</td><td>50.00%</td><td>70.00% [67.52,\u00a072.48]</td>"
    assert f'<tr class="marked">{best}' in page and page.count('class="marked"') == 1
    assert "<td>★</td><td>1</td><td>none</td><td>0</td>" in page and page.count("<td>★</td>") == 2
    assert "Best (bold): point 2." in page and "name: &lt;paper&gt;" in page


def test_sweep_point_that_lacks_a_seed_is_neither_best_nor_on_the_front(tmp_path: Path) -> None:
    page = page_of(grid_sweep(tmp_path / "W"))
    # .89, .90: s = .00707, 12.706 * .00707 / sqrt(2) = .0635
    assert "<td></td><td>3</td><td>paper</td><td>0</td><td>2/3</td><td>50.00%</td><td>89.50% [83.15,\u00a095.85]</td>" in page
    assert "not all seeds" in plot_of(page, "Each objective against the share kept", "imagenet/acc1")


def test_sweep_says_what_became_of_its_trials_and_why(tmp_path: Path) -> None:
    page = page_of(grid_sweep(tmp_path / "W"))
    assert "4 points, 3 seeds each, 12 trials: 11 finished, 1 failed. All seeds finished of 3 of 4 points" in page
    assert "<td>p3s2</td><td>failed</td><td>–</td><td>out of &lt;memory&gt;</td>" in page and "<memory>" not in page
    assert "How long it took: 10 min in the call that ended it; its trials, one after another, are 110 s." in page
    assert "1,234 of imagenet" in page


def test_sweep_points_of_three_seeds_have_error_bars_and_those_of_one_have_none(tmp_path: Path) -> None:
    section, front = "Each objective against the share kept", "imagenet_attr/acc1 against imagenet/acc1"
    page = page_of(grid_sweep(tmp_path / "three"))
    assert error_bars(plot_of(page, section, "imagenet/acc1")) == 4
    assert error_bars(plot_of(page, "The front", front)) == 8  # one for each objective
    page = page_of(grid_sweep(tmp_path / "one", num_seeds=1))
    assert error_bars(plot_of(page, section, "imagenet/acc1")) == error_bars(plot_of(page, "The front", front)) == 0
    assert "With one seed there is none" in page and "[" not in page[page.index("<td>★</td>") : page.index("</table>")]


def test_sweep_heat_map_shows_means_over_seeds_and_no_cell_for_a_point_that_lacks_one(tmp_path: Path) -> None:
    page = page_of(grid_sweep(tmp_path / "W"))
    cells = {title: sorted(cell_texts(plot_of(page, "Two keys against each other", title))) for title in ("imagenet/acc1", "score")}
    assert cells == {"imagenet/acc1": ["50.0%", "70.0%", "80.0%"], "score": ["35.0%", "55.0%", "60.0%"]}


def test_sweep_of_three_keys_averages_cells_over_the_third_only_where_all_its_values_are_there(tmp_path: Path) -> None:
    space = {"policy": ["none", "paper"], "augment.factor": [1, 0], "optim.lr": [0.1, 0.2]}
    shares = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, None]
    results = {(n, 1): trial(1, None if share is None else (share,)) for n, share in enumerate(shares)}
    section = page_of(sweep(tmp_path / "W", space, grid_of(space), results, num_objectives=1))
    section = section[section.index("<h2>Two keys") :].split("<h2>")[1]
    maps = [sorted(cell_texts(svg)) for svg in section.split("</figure>")[:-1]]
    # policy x factor: (.1 + .2) / 2, ...; policy x lr: (.1 + .3) / 2, ...; factor x lr: (.1 + .5) / 2, ...
    assert maps == [["15.0%", "35.0%", "55.0%"], ["20.0%", "30.0%", "60.0%"], ["30.0%", "40.0%", "50.0%"]]
    assert "the mean over all values of the keys that are not on its axes" in section


def test_sweep_over_ranges_shows_each_objective_against_each_of_them(tmp_path: Path) -> None:
    space = {"policy.max_text_area": {"low": 0.0, "high": 1.0}, "optim.lr": {"low": 1e-4, "high": 1e-2, "log": True}}
    points = [{"policy.max_text_area": 0.1 * n, "optim.lr": 10 ** (-4 + 0.2 * n)} for n in range(11)]
    page = page_of(sweep(tmp_path / "W", space, points, {(n, 1): trial(1, (0.05 * n,)) for n in range(11)}, num_objectives=1))
    of_keys = page[page.index("<h2>Each objective against a key</h2>") :].split("<h2>")[1]
    area, lr = of_keys.split("</figure>")[:2]
    assert ">policy.max_text_area</text>" in area and ">0.001</text>" not in area
    assert all(f">{tick}</text>" in lr for tick in ("optim.lr", "0.0001", "0.001", "0.01"))  # decades: a log axis
    pair = plot_of(page, "Two keys against each other", "imagenet/acc1")
    assert not cell_texts(pair) and ">0.001</text>" in pair


def test_sweep_stopped_trial_is_told_with_its_steps_and_is_in_no_mean(tmp_path: Path) -> None:
    results = {(0, seed): trial(seed, (0.5,)) for seed in range(3)} | {(1, seed): trial(seed, (0.6,)) for seed in range(3)}
    results[1, 2] |= {"status": "stopped", "steps": 100, "metrics": {"imagenet": {"acc1": 0.01}}}
    space = {"augment.factor": [1, 0]}
    page = page_of(sweep(tmp_path / "W", space, grid_of(space), results, num_objectives=1))
    assert "5 finished, 1 stopped early" in page and "<td>p1s2</td><td>stopped</td><td>100</td>" in page
    assert "<td>1</td><td>0</td><td>2/3</td><td>50.00%</td><td>59.50%" in page


def test_sweep_that_was_killed_has_a_page_of_what_is_there(tmp_path: Path) -> None:
    crashed = {"status": "crashed", "reason": "<b>worker died"}
    results = {(0, 1): trial(1, (0.5, 0.5)), (1, 1): crashed, (2, 1): None}
    space = {"policy": ["none", "paper", "<i>parrot"]}
    page = page_of(sweep(tmp_path / "W", space, grid_of(space), results))
    assert "Not finished" in page and "&lt;b&gt;worker died" in page and "&lt;i&gt;parrot" in page
    assert "<b>worker" not in page and "<i>parrot" not in page
    assert "1 finished, 1 crashed (the same words try them again), 1 not run to the end (the same words go on)" in page
    assert "<svg" in page and "How long it took" not in page


def test_sweep_of_one_point_and_one_without_any_finished_have_a_page(tmp_path: Path) -> None:
    space = {"augment.factor": [1]}
    one = page_of(sweep(tmp_path / "one", space, grid_of(space), {(0, 1): trial(1, (0.5, 0.5))}))
    assert "1 point, 1 seed each, 1 trial: 1 finished." in one and "At every point: augment.factor=1." in one and "<svg" not in one
    none = sweep(tmp_path / "none", GRID, grid_of(GRID), {(n, 1): trial(1, None) for n in range(4)})
    (none / "best.yaml").unlink()
    page = page_of(none)
    assert "No point is complete, so none is best." in page and "No best.yaml" in page and "<svg" not in page


def test_sweep_that_has_not_ended_says_so(tmp_path: Path) -> None:
    assert "results.parquet is missing" in page_of(folder(tmp_path / "sweep", "sweep"))


def test_sweep_of_another_version_is_said_not_shown(tmp_path: Path) -> None:
    out = folder(tmp_path / "W", "sweep", {"space": GRID, "evaluators": ["imagenet"]})
    write_parquet(out / "results.parquet", [{"trial": "t0", "status": "done", "policy": "none", "score": 0.5}])
    assert "was not written by this version" in page_of(out)


def test_demo_puts_the_difference_first_and_composes_the_other_pages(tmp_path: Path) -> None:
    out = folder(tmp_path, "demo", {}, {})
    selection(tmp_path, annotated(tmp_path))
    attacked = attack(tmp_path / "attacked")
    for name in ("raw", "filtered"):
        run(tmp_path / name)
    evaluation(tmp_path / "evaluation", attacked, "raw", "filtered")
    results = {
        "raw": {"clean": 0.77, "retrieval": 0.5, "attacked": 0.28},
        "filtered": {"clean": 0.92, "retrieval": 0.6, "attacked": 0.66},
        "text_detector": {"recall": 0.97, "false_positives": 0.012},
    }
    write_json(str(out / "results.json"), results)
    page = page_of(out)
    assert re.search(r"<td>attacked</td>\s*<td>28.0%</td>\s*<td>66.0%</td>\s*<td>\+38.0</td>", page)
    assert (
        page.index("+38.0")
        < page.index("Kept 2 of 4")
        < page.index("Training")
        < page.index("Models compared")
        < page.index("Attacked pictures")
    )
    assert "filtered: tench ✓" in page and "raw: tench ✓" in page and "<td>97.0%</td>" in page


def test_plots_escape_their_labels(tmp_path: Path) -> None:
    out = folder(tmp_path / "s", "filter", {"annotations": "nowhere"}, {"samples": 2, "kept": 1, "reasons": {"<script>$x": 1}})
    assert "&lt;script&gt;$x" in page_of(out)


@pytest.mark.parametrize("settings", [None, '{"verb": "other"}', "[]", "no json"])
def test_a_folder_that_is_not_ours_is_refused_in_one_line(tmp_path: Path, settings: str | None) -> None:
    if settings is not None:
        (tmp_path / "settings.json").write_text(settings)
    with pytest.raises(UserError) as error:
        report(str(tmp_path))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "report.html").exists()
