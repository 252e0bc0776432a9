"""Overheads: what they add to a simulated request, and that a calibration finds them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from phasewise.placement.simulation.calibration import read_calibration, write_calibration
from phasewise.placement.simulation.calibration_fit import calibration_load, fit_overheads
from phasewise.placement.simulation.deployment import Deployment, Overheads
from phasewise.placement.simulation.run import SimulatedRun
from phasewise.placement.simulation.simulator import simulate
from phasewise.placement.workload.workload import Workload

from .simulated_clusters import STEP, pair, requests

TRUE = Overheads(
    admit_s=0.0015,
    report_s=0.0015,
    handoff_s=0.002,
    step_s=0.0007,
    row_s=0.00003,
    prompt_s=0.002,
    prompt_share=0.2,
    cores=2,
    serve_s=0.0006,
    serve_row_s=0.000168,
    crowd_share=0.3,
    warm_s=0.0005,
)


def twin(overheads: Overheads) -> Deployment:
    return replace(pair(), overheads=overheads)


def spent_on(load: Workload, run: SimulatedRun, overheads: Overheads) -> float:
    """Core time of gateway and clients, of which a request takes as much as four steps."""
    steps = sum(worker.steps for worker in run.workers) + 4 * load.num_requests
    rows = int(load.output_tokens.sum())
    return steps * overheads.serve_s + rows * overheads.serve_row_s


def one(prompt: int, output: int) -> Workload:
    return Workload(
        arrival_s=np.zeros(1),
        prompt_tokens=np.array([prompt], np.int32),
        output_tokens=np.array([output], np.int32),
    )


def test_a_single_prompt_pays_every_overhead_on_its_way_once() -> None:
    run = simulate(twin(TRUE), one(100, 1))
    alone_s = STEP.base_s + 100 * STEP.new_token_s + STEP.attention_s * 100 * 50
    expected = alone_s * 1.2 + 0.0015 + 0.0015 + 0.0007 + 0.002
    assert run.ttft_s[0] == pytest.approx(expected)


def test_prompts_that_share_a_step_pay_for_its_host_work_once() -> None:
    together = Workload(
        arrival_s=np.zeros(8),
        prompt_tokens=np.full(8, 40, np.int32),
        output_tokens=np.ones(8, np.int32),
    )
    run = simulate(twin(Overheads(prompt_s=0.002)), together)
    free = simulate(twin(Overheads()), together)
    assert run.workers[0].steps == free.workers[0].steps == 1
    assert run.ttft_s == pytest.approx(free.ttft_s + 0.002)


def test_a_row_pays_its_share_of_host_work_in_every_step() -> None:
    free = simulate(twin(Overheads()), one(100, 11))
    taxed = simulate(twin(Overheads(row_s=0.001)), one(100, 11))
    assert taxed.tpot_s[0] - free.tpot_s[0] == pytest.approx(0.001)


def test_a_twin_with_fitted_overheads_predicts_another_load() -> None:
    load = calibration_load((16, 128, 256, 512), answer=20, idle_s=0.2)
    live = simulate(twin(TRUE), load)
    serving_s = spent_on(load, live, TRUE)
    fitted = fit_overheads(twin, load, live.ttft_s, live.tpot_s, cores=2, serving_s=serving_s)
    assert fitted.overheads.serve_s == pytest.approx(TRUE.serve_s, rel=0.05)
    assert fitted.ttft_error < 0.05 and fitted.tpot_error < 0.05
    other = requests(200, 8.0, seed=5)
    expected = simulate(twin(TRUE), other)
    predicted = simulate(twin(fitted.overheads), other)
    plain = simulate(twin(Overheads()), other)
    for column in ("ttft_s", "tpot_s"):
        mean = float(getattr(expected, column).mean())
        assert float(getattr(predicted, column).mean()) == pytest.approx(mean, rel=0.05)
        assert float(getattr(plain, column).mean()) < 0.9 * mean


def test_without_shared_cores_steps_keep_the_time_the_model_gives() -> None:
    load = calibration_load((16, 64, 128, 256, 512), answer=20, idle_s=0.2)
    live = simulate(twin(replace(TRUE, cores=0, prompt_share=0.0)), load)
    found = fit_overheads(twin, load, live.ttft_s, live.tpot_s, cores=0).overheads
    assert (found.cores, found.prompt_share, found.serve_s) == (0, 0.0, 0.0)


def test_a_written_calibration_reads_back(tmp_path: Path) -> None:
    write_calibration(TRUE, "made up", tmp_path / "calibration.json")
    found = read_calibration(tmp_path / "calibration.json")
    assert found.origin == "made up" and found.network is None
    for name in TRUE.__slots__:
        assert getattr(found.overheads, name) == pytest.approx(getattr(TRUE, name))


def test_paced_steps_are_fitted_with_their_host_work_in_them() -> None:
    true = Overheads(admit_s=0.0015, report_s=0.0015, handoff_s=0.002)
    load = calibration_load((16, 64, 128, 256, 512), answer=40, idle_s=0.2)
    live = simulate(twin(true), load)
    fitted = fit_overheads(twin, load, live.ttft_s, live.tpot_s, cores=0)
    found = fitted.overheads
    assert found.step_s == found.row_s == found.prompt_s == 0.0
    assert found.admit_s == pytest.approx(true.admit_s, rel=0.2)
    assert fitted.ttft_error < 0.1 and fitted.tpot_error < 0.01
