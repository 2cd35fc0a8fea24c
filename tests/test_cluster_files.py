"""cluster/: every file is what its own tool takes, names machines and no hyper-parameters, and says raysys's words as raysys reads them."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import jsonschema
import pytest
import yaml
from ray._private.ray_constants import RAY_RUNTIME_ENV_DEFAULT_EXCLUDES
from ray._private.runtime_env.packaging import _zip_files
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.kuberay.utils import parse_quantity
from ray.autoscaler._private.util import prepare_config, validate_config

from raysys.cli import compose_config

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
KUBERAY, VMS = sorted(CLUSTER.glob("kuberay/*.yaml")), sorted(CLUSTER.glob("vm/*.yaml"))
JOBS = [file for file in KUBERAY if file.name.startswith("rayjob")]
BATCH = sorted(CLUSTER.glob("slurm/*.sbatch"))
DOCKERFILE = CLUSTER / "image" / "Dockerfile"
FILES = sorted(file for file in CLUSTER.rglob("*") if file.is_file())
SCHEMAS = Path(os.environ.get("RAYSYS_KUBERAY_SCHEMAS", ROOT.parent / "shared" / "data" / "kuberay"))
SAID = {"corpus.path", "annotations", "imagenet.path", "imagenet_attr.path", "coco.path", "output"}  # where things lie
SAID |= {"num_workers", "use_gpu", "max_concurrent", "ocr.engine", "ocr.num_actors", "ocr.num_gpus_per_actor"}  # on which machines
SAID |= {"ocr.decode_threads", "ocr.batch", "train.decode_threads", "train.read_threads", "train.checkpoint_minutes"}
SAID |= {"experiment"}  # the recipe, which stands in conf/
SECRET = re.compile(r"AKIA[0-9A-Z]{16}|-----BEGIN|\b[0-9a-f]{32,}\b|\b[A-Za-z0-9+]{40,}\b|://[^/\s]*:[^/\s]*@")


def by_name(file: Path) -> str:
    return str(file.relative_to(CLUSTER))


def each(files: list[Path]) -> Any:
    assert files
    return pytest.mark.parametrize("file", files, ids=by_name)


def load(file: Path) -> Any:
    return yaml.safe_load(file.read_text())


def cluster_spec(file: Path) -> dict[str, Any]:
    spec = load(file)["spec"]
    return spec.get("rayClusterSpec", spec)


def pods(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def pinned(package: str) -> str:
    return re.search(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def raysys_calls(file: Path) -> list[list[str]]:
    """Words of every ``python -m raysys``; of a shell's variables those in upper case as a path, those in lower case as a number."""
    text = load(file)["spec"].get("entrypoint", "") if file in KUBERAY else file.read_text().replace("\\\n", " ")
    text = re.sub(r"\$\{?[A-Z_]+\}?", "/mnt/somewhere", re.sub(r"\$\{?[a-z_]+\}?", "11", text))
    calls = re.findall(r"python -m raysys (.*)", text)
    return [shlex.split(call) for call in calls]


# ---- all files -----------------------------------------------------------------------------------------------------------


@each(FILES)
def test_a_file_begins_with_three_lines_on_its_use(file: Path) -> None:
    lines = [line for line in file.read_text().splitlines() if not line.startswith(("#!", "# shellcheck"))]
    assert all(line.startswith("#") and len(line) > 20 for line in lines[:3])
    assert re.search("kubectl|ray up|sbatch|docker build", " ".join(lines[:3]))


@each(FILES)
def test_no_secret_stands_in_a_file(file: Path) -> None:
    assert not SECRET.search(file.read_text())


@pytest.mark.parametrize(
    "text", ["key: AKIA" + 16 * "X", "token=" + 32 * "f", "https://me:word@host/", "-----BEGIN PRIVATE KEY-----"]
)
def test_a_secret_would_be_found(text: str) -> None:
    assert SECRET.search(text)


@each([*JOBS, *BATCH])
def test_words_compose_and_name_machines_and_paths_only(file: Path) -> None:
    calls = raysys_calls(file)
    assert [call[0] for call in calls] == [file.stem.removeprefix("rayjob-")]
    for verb, *words in calls:
        compose_config(verb, words)
        given = dict(word.split("=", 1) for word in words)
        assert set(given) <= SAID
        assert all(Path(given[key]).is_absolute() for key in given if key.endswith("path") or key in ("annotations", "output"))


