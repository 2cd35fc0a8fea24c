"""Ray's start and end: a cluster that RAY_ADDRESS names, else a fresh local one of our own.

Never joins a Ray that happens to run on this machine, never stops one that it did not start.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints a table of its own, whatever the verbosity
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # what trials measure stands in their own logs
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C ends a sweep as it ends every verb
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's coming default; silences its warning

import ray

from raysys.config import RayConfig
from raysys.storage import UserError


@contextmanager
def ray_session(cfg: RayConfig) -> Iterator[None]:
    """Ray is up within; a session within a session is the same one."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if not cfg.verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        ray.init(
            address=address or "local",
            num_cpus=None if address else cfg.num_cpus,
            include_dashboard=None if address else cfg.dashboard,
            log_to_driver=cfg.verbose,
            logging_level=logging.INFO if cfg.verbose else logging.ERROR,
            namespace="raysys",
        )
    except ConnectionError as error:
        raise UserError(f"RAY_ADDRESS={address}: no Ray answers there ({error})") from error
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


def num_cpus() -> int:
    """CPUs of the whole cluster."""
    return int(ray.cluster_resources().get("CPU", 0))


def require(what: str, *, cpus: float = 0, gpus: float = 0) -> None:
    """Refuse what can never run: Ray would wait in silence. :raises UserError: with both numbers."""
    there = ray.cluster_resources()
    for kind, needed in (("CPU", cpus), ("GPU", gpus)):
        if needed > there.get(kind, 0):
            raise UserError(f"{what} needs {needed:g} {kind}s, the cluster has {there.get(kind, 0):g}; ask for less or add nodes")
