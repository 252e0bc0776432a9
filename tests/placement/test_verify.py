"""What simulation makes of what was searched: the rate that holds, and what is promised of it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from statistics import mean

import pytest
from phasewise.engine.errors import InvalidConfig
from phasewise.placement.goodput.judging import JointJudge
from phasewise.placement.search.algorithms import Search
from phasewise.placement.search.candidates import Judged, parse_placement
from phasewise.placement.search.deployed import deployment_of
from phasewise.placement.search.infeasible import Infeasible
from phasewise.placement.search.plan import make_plan
from phasewise.placement.search.problem import Problem
from phasewise.placement.search.verify import (
    MOST_STEPS,
    REQUESTS,
    STEP,
    Verified,
    Verifier,
    highest_step,
)
from phasewise.placement.simulation.deployment import Overheads
from phasewise.placement.simulation.simulator import simulate

from .plan_problems import plan, problem, silent


@cache
def tiny() -> tuple[Problem, Judged]:
    """A problem, and what recurrences make of decode workers alone."""
    asked = problem("tiny-cpu")
    return asked, judged(asked)


@cache
def tiny_verified() -> Verified:
    asked, near = tiny()
    return Verifier(asked, silent).verify(near)


def judged(asked: Problem, words: str = "D1x1") -> Judged:
    return Search(asked, silent).judge(parse_placement(words, asked))


@pytest.mark.parametrize("times", [0.4, 30.0])
def test_a_guess_far_off_ends_at_the_same_rate_in_few_simulations(times: float) -> None:
    asked, near = tiny()
    known_rps = tiny_verified().judged.rate_rps
    found = Verifier(asked, silent).verify(replace(near, rate_rps=times * near.rate_rps))
    assert known_rps * STEP < found.judged.rate_rps < known_rps / STEP
    assert found.attainment >= 0.9
    assert found.runs < 25, "a ladder of single steps takes as many as there are"


def test_the_next_rate_above_the_confirmed_one_does_not_hold() -> None:
    asked, near = tiny()
    confirmed_rps = tiny_verified().judged.rate_rps
    spec = replace(asked.workload, num_requests=REQUESTS)
    judge = JointJudge(policy=asked.slo)
    shares = []
    for rate_rps in (confirmed_rps, confirmed_rps / STEP):
        loads = [spec.build(seed, rate_rps=rate_rps) for seed in range(asked.config.search.seeds)]
        runs = [simulate(deployment_of(asked, near.placement), load) for load in loads]
        verdicts = map(judge.verdict, loads, runs)
        shares.append(mean(verdict.attainments["default"] for verdict in verdicts))
    assert shares[0] >= 0.9 > shares[1]


@pytest.mark.parametrize("edge", range(-9, 10))
@pytest.mark.parametrize("start", [-9, -3, 0, 5, 9])
def test_the_highest_step_is_found_from_anywhere_and_never_tried_twice(
    edge: int, start: int
) -> None:
    tried = []

    def holds(step: int) -> bool:
        tried.append(step)
        return step <= edge

    assert highest_step(holds, start, most=9, least=-9) == edge
    assert len(set(tried)) == len(tried) <= 10


def test_no_step_is_found_where_not_even_the_least_holds() -> None:
    assert highest_step(lambda step: False, 0, most=9, least=-9) is None


def test_what_must_beat_a_rate_ends_where_it_would_by_itself_or_is_left_at_that_rate() -> None:
    asked, near = tiny()
    known_rps = tiny_verified().judged.rate_rps
    found = Verifier(asked, silent).verify_above(near, 0.9 * known_rps)
    assert found is not None and found.judged.rate_rps == pytest.approx(known_rps)
    assert Verifier(asked, silent).verify_above(near, known_rps) is None, "the same is no more"


def test_two_seeds_promise_little_less_than_they_confirm() -> None:
    """How far streams differ is known from more of them than were simulated: by the t of two alone
    the low end would be below a half."""
    found = tiny_verified()
    assert found.seeds == 2 and len(found.streams) > 2
    assert 0.9 * found.judged.rate_rps < found.judged.low_rps < found.judged.rate_rps


def test_what_chance_does_to_both_alike_is_no_difference_between_them() -> None:
    """The intervals of both overlap, that of their difference on the same streams excludes 0."""
    found = plan("tiny-cpu")
    chance = (0.8, 1.2, 0.9, 1.1)

    def at(rate_rps: float) -> Verified:
        judged = replace(found.best.judged, rate_rps=rate_rps)
        return replace(found.best, judged=judged, streams=chance, seeds=4)

    best = at(10.0)
    alone = best.half_of(chance)
    assert 10.0 * (1 - alone) < 8.0 * (1 + alone)
    ours = replace(found, best=best)
    difference, half = ours.lead(at(8.0))
    assert half == pytest.approx(difference * alone)
    assert not ours.tie(at(8.0))
    assert ours.tie(at(9.6)), "the next rate that was tried"


def test_a_placement_that_holds_no_rate_is_told_with_what_it_misses() -> None:
    """A guess so high that a hundredth of it is still too much."""
    asked, near = tiny()
    high_rps = 2 * near.rate_rps / STEP**MOST_STEPS
    found = Verifier(asked, silent).verify(replace(near, rate_rps=high_rps)).judged
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
