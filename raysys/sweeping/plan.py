"""The trials of a sweep: those that have ended, and which comes next.

In: the words, a space, results of trials as they end (W/trials/TRIAL/result.json), points that an earlier call proposed (W/points). Out: jobs,
rows. No Ray; running them is left to :mod:`raysys.sweeping.on_ray`.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import asdict, dataclass, replace
from typing import Any

from raysys.config import SweepConfig, TrainConfig
from raysys.console import hushed, say
from raysys.corpus.index import SampleIndex
from raysys.corpus.shards import absolute_corpus
from raysys.errors import UserError
from raysys.evaluation.metrics import PRIMARY
from raysys.models import portable
from raysys.output import Output, fingerprint
from raysys.storage import absolute, exists, join, list_names, read_json, write_json
from raysys.sweeping.results import PointResult, Row, points_of, row_of
from raysys.sweeping.search import Tpe, draw_points, trials_of
from raysys.sweeping.space import Point, Space, Trial, at_trial, grid, size
from raysys.training.model import check_training_model
from raysys.training.samples import check_evidence, choose_samples, order_of

EVIDENCE = ("corpus", "annotations", "selection", "policy")
"""Words that say which samples are kept."""
CRASHED = {"status": "crashed"}


@dataclass(frozen=True)
class Job:
    """What a trial's process does."""

    name: str
    cfg: TrainConfig
    """Its words, its output among them; paths in it hold in any process."""
    evidence: str
    """Folder of the selection (or the index) that it shares with other trials."""


def _anywhere(cfg: TrainConfig) -> TrainConfig:
    """With paths that hold in any process."""
    model, pretrained = portable(cfg.model, cfg.pretrained)
    return replace(
        cfg,
        corpus=absolute_corpus(cfg.corpus),
        annotations=absolute(cfg.annotations) if cfg.annotations else None,
        selection=absolute(cfg.selection) if cfg.selection else None,
        model=model,
        pretrained=pretrained,
    )


