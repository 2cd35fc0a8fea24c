"""``tools/plan.py``: its sums by hand, what it takes for a rate, and its mistakes in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"
sys.path.insert(0, str(TOOLS))
import plan as planning  # noqa: E402

GPUS = ["--gpus", "10", "--ocr-per-gpu", "100", "--train-per-gpu", "1000"]


def planned(*words: str) -> dict[str, float | None]:
    """Of a million samples."""
    parsed = planning.parser().parse_args(list(words))
    return planning.plan(1e6, parsed, planning.rates_of(parsed))


@pytest.mark.parametrize(
    ("picture_kb", "kept", "measured", "within"), [(53, 1.0, 1.05, 0.01), (13, 1.0, 1.22, 0.01), (53, 0.5, 1.30, 0.01), (13, 0.5, 2.11, 0.08)]
)  # fmt: skip
def test_bytes_read_are_those_that_bench_ingest_measured(picture_kb: float, kept: float, measured: float, within: float) -> None:
    assert planning.bytes_read_per_sample(1e3 * picture_kb, kept) / (1e3 * picture_kb) == pytest.approx(measured, abs=within)


def test_hours_are_work_by_rate() -> None:
    found = planned(*GPUS, "--kept", "0.5", "--epochs", "4")
    assert found["annotate, h"] == pytest.approx(1e6 / 1_000 / 3600)
    assert found["train, h"] == pytest.approx(4 * 0.5e6 / 10_000 / 3600)
    assert found["cores that decode for training"] == pytest.approx(10_000 / 520)


def test_a_sweep_takes_rounds_of_the_trials_that_fit_beside_one_evaluator() -> None:
    words = [*GPUS, "--eval-per-gpu", "10500", "--points", "7", "--seeds", "1", "--sweep-seen", "3M"]
    of_three = planned(*words, "--workers-per-trial", "3")  # 9 of 10 GPUs: 3 at a time, 3 rounds of 15 + 1,000 + 10 s
    assert of_three["sweep of 7 trials, h"] == pytest.approx(3 * 1_025 / 3600)
    assert planned(*words)["sweep of 7 trials, h"] == pytest.approx(7 * (15 + 375 + 10) / 3600)  # 8 GPUs: one at a time


def test_a_sweep_is_no_faster_than_its_evaluator() -> None:
    found = planned(
        *GPUS, "--eval-per-gpu", "105", "--points", "9", "--seeds", "1", "--sweep-seen", "1k", "--workers-per-trial", "1"
    )
    assert found["sweep of 9 trials, h"] == pytest.approx(9 * 1_000 / 3600)


@pytest.mark.parametrize(
    ("words", "per_s"),
    [
        (["--cores", "10"], 5_200.0),
        (["--cores", "10", "--decode-per-core", "700"], 7_000.0),
        (["--train-per-gpu", "9000", "--cores", "1000"], 45_000.0),
    ],
)
def test_training_runs_no_faster_than_its_pictures_are_decoded(words: list[str], per_s: float) -> None:
    assert planned(*GPUS, *words, "--seen", "36M")["train, h"] == pytest.approx(36e6 / per_s / 3600)


def test_a_trial_has_its_share_of_the_cores_that_decode() -> None:
    found = planned(*GPUS, "--cores", "10", "--eval-per-gpu", "105000", "--points", "1", "--seeds", "1", "--sweep-seen", "2.6M",
                    "--workers-per-trial", "5")  # fmt: skip
    assert found["sweep of 1 trials, h"] == pytest.approx((15 + 2.6e6 / (5 * 520) + 1) / 3600)


def test_samples_seen_beat_epochs() -> None:
    assert planned(*GPUS, "--epochs", "3", "--seen", "36M")["train, h"] == pytest.approx(1.0)


def test_storage_and_bandwidth() -> None:
    found = planned(*GPUS, "--picture-kb", "17.2", "--kept", "1", "--policies", "1", "--gpus-per-node", "5")
    assert found["storage: corpus, TB"] == pytest.approx(0.020)
    assert found["storage: annotations, TB"] == pytest.approx(217e-6)
    assert found["storage: selections, TB"] == pytest.approx(2 * 29e-6)
    assert found["storage must give annotate, MB/s"] == pytest.approx(20.0)
    assert found["storage must give training, MB/s"] == pytest.approx(200.0)
    assert found["of it to each node, MB/s"] == pytest.approx(100.0)


def test_costs_are_of_what_has_a_price() -> None:
    found = planned(*GPUS, "--cores", "100", "--points", "0", "--gpu-hour", "2", "--core-hour", "0.1", "--kept", "1")
    hours = 1e6 / 1_000 / 3600 + 1e6 / 10_000 / 3600
    assert found["cost: machines"] == pytest.approx(hours * (10 * 2 + 100 * 0.1))
    assert found["cost: storage, a month"] is None and found["cost: requests"] is None
    assert planned(*GPUS, "--core-hour", "2")["cost: machines"] is None  # its GPUs have no price


def test_cores_count_as_paid_with_the_gpus_unless_they_have_a_price() -> None:
    found = planned(*GPUS, "--points", "0", "--gpu-hour", "2", "--kept", "1")
    assert found["cost: machines"] == pytest.approx((1e6 / 1_000 + 1e6 / 10_000) / 3600 * 10 * 2)


def rows(name: str, ours: float, machine: str, unit: str) -> dict[str, object]:
    return {"name": name, "ours": ours, "machine": machine, "unit": unit, "command": "python tools/x.py"}


def test_rates_of_gpus_come_from_what_benchmarks_wrote_on_gpus(tmp_path: Path) -> None:
    gpu, cpu = "NVIDIA H100, CUDA 13", "2 x AMD EPYC"
    looks = [rows("tar to verdict, bf16", 5, cpu, "pictures/s"), rows("tar to verdict, bf16", 800, gpu, "pictures/s"),
             rows("tar to verdict, bf16: wait", 9_999, gpu, "% of the wall time"), rows("JPEG to boxes", 9_999, gpu, "pictures/s")]  # fmt: skip
    steps = [rows("ViT-B-32, batch 512, compiled", 4_000, gpu, "samples/s"), rows("ViT-B-16, batch 512, compiled", 2_000, gpu, "samples/s"),
             rows("ViT-B-32, batch 512, compiled, MFU", 9_999, gpu, "% of the peak")]  # fmt: skip
    (tmp_path / "detector.json").write_text(json.dumps(looks))
    (tmp_path / "train.json").write_text(json.dumps(steps))
    found = planning.rates_of(planning.parser().parse_args(["--gpus", "1", "--bench", str(tmp_path)]))
    assert (found["ocr"].per_s, found["train"].per_s) == (800, 4_000)
    assert "python tools/x.py" in found["ocr"].source and "H100" in found["ocr"].source


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpus", "8"], "no rate of a GPU is known"),
        (["--gpus", "8", "--ocr-per-gpu", "9"], "--train-per-gpu"),
        (["--kept", "0"], "--kept"),
        (["--samples", "many"], "--samples"),
        (["--samples", "-5"], "--samples"),
        (["--cores", "0"], "--cores"),
        (["--samples", "1kM"], "such as 400M, 2B or .8"),
        (["--gpu-hour", "-2"], "--gpu-hour"),
        (["--tb-month", "nan"], "--tb-month"),
        (["--decode-per-core", "-520"], "--decode-per-core"),
        ([*GPUS, "--bench", "not/there"], "--bench=not/there"),
        ([*GPUS, "--train-per-core", "72"], "give --train-per-gpu"),
        (["--train-per-gpu", "72"], "give --gpus"),
        (["--bench", "."], "give --gpus"),
        ([*GPUS, "--workers-per-trial", "10"], "1 to 9 GPUs"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(words: list[str], says: str) -> None:
    done = subprocess.run([sys.executable, str(TOOLS / "plan.py"), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and says in done.stderr


def test_the_table_has_a_column_for_each_number_of_samples() -> None:
    done = subprocess.run([sys.executable, str(TOOLS / "plan.py")], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[2].split() == ["pairs", "10M", "1B", "10B"]
    assert "no GPU" in done.stdout.splitlines()[0] and "tools/bench_text_regions.py" in done.stdout


def test_what_limits_and_what_was_taken_for_granted_is_said() -> None:
    words = [*GPUS, "--cores", "10", "--gpu-hour", "2", "--samples", "1B"]
    said = subprocess.run([sys.executable, str(TOOLS / "plan.py"), *words], capture_output=True, text=True, check=True).stdout
    assert "training sees 800M samples" in said.splitlines()[0]
    assert "limited by decoding on 10 cores: 5,200 samples/s; 10 GPUs could take 10k." in said
    assert "cores count as paid with the GPUs" in said
    words = [*GPUS, "--gpu-hour", "2", "--core-hour", "1"]
    said = subprocess.run([sys.executable, str(TOOLS / "plan.py"), *words], capture_output=True, text=True, check=True).stdout
    assert "limited" not in said and "paid with" not in said
