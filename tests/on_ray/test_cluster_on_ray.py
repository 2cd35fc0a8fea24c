"""Work looks for room on a cluster of several nodes on this machine: it is refused, it waits, and every node must see the storage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from conftest import free_port, wait_for

from raysys.cluster import ray_session
from raysys.config import RayConfig
from raysys.errors import WorkFailed

pytestmark = pytest.mark.ray
BEGIN = """
import sys, threading, time
import ray
import raysys.cluster
from raysys.cluster import check_storage, live_nodes, make_room, ray_session, settled_nodes, watched
from raysys.config import RayConfig
from raysys.room import Need, num_that_fit
from raysys.errors import UserError, WorkFailed
from raysys.storage import write_bytes
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without CPUs, and two nodes with one each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100 << 20})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture
def address(cluster: Any) -> str:
    return str(cluster.address)


@pytest.mark.parametrize("address", [None, "local"])
def test_a_ray_that_does_not_start_here_is_no_matter_of_the_words(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise ConnectionError("no port")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(WorkFailed, match=r"^Ray did not start on this machine \(no port\)"), ray_session(RayConfig()):
        pass


def driver(address: str, body: str) -> subprocess.Popen[str]:
    """A process of its own: this one may be the driver of another cluster."""
    script = BEGIN + "with ray_session(RayConfig()):\n" + "".join(f"    {line}\n" for line in body.strip().splitlines())
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env=os.environ | {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def printed(address: str, body: str) -> list[str]:
    process = driver(address, body)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.splitlines()


def test_what_can_never_be_is_refused_at_once_and_what_others_hold_is_waited_for(address: str) -> None:
    three, whole, memory, one, late, two = printed(
        address,
        """
ask = lambda bundles, minutes: make_room(Need("the work", bundles), minutes)
for bundles in ([{"CPU": 1}] * 3, [{"CPU": 2}], [{"CPU": .5, "memory": 1e15}]):
    try:
        ask(bundles, 1)
    except UserError as error:
        print(error)
held = ray.remote(num_cpus=1)(lambda: time.sleep(600)).remote()
while num_that_fit([{"CPU": 1}], [node.free for node in live_nodes()]) > 1:
    time.sleep(.1)
ask([{"CPU": 1}], 1)
print("one has room")
try:
    ask([{"CPU": 1}] * 2, .05)
except WorkFailed as error:
    print(error)
threading.Timer(3, lambda: ray.cancel(held, force=True)).start()
ask([{"CPU": 1}] * 2, 1)
print("two have room", num_that_fit([{"CPU": 1}], [node.free for node in settled_nodes()]))
""",
    )
    assert three == "the work needs 3 CPUs, the cluster has 2; ask for less or add nodes"
    assert whole.startswith(
        "the work needs 2 CPUs on one node, 1 times; the cluster's nodes have room for 0, the largest has 1 CPUs"
    )
    assert "GB of memory on one node" in memory
    assert one == "one has room"
    assert late.startswith("the work waits: others hold what it needs; it did not come in") and "1 of 2 CPUs are free" in late
    assert two == "two have room 2"


@pytest.fixture
def autoscaled(tmp_path: Path) -> Iterator[str]:
    """Address of a head without CPUs, with Ray's own autoscaler (v2), which may bring two nodes of one CPU from a cloud that has none."""
    config = {
        "cluster_name": "test",
        "max_workers": 8,
        "provider": {
            "type": "external",  # the type "fake_multinode" wants a file that Ray's wheels lack
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": HEAD_NODE,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
        "head_node_type": "ray.head.default",
        **{key: {} for key in ("auth", "file_mounts", "docker")},
        **{key: [] for key in ("setup_commands", "initialization_commands", "head_setup_commands", "worker_setup_commands")},
        **{key: [] for key in ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files")},
        **{key: [] for key in ("rsync_exclude", "rsync_filter")},
        "file_mounts_sync_continuously": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    address, log = f"{ray.util.get_node_ip_address()}:{free_port()}", tmp_path / "log"
    words = ["--head", "--port", address.split(":")[1], "--num-cpus", "0", "--include-dashboard", "false"]
    head = ray_start([*words, "--autoscaling-config", str(tmp_path / "config.json")], log)
    try:
        wait_for(lambda: "Ray runtime started" in log.read_text(), head, log, limit_s=90)
        yield address
    finally:
        end(head)


HEAD_NODE = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
"""FAKE_HEAD_NODE_ID of the provider."""


def ray_start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    fake = {"RAY_enable_autoscaler_v2": "1", "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    fake |= {"RAY_CLOUD_INSTANCE_ID": HEAD_NODE, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_NODE} if "--head" in words else {}
    return subprocess.Popen(
        [str(Path(sys.executable).parent / "ray"), "start", "--block", "--object-store-memory", str(100 << 20), *words],
        env=os.environ | fake | {"RAY_AUTH_MODE": "token"},
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
    )


def end(process: subprocess.Popen[bytes]) -> None:
    of_it = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    for child in of_it:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()


@pytest.mark.long
def test_what_an_autoscaler_may_bring_is_waited_for_and_what_it_never_can_is_refused(autoscaled: str, tmp_path: Path) -> None:
    process = driver(
        autoscaled,
        """
raysys.cluster.SETTLE_S = .5
try:
    make_room(Need("the work", [{"CPU": 1}] * 3), 2)
except UserError as error:
    print(error)
make_room(Need("the work", [{"CPU": 1}] * 2), 2)
print("there is room", flush=True)
""",
    )
    assert process.stderr is not None
    lines: list[str] = []
    while "needs 2 CPUs, the cluster has 0; waiting for the autoscaler" not in (said := process.stderr.readline()):
        assert said, "".join(lines)
        lines.append(said)
    assert "0 of 0 CPUs are free" in said
    node = ray_start(["--address", autoscaled, "--num-cpus", "2"], tmp_path / "node.log")  # the cloud's machine
    try:
        never, room = process.communicate(timeout=90)[0].splitlines()
    finally:
        end(node)
    assert "needs 3 CPUs, the cluster has 0; waiting for the autoscaler, which says that it can never bring it" in never
    assert room == "there is room" and process.returncode == 0


def test_a_node_that_does_not_see_the_storage_is_named(address: str, tmp_path: Path) -> None:
    """memory:// is each process's own, as a folder is that is not mounted everywhere."""
    unseen, unwritten = printed(
        address,
        f"""
write_bytes("memory://pictures/0.tar", b"x")
write_bytes({str(tmp_path / "settings.json")!r}, b"x")
check_storage({str(tmp_path)!r}, {{"corpus.path": {str(tmp_path)!r}}})
write_bytes("memory://output/settings.json", b"x")
for output, inputs in ((None, {{"corpus.path": "memory://pictures/0.tar"}}), ("memory://output", {{}})):
    try:
        check_storage(output, inputs)
    except UserError as error:
        print(error)
""",
    )
    assert "does not see corpus.path=memory://pictures/0.tar; all nodes must see the same files" in unseen
    assert "does not see output=memory://output as the driver does" in unwritten
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".tmp-")]
