"""``raysys doctor``: what this machine or cluster has, and what is missing for which verb, with the command that mends it.

In: nothing but where Ray is. Out: one page, or with ``verbosity=json`` one object of all facts; status 0 when every verb can do its main
work here. Reads as it works: facts of this process's machine, Ray and its nodes, problems, page. Ray itself may be what is broken.
"""

from __future__ import annotations

import os
from dataclasses import asdict

from raysys.config import DoctorConfig, RayConfig
from raysys.console import say, tell_event, waiting_for
from raysys.doctor.facts import Facts, gather
from raysys.doctor.judge import ON_RAY, Node, Problem, judge, judge_nodes, lacking
from raysys.doctor.page import render
from raysys.errors import UserError, WorkFailed
from raysys.masking import mask, without_credentials


def doctor(cfg: DoctorConfig) -> None:
    """:raises WorkFailed: naming the verbs that lack something."""
    with waiting_for("trying every package and OCR engine"):
        facts = gather()
    problems = judge(facts)
    ray, nodes, of_ray = _try_ray(cfg.ray, facts)
    problems = sorted([*problems, *of_ray], key=lambda problem: not problem.needed)
    lacks = {verb: missing for verb, missing in lacking(problems).items() if missing}
    if cfg.verbosity == "json":
        found = {"ray": ray, "nodes": list(map(asdict, nodes)), "problems": list(map(asdict, problems)), "not_ready": list(lacks)}
        tell_event("facts", **without_credentials({"facts": asdict(facts)} | found))
    else:
        say(mask(render(facts, ray, nodes, problems)))
    if lacks:
        first = next(iter(lacks.values()))[0]
        raise WorkFailed(f"not ready: {', '.join(lacks)}; mend first: {first.what}{f' -> {first.mend}' if first.mend else ''}")


def _try_ray(cfg: RayConfig, facts: Facts) -> tuple[str, list[Node], list[Problem]]:
    """How Ray was reached or why not, its nodes, and their problems."""
    if any(p.name == "ray" and (p.version is None or p.error is not None) for p in facts.packages):
        return "not tried", [], []  # its package is a problem already
    try:
        from raysys.doctor.on_ray import ask_nodes
    except ImportError as error:  # another part of it than `import ray`
        mend = "pip install --force-reinstall 'ray[default,data,train,tune]'"
        return "not tried", [], [Problem(f"Ray cannot be used ({error})", mend, ON_RAY, needed=True)]
    address = os.environ.get("RAY_ADDRESS")
    try:
        took_s, nodes = ask_nodes(cfg)
    except (UserError, WorkFailed) as error:  # its text holds the mend
        return "not reached", [], [Problem(str(error), "", ON_RAY, needed=True)]
    ray = f"joined at {address}" if address else "a local cluster starts here (RAY_ADDRESS is not set)"
    return f"{ray}, in {took_s:.1f} s; nodes: {len(nodes)}", nodes, judge_nodes(facts, nodes)
