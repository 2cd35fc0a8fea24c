"""Does work find a place on the nodes of a cluster? Arithmetic, without Ray.

In: what processes need (:data:`Bundle`), what nodes have. Out: what finds no place, and the words for it. Who asks, and who waits, stands in
:mod:`raysys.cluster`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Bundle = Mapping[str, float]
"""Resources (``CPU``, ``GPU``, ``memory`` and ``object_store_memory`` in bytes) that one process needs on one node, or that a node has."""
SLACK = 1e-6
"""Of a resource: Ray counts in parts of 10,000."""


@dataclass(frozen=True)
class Need:
    """What some work asks of a cluster."""

    what: str
    """As a message begins: ``train with 8 workers``."""
    bundles: Sequence[Bundle]

    def total(self, kind: str) -> float:
        return sum(bundle.get(kind, 0) for bundle in self.bundles)

    def without_memory(self) -> Need:
        return Need(self.what, [{kind: n for kind, n in b.items() if "memory" not in kind and n} for b in self.bundles])


class _Room:
    """What is left of a node. A share of a GPU lies on one device, so devices are counted one by one."""

    def __init__(self, node: Bundle) -> None:
        whole = int(node.get("GPU", 0) + SLACK)
        rest = node.get("GPU", 0) - whole
        self._devices = [1.0] * whole + ([rest] if rest > SLACK else [])
        self._left = {kind: number for kind, number in node.items() if kind != "GPU"}

    def size(self) -> tuple[float, float]:
        return sum(self._devices), self._left.get("CPU", 0)

    def take(self, bundle: Bundle) -> bool:
        """Whether the bundle had a place here; then it has it."""
        devices = self._devices_for(bundle.get("GPU", 0))
        rest = {kind: number for kind, number in bundle.items() if kind != "GPU"}
        if devices is None or any(self._left.get(kind, 0) < number - SLACK for kind, number in rest.items()):
            return False
        for device in devices:
            self._devices[device] -= min(bundle["GPU"], 1)
        for kind, number in rest.items():
            self._left[kind] = self._left.get(kind, 0) - number
        return True

    def _devices_for(self, gpus: float) -> list[int] | None:
        if gpus <= 0:
            return []
        fullest_first = sorted(range(len(self._devices)), key=self._devices.__getitem__)
        fit = [device for device in fullest_first if self._devices[device] >= min(gpus, 1) - SLACK]
        number = max(1, round(gpus))  # more than one: whole ones, as Ray wants it
        return fit[:number] if len(fit) >= number else None


def left_over(bundles: Sequence[Bundle], nodes: Sequence[Bundle]) -> list[Bundle]:
    """Bundles that find no place: the largest first, each on the smallest node that has it; by GPUs, or by CPUs if that finds more."""
    kinds = ("GPU", "CPU"), ("CPU", "GPU")
    return min((_left_over(bundles, nodes, order) for order in kinds), key=len)


def _left_over(bundles: Sequence[Bundle], nodes: Sequence[Bundle], order: tuple[str, str]) -> list[Bundle]:
    rooms = [_Room(node) for node in nodes]
    largest_first = sorted(bundles, key=lambda bundle: [bundle.get(kind, 0) for kind in order], reverse=True)
    return [bundle for bundle in largest_first if not _place(bundle, rooms)]


def num_that_fit(bundles: Sequence[Bundle], nodes: Sequence[Bundle], *, beside: Sequence[Bundle] = ()) -> int:
    """How many times all of ``bundles`` find a place, after the others have."""
    rooms = [_Room(node) for node in nodes]
    number = 0
    if all(_place(bundle, rooms) for bundle in beside):
        while all(_place(bundle, rooms) for bundle in bundles):
            number += 1
    return number


def _place(bundle: Bundle, rooms: list[_Room]) -> bool:
    return any(room.take(bundle) for room in sorted(rooms, key=_Room.size))


def missing(need: Need, nodes: Sequence[Bundle]) -> str | None:
    """What of a need these nodes cannot hold, be they free."""
    for kind in ("CPU", "GPU"):
        there = sum(node.get(kind, 0) for node in nodes)
        if need.total(kind) > there + SLACK:
            return f"{need.what} needs {need.total(kind):g} {kind}s, the cluster has {there:g}"
    if not (without := left_over(need.bundles, nodes)):
        return None
    bundle = without[0]
    largest = {kind: max((node.get(kind, 0) for node in nodes), default=0) for kind in bundle}
    return (
        f"{need.what} needs {_words(bundle)} on one node, {len(need.bundles)} times; the cluster's nodes have room for "
        f"{len(need.bundles) - len(without)}, the largest has {_words(largest)}"
    )


def _words(bundle: Bundle) -> str:
    return ", ".join(
        f"{n / 1e9:.3g} GB of {kind.replace('_', ' ')}" if "memory" in kind else f"{n:g} {kind}s" for kind, n in bundle.items() if n
    )