class Plan:
    """All that is known of the trials; tpe adds points as it goes."""

    def __init__(self, cfg: SweepConfig, base: TrainConfig, space: Space) -> None:
        self._cfg, self._base, self._space = cfg, base, space
        self.keys = list(space)
        self.objectives = [f"{name}/{PRIMARY[name]}" for name in base.evaluators]
        self.results: dict[str, dict[str, Any]] = {}
        """Of the trials that have ended, by name."""
        self._points: list[Point] = []
        self._queue: deque[Trial] = deque()
        """Trials that have not begun in this call."""
        self._configs: dict[int, TrainConfig] = {}
        self._judged: dict[str, SampleIndex] = {}
        self.refused: set[str] = set()
        """Evidence (``Job.evidence``) that cannot be trained on."""
        self._tpe: Tpe | None = None
        self._num_points = cfg.num_samples or 0
        if cfg.search == "grid":
            self._points = grid(space)
            self._num_points = len(self._points)
        elif cfg.search == "random":
            self._num_points = int(min(self._num_points, size(space)))
            self._points = draw_points(space, seed=cfg.seed, count=self._num_points)
        else:
            self._tpe = Tpe(space, seed=cfg.seed, num_objectives=len(self.objectives) if cfg.objective == "front" else 1)
            self._num_points = int(min(self._num_points, size(space)))

    def check(self) -> None:
        """:raises UserError: where a point can not be trained, before anything runs."""
        if (
            self._base.annotations is None
            and "annotations" not in self.keys
            and any(k.split(".")[0] == "policy" for k in self.keys)
        ):
            raise UserError("space: policy is swept, so annotations=FOLDER is needed (raysys annotate makes it, once)")
        alone = [Point(0, {key: value}) for key, said in self._space.items() if isinstance(said, list) for value in said]
        configs = (
            [self.config(point) for point in self._points] or [at_trial(self._base, Trial(p, 0), "") for p in alone] or [self._base]
        )
        for cfg in configs:
            check_evidence(cfg)
        for cfg in {repr((c.model, c.pretrained, c.loss, c.towers, c.train)): c for c in configs}.values():
            check_training_model(cfg)

    def take_up(self, output: Output) -> None:
        """Go on with what an earlier call left: points that it proposed, trials that have ended; what crashed comes again."""
        self._output = output
        folder = output.join("points")
        if self._tpe and exists(folder):
            for number, file in enumerate(sorted(name for name in list_names(folder) if not name.startswith(".tmp-"))):
                self._points.append(Point(number, read_json(join(folder, file))))
                self._tpe.take_up(self._points[-1])
        for trial in self.trials():
            file = self.result_file(trial.name)
            if exists(file):
                self.results[trial.name] = read_json(file)
        for point in self._points:
            self._tell(point)
        for trial in self.trials():
            if self.results.get(trial.name, CRASHED)["status"] == "crashed" and (self._tpe is None or self._can_be(trial)):
                self._queue.append(trial)

    def trials(self) -> list[Trial]:
        """In the order in which they run. Of tpe, those of the points that are proposed, point by point: it learns of whole points."""
        seeds = range(self._cfg.seed, self._cfg.seed + self._cfg.seeds)
        if self._tpe:
            return [trial for point in self._points for trial in trials_of([point], seeds)]
        return trials_of(self._points, seeds)

    @property
    def num_trials(self) -> int:
        """Also those that tpe has not proposed yet."""
        return max(self._num_points, len(self._points)) * self._cfg.seeds

    @property
    def num_to_come(self) -> int:
        return len(self._queue) + self.num_trials - len(self._points) * self._cfg.seeds

    def result_file(self, trial: str) -> str:
        return self._output.join("trials", trial, "result.json")

    def config(self, point: Point) -> TrainConfig:
        """The words of a point, with the sweep's seed and no output; paths in them hold in any process."""
        if point.number not in self._configs:
            self._configs[point.number] = _anywhere(at_trial(self._base, Trial(point, self._cfg.seed), ""))
        return self._configs[point.number]

    def job(self, trial: Trial) -> Job:
        return self._job(trial.name, replace(self.config(trial.point), seed=trial.seed))

    def _job(self, name: str, cfg: TrainConfig) -> Job:
        judged = fingerprint([asdict(cfg.corpus), cfg.annotations, cfg.selection, asdict(cfg.policy)])
        return Job(name, replace(cfg, output=self._output.join("trials", name)), self._output.join("evidence", judged))

    def judge(self) -> None:
        """Make the selections (or indexes) of the trials to come, each once for all that rest on it, and say what they keep.

        Before any GPU is asked for: a policy that keeps too little is told here, and its trials fail at once.
        """
        first = {self.job(trial).evidence: trial for trial in reversed(self._queue)}
        for trial in reversed(first.values()):
            said = [f"{key}={value}" for key, value in trial.point.values.items() if key.split(".")[0] in EVIDENCE]
            what, job = ", ".join(said) or "all points", self.job(trial)
            try:
                index = self.judge_for(job)
                order_of(job.cfg, index)
            except UserError as error:
                say(f"sweep: {what}: {error}")
                self.refused.add(job.evidence)
                continue
            passes = job.cfg.num_steps * job.cfg.global_batch / len(index)
            share = f"{len(index):,} of {index.num_samples_before:,} samples ({len(index) / index.num_samples_before:.1%})"
            say(f"sweep: {what}: keeps {share}, seen {passes:.1f} times")

    def judge_for(self, job: Job) -> SampleIndex:
        """The selection (or index) of a job, which is made where it is not there. :raises UserError: where that cannot be."""
        if job.evidence not in self._judged:
            with hushed():  # filter's own lines
                self._judged[job.evidence] = choose_samples(job.cfg, job.evidence)
        return self._judged[job.evidence]

    def coming(self) -> list[Job]:
        """The next trials, which stay to come; where tpe has still to propose the first, one with the words as they are."""
        return [self.job(trial) for trial in self._queue] or [self._job("words", _anywhere(self._base))]

    def next(self) -> Job | None:
        """The next trial; None: that were all."""
        while not self._queue and self._tpe and len(self._points) < self._num_points:
            point = self._tpe.propose()
            assert point is not None, "num_points is at most the size of the space"
            write_json(self._output.join("points", f"{point.number:06d}.json"), point.values)
            self._points.append(point)
            self._queue.extend(trial for trial in self.trials() if trial.point == point and self._can_be(trial))
        return self.job(self._queue.popleft()) if self._queue else None

    def _can_be(self, trial: Trial) -> bool:
        """Whether the values of a proposed point can be together; else its trial has failed."""
        try:
            check_evidence(self.config(trial.point))
        except UserError as error:
            self.end(trial.name, {"status": "failed", "reason": str(error)})
            return False
        return True

    def end(self, name: str, result: dict[str, Any]) -> None:
        """A trial has ended."""
        write_json(self.result_file(name), result)
        self.results[name] = result
        self._tell(next(trial.point for trial in self.trials() if trial.name == name))

    def _tell(self, point: Point) -> None:
        """Tpe learns of a point when the last of its seeds has ended."""
        rows = self.rows(of_point=point.number)
        if self._tpe is None or any(row["status"] in ("missing", "crashed") for row in rows):
            return
        if all(row["status"] == "finished" for row in rows):
            [result] = points_of(rows, self.keys, self.objectives)
            assert result.score is not None
            means = tuple(result.objectives[name].mean for name in self.objectives)
            self._tpe.tell(point.number, means if self._cfg.objective == "front" else (result.score.mean,))
        elif all(row["status"] in ("finished", "stopped") for row in rows):
            score = statistics.fmean(row["score"] for row in rows)
            self._tpe.tell(point.number, (score,), stopped_at=min(row["steps"] for row in rows))
        else:
            self._tpe.tell(point.number, None)

    def rows(self, of_point: int | None = None) -> list[Row]:
        """A line a trial, by point and seed."""
        names = {"objectives": self.objectives, "objective": self._cfg.objective}
        trials = [trial for trial in self.trials() if of_point in (None, trial.point.number)]
        return [
            row_of(t.name, t.point.number, t.seed, t.point.values, self.results.get(t.name), **names)  # type: ignore[arg-type]
            for t in sorted(trials, key=lambda trial: (trial.point.number, trial.seed))
        ]

    def words_of(self, best: PointResult) -> TrainConfig:
        """What ``raysys train`` is to be told for a point."""
        return self.config(Point(best.number, best.values))
