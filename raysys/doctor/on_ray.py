"""Ray's part: every node is asked by a task that is pinned to it.

In: how to reach Ray. Out: a :class:`Node` for every node, also for one that does not answer.
"""

from __future__ import annotations

import time
from contextlib import ExitStack

import ray
from ray._common.utils import get_default_ray_temp_dir as _sessions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysys.cluster import live_nodes, ray_session
from raysys.config import RayConfig
from raysys.console import waiting_for
from raysys.doctor.facts import gather, versions
from raysys.doctor.judge import Node
from raysys.errors import UserError, WorkFailed

ANSWER_S = 300.0
"""What a node may take: it tries every package and engine, and may be busy."""


def ask_nodes(cfg: RayConfig) -> tuple[float, list[Node]]:
    """(seconds until Ray was there, nodes). The driver's own node is asked for its versions only: its facts are known.

    :raises UserError: where RAY_ADDRESS names no cluster. :raises WorkFailed: where Ray does not start.
    """
    began = time.monotonic()
    with ExitStack() as session:
        try:
            session.enter_context(ray_session(cfg))
        except UserError:
            raise
        except Exception as error:  # where its processes do not come up Ray raises plain ones, and many others
            why = " ".join(str(error).split())
            raise WorkFailed(f"Ray does not start here: {why}; its logs are in {_sessions()}/session_latest/logs") from error
        took_s, here = time.monotonic() - began, ray.get_runtime_context().get_node_id()
        there = live_nodes()
        pinned = [
            ray.remote(versions if node.id == here else gather).options(
                num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)
            )
            for node in there
        ]
        answers = [task.remote() for task in pinned]
        with waiting_for(f"asking {len(there)} nodes"):
            ray.wait(answers, num_returns=len(answers), timeout=ANSWER_S)
        nodes = [Node(node.address, node.total, node.free) for node in there]
        for node, answer in zip(nodes, answers, strict=True):
            _take(node, answer)
    return took_s, nodes


def _take(node: Node, answer: ray.ObjectRef) -> None:
    """Put an answer, or that there is none, into its node."""
    if not ray.wait([answer], timeout=0)[0]:
        node.error = f"does not answer in {ANSWER_S:.0f} s"
        return
    try:
        said = ray.get(answer)
    except (ray.exceptions.TaskUnschedulableError, ray.exceptions.NodeDiedError):
        node.error, node.total = "died while it was asked", {}
        return
    except ray.exceptions.RayError as error:  # it has another raysys, say
        node.error = f"does not answer: {str(getattr(error, 'cause', error)).strip().splitlines()[-1]}"
        return
    if isinstance(said, dict):
        node.versions = said
    else:
        node.facts, node.versions = said, said.versions
