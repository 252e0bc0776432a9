"""What simulation makes of what was searched: the rate that holds, and what is promised of it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from phasewise.cluster import cli
from phasewise.engine.errors import InvalidConfig
from phasewise.placement.search.algorithms import Search
from phasewise.placement.search.candidates import Judged, parse_placement
from phasewise.placement.search.infeasible import Infeasible
from phasewise.placement.search.plan import make_plan
from phasewise.placement.search.problem import Problem
from phasewise.placement.search.verify import MOST_STEPS, STEP, verify
from phasewise.placement.simulation.deployment import Overheads

from .plan_problems import CONFIGS, plan, problem, silent


def judged(asked: Problem, words: str = "D1x1") -> Judged:
    return Search(asked, silent).judge(parse_placement(words, asked))


@pytest.mark.parametrize("times", [3.0, 30.0])
def test_a_guess_far_too_high_ends_at_the_same_rate_in_few_simulations(times: float) -> None:
    asked = problem("tiny-cpu")
    near = judged(asked)
    known_rps = verify(asked, near, silent).judged.rate_rps
    found = verify(asked, replace(near, rate_rps=times * near.rate_rps), silent)
    assert known_rps * STEP < found.judged.rate_rps < known_rps / STEP
    assert found.runs < 20, "a ladder of single steps takes as many as there are"


def test_a_placement_that_holds_no_rate_is_told_with_what_it_misses() -> None:
    """A guess so high that a hundredth of it is still too much."""
    asked = problem("tiny-cpu")
    near = judged(asked)
    high_rps = 2 * near.rate_rps / STEP**MOST_STEPS
    found = verify(asked, replace(near, rate_rps=high_rps), silent).judged
    assert (found.rate_rps, found.low_rps, found.by) == (0.0, 0.0, "simulation")


@pytest.mark.parametrize("rate_is_given", [True, False])
def test_where_simulation_holds_no_rate_the_plan_names_the_target(rate_is_given: bool) -> None:
    """One core for both phases, gateway and clients: every step waits longer than a token may."""
    asked = problem("tiny-cpu", "search.colocated=false", "workload.rate_rps=0.05")
    if not rate_is_given:
        workload = {k: v for k, v in asked.config.workload.items() if k != "rate_rps"}
        asked = replace(asked, config=replace(asked.config, workload=workload))
    asked = replace(asked, overheads=Overheads(cores=1, serve_s=0.12))
    with pytest.raises(Infeasible, match="no rate") as raised:
        make_plan(asked, silent)
    assert raised.value.binding == "slo.tpot_ms"
    assert float(raised.value.nearest.removeprefix("tpot_ms ")) > 120


def test_phases_that_meet_their_targets_alone_only_are_named() -> None:
    """Gateway and clients on the one core leave prompts no time once there are tokens."""
    asked = problem("tiny-cpu", "search.colocated=false")
    asked = replace(asked, overheads=Overheads(cores=1, serve_s=0.3))
    with pytest.raises(Infeasible, match="alone") as raised:
        make_plan(asked, silent)
    assert raised.value.binding == "slo.ttft_ms and slo.tpot_ms"
    assert raised.value.nearest.startswith("ttft_ms ")


def test_the_promise_for_a_rate_covers_it() -> None:
    words = ("objective.goal=gpus", "workload.rate_rps=12")
    bare = plan("tiny-cpu", *words, "objective.headroom=0")
    assert bare.promised_rps(bare.best) == bare.best.judged.low_rps >= 12
    wary = plan("tiny-cpu", *words, "objective.headroom=0.45")
    assert wary.promised_rps(wary.best) == pytest.approx(0.55 * wary.best.judged.low_rps)
    assert wary.promised_rps(wary.best) >= 12
    assert wary.best.judged.placement.gpus > bare.best.judged.placement.gpus


def test_a_headroom_that_the_machines_cannot_leave_is_infeasible() -> None:
    words = ("workload.rate_rps=30", "objective.headroom=0.6")
    with pytest.raises(Infeasible, match="headroom of 60%") as raised:
        make_plan(problem("tiny-cpu", *words), silent)
    assert 0 < float(raised.value.nearest.removeprefix("rate_rps ")) < 30


@pytest.mark.parametrize("share", ["1", "-0.1", "much"])
def test_a_headroom_that_is_no_share_is_refused(share: str) -> None:
    with pytest.raises(InvalidConfig, match=r"objective\.headroom"):
        problem("llama-3.1-8b-h100", f"objective.headroom={share}")


def test_a_calibration_of_one_machine_is_refused() -> None:
    with pytest.raises(InvalidConfig, match=r"machine_latency\.h100\.calibration"):
        problem("llama-3.1-8b-h100", "machine_latency.h100.calibration=c.json")


def test_the_promise_is_told_wherever_a_plan_is(capsys: pytest.CaptureFixture[str]) -> None:
    name = str(CONFIGS / "plan-tiny-cpu.yaml")
    words = ["--set", "search.seeds=2", "--set", "objective.headroom=0.2"]
    assert cli.main(["plan", name, "--json", *words]) == 0
    told = json.loads(capsys.readouterr().out)
    best = told["best"]
    assert told["headroom"] == 0.2
    assert best["promised_rps"] == pytest.approx(0.8 * best["interval_rps"][0])
    assert cli.main(["plan", name, "--explain", *words]) == 0
    text = capsys.readouterr().out
    promise = f"{best['promised_rps']:.2f} req/s: the low end of the interval less 20% headroom"
    assert text.count(promise) == 3, "in the summary, in the reasons, in the file's heading"
