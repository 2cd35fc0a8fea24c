"""``raysys evaluate`` on Ray: a pool of actors that keep their sets between models, each with its share of every set.

In: :class:`EvaluateConfig`; weights of a training. Out: E/{results, predictions, tensorboard, comparison.json, manifest.json}. What is asked stands in
:mod:`raysys.evaluation.evaluator`, what is written in :mod:`raysys.evaluation.results`.
"""

from __future__ import annotations

import shlex
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysys.cluster import TELL_EVERY_S, check_storage, live_nodes, make_room, ray_session, settled_nodes, what_is_free
from raysys.config import EVALUATORS, EvaluateConfig, ModelConfig, QuestionsConfig, ServiceConfig
from raysys.console import Progress, duration, say, tell_result, warn
from raysys.errors import UserError, WorkFailed
from raysys.evaluation.class_sets import read_class_set
from raysys.evaluation.evaluator import ATTACKED, Embeddings, Evaluator, SetConfig, SetResult, read_set
from raysys.evaluation.on_board import write_board
from raysys.evaluation.results import lines, read_results, result_file, write_comparison, write_result
from raysys.masking import mask
from raysys.models import LoadedModel, check_model, load_model, model_name, portable
from raysys.output import Output, open_output, settings_of
from raysys.room import Need, num_that_fit
from raysys.storage import absolute, exists, list_names, read_json

GPU_SERVICE_CPUS = 4.0
"""Of an actor with a GPU or a share of one beside workers: it decodes its sets once."""
SERVICE_CPUS = 0.1
"""Of an actor beside workers: below what they leave of a core (they ask for .9 each), so that it fits on the machine that they fill."""


# ---- the service ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """A model by its words."""

    model: str
    pretrained: str | None


@dataclass(frozen=True)
class Trained:
    """A model that is being trained: references to its architecture, and to its weights as they are now."""

    blueprint: ray.ObjectRef[LoadedModel]
    weights: ray.ObjectRef[dict[str, torch.Tensor]]


class _EvaluatorActor:
    """An :class:`Evaluator` behind an actor, with the model that it was asked about last."""

    def __init__(self, sets: dict[str, SetConfig], service: ServiceConfig, rank: int, of: int, threads: int) -> None:
        torch.set_num_threads(threads)
        has_gpu = ray.get_runtime_context().get_assigned_resources().get("GPU", 0) > 0
        if has_gpu and not torch.cuda.is_available():
            raise UserError("service.num_gpus_per_actor: Ray gave a GPU, but torch sees none; install a CUDA build of torch")
        device = "cuda" if has_gpu else "cpu"
        self._evaluator = Evaluator(sets, service, device=device, threads=threads, rank=rank, of=of)
        self._device = device
        self._question = ""
        self._loaded: LoadedModel | None = None
        self._done: dict[tuple[str, str, str], tuple[int, int]] = {}

    def embed(self, question: str, source: Spec | Trained, name: str) -> Embeddings:
        """This actor's share of a set; ``question`` stands for the model."""
        if question != self._question:
            self._question, self._loaded = "", None  # two models at once may be too many
            self._loaded = self._load(source)
            self._question = question
        assert self._loaded is not None

        def watch(set_name: str, unit: str, done: int, total: int) -> None:
            self._done[question, set_name, unit] = done, total

        return self._evaluator.embed(self._loaded, name, watch)

    def _load(self, source: Spec | Trained) -> LoadedModel:
        if isinstance(source, Spec):
            torch.manual_seed(0)  # pretrained=random: all actors draw the same
            return load_model(source.model, source.pretrained, device=self._device)
        loaded = deepcopy(ray.get(source.blueprint))  # what comes from Ray's object store is read-only
        weights: Any = ray.get(source.weights)
        loaded.model.load_state_dict(weights)
        return loaded

    def answer(self, name: str, *shares: Embeddings) -> SetResult:
        return self._evaluator.answer(name, shares)

    @ray.method(concurrency_group="watch")
    def done(self, question: str, name: str) -> dict[str, tuple[int, int]]:
        """Unit (pictures, classes, captions) -> done and total."""
        return {unit: done for (of_model, of_set, unit), done in list(self._done.items()) if (of_model, of_set) == (question, name)}

    @ray.method(concurrency_group="watch")
    def decoded(self) -> dict[str, int]:
        return dict(self._evaluator.num_decoded)


