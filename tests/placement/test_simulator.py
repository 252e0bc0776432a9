"""The simulator against closed forms, recurrences, and itself step by step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from phasewise.engine.errors import InvalidConfig
from phasewise.placement.latency.distserve_profile import DistServeLatency, read_distserve_profile
from phasewise.placement.latency.transfer import Link, layerwise_s
from phasewise.placement.recurrences import queueing
from phasewise.placement.recurrences.distserve_mirror import MirrorPhase, mirror
from phasewise.placement.simulation.deployment import Deployment, Failure, Overheads, replicas
from phasewise.placement.simulation.network import Network
from phasewise.placement.simulation.run import SimulatedRun, StopRule
from phasewise.placement.simulation.simulator import Simulator, simulate
from phasewise.placement.workload.traces import PrefixHashes

from .simulated_clusters import STEP, at, constant, pair, requests

COLUMNS = ("ttft_s", "tpot_s", "e2e_s", "queue_s", "prefill_s", "transfer_s")
COEFFICIENTS = Path(__file__).parent / "data" / "distserve_distserve.json"


def assert_same(one: SimulatedRun, other: SimulatedRun, tolerance: float = 0.0) -> None:
    for name in COLUMNS:
        np.testing.assert_allclose(
            getattr(one, name), getattr(other, name), rtol=0, atol=tolerance, err_msg=name
        )
    assert (one.preemptions == other.preemptions).all()
    assert (one.failovers == other.failovers).all()


def test_a_request_alone_takes_what_its_steps_take() -> None:
    run = simulate(pair(kv_bytes_per_token=0.0), at((1.0, 100, 3)))
    prefill_s = 0.004 + 100 * 0.0001 + 100 * 50 * 1e-8
    steps_s = [0.004 + 0.0002 + context * 1e-7 for context in (100, 101)]
    assert run.ttft_s[0] == pytest.approx(prefill_s)
    assert run.tpot_s[0] == pytest.approx(sum(steps_s) / 2)
    assert run.e2e_s[0] == pytest.approx(prefill_s + sum(steps_s))
    assert run.queue_s[0] == 0 and run.transfer_s[0] == 0


def test_overheads_stand_where_they_are_spent() -> None:
    overheads = Overheads(admit_s=0.1, report_s=0.2, handoff_s=0.3, step_s=0.4)
    plain = simulate(pair(kv_bytes_per_token=0.0), at((0.0, 100, 2)))
    run = simulate(pair(kv_bytes_per_token=0.0, overheads=overheads), at((0.0, 100, 2)))
    assert run.ttft_s[0] - plain.ttft_s[0] == pytest.approx(0.1 + 0.4 + 0.2)
    assert run.tpot_s[0] - plain.tpot_s[0] == pytest.approx(0.3 + 0.4)
    assert run.queue_s[0] == pytest.approx(0.1)


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_prefill_alone_waits_as_md1_says(load: float) -> None:
    """One prompt a step, so steps are constant; TTFT within three standard errors."""
    deployment = pair(prefill_time=constant(0.1), max_batch_size=1, kv_bytes_per_token=0.0)
    run = simulate(deployment, requests(40_000, load / 0.1, output=(1, 1)))
    blocks = run.ttft_s.reshape(40, -1).mean(axis=1)  # correlated within, hardly between
    error_s = blocks.std() / np.sqrt(len(blocks))
    assert abs(run.ttft_s.mean() - queueing.mean_ttft_s(0.1, load / 0.1)) < 3 * error_s


def test_a_pipeline_of_two_waits_as_md1_says() -> None:
    deployment = pair(
        prefill_time=constant(0.05), prefill_stages=2, max_batch_size=1, kv_bytes_per_token=0.0
    )
    run = simulate(deployment, requests(20_000, 14.0, output=(1, 1)))
    blocks = run.ttft_s.reshape(40, -1).mean(axis=1)
    error_s = blocks.std() / np.sqrt(len(blocks))
    assert abs(run.ttft_s.mean() - queueing.mean_ttft_pipeline_s(0.1, 14.0)) < 3 * error_s


def distserve_pair(prefill_stages: int = 1) -> tuple[Deployment, MirrorPhase, MirrorPhase]:
    """OPT-13B without limits or transfer, and the same for the recurrences."""
    profile = read_distserve_profile(COEFFICIENTS)
    source = DistServeLatency(model="facebook/opt-13b", profile=profile)
    wide: dict[str, Any] = {
        "num_blocks": 40_000,
        "max_batch_size": 1 << 20,
        "max_batch_tokens": 1 << 30,
    }
    deployment = Deployment(
        prefill=replicas("prefill", 1, source.phase("prefill", 2, prefill_stages), **wide),
        decode=replicas("decode", 1, source.phase("decode", 1, 1), **wide),
        max_wait_s=1e9,
        block_size=64,
    )
    return (
        deployment,
        MirrorPhase(coefficients=profile["facebook/opt-13b", 2], pipeline_parallel=prefill_stages),
        MirrorPhase(coefficients=profile["facebook/opt-13b", 1]),
    )


@pytest.mark.parametrize("rate_rps", [1.0, 4.5, 12.0])
def test_under_distserve_assumptions_times_equal_its_recurrences(rate_rps: float) -> None:
    """Its output length counts decode steps, ours tokens: one more."""
    deployment, prefill, decode = distserve_pair()
    workload = requests(600, rate_rps, prompt=(4, 1500), output=(2, 300))
    run = simulate(deployment, workload)
    counted = replace(workload, output_tokens=workload.output_tokens - 1)
    expected = mirror(counted, prefill, decode)
    np.testing.assert_allclose(run.ttft_s, expected.ttft_s, rtol=0, atol=1e-9)
    np.testing.assert_allclose(run.tpot_s, expected.tpot_s, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_blocks": 60},
        {"num_blocks": 60, "transfer_mode": "pull"},
        {"prefill": 2, "decode": 3, "policy": "round_robin"},
        {"prefill": 2, "decode": 2, "num_blocks": 80},
        {"prefill": 0, "decode": 2, "max_batch_tokens": 96, "tpot_ms": 15.0},
        {"local_prefill": "auto", "local_prefill_tokens": 100, "max_batch_tokens": 128},
        {"max_batch_size": 4},
        {"network": Network(local=Link(bytes_per_s=2e6, latency_s=0.001))},
        {"ttft_ms": 200.0, "tpot_ms": 20.0, "num_blocks": 100},
    ],
    ids=str,
)
def test_jumping_over_steps_changes_nothing(changes: dict[str, Any]) -> None:
    deployment = pair(**changes)
    workload = requests(250, 12.0)
    jumped, stepped = (simulate(deployment, workload, jump=jump) for jump in (True, False))
    assert_same(jumped, stepped, 1e-9)
    assert jumped.num_served == 250
    for one, other in zip(jumped.workers, stepped.workers, strict=True):
        assert (one.steps, one.tokens) == (other.steps, other.tokens)
        assert one.busy_s == pytest.approx(other.busy_s)


def test_jumping_over_steps_changes_nothing_when_workers_die() -> None:
    deployment = pair(prefill=2, decode=2)
    failures = [
        Failure(worker="decode-0", at_s=3.0, back_s=5.0),
        Failure(worker="prefill-1", at_s=4.0),
    ]
    workload = requests(250, 20.0)
    jumped, stepped = (
        simulate(deployment, workload, failures=failures, jump=jump) for jump in (True, False)
    )
    assert_same(jumped, stepped, 1e-9)
    assert jumped.failovers.sum() > 0


def test_the_same_run_twice_is_the_same() -> None:
    deployment = pair(prefill=2, decode=2, num_blocks=100)
    failures = [Failure(worker="decode-0", at_s=3.0)]
    workload = requests(300, 12.0)
    assert_same(
        simulate(deployment, workload, failures=failures),
        simulate(deployment, workload, failures=failures),
    )


def test_memory_short_in_decode_preempts_or_parks_and_everyone_ends() -> None:
    run = simulate(pair(num_blocks=60), requests(300, 12.0, output=(50, 200)))
    assert run.num_served == 300
    assert run.preemptions.sum() > 0
    assert run.transfer_s.max() > 0.1, "some prompts waited in the prefill pool"


def test_every_block_is_free_and_no_one_is_left_when_all_have_ended() -> None:
    workload = requests(200, 15.0)
    simulator = Simulator(pair(prefill=2, decode=2, num_blocks=80), workload, None, jump=True)
    simulator.plan_failure(Failure(worker="decode-1", at_s=2.0, back_s=3.0))
    simulator.plan_failure(Failure(worker="prefill-0", at_s=4.0, back_s=6.0))
    run = simulator.run(None)
    assert run.num_served == 200
    for worker in simulator.prefill:
        worker.scheduler.check()
        assert worker.allocator.num_free == worker.allocator.num_blocks
        assert not worker.members and not worker.outstanding_tokens
    for worker in simulator.decode:
        assert not worker.requests and not worker.outstanding_tokens
        for lane in worker.lanes:
            lane.scheduler.check()
            assert lane.allocator.num_free == lane.allocator.num_blocks
            assert not lane.members


def test_times_of_a_request_add_up() -> None:
    run = simulate(pair(num_blocks=80), requests(200, 12.0, output=(2, 80)))
    np.testing.assert_allclose(run.queue_s + run.prefill_s, run.ttft_s, atol=1e-12)
    outputs = requests(200, 12.0, output=(2, 80)).output_tokens
    np.testing.assert_allclose(run.ttft_s + run.tpot_s * (outputs - 1), run.e2e_s, atol=1e-9)


def test_a_pushed_prompt_alone_arrives_as_layerwise_says() -> None:
    for bytes_per_s in (1e5, 1e6, 1e8):
        link = Link(bytes_per_s=bytes_per_s)
        run = simulate(pair(network=Network(local=link)), at((0.0, 300, 2)))
        expected_s = layerwise_s(300 * 1000.0, 10, float(run.prefill_s[0]), link)
        assert run.transfer_s[0] == pytest.approx(expected_s, rel=1e-9)


def test_two_transfers_over_one_link_take_twice_as_long() -> None:
    """Two prefill workers end together and one decode worker receives."""
    network = Network(local=Link(bytes_per_s=1e5))
    deployment = pair(prefill=2, transfer_mode="pull", network=network)
    alone = simulate(deployment, at((0.0, 300, 2)))
    both = simulate(deployment, at((0.0, 300, 2), (0.0, 300, 2)))
    assert alone.transfer_s[0] == pytest.approx(3.0)
    assert both.transfer_s == pytest.approx([6.0, 6.0])


def test_transfers_over_other_links_do_not_disturb_each_other() -> None:
    network = Network(local=Link(bytes_per_s=1e5))
    deployment = pair(prefill=2, decode=2, transfer_mode="pull", network=network)
    both = simulate(deployment, at((0.0, 300, 2), (0.0, 300, 2)))
    assert both.transfer_s == pytest.approx([3.0, 3.0])


def test_a_nodes_way_out_is_shared_by_its_workers() -> None:
    wide = pair(prefill=2, decode=2, transfer_mode="pull")
    far = replace(
        wide,
        prefill=tuple(replace(worker, node="a") for worker in wide.prefill),
        decode=tuple(replace(worker, node="b") for worker in wide.decode),
        network=Network(remote=Link(bytes_per_s=1e5), node_bytes_per_s=1e5),
    )
    both = simulate(far, at((0.0, 300, 2), (0.0, 300, 2)))
    assert both.transfer_s == pytest.approx([6.0, 6.0])


def test_push_hides_the_transfer_that_pull_shows() -> None:
    network = Network(local=Link(bytes_per_s=2e7))
    pushed, pulled = (
        simulate(pair(network=network, transfer_mode=mode), requests(100, 3.0, output=(2, 50)))
        for mode in ("push", "pull")
    )
    assert pushed.transfer_s.mean() < pulled.transfer_s.mean() / 3
    assert pushed.ttft_s == pytest.approx(pulled.ttft_s), "TTFT never waits for it"


def test_a_lost_decode_worker_costs_a_prefill_and_no_token() -> None:
    workload = at((0.0, 100, 200))
    deployment = pair(decode=2, kv_bytes_per_token=0.0, overheads=Overheads(detect_s=0.5))
    smooth = simulate(deployment, workload)
    run = simulate(deployment, workload, failures=[Failure(worker="decode-0", at_s=0.4)])
    assert run.failovers[0] == 1 and run.num_served == 1
    assert run.ttft_s[0] == smooth.ttft_s[0], "the first token was out already"
    known = 100 + 1 + int((0.4 - smooth.ttft_s[0]) / smooth.tpot_s[0])
    again_s = STEP.base_s + known * STEP.new_token_s
    assert run.e2e_s[0] - smooth.e2e_s[0] == pytest.approx(0.5 + again_s, rel=0.02)


def test_without_another_worker_the_request_ends_unserved() -> None:
    run = simulate(pair(), at((0.0, 100, 200)), failures=[Failure(worker="decode-0", at_s=0.1)])
    assert np.isnan(run.e2e_s[0]) and not np.isnan(run.ttft_s[0])


def test_colocated_decodes_stall_less_with_small_chunks() -> None:
    workload = requests(150, 6.0, prompt=(500, 1500), output=(20, 100))
    whole, chunked = (
        simulate(pair(prefill=0, max_batch_tokens=tokens), workload) for tokens in (2048, 128)
    )
    assert chunked.tpot_s.max() < whole.tpot_s.max()
    assert whole.num_served == chunked.num_served == 150


def test_a_full_gateway_refuses() -> None:
    run = simulate(pair(max_in_flight=1), at((0.0, 100, 50), (0.01, 100, 50), (9.0, 100, 50)))
    assert np.isnan(run.ttft_s).tolist() == [False, True, False]


def test_a_decode_pipeline_has_a_micro_batch_in_each_stage() -> None:
    """Two requests in turn: each step takes two stages, and nobody waits for the other."""
    deployment = pair(
        decode_time=constant(0.01),
        decode_stages=2,
        prefill_time=constant(0.001),
        prefill=2,
        kv_bytes_per_token=0.0,
    )
    run = simulate(deployment, at((0.0, 10, 11), (0.005, 10, 11)))
    assert run.tpot_s == pytest.approx([0.02, 0.02], rel=0.06)


@pytest.mark.parametrize("prefill", [0, 1])
def test_a_prompt_whose_beginning_was_seen_computes_the_rest_only(prefill: int) -> None:
    ids = np.array([7, 8, 7, 9], dtype=np.int64)
    prefix = PrefixHashes(offsets=np.array([0, 2, 4]), ids=ids, block_tokens=512)
    workload = replace(at((0.0, 1024, 3), (5.0, 1024, 3)), prefix=prefix)
    first, second = simulate(pair(prefill=prefill, prefix_cache=True), workload).prefill_s
    assert second == pytest.approx(
        STEP.base_s + 512 * STEP.new_token_s + 512 * 768 * STEP.attention_s
    )
    assert first > second
    blind = simulate(pair(prefill=prefill), workload).prefill_s
    assert blind == pytest.approx([first, first])


def test_a_hopeless_run_is_stopped() -> None:
    n = 400
    workload = requests(n, 200.0)
    limits = np.full(n, 0.1)
    rule = StopRule(ttft_s=limits, tpot_s=limits, first_row=0, last_row=n, max_misses=10)
    run = simulate(pair(), workload, stop=rule)
    assert run.stopped and run.num_served < n // 2
    easy = replace(rule, ttft_s=np.full(n, 1e9), tpot_s=np.full(n, 1e9))
    assert not simulate(pair(), workload, stop=easy).stopped


def test_samples_show_how_full_workers_were() -> None:
    run = simulate(pair(), requests(100, 10.0), sample_every_s=0.5)
    assert {sample.name for sample in run.samples} == {"prefill-0", "decode-0"}
    assert max(sample.used_blocks for sample in run.samples) > 0
    assert run.samples[-1].at_s <= run.duration_s


def test_a_request_that_never_fits_is_refused_by_number() -> None:
    with pytest.raises(InvalidConfig, match="request 1"):
        simulate(pair(num_blocks=10), at((0.0, 10, 10), (0.0, 500, 10)))


def test_a_failure_of_an_unknown_worker_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="decode-9"):
        simulate(pair(), at((0.0, 10, 10)), failures=[Failure(worker="decode-9", at_s=1.0)])
