"""The doctor's judgement on made-up machines, its page, and that what is broken is shown and stops nothing."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from raysys.config import OcrConfig
from raysys.doctor import examine, facts, judge, page
from raysys.doctor.facts import Disk, EngineTrial, Facts, Package
from raysys.doctor.judge import ALL, Node, judge_nodes, lacking
from raysys.doctor.trial import attempt, attempt_imports

GB = 10**9
Cli = Callable[..., tuple[int, str, str]]
REQUIRED = [requirement for extra, requirement in facts._requirements() if extra is None]
GOOD = [Package(facts._normal(r.name), str(r), None, "99.0", fits=True) for r in REQUIRED]
EXTRAS = [Package(f"of-{extra}", f"of-{extra}>=1", extra, "1.0", fits=True) for extra in facts.EXTRAS]


def machine(**changes: Any) -> Facts:
    """One on which everything is well, but for the changes."""
    good = Facts(
        host="somewhere",
        versions={"Python": "3.11.9", "raysys": "0.1.0 code 0123456789ab", "ray": "2.60.0", "torch": "2.15.0"},
        executable="/venv/bin/python",
        packages=[*GOOD, *EXTRAS],
        cpu="Xeon",
        cores=4,
        cpu_limit=None,
        cpu_flags=["avx512_bf16"],
        memory_total=16 * GB,
        memory_free=12 * GB,
        shm_total=8 * GB,
        shm_free=8 * GB,
        disks=[Disk(use, f"/{n}", 50 * GB, 100 * GB, True) for n, use in enumerate(("working folder", "temporary files", "Ray's sessions"))],
        open_files=65536,
        torch_built_for=None,
        gpus=[],
        why_no_gpu=None,
        has_nvidia=False,
        cuda_visible=None,
        onnx_providers=["CPUExecutionProvider"],
        engines=[EngineTrial(name, True, 1.0, 0.2, ["SUMMER", "sale"]) for name in facts.ENGINE_MODULES],
        models={name: {"path": f"/wheels/{name}.onnx", "sha256": "ab" * 32} for name in (*(k.detector for k in OcrConfig().looks), OcrConfig().recognizer)},
        font="/fonts/DejaVuSans.ttf",
        arial="/fonts/arialuni.ttf",
        files_error=None,
        credentials={"s3": [], "gs": []},
        compilers={"cpu": "/usr/bin/g++", "cuda": "/usr/bin/gcc"},
    )  # fmt: skip
    return replace(good, **changes)


def with_package(name: str, **changes: Any) -> list[Package]:
    return [replace(p, **changes) if p.name == name else p for p in [*GOOD, *EXTRAS]]


def with_engine(name: str, **changes: Any) -> list[EngineTrial]:
    return [replace(trial, **changes) if trial.name == name else trial for trial in machine().engines]


def with_disk(number: int, **changes: Any) -> list[Disk]:
    return [replace(disk, **changes) if n == number else disk for n, disk in enumerate(machine().disks)]


GPU = {"name": "H200", "free": 100 * GB, "total": 140 * GB, "error": None}
OCR, RAY = ("annotate", "demo"), ("annotate", "train", "attack", "evaluate", "sweep", "demo")


@pytest.mark.parametrize(
    ("changes", "cannot", "says"),
    [
        ({"packages": with_package("optuna", version=None, fits=False)}, ("sweep",), "pip install 'optuna>=5.0'"),
        ({"packages": with_package("optuna", version="1.0", fits=False)}, ("sweep",), "optuna is 1.0"),
        ({"packages": with_package("numpy", version="2.9", fits=False)}, ALL, "numpy is 2.9"),
        ({"packages": with_package("jinja2", error="ValueError: x")}, ("report", "demo"), "cannot be imported (ValueError: x)"),
        ({"packages": with_package("paddleocr", version=None, fits=False)}, (), "paddleocr is not installed"),
        ({"packages": with_package("of-s3", version=None, fits=False)}, (), "pip install 'raysys[s3]'"),
        ({"packages": with_package("of-hf", error="OSError: y")}, (), "of-hf 1.0 cannot be imported (OSError: y)"),
        ({"engines": with_engine("onnx", error="no AVX", texts=[])}, OCR, "ocr.engine=onnx: no AVX"),
        ({"engines": with_engine("onnx", texts=["SUMMER"])}, OCR, "or take ocr.engine=openvino"),
        ({"engines": with_engine("torch", texts=[])}, (), "reads 'nothing' where 'SUMMER SALE' stands"),
        ({"models": machine().models | {"PP-OCRv6_small_rec": {"error": "no such file"}}}, OCR[:1], "PP-OCRv6_small_rec: no such"),
        ({"memory_free": 3 * GB}, (), "ocr.num_actors=2"),
        ({"memory_free": GB}, OCR, "enough for 0 of 4"),
        ({"memory_free": 3 * GB, "cpu_limit": 2.0}, (), None),
        ({"shm_free": GB // 20}, (), "Ray wants 4.8 GB"),
        ({"shm_free": 11 * GB, "memory_total": 400 * GB}, (), None),  # Ray makes its store as small as that
        ({"disks": with_disk(0, free=GB // 2)}, ALL, "give output=FOLDER elsewhere"),
        ({"disks": with_disk(0, writable=False)}, (), "cannot be written to"),
        ({"disks": with_disk(1, writable=False)}, RAY, "export TMPDIR=FOLDER"),
        ({"disks": with_disk(2, free=GB // 2)}, RAY, "export RAY_TMPDIR=FOLDER"),
        ({"disks": with_disk(2, free=4 * GB)}, (), "more than 95% full"),
        ({"disks": with_disk(2, total=0, free=0)}, RAY, "/2 (Ray's sessions) is not there"),
        ({"open_files": 1024}, (), "ulimit -n 65536"),
        ({"compilers": {"cpu": None, "cuda": "/usr/bin/gcc"}}, (), "apt-get install g++"),
        ({"has_nvidia": True}, (), "torch is built for CPUs only"),
        ({"has_nvidia": True, "torch_built_for": "13.0", "cuda_visible": ""}, (), "unset CUDA_VISIBLE_DEVICES"),
        ({"has_nvidia": True, "torch_built_for": "13.0", "why_no_gpu": "the driver is too old"}, (), "the driver is too old"),
        ({"gpus": [GPU]}, (), "onnxruntime-gpu"),
        ({"gpus": [GPU | {"error": "no kernel image"}]}, (), "GPU 0 (H200) does not add two numbers: no kernel image"),
        ({"arial": None}, (), "attack.fonts=[arialuni.ttf]"),
        ({"credentials": {"s3": [], "gs": ["GOOGLE_APPLICATION_CREDENTIALS (no such file)"]}}, (), "no such file"),
    ],
)  # fmt: skip
def test_what_a_machine_lacks_stops_the_verbs_that_need_it_and_no_other(
    changes: dict[str, Any], cannot: tuple[str, ...], says: str | None
) -> None:
    problems = judge.judge(machine(**changes))
    assert {verb for verb, missing in lacking(problems).items() if missing} == set(cannot)
    texts = [f"{p.what} -> {p.mend}" for p in problems]
    assert any(says in text for text in texts) if says else texts == []


def test_what_cannot_be_imported_is_not_told_again_for_each_engine() -> None:
    why = "ImportError: libgeos"
    broken = machine(
        packages=with_package("shapely", error=why), engines=[EngineTrial(n, True, error=why) for n in facts.ENGINE_MODULES]
    )
    assert [p.what for p in judge.judge(broken)] == [f"shapely 99.0 cannot be imported ({why})"]


def test_every_requirement_that_some_verbs_need_is_one() -> None:
    assert set(judge._NEEDED_BY) <= {package.name for package in GOOD}
    assert set(judge._EXTRAS) == set(facts.EXTRAS)


@pytest.mark.parametrize(("verb", "module"), [("filter", "raysys.policy.select"), ("report", "raysys.reporting.html")])
def test_a_verb_imports_no_package_that_it_is_said_to_do_without(verb: str, module: str) -> None:
    without = [facts._module(name).split(".")[0] for name, verbs in judge._NEEDED_BY.items() if verb not in verbs]
    script = f"import sys, {module}; print(*[m for m in {without} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# ---- nodes ------------------------------------------------------------------------------------------------------------


def node(address: str, *, cpus: float = 2, **changes: Any) -> Node:
    there = machine()
    return replace(Node(address, {"CPU": cpus}, {"CPU": cpus}, there.versions, there), **changes)


def told(nodes: list[Node]) -> list[tuple[str, bool]]:
    return [(problem.what, problem.needed) for problem in judge_nodes(machine(), nodes)]


def test_nodes_like_the_drivers_have_no_problem() -> None:
    assert told([node("10.0.0.1", facts=None), node("10.0.0.2")]) == []


def test_a_problem_of_several_nodes_is_told_once() -> None:
    full = machine(disks=with_disk(2, free=GB // 2))
    bad = [node(f"10.0.0.{n}", facts=full) for n in range(2, 7)]
    assert told([node("10.0.0.1"), *bad]) == [
        ("5 nodes (10.0.0.2, 10.0.0.3, 10.0.0.4, ...): /2 (Ray's sessions) has 0.5 GB free", True)
    ]


def test_a_problem_of_the_driver_is_not_told_of_its_nodes() -> None:
    assert judge_nodes(machine(arial=None), [node("10.0.0.2", facts=machine(arial=None))]) == []


def test_other_code_cannot_work_and_another_torch_is_told() -> None:
    other = machine().versions | {"raysys": "0.1.0 code ffffffffffff", "torch": "2.14.0"}
    assert told([node("10.0.0.2", versions=other)]) == [
        ("node 10.0.0.2: raysys is 0.1.0 code ffffffffffff, the driver's 0.1.0 code 0123456789ab", True),
        ("node 10.0.0.2: torch is 2.14.0, the driver's 2.15.0", False),
    ]


def test_a_node_that_does_not_answer_is_a_line() -> None:
    silent = node("10.0.0.2", facts=None, versions={}, error="does not answer in 300 s")
    assert told([node("10.0.0.1"), silent]) == [("node 10.0.0.2: does not answer in 300 s", True)]
    text = page.render(machine(), "joined", [node("10.0.0.1"), silent], judge_nodes(machine(), [silent]))
    assert "10.0.0.2" in text and "no answer" in text


def test_what_a_head_without_cpus_lacks_stops_nothing() -> None:
    head = node("10.0.0.1", cpus=0, facts=machine(packages=with_package("torch", version=None, fits=False)))
    assert told([head, node("10.0.0.2")]) == []
    assert told([head]) == [("no node of the cluster has CPUs", True)]


# ---- page -------------------------------------------------------------------------------------------------------------


def test_the_page_of_a_good_machine_is_short_and_says_ready() -> None:
    lines = page.render(machine(), "starts", [node("10.0.0.1")], []).splitlines()
    assert len(lines) < 50 and max(map(len, lines)) <= page.WIDTH
    assert [line.split()[:2] for line in lines[-len(ALL) :]] == [[verb, "ready"] for verb in ALL]


def test_a_verb_names_what_it_lacks_by_its_number() -> None:
    bad = machine(packages=with_package("optuna", version="1.0", fits=False), arial=None, open_files=256)
    text = page.render(bad, "starts", [node("10.0.0.1")], judge.judge(bad))
    assert "Missing:\n  1 optuna is 1.0 -> pip install 'optuna>=5.0'\n" in text
    assert "\n  sweep     LACKS 1\n" in text and "\n  attack    ready\n" in text


@pytest.fixture
def of_a_machine(monkeypatch: pytest.MonkeyPatch, run_cli: Cli) -> Callable[..., tuple[int, str, str]]:
    """The verb on a made-up machine with a Ray of one node."""

    def call(found: Facts, *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(examine, "gather", lambda: found)
        monkeypatch.setattr(examine, "_try_ray", lambda cfg, own: ("starts", [node("10.0.0.1")], []))
        return run_cli("doctor", *words)

    return call


def test_status_and_one_line_say_whether_every_verb_can_work(of_a_machine: Cli) -> None:
    assert of_a_machine(machine(arial=None))[0] == 0
    status, out, err = of_a_machine(machine(packages=with_package("optuna", version="1.0", fits=False)))
    assert status == 1 and "LACKS 1" in out
    assert err == "raysys doctor: not ready: sweep; mend first: optuna is 1.0 -> pip install 'optuna>=5.0'\n"


def test_json_is_one_object_of_everything_and_quiet_says_nothing(of_a_machine: Cli) -> None:
    status, out, _ = of_a_machine(machine(arial=None), "verbosity=json")
    said = json.loads(out)
    assert status == 0 and said["facts"] == asdict(machine(arial=None)) and said["not_ready"] == []
    assert [p["mend"] for p in said["problems"]] == ["attack.fonts=[arialuni.ttf]"] and said["nodes"][0]["address"] == "10.0.0.1"
    assert of_a_machine(machine(arial=None), "verbosity=quiet") == (0, "", "")


# ---- facts ------------------------------------------------------------------------------------------------------------


def test_a_package_that_raises_or_kills_its_process_is_shown_and_the_others_are_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, code in {
        "fine": "print('hello')", "raises": "raise ValueError('numpy.dtype size changed')", "gone": "import nothing_there",
        "killed": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "leaves": "raise SystemExit(0)", "late": "",
    }.items():  # fmt: skip
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    details, errors = attempt_imports(["fine", "raises", "gone", "killed", "leaves", "late"])
    assert list(details) == ["fine", "late"]
    assert errors == {
        "raises": "ValueError: numpy.dtype size changed",
        "gone": "ModuleNotFoundError: No module named 'nothing_there'",
        "killed": "its process was ended by SIGSEGV",
        "leaves": "its import ended the process",
    }


def test_a_trial_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hangs.py").write_text("import time; time.sleep(60)")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert attempt("import", "hangs", limit_s=2) == ([], "not done in 2 s")


def test_the_facts_of_this_machine_pickle_and_are_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried in other processes is left to the run on Ray."""
    monkeypatch.setattr(facts, "attempt", lambda *words: ([], "left out"))
    monkeypatch.setattr(facts, "attempt_imports", lambda modules: ({m: None for m in modules[1:]}, {modules[0]: "left out"}))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA-NOT-TO-BE-SHOWN")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere/not-to-be-shown.json")
    here = facts.gather()
    assert pickle.loads(pickle.dumps(here)) == here
    text = json.dumps(asdict(here))
    assert "NOT-TO-BE-SHOWN" not in text.upper()
    assert here.credentials["s3"][0] == "AWS_ACCESS_KEY_ID"
    assert here.credentials["gs"][0] == "GOOGLE_APPLICATION_CREDENTIALS (no such file)"
    assert all(p.version and p.fits for p in here.packages if p.extra is None)
    assert [p.name for p in here.packages if p.error] == ["ray"]
    assert here.disks[0].path == os.getcwd() and here.disks[0].free > 0
    assert here.memory_total and here.memory_free and here.memory_free <= here.memory_total
    assert 1 <= here.cores <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("files", "limit", "memory"),
    [
        (  # version 2: the group above has the smaller limit of memory
            {
                "/proc/self/cgroup": "0::/a/b",
                "/sys/fs/cgroup/a/b/cpu.max": "150000 100000",
                "/sys/fs/cgroup/a/cpu.max": "max 100000",
                "/sys/fs/cgroup/a/b/memory.max": "max",
                "/sys/fs/cgroup/a/memory.max": str(2 << 30),
                "/sys/fs/cgroup/a/memory.current": str(1 << 30),
                "/sys/fs/cgroup/a/memory.stat": f"anon 1\ninactive_file {1 << 29}",
            },
            1.5, (2 << 30, 3 << 29),
        ),
        (  # version 1
            {
                "/proc/self/cgroup": "4:memory:/c\n2:cpu,cpuacct:/",
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
                "/sys/fs/cgroup/memory/c/memory.limit_in_bytes": str(3 << 30),
                "/sys/fs/cgroup/memory/c/memory.usage_in_bytes": str(1 << 30),
            },
            4.0, (3 << 30, 2 << 30),
        ),
        ({"/proc/self/cgroup": "0::/", "/sys/fs/cgroup/cpu.max": "max 100000"}, None, (8 << 30, 4 << 30)),
    ],
)  # fmt: skip
def test_a_container_has_what_its_cgroups_leave_it(
    files: dict[str, str], limit: float | None, memory: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    files["/proc/meminfo"] = f"MemTotal: {8 << 20} kB\nMemFree: 1 kB\nMemAvailable: {4 << 20} kB"
    monkeypatch.setattr(facts, "_read", lambda file: files.get(str(file), ""))
    monkeypatch.setattr(facts, "_cpu_info", lambda key: "")
    assert facts._cpu_limit() == limit
    assert facts._memory() == memory
