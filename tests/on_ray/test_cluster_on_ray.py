"""Work looks for room on a cluster of several nodes on this machine: it is refused, it waits, and every node must see the storage."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.ray
BEGIN = """
import sys, threading, time
import ray
import raysys.cluster
from raysys.cluster import Need, check_storage, live_nodes, make_room, num_that_fit, ray_session, settled_nodes, watched
from raysys.config import RayConfig
from raysys.storage import UserError, WorkFailed, write_bytes
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


def driver(address: str, body: str) -> subprocess.Popen[str]:
    """A process of its own: this one may be the driver of another cluster."""
    script = BEGIN + "with ray_session(RayConfig()):\n" + "".join(f"    {line}\n" for line in body.strip().splitlines())
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env=os.environ | {"RAY_ADDRESS": address},
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


def test_what_an_autoscaler_may_bring_is_waited_for(address: str, cluster: Any) -> None:
    """The autoscaler's word of what it may bring is ours here; the node that comes is real."""
    process = driver(
        address,
        """
raysys.cluster.SETTLE_S = .5
raysys.cluster.state.get_max_resources_from_cluster_config = lambda: {"CPU": 3, "GPU": 1}
for bundles in ([{"CPU": 1}] * 4, [{"GPU": 2}]):
    try:
        make_room(Need("the work", bundles), 2)
    except UserError as error:
        print(error)
make_room(Need("the work", [{"CPU": 1}] * 3), 2)
print("there is room", flush=True)
""",
    )
    assert process.stderr is not None and process.stdout is not None
    said = next(line for line in process.stderr if "waiting for the autoscaler" in line)
    assert "the work needs 3 CPUs, the cluster has 2; waiting for the autoscaler" in said and "2 of 2 CPUs are free" in said
    node = cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    try:
        cpus, gpus, room = process.communicate(timeout=90)[0].splitlines()
    finally:
        cluster.remove_node(node)
    assert "needs 4 CPUs, with all nodes that its autoscaler may bring the cluster has 3" in cpus
    assert "needs 2 GPUs" in gpus and room == "there is room" and process.returncode == 0


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
