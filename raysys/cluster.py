"""Ray's edge: a cluster that RAY_ADDRESS names, else a fresh local one of our own; and whether work has room there.

In: :class:`RayConfig`, what work needs (:class:`Need`). Out: Ray that is up, room that is there, or one line that says what is missing: at
once where it can never come, after a while where others hold it or an autoscaler may bring it.
Never joins a Ray that happens to run on this machine, unless RAY_ADDRESS=auto says so; never stops one that it did not start.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints a table of its own, whatever the verbosity
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # what trials measure stands in their own logs
os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")  # a trial whose process died is begun again, and told of by us
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C ends a sweep as it ends every verb
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's coming default; silences its warning

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.state import available_resources_per_node
from ray._private.worker import global_worker
from ray.core.generated import autoscaler_pb2, gcs_service_pb2, gcs_service_pb2_grpc
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysys.config import RayConfig
from raysys.console import duration, waiting_for, warn
from raysys.errors import UserError, WorkFailed
from raysys.masking import INTERPOLATED, mask
from raysys.patience import RETRY_S
from raysys.room import Bundle, Need, left_over, missing
from raysys.storage import exists, join, read_bytes, remove_file, write_bytes

TELL_EVERY_S = 60.0
"""Between two lines of one that waits."""
ANSWER_S = 10.0
"""What the head of a cluster may take to answer."""
STORAGE_ANSWER_S = RETRY_S + 60.0
"""What a node may take to look at the storage: it waits itself for a store that answers errors."""
SETTLE_S = 5.0
"""What work that has just ended may take to give its resources back."""


# ---- up and down ------------------------------------------------------------------------------------------------------


@contextmanager
def ray_session(cfg: RayConfig) -> Iterator[None]:
    """Ray is up within; a session within a session is the same one.

    :raises UserError: where RAY_ADDRESS names no cluster that lets us in.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if address in ("", "local"):  # Ray's words for a fresh one on this machine
        address = None
    if address and "://" in address:
        raise UserError(
            f"RAY_ADDRESS={mask(address)}: raysys runs on the cluster, not through Ray Client or the dashboard; "
            "`ray job submit --address http://HOST:8265 --working-dir . -- python -m raysys VERB ...` brings it there"
        )
    if address and address != "auto" and not re.fullmatch(r".+:\d+", address):
        raise UserError(f"RAY_ADDRESS={address} is no HOST:PORT, as 10.0.0.1:6379")
    if not cfg.verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        _knock(address)
        with (
            waiting_for("starting Ray" if address is None else f"joining Ray at {address}"),
            nullcontext() if cfg.verbose else _mute(),
        ):
            ray.init(
                address=address or "local",
                num_cpus=None if address else cfg.num_cpus,
                include_dashboard=None if address else cfg.dashboard,
                dashboard_host="127.0.0.1",
                log_to_driver=cfg.verbose,
                logging_level=logging.INFO if cfg.verbose else logging.ERROR,
                namespace="raysys",
                # which variables hold secrets, not what they hold
                runtime_env={"env_vars": {INTERPOLATED: os.environ[INTERPOLATED]}} if os.environ.get(INTERPOLATED) else None,
            )
    except (ConnectionError, TimeoutError, OverflowError, socket.gaierror) as error:
        if address is None:
            raise WorkFailed(f"Ray did not start on this machine ({error}); `raysys doctor ray.verbose=true` shows why") from error
        raise UserError(
            f"RAY_ADDRESS={address}: no Ray answers there ({error}); start it (`ray start --head` there), "
            "or unset RAY_ADDRESS for a cluster of this machine"
        ) from error
    except ray.exceptions.AuthenticationError as error:
        raise UserError(
            f"RAY_ADDRESS={address}: the cluster lets in only who has its token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
            f"RAY_AUTH_TOKEN_PATH where it is not in ~/.ray/auth_token ({str(error).split('. ')[0]})"
        ) from error
    except RuntimeError as error:
        if "ersion mismatch" not in str(error):
            raise
        raise UserError(f"RAY_ADDRESS={address}: {error}; install the cluster's versions of Python and Ray here") from error
    ray.data.DataContext.get_current().memory_usage_poll_interval_s = (
        None  # walking an actor's pages every second costs it some per cent
    )
    if not cfg.verbose:
        ray.data.DataContext.get_current().enable_progress_bars = False
        ray.data.DataContext.get_current().print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        logging.getLogger("ray.train").setLevel(logging.ERROR)
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _mute() -> Iterator[None]:
    """What Ray's native part writes to stderr while it starts goes nowhere; what goes wrong, it raises too."""
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def _knock(address: str | None) -> None:
    """Where nobody listens Ray would try for minutes; where it has another token, twenty times.

    :raises OSError: nobody answers. :raises AuthenticationError: it takes another token.
    """
    host, _, port = (address or "").rpartition(":")
    if not port.isdigit():
        return
    socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
    channel = init_grpc_channel(f"{host}:{port}", asynchronous=False)
    try:
        gcs = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        gcs.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=ANSWER_S)  # type: ignore[attr-defined]  # made at import
    except grpc.RpcError as error:
        code, details = error.code(), error.details()
        if code == grpc.StatusCode.UNAUTHENTICATED:
            raise ray.exceptions.AuthenticationError(details) from error
        raise ConnectionError(f"{code.name}: {details}") from error
    finally:
        channel.close()