@each(FILES)
def test_no_hyper_parameter_occurs(file: Path) -> None:
    text = re.sub(r"\btrain\.(decode_threads|read_threads|checkpoint_minutes)=", "", file.read_text())  # words on machines
    assert not re.search(
        r"\b(train|optim|augment|order|policy|towers)\.\w+\s*[=:]|global_batch|micro_batch|\blr\b|samples_seen", text
    )


# ---- KubeRay -------------------------------------------------------------------------------------------------------------


def schema_errors(manifest: dict[str, Any]) -> list[str]:
    schema = SCHEMAS / f"{manifest['kind'].lower()}s.v1.schema.json"
    if not schema.is_file():
        pytest.skip(f"no KubeRay schemas in {SCHEMAS}; RAYSYS_KUBERAY_SCHEMAS names another folder")
    assert (manifest["apiVersion"], manifest["kind"]) in (("ray.io/v1", "RayCluster"), ("ray.io/v1", "RayJob"))
    return [error.message for error in jsonschema.Draft7Validator(json.loads(schema.read_text())).iter_errors(manifest)]


@each(KUBERAY)
def test_kuberay_takes_the_manifest(file: Path) -> None:
    assert schema_errors(load(file)) == []


@pytest.mark.parametrize("path", ["", "spec", "spec.headGroupSpec", "spec.workerGroupSpecs.1.template.spec.containers.0.resources"])
def test_kuberay_schema_refuses_a_misspelt_key(path: str) -> None:
    manifest = load(CLUSTER / "kuberay" / "raycluster.yaml")
    place = manifest
    for step in filter(None, path.split(".")):
        place = place[int(step) if step.isdigit() else step]
    place["limit"] = {}
    assert len(schema_errors(manifest)) == 1


@each(JOBS)
def test_a_job_repeats_the_cluster(file: Path) -> None:
    assert cluster_spec(file) == cluster_spec(CLUSTER / "kuberay" / "raycluster.yaml")


def test_cluster_keeps_token_versions_and_recovery() -> None:
    spec = cluster_spec(CLUSTER / "kuberay" / "raycluster.yaml")
    assert spec["rayVersion"] == pinned("ray")
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True and spec["autoscalerOptions"]["version"] == "v2"
    assert spec["gcsFaultToleranceOptions"]["redisAddress"]
    assert list(spec["gcsFaultToleranceOptions"]["redisPassword"]) == ["valueFrom"]
    assert (spec["headGroupSpec"]["serviceType"], spec["headGroupSpec"]["enableIngress"]) == ("ClusterIP", False)
    assert len({pod["containers"][0]["image"] for pod in pods(spec)}) == 1


def test_ray_reads_an_idle_head_a_driver_group_a_gpu_group_and_a_cpu_group() -> None:
    manifest = load(CLUSTER / "kuberay" / "raycluster.yaml")
    manifest["metadata"]["namespace"] = "default"
    groups = _derive_autoscaling_config_from_ray_cr(manifest)["available_node_types"]
    has = {name: {key for key, amount in group["resources"].items() if amount > 0} for name, group in groups.items()}
    workers = {"driver": {"CPU", "memory", "driver"}, "gpu": {"CPU", "GPU", "memory"}, "cpu": {"CPU", "memory"}}
    assert has == {"headgroup": {"memory"}} | workers
    limits = {name: (groups[name]["min_workers"], groups[name]["max_workers"]) for name in workers}
    assert limits == {"driver": (1, 4), "gpu": (0, 8), "cpu": (0, 16)}


