"""Which trials a sweep runs, in one call and in the next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import noise_jpeg, sample, write_tar

from raysys.cli import compose_config
from raysys.config import SweepConfig, TrainConfig
from raysys.errors import UserError
from raysys.output import Output
from raysys.sweeping.plan import Plan
from raysys.sweeping.space import read_space
from raysys.training.samples import weighted_sources


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_tar(tmp_path / "c" / "0.tar", sample("0", noise_jpeg(0)))
    return tmp_path / "c"


def plan(tmp_path: Path, corpus: Path, model: str, space: str, *words: str) -> Plan:
    """A plan of a new call with an output folder W."""
    (tmp_path / "space.yaml").write_text(space)
    cfg: SweepConfig = compose_config(
        "sweep",
        [f"space={tmp_path / 'space.yaml'}", *([] if any("corpus." in word for word in words) else [f"corpus.path={corpus}"]), f"model={model}", "train.steps=10", "seed=5", "output=W",
         "evaluators=[imagenet,retrieval]", f"imagenet.path={corpus}", f"retrieval.path={corpus}", *words],
    )  # fmt: skip
    base = TrainConfig(**{key: getattr(cfg, key) for key in TrainConfig.__dataclass_fields__})
    made = Plan(cfg, base, read_space(cfg.space))
    made.take_up(Output(str(tmp_path / "W"), "sweep", "", finished=False))
    return made


def finished(score: float) -> dict[str, Any]:
    metrics = {"imagenet": {"acc1": score}, "retrieval": {"mean_recall@1": score}}
    return {
        "status": "finished",
        "reason": None,
        "steps": 10,
        "kept_share": 1.0,
        "metrics": metrics,
        "seconds": 1.0,
        "samples_per_s": 1.0,
    }


def end(made: Plan, name: str, result: dict[str, Any]) -> None:
    made.end(name, result)


def rest(made: Plan) -> list[str]:
    names = []
    while (job := made.next()) is not None:
        names.append(job.name)
    return names


GRID = "optim.lr: [0.1, 0.2]\n"


def test_all_points_come_with_the_first_seed_then_with_the_next(tmp_path: Path, corpus: Path, tiny_model: str) -> None:
    made = plan(tmp_path, corpus, tiny_model, GRID, "seeds=2")
    assert made.num_to_come == made.num_trials == 4
    job = made.next()
    assert job is not None and job.cfg.output == str(tmp_path / "W" / "trials" / job.name)
    assert (job.name, job.cfg.optim.lr, job.cfg.seed) == ("000_lr=0.1_seed=5", 0.1, 5)
    assert rest(made) == ["001_lr=0.2_seed=5", "000_lr=0.1_seed=6", "001_lr=0.2_seed=6"]


def test_next_call_keeps_what_ended_and_tries_again_what_crashed(tmp_path: Path, corpus: Path, tiny_model: str) -> None:
    made = plan(tmp_path, corpus, tiny_model, "optim.lr: [0.1, 0.2, 0.3, 0.4]\n")
    end(made, "000_lr=0.1_seed=5", finished(0.5))
    end(made, "001_lr=0.2_seed=5", {"status": "failed", "reason": "it diverged"})
    end(made, "002_lr=0.3_seed=5", {"status": "crashed", "reason": "its process died"})
    again = plan(tmp_path, corpus, tiny_model, "optim.lr: [0.1, 0.2, 0.3, 0.4]\n")
    assert again.num_to_come == 2
    assert rest(again) == ["002_lr=0.3_seed=5", "003_lr=0.4_seed=5"]
    assert [row["status"] for row in again.rows()] == ["finished", "failed", "crashed", "missing"]


def test_more_seeds_only_add_trials(tmp_path: Path, corpus: Path, tiny_model: str) -> None:
    made = plan(tmp_path, corpus, tiny_model, GRID)
    for name in rest(made):
        end(made, name, finished(0.5))
    assert rest(plan(tmp_path, corpus, tiny_model, GRID, "seeds=2")) == ["000_lr=0.1_seed=6", "001_lr=0.2_seed=6"]


def test_more_samples_of_a_random_search_only_add_points(tmp_path: Path, corpus: Path, tiny_model: str) -> None:
    space = "optim.lr: {low: 0.1, high: 0.2}\n"
    few = rest(plan(tmp_path, corpus, tiny_model, space, "search=random", "num_samples=2"))
    assert rest(plan(tmp_path, corpus, tiny_model, space, "search=random", "num_samples=4"))[:2] == few


TPE = ("search=tpe", "num_samples=3", "seeds=2")
RANGE = "optim.lr: {low: 0.001, high: 0.1, log: true}\n"


def test_tpe_goes_on_with_the_points_that_it_proposed_before(tmp_path: Path, corpus: Path, tiny_model: str) -> None:
    made = plan(tmp_path, corpus, tiny_model, RANGE, *TPE)
    assert made.num_trials == made.num_to_come == 6
    names = [job.name for job in (made.next(), made.next(), made.next()) if job]
    assert [name[:3] for name in names] == ["000", "000", "001"]
    end(made, names[0], finished(0.5))
    again = plan(tmp_path, corpus, tiny_model, RANGE, *TPE)
    assert again.num_to_come == 5
    left = rest(again)
    assert left[0] == names[1] and left[1] == names[2]
    assert [name[:3] for name in left] == ["000", "001", "001", "002", "002"]
    assert len({name.split("_")[1] for name in left}) == 3


def test_tpe_learns_of_a_point_when_its_last_seed_has_ended(
    tmp_path: Path, corpus: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, Any, Any]] = []
    monkeypatch.setattr(
        "raysys.sweeping.search.Tpe.tell",
        lambda self, number, objectives, stopped_at=None: told.append((number, objectives, stopped_at)),
    )
    made = plan(tmp_path, corpus, tiny_model, RANGE, *TPE)
    names = rest(made)
    end(made, names[0], finished(0.5))
    assert told == []
    end(made, names[1], finished(0.7))
    end(made, names[2], finished(0.5))
    end(made, names[3], finished(0.5) | {"status": "stopped", "steps": 4})
    end(made, names[4], finished(0.5))
    end(made, names[5], finished(float("nan")))
    assert told == [(0, (pytest.approx(0.6),), None), (1, (0.5,), 4), (2, None, None)]


def test_a_point_file_that_was_being_written_when_the_call_was_killed_is_not_taken_for_a_point(
    tmp_path: Path, corpus: Path, tiny_model: str
) -> None:
    made = plan(tmp_path, corpus, tiny_model, RANGE, *TPE)
    first = made.next()
    (tmp_path / "W" / "points" / ".tmp-1234").write_text('{"optim.l')
    again = plan(tmp_path, corpus, tiny_model, RANGE, *TPE).next()
    assert first is not None and again is not None and again.name == first.name


def test_values_that_cannot_be_together_are_a_failed_point_and_the_search_goes_on(
    tmp_path: Path, corpus: Path, tiny_model: str
) -> None:
    space = "towers.lock_image: [true, false]\ntowers.lock_image_unlocked_groups: [0, 1]\n"
    made = plan(tmp_path, corpus, tiny_model, space, "search=tpe", "num_samples=4", "towers.lock_image=true")
    assert len(rest(made)) == 3
    failed = [row for row in made.rows() if row["status"] == "failed"]
    assert len(failed) == 1 and "towers.lock_image_unlocked_groups=1 needs towers.lock_image=true" in failed[0]["reason"]
    Path(made.result_file(failed[0]["trial"])).unlink()  # killed between the point and its result
    again = plan(tmp_path, corpus, tiny_model, space, "search=tpe", "num_samples=4", "towers.lock_image=true")
    assert [row["trial"] for row in again.rows() if row["status"] == "failed"] == [failed[0]["trial"]]


def test_random_search_draws_no_point_twice(tmp_path: Path, corpus: Path, tiny_model: str) -> None:
    made = plan(tmp_path, corpus, tiny_model, "optim.lr: [0.1, 0.2, 0.3]\n", "search=random", "num_samples=9")
    assert sorted(name[3:] for name in rest(made)) == ["_lr=0.1_seed=5", "_lr=0.2_seed=5", "_lr=0.3_seed=5"]


def test_tpe_ends_where_a_small_space_has_no_other_point(tmp_path: Path, corpus: Path, tiny_model: str) -> None:
    made = plan(tmp_path, corpus, tiny_model, GRID, "search=tpe", "num_samples=9")
    assert made.num_trials == 2
    assert sorted(name[3:] for name in rest(made)) == ["_lr=0.1_seed=5", "_lr=0.2_seed=5"]
    assert made.num_to_come == 0


def test_sources_keep_their_weights_in_trials(tmp_path: Path, corpus: Path, tiny_model: str) -> None:
    made = plan(
        tmp_path, corpus, tiny_model, "corpus.sources.b.weight: [1.0, 3.0]\n",
        f"corpus.sources.a.path={corpus}", "corpus.sources.a.weight=1", f"corpus.sources.b.path={corpus}", "corpus.sources.b.weight=1",
    )  # fmt: skip
    weights = [weighted_sources(job.cfg.corpus) for job in (made.next(), made.next()) if job]
    assert weights == [{"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 3.0}]


def test_trials_of_one_policy_share_their_selection(tmp_path: Path, corpus: Path, tiny_model: str) -> None:
    made = plan(tmp_path, corpus, tiny_model, "policy: [none, paper]\naugment.factor: [1, 0]\n", f"annotations={corpus}", "seeds=2")
    places = [job.evidence for job in made.coming()]
    assert places[0] == places[1] == places[4] and places[2] == places[3] and places[0] != places[2]


def test_policies_need_annotations(tmp_path: Path, corpus: Path, tiny_model: str) -> None:
    with pytest.raises(UserError, match=r"policy is swept, so annotations=FOLDER is needed"):
        plan(tmp_path, corpus, tiny_model, "policy: [none, paper]\n").check()


def test_a_model_that_is_not_there_is_refused_before_anything_runs(tmp_path: Path, corpus: Path, tiny_model: str) -> None:
    with pytest.raises(UserError, match="ViT-B-77"):
        plan(tmp_path, corpus, tiny_model, f"model: [{tiny_model}, ViT-B-77]\n").check()