@dataclass(frozen=True)
class Asked:
    """A question that is under way."""

    question: str
    name: str
    """Of the set."""
    result: ray.ObjectRef[SetResult]


class EvaluatorPool:
    """Actors that share every set; may be sent to any process of the cluster.

    They start again when they die, and what they were asked is asked again.
    """

    def __init__(self, sets: dict[str, SetConfig], service: ServiceConfig, slots: list[dict[str, Any]], *, threads: int) -> None:
        """:param slots: Ray's options of each actor. :param threads: of each, for torch and for decoding."""
        self._names = list(sets)
        actor: Any = ray.remote(concurrency_groups={"watch": 1})(_EvaluatorActor)  # type: ignore[call-overload]  # Ray forgot it there
        self._actors = [
            actor.options(max_restarts=-1, max_task_retries=3, **slot).remote(sets, service, rank, len(slots), threads)
            for rank, slot in enumerate(slots)
        ]

    def ask(self, source: Spec | Trained, names: list[str] | None = None) -> list[Asked]:
        """A question for each set (None: all), at once; ``ray.get`` of their results waits."""
        question = uuid.uuid4().hex
        asked = []
        for name in self._names if names is None else names:
            shares = [actor.embed.remote(question, source, name) for actor in self._actors]
            asked.append(Asked(question, name, self._actors[0].answer.remote(name, *shares)))
        return asked

    def done(self, asked: Asked) -> dict[str, tuple[int, int]]:
        """Unit -> done and total, over all actors."""
        together: dict[str, tuple[int, int]] = {}
        calls = [actor.done.remote(asked.question, asked.name) for actor in self._actors]
        for of_actor in self._answers(calls, timeout_s=1.0):
            for unit, (done, total) in of_actor.items():
                together[unit] = together.get(unit, (0, 0))[0] + done, total
        return together

    def num_decoded(self) -> dict[str, int]:
        """Set -> pictures that were decoded; those that lay decoded on disk don't count."""
        of_actors = self._answers([actor.decoded.remote() for actor in self._actors], timeout_s=10.0)
        return {name: sum(decoded.get(name, 0) for decoded in of_actors) for name in self._names}

    @staticmethod
    def _answers(calls: list[Any], *, timeout_s: float) -> list[Any]:
        """Of those actors that live; one that starts again does not answer."""
        answers = []
        for call in ray.wait(calls, num_returns=len(calls), timeout=timeout_s)[0]:
            with suppress(ray.exceptions.RayActorError):
                answers.append(ray.get(call))
        return answers

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)


def pool_beside(sets: dict[str, SetConfig], service: ServiceConfig, *, threads: int) -> EvaluatorPool:
    """A pool that works beside a training: on a GPU or a share of one where the words say so, else while workers rest."""
    options = {"num_cpus": cpus_beside(service), "num_gpus": service.num_gpus_per_actor}
    return EvaluatorPool(sets, service, [options] * num_actors_beside(service), threads=threads)


def cpus_beside(service: ServiceConfig) -> float:
    """CPUs that each actor of :func:`pool_beside` asks for."""
    return GPU_SERVICE_CPUS if service.num_gpus_per_actor else SERVICE_CPUS


def num_actors_beside(service: ServiceConfig) -> int:
    """Actors of :func:`pool_beside`."""
    return service.num_actors or 1


def bundles_beside(service: ServiceConfig) -> list[dict[str, float]]:
    """What the actors of :func:`pool_beside` take."""
    return [{"CPU": cpus_beside(service), "GPU": service.num_gpus_per_actor}] * num_actors_beside(service)


def _need(service: ServiceConfig) -> Need:
    """The fewest evaluators that will do."""
    number = max(service.num_actors, 1)
    return Need(f"evaluate with {number} evaluators", [{"CPU": 1.0, "GPU": service.num_gpus_per_actor}] * number)