def test_a_driver_counts_no_more_cpus_than_its_pod_has() -> None:
    spec = cluster_spec(CLUSTER / "kuberay" / "raycluster.yaml")
    pod = {group["groupName"]: group for group in spec["workerGroupSpecs"]}["driver"]
    assert pod["resources"]["CPU"] == pod["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]


@each(JOBS)
def test_a_jobs_words_fit_the_gpu_machines(file: Path) -> None:
    group = {group["groupName"]: group for group in cluster_spec(file)["workerGroupSpecs"]}["gpu"]
    has = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    cpus, gpus = int(has["cpu"]), int(has["nvidia.com/gpu"])
    ((verb, *words),) = raysys_calls(file)
    cfg = compose_config(verb, words)
    if verb == "annotate":
        assert (cfg.ocr.num_actors, gpus * cfg.ocr.decode_threads) == (group["maxReplicas"] * gpus, cpus)
    else:
        assert gpus * cfg.train.decode_threads <= cpus
    if verb == "sweep":  # beside one evaluator
        assert cfg.max_concurrent == (group["maxReplicas"] * gpus - 1) // cfg.num_workers


def test_groups_keep_the_operators_rules() -> None:
    """ValidateRayClusterSpec of KubeRay: no restarts under the autoscaler v2; resources in one place."""
    spec = cluster_spec(CLUSTER / "kuberay" / "raycluster.yaml")
    assert {pod["restartPolicy"] for pod in pods(spec)} == {"Never"}
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert not ("resources" in group and {"num-cpus", "num-gpus", "memory", "resources"} & set(group["rayStartParams"]))


def test_every_pod_mounts_the_storage_and_fits_its_memory() -> None:
    spec = cluster_spec(CLUSTER / "kuberay" / "raycluster.yaml")
    stores = [
        group["rayStartParams"].get("object-store-memory", "0") for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
    ]
    for pod, store in zip(pods(spec), stores, strict=True):
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert list(mounts["/mnt/raysys"]["persistentVolumeClaim"]) == ["claimName"]
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        assert container["resources"]["requests"] == container["resources"]["limits"]
        memory, shm = (
            parse_quantity(size)
            for size in (container["resources"]["limits"]["memory"], mounts["/dev/shm"]["emptyDir"]["sizeLimit"])
        )
        assert int(store) <= shm < memory
        assert pod["securityContext"]["runAsNonRoot"] and not container["securityContext"]["allowPrivilegeEscalation"]


def test_credentials_come_from_secrets_only() -> None:
    for pod in pods(cluster_spec(CLUSTER / "kuberay" / "raycluster.yaml")):
        for container in pod["containers"]:
            assert [list(source) for source in container["envFrom"]] == [["secretRef"]]
            assert "env" not in container


def test_kubernetes_refuses_what_was_left_to_replace() -> None:
    spec = cluster_spec(CLUSTER / "kuberay" / "raycluster.yaml")
    label = re.compile(r"([a-z0-9.-]+/)?[A-Za-z0-9_.-]+")  # a qualified name's prefix is a DNS name
    for pod in pods(spec):
        (container,) = pod["containers"]
        assert not re.fullmatch(r"[a-z0-9./:_-]+", container["image"].split(":")[0])  # repositories are lower case
        assert not re.fullmatch(r"[a-z0-9.-]+", container["envFrom"][0]["secretRef"]["name"])
        assert not any(label.fullmatch(key) for key in pod["nodeSelector"])
    _, _, gpu, cpu = pods(spec)
    on_spot, on_gpu = ({toleration["key"] for toleration in pod["tolerations"]} for pod in (cpu, gpu))
    assert on_gpu == on_spot | {"nvidia.com/gpu"} and on_spot == {"REPLACE-ME/spot"}
    for pod in (gpu, cpu):
        assert pod["containers"][0]["lifecycle"]["preStop"] and pod["terminationGracePeriodSeconds"] <= 30


@each(JOBS)
def test_a_jobs_first_lines_name_its_file_and_its_job(file: Path) -> None:
    name = load(file)["metadata"]["name"]
    follow = f"kubectl wait --for=create job/{name} --timeout=30m && kubectl logs -f --tail=-1 job/{name}"
    assert f"kubectl create -f {file.relative_to(ROOT)} && {follow}\n" in file.read_text()
    assert f"kubectl delete rayjob {name} first" in file.read_text()


@each(JOBS)
def test_a_job_has_its_driver_on_a_driver_node_and_is_tried_again(file: Path) -> None:
    spec = load(file)["spec"]
    assert json.loads(spec["entrypointResources"]) == {"driver": 1}
    assert spec["submissionMode"] == "K8sJobMode" and spec["backoffLimit"] == 1
    assert spec["shutdownAfterJobFinishes"] is True and "activeDeadlineSeconds" not in spec


# ---- virtual machines ----------------------------------------------------------------------------------------------------


@each(VMS)
def test_ray_up_takes_the_machines(file: Path) -> None:
    config = prepare_config(load(file))
    validate_config(config)
    nodes = config["available_node_types"]
    assert nodes[config["head_node_type"]]["resources"] == {"CPU": 0}
    assert nodes["driver"]["resources"]["driver"] > 0 and "driver" not in nodes["gpu"]["resources"]
    assert nodes["gpu"]["min_workers"] == 0 < nodes["gpu"]["resources"]["GPU"]
    assert (nodes["cpu"]["min_workers"], nodes["cpu"]["max_workers"], list(nodes["cpu"]["resources"])) == (0, 16, ["CPU"])
    assert config["max_workers"] >= sum(nodes[name]["max_workers"] for name in ("driver", "gpu", "cpu"))


@each(VMS)
def test_ray_up_refuses_a_misspelt_key(file: Path) -> None:
    config = copy.deepcopy(load(file)) | {"idle_timeout_minute": 10}
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minute"):
        validate_config(prepare_config(config))


@each(VMS)
def test_machines_take_the_token_the_versions_and_the_storage(file: Path) -> None:
    config = load(file)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "export RAY_AUTH_MODE=token" in " ".join(config["initialization_commands"])
    (head,) = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in head and "--num-cpus=0" in head
    assert all("--constraint constraints.txt" in line for line in config["setup_commands"] if "pip install" in line)
    assert any("REPLACE-ME" in line and "/mnt/raysys" in line for line in config["setup_commands"])
    sent = {local for local in config["file_mounts"].values() if not local.startswith("~")}
    assert sent == {"raysys", "conf", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    assert all((ROOT / name).exists() for name in sent)


# ---- Slurm ---------------------------------------------------------------------------------------------------------------


@each([*BATCH, CLUSTER / "slurm" / "_ray.sh"])
def test_shellcheck_finds_nothing(file: Path) -> None:
    subprocess.run(["bash", "-n", file], check=True)
    shellcheck = Path(sys.executable).parent / "shellcheck"
    found = subprocess.run([shellcheck, "--external-sources", file.relative_to(ROOT)], cwd=ROOT, capture_output=True, text=True)
    assert (found.stdout, found.returncode) == ("", 0)


def test_batch_scripts_ask_for_the_same_machines() -> None:
    asked = [{line for line in file.read_text().splitlines() if line.startswith("#SBATCH")} for file in BATCH]
    assert {"#SBATCH --requeue", "#SBATCH --signal=B:USR1@120", "#SBATCH --exclusive", "#SBATCH --ntasks-per-node=1"} <= asked[0]
    assert len({frozenset(line for line in lines if "--job-name" not in line) for lines in asked}) == 1


@each(BATCH)
def test_a_batch_script_names_each_variable_that_is_not_set(file: Path) -> None:
    wanted = [*re.findall(r"\$\{(\w+):\?", file.read_text()), "RAYSYS_ENV", "SLURM_JOB_ID"]
    given = {"PATH": os.environ["PATH"]}
    for name in wanted:
        run = subprocess.run(["bash", file], env=given, capture_output=True, text=True)
        assert run.returncode != 0 and f"{name}: " in run.stderr
        given[name] = str(ROOT)  # SLURM_SUBMIT_DIR is the checkout
    assert len(wanted) >= 5


RAY = """#!/bin/bash
printf '%s ' "$@" > "$SEEN/ray"; mkdir -p "$RAY_TMPDIR"
stat -c %a "$RAY_AUTH_TOKEN_PATH" > "$SEEN/mode"; cp "$RAY_AUTH_TOKEN_PATH" "$SEEN/token"; env > "$SEEN/environment"
[[ -n ${NO_HEAD:-} ]] && exit 0    # so does Ray's
while [[ $1 != -- ]]; do shift; done; shift; "$@"
"""
PYTHON = """#!/bin/bash
[[ $1 == -c ]] && exec REAL "$@"
printf '%s\\n' "$RAY_ADDRESS" "$@" > "$SEEN/verb"
if [[ -n ${WAIT:-} ]]; then touch "$SEEN/works"; until [[ -e $SEEN/requeued ]]; do sleep 0.05; done; fi
exit "${STATUS:-0}"
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done; "$@"
"""
JOB = f"of-a-test-{os.getpid()}"
LOGS = Path(f"/tmp/ray-{JOB}")
SCONTROL = """#!/bin/bash
echo "$@" > "$SEEN/requeued"
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment of a job of two nodes on a Slurm whose srun, and on a Ray whose symmetric-run, just run the command here."""
    bin_dir = tmp_path / "env" / "bin"
    bin_dir.mkdir(parents=True)
    real = PYTHON.replace("REAL", sys.executable)
    for name, text in {"ray": RAY, "python": real, "srun": SRUN, "scontrol": SCONTROL}.items():
        (bin_dir / name).write_text(text)
        (bin_dir / name).chmod(0o755)
    ours = {
        "RAYSYS_ENV": bin_dir.parent,
        "HOME": tmp_path / "home",
        "SEEN": tmp_path,
        "SLURM_SUBMIT_DIR": ROOT,
        "PATH": os.environ["PATH"],
    }
    words = {"CORPUS": "/data/train-{0..9}.tar", "ANNOTATIONS": "/data/A", "OUTPUT": "/data/my run"}
    machines = {
        "SLURM_JOB_ID": JOB,
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_ON_NODE": "96",
        "SLURM_GPUS_ON_NODE": "8",
        "HEAD": "10.0.0.1",
    }
    other = {
        "IMAGENET": "/data/I",
        "IMAGENET_ATTR": "/data/T",
        "COCO": "/data/C",
        "RAY_ADDRESS": "elsewhere:1",
        "RAY_AUTH_TOKEN": "other",
    }
    yield {key: str(value) for key, value in (ours | words | machines | other).items()}
    shutil.rmtree(LOGS, ignore_errors=True)


def submit(env: dict[str, str], verb: str = "train") -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", CLUSTER / "slurm" / f"{verb}.sbatch"], env=env, capture_output=True, text=True)


def test_a_batch_job_runs_the_verb_on_its_own_ray(slurm: dict[str, str], tmp_path: Path) -> None:
    job = submit(slurm)
    assert (job.returncode, job.stderr) == (0, "")
    started = (tmp_path / "ray").read_text()
    assert started.startswith("symmetric-run --address 10.0.0.1:6379 --min-nodes 2 --num-cpus 96 --num-gpus 8 -- ")
    verb = (tmp_path / "verb").read_text().splitlines()
    assert verb[:4] == ["10.0.0.1:6379", "-m", "raysys", "train"]
    assert {"corpus.path=/data/train-{0..9}.tar", "output=/data/my run", "num_workers=[8,64]"} < set(verb)


def test_a_batch_job_has_a_token_of_its_own_that_nobody_sees(slurm: dict[str, str], tmp_path: Path) -> None:
    job = submit(slurm)
    token, environment = (tmp_path / "token").read_text(), (tmp_path / "environment").read_text()
    assert re.fullmatch("[0-9a-f]{64}", token) and (tmp_path / "mode").read_text() == "600\n"
    assert token not in job.stdout + job.stderr + environment
    assert "RAY_AUTH_MODE=token\n" in environment and "RAY_AUTH_TOKEN=" not in environment
    assert list((tmp_path / "home" / ".ray").iterdir()) == []
    assert submit(slurm).returncode == 0 and (tmp_path / "token").read_text() != token


def test_a_batch_job_fails_with_the_verbs_status(slurm: dict[str, str]) -> None:
    assert submit(slurm | {"STATUS": "2"}).returncode == 2


def test_a_batch_job_fails_where_ray_does_not_come_up(slurm: dict[str, str]) -> None:
    job = submit(slurm | {"NO_HEAD": "1"})
    assert job.returncode == 1 and "Ray did not come up on 10.0.0.1" in job.stderr


def test_a_batch_job_out_of_time_queues_itself_again(slurm: dict[str, str], tmp_path: Path) -> None:
    with subprocess.Popen(["bash", CLUSTER / "slurm" / "train.sbatch"], env=slurm | {"WAIT": "1", "STATUS": "3"}) as job:
        try:
            while not (tmp_path / "works").exists():
                assert job.poll() is None
            job.send_signal(signal.SIGUSR1)
            assert job.wait(timeout=20) == 3  # not before the verb ends
        finally:
            job.kill()
    assert (tmp_path / "requeued").read_text() == f"requeue {JOB}\n"


@pytest.mark.parametrize(
    ("verb", "cpus", "gpus", "threads"), [("train", 96, 8, 11), ("train", 8, 8, 1), ("annotate", 96, 8, 12), ("annotate", 4, 8, 1)]
)
def test_a_batch_job_shares_the_cpus_of_a_node_among_its_gpus(
    slurm: dict[str, str], tmp_path: Path, verb: str, cpus: int, gpus: int, threads: int
) -> None:
    job = submit(slurm | {"SLURM_CPUS_ON_NODE": str(cpus), "SLURM_GPUS_ON_NODE": str(gpus)}, verb)
    assert (job.returncode, job.stderr) == (0, "")
    key = {"train": "train.decode_threads", "annotate": "ocr.decode_threads"}[verb]
    assert f"{key}={threads}" in (tmp_path / "verb").read_text().splitlines()


@pytest.mark.parametrize("verb", ["annotate", "train"])
def test_a_batch_job_without_gpus_says_how_to_ask_for_them(slurm: dict[str, str], verb: str) -> None:
    job = submit({key: value for key, value in slurm.items() if key != "SLURM_GPUS_ON_NODE"}, verb)
    assert job.returncode == 1 and "SLURM_GPUS_ON_NODE: ask for GPUs, as --gpus-per-node=8" in job.stderr


@each(BATCH)
def test_a_batch_job_from_elsewhere_than_the_checkout_says_so(slurm: dict[str, str], tmp_path: Path, file: Path) -> None:
    job = submit(slurm | {"SLURM_SUBMIT_DIR": str(tmp_path)}, file.stem)
    assert (job.returncode, job.stderr) == (2, f"{tmp_path} is not raysys's checkout: cd there, then sbatch\n")


@each(BATCH)
def test_a_batch_job_without_a_ray_in_its_environment_says_so(slurm: dict[str, str], tmp_path: Path, file: Path) -> None:
    (tmp_path / "env" / "bin" / "ray").unlink()
    job = submit(slurm, file.stem)
    assert job.returncode == 2 and job.stderr.startswith(f"RAYSYS_ENV={tmp_path / 'env'} holds no bin/ray: ")
    assert job.stderr.count("\n") == 1


@pytest.mark.parametrize("status", ["0", "1"])
def test_rays_logs_stay_on_the_nodes_only_where_a_batch_job_failed(slurm: dict[str, str], status: str) -> None:
    assert submit(slurm | {"STATUS": status}).returncode == int(status)
    assert LOGS.exists() == (status != "0")


# ---- the image -----------------------------------------------------------------------------------------------------------


def test_hadolint_finds_nothing() -> None:
    found = subprocess.run([Path(sys.executable).parent / "hadolint", DOCKERFILE], capture_output=True, text=True)
    assert (found.stdout, found.returncode) == ("", 0)


def test_the_image_has_the_projects_python_and_pins() -> None:
    text = DOCKERFILE.read_text()
    assert (
        re.search(r"^FROM python:(\d+\.\d+)\.\d+-slim-\w+$", text, re.MULTILINE)[1] == project()["tool"]["mypy"]["python_version"]
    )
    (extras,) = re.findall(r"--constraint constraints.txt '\.\[(.+)\]'", text)
    assert set(extras.split(",")) <= set(project()["project"]["optional-dependencies"])
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE) == ["1000"]


def test_the_image_copies_what_docker_may_send_and_nothing_else() -> None:
    ignore = [line for line in (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines() if not line.startswith("#")]
    copied = {name for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE.read_text(), re.MULTILINE) for name in line.split()}
    assert ignore[0] == "*"
    assert {line[1:] for line in ignore if line.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)


# ---- ray job submit --working-dir . --------------------------------------------------------------------------------------


def packed(folder: Path, to: Path) -> dict[str, int]:
    """Files that Ray would send and their sizes in bytes (they are stored, not compressed)."""
    _zip_files(str(folder), RAY_RUNTIME_ENV_DEFAULT_EXCLUDES.split(","), str(to), include_gitignore=True)
    with ZipFile(to) as file:
        return {member.filename: member.file_size for member in file.infolist()}


def test_a_job_takes_the_code_and_its_choices_along(tmp_path: Path) -> None:
    sizes = packed(ROOT, tmp_path / "sent.zip")
    for folder in ("raysys", "conf"):
        there = {
            str(file.relative_to(ROOT)) for file in (ROOT / folder).rglob("*") if file.is_file() and "__pycache__" not in file.parts
        }
        assert {name for name in sizes if name.startswith(f"{folder}/")} == there
    assert "pyproject.toml" in sizes
    assert sum(sizes.values()) < 2e6


def test_a_job_leaves_data_results_and_secrets_behind(tmp_path: Path) -> None:
    for name in (".rayignore", ".gitignore"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    kept = {"raysys/cli.py", "raysys/corpus/index.py", "conf/train.yaml", "conf/ocr/fast.yaml", "pyproject.toml", "my.yaml"}
    left = {
        ".git/config",
        ".venv/bin/x",
        "outputs/demo/x",
        "tests/t.py",
        "data/a.tar",
        ".env",
        "key.pem",
        "raysys/__pycache__/cli.pyc",
    }
    for name in kept | left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert set(packed(tmp_path, tmp_path / "sent.zip")) == kept
