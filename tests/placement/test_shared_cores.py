"""Workers that share cores with the gateway and its clients: who waits, and who does not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from phasewise.placement.simulation.cores import HOME_SHARE
from phasewise.placement.simulation.deployment import Deployment, Overheads
from phasewise.placement.simulation.simulator import simulate
from phasewise.placement.workload.workload import Workload

from .simulated_clusters import STEP, constant, pair, requests

LONG = 4000  # tokens of a prompt that takes as long as many decode steps
CROWDED = Overheads(cores=2, serve_s=0.001)


def cluster(overheads: Overheads, *, prefill: int = 1, decode: int = 1) -> Deployment:
    return replace(pair(prefill=prefill, decode=decode, max_batch_tokens=4096), overheads=overheads)


def load(*rows: tuple[float, int, int]) -> Workload:
    """Of (arrival, prompt, output)."""
    arrival_s, prompts, outputs = zip(*rows, strict=True)
    return Workload(
        arrival_s=np.array(arrival_s),
        prompt_tokens=np.array(prompts, np.int32),
        output_tokens=np.array(outputs, np.int32),
    )


ANSWER_BESIDE_PROMPT = load((0.0, 100, 60), (0.05, LONG, 1))


def test_what_serving_takes_from_two_busy_cores_is_taken_where_it_ran_last() -> None:
    """Beside a decode worker that is never idle that is prefill's core."""
    apart = simulate(cluster(Overheads()), ANSWER_BESIDE_PROMPT)
    shared = simulate(cluster(CROWDED), ANSWER_BESIDE_PROMPT)
    late_s = shared.ttft_s[1] - apart.ttft_s[1]
    slow_s = (shared.tpot_s[0] - apart.tpot_s[0]) * 59
    assert late_s > 0.01
    assert slow_s == pytest.approx(late_s * (1 / HOME_SHARE - 1), rel=0.05)


def test_serving_takes_as_much_as_it_needs_and_no_more() -> None:
    run = simulate(cluster(CROWDED), ANSWER_BESIDE_PROMPT)
    alone = simulate(cluster(Overheads()), ANSWER_BESIDE_PROMPT)
    more_s = sum(w.busy_s for w in run.workers) - sum(w.busy_s for w in alone.workers)
    assert 0 < more_s <= 59 * CROWDED.serve_s + 1e-9


def test_serving_is_free_while_a_core_is_idle() -> None:
    lone = load((0.0, 100, 60))
    assert simulate(cluster(CROWDED), lone).e2e_s == pytest.approx(
        simulate(cluster(Overheads()), lone).e2e_s
    )
    roomy = simulate(cluster(replace(CROWDED, cores=3)), ANSWER_BESIDE_PROMPT)
    assert roomy.e2e_s == pytest.approx(simulate(cluster(Overheads()), ANSWER_BESIDE_PROMPT).e2e_s)


def test_of_two_workers_that_decode_one_pays_for_most_of_both_ones_tokens() -> None:
    twins = load((0.0, 100, 40), (0.003, 100, 40))
    colocated = {"prefill": 0, "decode": 2}
    apart = simulate(cluster(Overheads(), **colocated), twins)
    shared = simulate(cluster(CROWDED, **colocated), twins)
    more_s = sorted(shared.tpot_s - apart.tpot_s)
    assert sum(more_s) == pytest.approx(2 * CROWDED.serve_s, rel=0.2)
    assert more_s[1] > 2 * more_s[0]


def test_what_runs_beside_steps_takes_longer_where_every_core_computes() -> None:
    plain = replace(CROWDED, step_s=0.002)
    dear = replace(plain, crowd_share=0.5)
    lone, twins = load((0.0, 100, 40)), load((0.0, 100, 40), (0.003, 100, 40))

    def more_s(requests_: Workload) -> list[float]:
        runs = [simulate(cluster(o, prefill=0, decode=2), requests_) for o in (plain, dear)]
        return (runs[1].tpot_s - runs[0].tpot_s).tolist()

    assert more_s(lone) == pytest.approx([0.0])
    assert max(more_s(twins)) > 0.4 * plain.step_s  # of the worker that serving runs beside
    assert min(more_s(twins)) < 0.1 * plain.step_s


def test_schedulers_on_shared_cores_learn_what_steps_take_there() -> None:
    """Their chunks then keep the target with all that a step waits for, not with its own time."""
    beside = load((0.0, 100, 200), (0.3, LONG, 1))
    alone = pair(prefill=0, decode=1, max_batch_tokens=4096, ttft_ms=9e3, tpot_ms=40.0)
    costs = replace(Overheads(), step_s=0.02)
    gaps = {
        cores: simulate(replace(alone, overheads=replace(costs, cores=cores)), beside)
        for cores in (0, 2)
    }
    assert gaps[2].ttft_s[1] > 1.5 * gaps[0].ttft_s[1]  # more and smaller chunks
    assert gaps[2].tpot_s[0] < 0.041


def test_a_worker_that_computes_alone_finds_its_weights_in_the_cache() -> None:
    warm = Overheads(cores=2, warm_s=0.001)
    lone = load((0.0, 100, 60))
    saved_s = (
        simulate(cluster(Overheads()), lone).tpot_s[0] - simulate(cluster(warm), lone).tpot_s[0]
    )
    assert saved_s == pytest.approx(0.001 * 58 / 59)  # not the first step: it was idle before


def test_a_worker_beside_another_finds_its_cache_taken() -> None:
    warm = Overheads(cores=2, warm_s=0.001)
    beside = load((0.0, 100, 60), (0.0, LONG, 1), (0.0, LONG, 1))
    cold, warmed = (simulate(cluster(o), beside) for o in (Overheads(), warm))
    assert warmed.tpot_s[0] == pytest.approx(cold.tpot_s[0])


def test_a_step_is_never_made_shorter_than_nothing() -> None:
    eager = Overheads(cores=2, warm_s=1.0)
    run = simulate(replace(pair(decode_time=constant(0.001)), overheads=eager), load((0.0, 10, 9)))
    assert run.tpot_s[0] == pytest.approx(0.001 / 8)


def test_shared_cores_give_the_same_run_every_time_and_with_every_way_to_step() -> None:
    overheads = replace(CROWDED, serve_row_s=0.0002, warm_s=0.0005, step_s=0.0003)
    many = requests(150, 12.0, seed=3)
    for workers in ({"prefill": 1, "decode": 1}, {"prefill": 0, "decode": 2}):
        deployment = cluster(overheads, **workers)
        runs = [simulate(deployment, many, jump=jump) for jump in (True, True, False)]
        assert runs[0].num_served == 150
        for other in runs[1:]:
            np.testing.assert_allclose(other.e2e_s, runs[0].e2e_s, rtol=1e-9)


def test_workers_without_shared_cores_take_what_the_model_gives() -> None:
    run = simulate(cluster(Overheads(warm_s=0.001, serve_s=0.001)), load((0.0, 100, 1)))
    alone_s = STEP.base_s + 100 * STEP.new_token_s + STEP.attention_s * 100 * 50
    assert run.ttft_s[0] == pytest.approx(alone_s)