def _whole_cluster(service: ServiceConfig, wait_minutes: float | None, *, was_there: bool) -> list[dict[str, Any]]:
    """Ray's options of actors that take every GPU share that is free, or without GPUs every free CPU.

    :param was_there: a node was lost: what is missing now may come back.
    :raises UserError: where ``service`` asks for more than there is.
    """
    share, fit = service.num_gpus_per_actor, dict[str, int]()
    while not fit:  # others may be quicker
        make_room(_need(service), wait_minutes, was_there=was_there)
        free = {node.id: node.free for node in settled_nodes()}
        numbers = {node_id: num_that_fit([{"CPU": 1.0, "GPU": share}], [there]) for node_id, there in free.items()}
        fit = {node_id: number for node_id, number in numbers.items() if number}
    most = sum(fit.values())
    num = min(service.num_actors, most) or (most if share else len(fit))
    actors = dict.fromkeys(fit, 0)
    for _ in range(num):  # each where most is free
        actors[max(fit, key=lambda node_id: (fit[node_id] - actors[node_id]) / fit[node_id])] += 1
    return [
        {
            "num_cpus": int(free[node_id]["CPU"]) // number,
            "num_gpus": share,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=True),  # if its node dies, elsewhere
        }
        for node_id, number in actors.items()
        for _ in range(number)
    ]


# ---- the verb ---------------------------------------------------------------------------------------------------------


def evaluator_sets(cfg: QuestionsConfig) -> tuple[dict[str, SetConfig], dict[str, str]]:
    """The sets that a config asks for, with paths that hold on any process of this machine; and their fingerprints.

    Each is read once here: a missing one is refused before anything runs.
    """
    sets: dict[str, SetConfig] = {}
    fingerprints: dict[str, str] = {}
    for name in sorted(set(cfg.evaluators), key=EVALUATORS.index):  # the clean set before the attacked one
        a_set: SetConfig = getattr(cfg, name)
        keys = ("path", "labels", "classes", "templates", "captions")
        files = [key for key in keys if getattr(a_set, key, None) and exists(getattr(a_set, key))]
        paths: dict[str, Any] = {key: absolute(getattr(a_set, key)) for key in files}
        sets[name] = replace(a_set, **paths)
        fingerprints[name] = read_set(name, sets[name]).fingerprint
    return sets, fingerprints


def evaluate(cfg: EvaluateConfig) -> str:
    """Ask each model every question; what an earlier call finished is not asked again. :returns: the output folder."""
    models = models_of(cfg)
    for model in models.values():
        check_model(model.model, model.pretrained)
    sets, fingerprints = evaluator_sets(cfg)
    output = open_output(cfg.output, "evaluate", settings_of(cfg, "service") | {"service": {"precision": cfg.service.precision}})
    todo = {name: [s for s in sets if not exists(result_file(output, s, name))] for name in models}
    _refuse_changed(output, models, todo, fingerprints)
    if output.finished:
        say("evaluate: nothing is left to do, this evaluation is finished")
    else:
        num_decoded: dict[str, int] = {}
        try:
            if any(todo.values()):
                with ray_session(cfg.ray):
                    lost = False
                    while any(todo.values()):
                        slots = _whole_cluster(cfg.service, cfg.ray.wait_minutes, was_there=lost)
                        check_storage(None, inputs_of(sets) | _model_files(models))
                        pool = EvaluatorPool(sets, cfg.service, slots, threads=min(slot["num_cpus"] for slot in slots))
                        try:
                            for name, result in _ask(pool, models, todo, _nodes_of(slots)):
                                write_result(output, name, models[name], cfg.service, result, fingerprints[result.evaluator])
                                todo[name].remove(result.evaluator)
                            num_decoded = pool.num_decoded()
                        except _NodeLost as gone:
                            lost = True
                            warn(f"evaluate: node {gone} is gone; what is not answered is asked again")
                        pool.close()
        except UserError:
            if not list_names(output.join("results")):
                output.forget()  # other words may mend it, and would be refused here
            raise
    results = read_results(output, list(sets), list(models))
    comparison = write_comparison(output, results) if len(models) > 1 else []
    if not output.finished:
        attacked = read_class_set(cfg.imagenet_attr, ATTACKED, attacked=True) if ATTACKED in sets else None
        for number, name in enumerate(models):
            write_board(output, name, models[name], [of_models[number] for of_models in results.values()], attacked)
        output.finish({s: of_models[0]["metrics"]["num_pictures"] for s, of_models in results.items()}, decoded=num_decoded)
    say("\n".join(lines(results, comparison)))
    tell_result(mask(output.path), next_words=f"raysys report {shlex.quote(mask(output.path))}")
    return output.path


