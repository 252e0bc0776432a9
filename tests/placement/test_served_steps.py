"""Step times in service: what recurrences say that a calibrated worker spends, and simulation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from phasewise.engine.step_time import StepCoefficients, StepFeatures
from phasewise.placement.recurrences.served_steps import in_service, prefill_stretch, seen_by
from phasewise.placement.search.candidates import parse_placement
from phasewise.placement.search.colocated import Colocated
from phasewise.placement.search.deployed import deployment_of
from phasewise.placement.search.phase_search import PhaseSearch
from phasewise.placement.search.problem import Problem
from phasewise.placement.simulation.deployment import Overheads, WorkerModel
from phasewise.placement.simulation.simulator import simulate
from phasewise.placement.simulation.stages import Stages

from .plan_problems import problem
from .simulated_clusters import latency

STEP = StepCoefficients(base_s=0.004, new_token_s=1e-4, decode_row_s=2e-4, decode_context_s=1e-6)
COSTS = Overheads(
    admit_s=0.002, report_s=0.003, handoff_s=0.004, step_s=0.001, row_s=1e-4, prompt_s=0.002
)
CORES = Overheads(step_s=0.001, cores=2, serve_s=0.0005, serve_row_s=1e-4, warm_s=0.0004)


def test_without_overheads_times_are_the_models_own() -> None:
    model = latency(STEP)
    assert in_service(model, Overheads()) is model
    assert prefill_stretch(Overheads(), 1, 1, 1e6, model) == 1.0


@pytest.mark.parametrize(
    "features", [StepFeatures(), StepFeatures(50, 900.0), StepFeatures(50, 900.0, 7, 800)]
)
def test_a_step_takes_what_the_simulator_spends_on_it(features: StepFeatures) -> None:
    costs = replace(COSTS, prompt_share=0.2)
    worker = WorkerModel(name="decode-0", latency=latency(STEP), num_blocks=10)
    prompts = 3 if features.new_tokens else 0
    spent_s = Stages(worker, costs, None).run(features, 0.0, prompts)
    found_s = in_service(latency(STEP), costs).total_s(features)
    if prompts:
        found_s += costs.prompt_s
    assert found_s == pytest.approx(spent_s, rel=1e-12)


def test_workers_wait_for_gateway_and_clients_only_where_no_core_is_to_spare() -> None:
    alone, crowded = seen_by(CORES, 1), seen_by(CORES, 2)
    assert (alone.step_s, alone.warm_s) == (CORES.step_s, CORES.warm_s)
    assert (crowded.step_s, crowded.warm_s) == (CORES.step_s + CORES.serve_s, 0.0)
    assert prefill_stretch(replace(CORES, cores=3), 1, 1, 100.0, latency(STEP)) == 1.0
    assert prefill_stretch(CORES, 1, 1, 400.0, latency(STEP)) > 1.1


def calibrated(overheads: Overheads) -> Problem:
    return replace(problem("tiny-cpu"), overheads=overheads)


@pytest.mark.parametrize(
    ("words", "overheads", "rate_rps"),
    [
        ("P1x1 D1x1", COSTS, 8.0),
        ("D1x1", COSTS, 8.0),
        ("D1x1", CORES, 8.0),
        ("P1x1 D1x1", CORES, 12.0),
    ],
)
def test_recurrences_are_near_the_simulation_with_overheads(
    words: str, overheads: Overheads, rate_rps: float
) -> None:
    asked = calibrated(overheads)
    placement = parse_placement(words, asked)
    phases = PhaseSearch(asked)
    prefill, decode = placement.prefill, placement.decode
    if prefill is None:
        found = Colocated(phases).outcome(decode.shape, rate_rps / decode.count, decode.count)
    else:
        behind_s = phases.behind_s(prefill.shape, decode.shape, local=False)
        found = phases.outcome(prefill.shape, 1, decode.shape, 1, rate_rps, behind_s)
    run = simulate(deployment_of(asked, placement), phases.workload.at_rate(rate_rps))
    for ours, simulated in zip(found, (run.ttft_s, run.tpot_s), strict=True):
        assert float(np.mean(ours)) == pytest.approx(float(np.nanmean(simulated)), rel=0.15)
