"""Every verb as a Ray job, on a head of this machine: from `ray start` to the last of its processes.

In: nothing. A corpus of 48 embedded scenes is drawn into a temporary folder; a head starts that listens on loopback alone, on ports that nobody
has, and lets in whoever knows the token; each verb is submitted with the words that a user would give to `ray job submit`, then what must fail.
Out: a line a job: its seconds, the status of `ray job submit`, the verb's own (``driver_exit_code``), and the end of its log. Status 1 where one
is not as it should be. The head, all its processes and the folder are gone at the end.
``demo`` is left out: it draws 1,000 scenes at least and takes minutes, by the functions of the verbs that are here.

    python tools/try_jobs.py
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from raysys.corpus import scenes

REPOSITORY = Path(__file__).parent.parent
WINDOW = 250
"""Ports of one head: a dozen for its services, the rest for its workers."""
START_S, JOB_S = 180, 900
"""What a start and a job may take on a busy machine."""


# ---- a head -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    folder: Path
    first_port: int
    process: psutil.Popen

    @property
    def address(self) -> str:
        """What RAY_ADDRESS names."""
        return f"127.0.0.1:{self.first_port}"

    @property
    def dashboard(self) -> str:
        """What `ray job submit --address` names."""
        return f"http://127.0.0.1:{self.first_port + 1}"

    @property
    def token_file(self) -> Path:
        return self.folder / "token"

    def processes(self) -> list[psutil.Process]:
        """The head's own, its workers' and its jobs'."""
        return [self.process, *self.process.children(recursive=True)]

    def ask(self, path: str) -> Any:
        """The dashboard's answer, with the token."""
        request = urllib.request.Request(
            self.dashboard + path, headers={"Authorization": f"Bearer {self.token_file.read_text().strip()}"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)


def environment(token_file: Path | None) -> dict[str, str]:
    """Of a head and of a client that has this token, or of a client that gives none. PATH gives a job the Python that runs this."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    with_token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}
    # Ray puts the machine's outer address for 127.0.0.1, and then binds to all there are, unless it is told that this is no cluster.
    kept |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    return kept | (with_token if token_file else {"RAY_AUTH_MODE": "disabled"})


def write_token(file: Path) -> Path:
    """A new one, that this user alone can read."""
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        opened.write(secrets.token_hex(32))
    return file


@contextmanager
def running_head(folder: Path) -> Iterator[Head]:
    """A head with its files in ``folder``, whose path must be short: names of sockets have at most 107 bytes."""
    ports = _free_ports()
    services = (
        "port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port", "metrics-export-port",
        "node-manager-port", "object-manager-port", "ray-client-server-port",
    )  # fmt: skip
    of_services = [f"--{name}={port}" for name, port in zip(services, ports, strict=False)]
    spare = ports[len(services) :]
    of_head = environment(write_token(folder / "token")) | {
        "RAY_TMPDIR": str(folder),
        "AUTOSCALER_METRIC_PORT": str(spare[0]),
        "DASHBOARD_METRIC_PORT": str(spare[1]),
    }
    words = ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", *of_services]
    words += [f"--min-worker-port={spare[2]}", f"--max-worker-port={spare[-1]}", "--num-cpus=2", "--object-store-memory=200000000"]
    log = folder / "head.log"
    with log.open("wb") as opened:
        process = psutil.Popen(["ray", "start", "--head", "--block", *words], env=of_head, stdout=opened, stderr=subprocess.STDOUT)
    head = Head(folder, ports[0], process)
    try:
        _wait_until_up(head, log, agent_port=ports[2])
        yield head
    finally:
        family = head.processes() if process.poll() is None else []
        if family:
            process.terminate()
        _, alive = psutil.wait_procs(family, timeout=5)  # Ray gives Ray Data's own actors half a minute
        for left in alive:
            left.kill()
        psutil.wait_procs(alive, timeout=30)


def _free_ports() -> range:
    """Below those that systems give to clients, beyond those that Ray gives to workers by itself (10002 .. 19999)."""
    starts = list(range(20_000, 32_000, WINDOW))
    random.shuffle(starts)
    return next(window for window in (range(start, start + WINDOW) for start in starts) if all(map(_is_free, window)))


def _is_free(port: int) -> bool:
    with socket.socket() as sock:
        try:
            sock.bind(("", port))
        except OSError:
            return False
    return True


def _wait_until_up(head: Head, log: Path, *, agent_port: int) -> None:
    end = time.monotonic() + START_S
    while True:
        try:
            head.ask("/api/version")
            socket.create_connection(("127.0.0.1", agent_port), 5).close()
            return
        except OSError:  # URLError is one
            if head.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the head did not come up:\n{log.read_text()}") from None
            time.sleep(0.2)


# ---- a job ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What became of one."""

    submit_status: int
    """Of `ray job submit`."""
    said: str
    """What `ray job submit` printed: its own words and the job's log."""
    exit_code: int | None
    """The verb's own; None where no job came to be."""
    log: str
    seconds: float


def submit(head: Head, name: str, words: list[str], *, client: dict[str, str] | None = None, working_dir: Path = REPOSITORY) -> Job:
    """``ray job submit ... -- python -m raysys WORDS``, and its end.

    :param name: each job has its own.
    :param client: environment of `ray job submit`; None: one that knows the token.
    """
    began = time.monotonic()
    command = [
        "ray",
        "job",
        "submit",
        "--address",
        head.dashboard,
        "--working-dir",
        ".",
        "--submission-id",
        name,
        "--log-color",
        "false",
    ]
    done = subprocess.run(
        [*command, "--", "python", "-m", "raysys", *words], cwd=working_dir, env=client or environment(head.token_file),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=JOB_S, check=False,
    )  # fmt: skip
    seconds = time.monotonic() - began
    if all(job["submission_id"] != name for job in head.ask("/api/jobs/")):
        return Job(done.returncode, done.stdout, None, "", seconds)
    code = head.ask(f"/api/jobs/{name}")["driver_exit_code"]
    return Job(done.returncode, done.stdout, code, head.ask(f"/api/jobs/{name}/logs")["logs"], seconds)


# ---- what is submitted ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A job, and the end that it should have."""

    name: str
    words: list[str]
    exit_code: int | None
    """None: it is not let in."""
    says: str
    """In the last lines of the log, or of what `ray job submit` printed where there is none."""
    token_file: Path | None = None
    """What the client knows; None for a client that knows no token."""

    def judge(self, job: Job) -> str:
        """What is not as it should be; nothing where all is."""
        if job.exit_code != self.exit_code or job.submit_status != int(self.exit_code != 0):
            return f"the verb ended with {job.exit_code}, `ray job submit` with {job.submit_status}"
        if not self.end(job):
            return f"its last lines do not say '{self.says}'"
        if "\r" in job.log or "\x1b" in job.log:
            return "its log is written for a terminal"
        return ""

    def end(self, job: Job) -> str:
        """The line that says it; a failed verb's is the last one."""
        lines = (job.log or job.said).splitlines()
        return next((line for line in reversed(lines[-1 if self.exit_code else -5 :]) if self.says in line), "")


def draw(folder: Path) -> None:
    """Scenes to train on and to ask about, as `raysys demo` draws them."""
    scenes.write_corpus(folder / "train", num_samples=48, samples_per_shard=24, seed=0, text_share=0.3)
    scenes.write_evaluation_sets(folder, seed=0, per_kind=1, num_retrieval=12)
    (folder / "templates.txt").write_text("a photo of a {}\n")
    (folder / "space.yaml").write_text("policy: [none, paper]\n")


def verbs(folder: Path, token_file: Path) -> list[Trial]:
    """All but `demo`, in the order of the pipeline: each takes what those before it have made."""
    corpus = f"corpus.path={folder}/train"
    clean = [f"imagenet.path={folder}/val", f"imagenet.classes={folder}/classes.json"]
    texts = f"templates={folder}/templates.txt"
    recipe = [corpus, f"annotations={folder}/A", "model=test_resnet-64", "global_batch=8"]
    questions = [
        "evaluators=[imagenet,imagenet_attr,retrieval]", *clean, f"imagenet.{texts}", f"imagenet_attr.path={folder}/O",
        f"imagenet_attr.classes={folder}/classes.json", f"imagenet_attr.{texts}", f"retrieval.path={folder}/retrieval-00000.tar",
        f"service.cache_dir={folder}/cache",
    ]  # fmt: skip
    words = {
        "annotate": [corpus, "ocr=scenes", f"output={folder}/A"],
        "filter": [f"annotations={folder}/A", f"output={folder}/S"],
        "train": [*recipe, "num_workers=2", "train.steps=300", f"output={folder}/R"],
        "attack": [*clean, "attack.classes=random", "attack.font_px=20", "attack.x_px=8", "attack.y_px=46", f"output={folder}/O"],
        "evaluate": [f"model={folder}/R", *questions, f"output={folder}/E"],
        "sweep": [f"space={folder}/space.yaml", *recipe, "train.steps=4", "measure_steps=0", *questions, f"output={folder}/W"],
        "report": [f"{folder}/W"],
    }
    return [Trial(verb, [verb, *rest], 0, "result:", token_file) for verb, rest in words.items()]


def mistakes(folder: Path, token_file: Path) -> list[Trial]:
    """What a user may get wrong, and work that cannot end well."""
    corpus = f"corpus.path={folder}/train"
    train = ["train", corpus, "model=test_resnet-64", "global_batch=8", "train.steps=20", f"output={folder}/X"]
    return [
        Trial("relative", ["annotate", corpus, "output=A"], 2, "lies in a folder that Ray deletes", token_file),
        Trial("unknown", ["annotate", corpus, f"output={folder}/X", "ocr.engin=onnx"], 2, "unknown key 'ocr.engin'", token_file),
        Trial("diverged", [*train, "optim.lr=1e30", "optim.warmup_steps=0"], 1, "not finite at step", token_file),
    ]


def strangers(folder: Path) -> list[Trial]:
    """Clients with another token, and with none."""
    words = ["annotate", f"corpus.path={folder}/train", f"output={folder}/X"]
    return [
        Trial("other_token", words, None, "Token authentication is enabled", write_token(folder / "other")),
        Trial("no_token", words, None, "Token authentication is enabled"),
    ]


def try_it(head: Head, trial: Trial) -> Job:
    return submit(head, trial.name, trial.words, client=environment(trial.token_file))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    bad = 0
    with tempfile.TemporaryDirectory(dir=os.environ.get("RAY_TMPDIR")) as path:
        folder = Path(path)
        draw(folder)
        with running_head(folder) as head:
            for trial in [*verbs(folder, head.token_file), *mistakes(folder, head.token_file), *strangers(folder)]:
                job = try_it(head, trial)
                wrong = trial.judge(job)
                status = f"ray job submit {job.submit_status}, verb {'-' if job.exit_code is None else job.exit_code}"
                print(f"{trial.name:14} {job.seconds:5.0f} s  {status:26} {wrong or trial.end(job)[:150]}", flush=True)
                if wrong:
                    bad += 1
                    print(job.log or job.said, flush=True)
    sys.exit(int(bad > 0))


if __name__ == "__main__":
    main()