def _refuse_changed(
    output: Output, models: dict[str, ModelConfig], todo: dict[str, list[str]], fingerprints: dict[str, str]
) -> None:
    """:raises UserError: where a finished result is of a set that has changed since."""
    for name in models:
        for evaluator, fingerprint in fingerprints.items():
            if evaluator not in todo[name]:
                file = result_file(output, evaluator, name)
                if read_json(file)["set"] != fingerprint:
                    raise UserError(f"{mask(file)} is of another state of the set {evaluator}; give a new folder")


def inputs_of(sets: dict[str, SetConfig]) -> dict[str, str]:
    """Key of the words -> what every node must see."""
    return {f"{name}.path": str(a_set.path) for name, a_set in sets.items()}


def files_of(model: str, pretrained: str | None) -> dict[str, str]:
    """Key of the words -> file or folder, where a model and its weights are such."""
    words = zip(("model", "pretrained"), portable(model, pretrained), strict=True)
    paths = {key: word.removeprefix("local-dir:") for key, word in words if word is not None}
    return {key: path for key, path in paths.items() if exists(path)}


def _model_files(models: dict[str, ModelConfig]) -> dict[str, str]:
    return {
        f"models.{name}.{key}": path
        for name, model in models.items()
        for key, path in files_of(model.model, model.pretrained).items()
    }


def models_of(cfg: EvaluateConfig) -> dict[str, ModelConfig]:
    """Name in file names -> model."""
    return cfg.models or {model_name(cfg.model): ModelConfig(cfg.model, cfg.pretrained)}  # type: ignore[arg-type]  # check(): one is given


class _NodeLost(Exception):
    """A node with evaluators has died; its argument is the address."""


def _nodes_of(slots: list[dict[str, Any]]) -> dict[str, str]:
    """Nodes with evaluators -> addresses."""
    used = {slot["scheduling_strategy"].node_id for slot in slots}
    return {node.id: node.address for node in live_nodes() if node.id in used}


def _ask(
    pool: EvaluatorPool, models: dict[str, ModelConfig], todo: dict[str, list[str]], used: dict[str, str]
) -> Iterator[tuple[str, SetResult]]:
    """All questions are put at once, so that no device waits for another; answers with the model's name, in order.

    :raises _NodeLost: one of ``used``: its share would wait for another node with room, which may never come.
    """
    asked = [
        (name, one)
        for name, sets in todo.items()
        if sets
        for one in pool.ask(Spec(*portable(models[name].model, models[name].pretrained)), sets)
    ]
    for name, one in asked:
        label = one.name if len(models) == 1 else f"{name}, {one.name}"
        try:
            _show(pool, one, label, used)
            yield name, ray.get(one.result)
        except ray.exceptions.RayActorError as error:
            raise WorkFailed(
                f"the evaluator died again and again at {label}; with too little memory, try a smaller service.batch_size"
            ) from error


def _show(pool: EvaluatorPool, asked: Asked, label: str, used: dict[str, str]) -> None:
    """A line of progress for each unit, until the answer is there. :raises _NodeLost: where it may never come."""
    shown: dict[str, Progress] = {}
    try:
        _follow(pool, asked, label, used, shown)
    finally:
        for progress in shown.values():
            progress.close()


def _follow(pool: EvaluatorPool, asked: Asked, label: str, used: dict[str, str], shown: dict[str, Progress]) -> None:
    """:param shown: gets a line for each unit, the newest of them on the screen."""
    there, look, heard = False, time.monotonic(), time.monotonic()
    while not there:
        there = bool(ray.wait([asked.result], timeout=0.5)[0])
        if not there and time.monotonic() > look:
            look = time.monotonic() + 5.0
            lost = used.keys() - {node.id for node in live_nodes()}
            if lost:
                raise _NodeLost(used[min(lost)])
            if time.monotonic() - heard > TELL_EVERY_S:
                heard = time.monotonic()
                everything = Need("", [{"CPU": 1, "GPU": 1}])
                warn(f"{label}: nothing heard for {duration(TELL_EVERY_S)}; {what_is_free(everything)}")
        for unit, (done, total) in pool.done(asked).items():
            if unit not in shown:
                for before in shown.values():
                    before.close()
                shown[unit] = Progress(label, total, unit)
            if done > shown[unit].done:
                heard = time.monotonic()
                shown[unit].advance(done - shown[unit].done)