def num_cpus() -> int:
    """CPUs of the whole cluster."""
    return int(ray.cluster_resources().get("CPU", 0))


def on_this_node(*, soft: bool = False) -> NodeAffinitySchedulingStrategy:
    """For what a call cannot do without: it stays beside the driver, and any other node may die."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=soft)


def this_node() -> Node:
    node_id = ray.get_runtime_context().get_node_id()
    return next(node for node in live_nodes() if node.id == node_id)


def only_here() -> dict[str, float]:
    """A resource that no other node has, for those whom Ray lets ask for nothing but resources."""
    return {kind: 0.001 for kind in this_node().total if kind.startswith("node:") and kind != "node:__internal_head__"}


# ---- room -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    id: str
    address: str
    total: dict[str, float]
    free: dict[str, float]


def live_nodes() -> list[Node]:
    """Nodes that are there."""
    free = available_resources_per_node()
    return [
        Node(node["NodeID"], node["NodeManagerAddress"], node["Resources"], free.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"]
    ]


def settled_nodes() -> list[Node]:
    """The same, when what has just ended has given back what it held."""
    end, there = time.monotonic() + SETTLE_S, live_nodes()
    while time.monotonic() < end and any(node.free.get("CPU", 0) < node.total.get("CPU", 0) - 1e-6 for node in there):
        time.sleep(0.1)
        there = live_nodes()
    return there


def make_room(need: Need, wait_minutes: float | None, *, enough: Sequence[Bundle] | None = None, was_there: bool = False) -> None:
    """Return when there is room. What others hold, and what an autoscaler may bring, is waited for, with a line a minute.

    :param wait_minutes: None: without end.
    :param enough: with which the work may begin; None: all that it needs.
    :param was_there: the cluster had it and has lost it: that is waited for too.
    :raises UserError: where the cluster can never have it. :raises WorkFailed: where it did not come in time.
    """
    there = live_nodes()
    fewest = (need if enough is None else Need(need.what, enough)).without_memory()  # memory is nobody's in Ray's books
    why = missing(need, [node.total for node in there])
    if why is not None:
        is_memory = missing(need.without_memory(), [node.total for node in there]) is None
        if not was_there and (is_memory or not _autoscaler().autoscaler_state_version):
            raise UserError(f"{why}; ask for less or add nodes")
        why += "; waiting for nodes" if was_there else "; waiting for the autoscaler"
    else:
        why = f"{need.what} waits: others hold what it needs"
    if not left_over(fewest.bundles, [node.free for node in there]):
        return
    group = placement_group([dict(bundle) for bundle in fewest.bundles])  # what an autoscaler looks at
    began, told = time.monotonic(), 0
    try:
        while not group.wait(1.0):
            spent = time.monotonic() - began
            if any(group.id.hex() in request.details for request in _autoscaler().infeasible_gang_resource_requests):
                raise UserError(f"{why}, which says that it can never bring it; ask for less, or let it bring more or larger nodes")
            if wait_minutes is not None and spent > wait_minutes * 60:
                raise WorkFailed(
                    f"{why}; it did not come in {duration(spent)} (ray.wait_minutes={wait_minutes:g}); {what_is_free(need)}; "
                    "ask for less, or wait longer"
                )
            if spent > SETTLE_S + told * TELL_EVERY_S:
                told += 1
                warn(f"{why} ({duration(spent)}); {what_is_free(need)}; to wait no longer: Ctrl-C, and ask for less")
    finally:
        remove_placement_group(group)


def _autoscaler() -> Any:
    """What an autoscaler told last; version 0 where there is none (Ray's autoscaler.proto, AutoscalingState)."""
    reply = autoscaler_pb2.GetClusterStatusReply()  # type: ignore[attr-defined]  # made at import
    gcs: Any = global_worker
    reply.ParseFromString(gcs.gcs_client.get_cluster_status())
    return reply.autoscaling_state


def what_is_free(need: Need) -> str:
    there = live_nodes()
    return ", ".join(
        f"{sum(node.free.get(kind, 0) for node in there):g} of {sum(node.total.get(kind, 0) for node in there):g} {kind}s are free"
        for kind in ("CPU", "GPU")
        if need.total(kind)
    )


@contextmanager
def watched(need: Need) -> Iterator[None]:
    """Say so, while work runs within, when the cluster has lost what it needs: Ray waits for nodes in silence."""
    ended = threading.Event()

    def watch() -> None:
        told = 0.0  # when; 0: there is room
        while not ended.wait(SETTLE_S):
            try:
                lost = missing(need, [node.total for node in live_nodes()])
            except (ray.exceptions.RayError, ConnectionError):  # the head starts again
                continue
            if lost is None and told:
                warn(f"{need.what}: there is room again")
                told = 0.0
            elif lost is not None and (not told or time.monotonic() - told > TELL_EVERY_S):
                warn(f"{lost}; waiting for nodes")
                told = time.monotonic()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


# ---- storage ----------------------------------------------------------------------------------------------------------


def check_storage(output: str | None, inputs: Mapping[str, str]) -> None:
    """Every node that may work sees what this process sees, and may write where it writes.

    :param output: a folder of ours with settings.json. :param inputs: key -> file or folder.
    :raises UserError: which node does not, and what.
    """
    here = ray.get_runtime_context().get_node_id()
    workers = [node for node in live_nodes() if node.id != here and (node.total.get("CPU", 0) or node.total.get("GPU", 0))]
    mark = read_bytes(join(output, "settings.json")) if output else b""
    task = ray.remote(num_cpus=0, max_retries=0)(_see_storage)
    there = [NodeAffinitySchedulingStrategy(node.id, soft=False) for node in workers]
    asked = [task.options(scheduling_strategy=node).remote(output, mark, dict(inputs)) for node in there]
    if asked:
        ray.wait(asked, num_returns=len(asked), timeout=STORAGE_ANSWER_S)
    for node, answer in zip(workers, asked, strict=True):
        if not ray.wait([answer], timeout=0)[0]:
            raise UserError(
                f"node {node.address} could not look at the storage in {STORAGE_ANSWER_S:.0f} s; "
                "mend the mount that hangs there, or take the node out"
            )
        try:
            seen = ray.get(answer)
        except ray.exceptions.RayError as error:
            if node.id not in {other.id for other in live_nodes()}:
                continue  # it died; nothing will run there
            seen = str(getattr(error, "cause", error)).strip().splitlines()[-1]
        if seen is not None:
            raise UserError(
                f"node {node.address} {seen}; all nodes must see the same files: mount the folder everywhere, or give s3:// or gs://"
            )


def refuse_other_storage(output: str) -> None:
    """By a process of a node that may have come after :func:`check_storage`: what it wrote would be lost in silence.

    :raises UserError: where the output is not there.
    """
    if not exists(join(output, "settings.json")):
        raise UserError(
            f"node {platform.node()} does not see output={mask(output)}: mount the folder on every node, or give s3:// or gs://"
        )


def _see_storage(output: str | None, mark: bytes, inputs: dict[str, str]) -> str | None:
    """What this node does not see."""
    try:
        for key, path in inputs.items():
            if not exists(path):
                return f"does not see {key}={mask(path)}"
        if output is not None:
            if not exists(join(output, "settings.json")) or read_bytes(join(output, "settings.json")) != mark:
                return f"does not see output={mask(output)} as the driver does"
            probe = join(output, f".tmp-{uuid.uuid4().hex}")
            write_bytes(probe, b"")
            remove_file(probe)
    except (UserError, OSError) as error:
        return f"cannot use the storage: {error}"
    return None
