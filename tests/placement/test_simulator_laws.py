"""Random clusters under random load and deaths: the laws hold, and jumps change nothing."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from phasewise.placement.latency.transfer import Link
from phasewise.placement.simulation.deployment import Deployment, Failure, Overheads
from phasewise.placement.simulation.network import Network
from phasewise.placement.simulation.run import SimulatedRun
from phasewise.placement.simulation.simulator import Simulator
from phasewise.placement.workload.traces import PrefixHashes
from phasewise.placement.workload.workload import Workload

from .simulated_clusters import pair, requests

NUM_REQUESTS = 60


def random_deployment(draw: random.Random) -> Deployment:
    prefill, stages = draw.choice([0, 1, 2, 3]), draw.choice([1, 1, 1, 2])
    changes: dict[str, Any] = {
        "prefill": prefill,
        "decode": draw.choice([1, 2, 3]),
        "prefill_stages": draw.choice([1, 1, 2]),
        "decode_stages": stages,
        "num_blocks": draw.choice([60, 80, 200, 4000]) * stages,
        "max_batch_size": draw.choice([2, 8, 64]),
        "max_batch_tokens": draw.choice([70, 256, 2048]),
        "transfer_mode": draw.choice(["auto", "push", "pull"]),
        "policy": draw.choice(["round_robin", "least_outstanding_tokens"]),
        "ttft_ms": draw.choice([0.0, 200.0]),
        "tpot_ms": draw.choice([0.0, 15.0]),
        "max_wait_s": draw.choice([0.2, 10.0]),
        "max_failovers": draw.choice([0, 3]),
        "prefix_cache": draw.random() < 0.3,
        "overheads": draw.choice(
            [Overheads(), Overheads(admit_s=0.003, handoff_s=0.004, step_s=0.001, detect_s=0.1)]
        ),
        "network": draw.choice([Network(), Network(local=Link(bytes_per_s=2e6, latency_s=0.001))]),
    }
    if prefill and draw.random() < 0.5:
        changes |= {"local_prefill": "auto", "local_prefill_tokens": 100}
    return pair(**changes)


def random_failures(draw: random.Random, deployment: Deployment) -> list[Failure]:
    names = [worker.name for worker in (*deployment.prefill, *deployment.decode)]
    failures = []
    for _ in range(draw.choice([0, 0, 1, 3])):
        at_s = draw.uniform(0, 6)
        back_s = None if draw.random() < 0.2 else at_s + draw.uniform(0.01, 2)
        failures.append(Failure(worker=draw.choice(names), at_s=at_s, back_s=back_s))
    return failures


def with_prefixes(workload: Workload, seed: int) -> Workload:
    """Four ids of 128 tokens a prompt; equal ids have equal ids before them."""
    digits = np.random.default_rng(seed).integers(1, 7, (workload.num_requests, 4))
    ids = np.cumsum(digits * np.array([1000, 100, 10, 1]), axis=1).astype(np.int64)
    offsets = np.arange(0, 4 * workload.num_requests + 1, 4)
    return replace(
        workload, prefix=PrefixHashes(offsets=offsets, ids=ids.ravel(), block_tokens=128)
    )


def assert_nothing_is_left(simulator: Simulator) -> None:
    for worker in simulator.prefill:
        if worker.alive:
            worker.scheduler.check()
            assert worker.allocator.counts().active == 0
            assert not worker.members and not worker.outstanding_tokens
    for worker in simulator.decode:
        assert not worker.requests and not worker.outstanding_tokens
        for lane in worker.lanes if worker.alive else ():
            lane.scheduler.check()
            counts = lane.allocator.counts()
            assert counts.active == counts.leased == 0
            assert not lane.members


@pytest.mark.parametrize("seed", range(25))
def test_laws_hold_and_jumps_change_nothing(seed: int) -> None:
    draw = random.Random(seed)
    deployment = random_deployment(draw)
    failures = random_failures(draw, deployment)
    workload = with_prefixes(requests(NUM_REQUESTS, draw.choice([5, 20, 80]), seed=seed), seed)
    runs: list[SimulatedRun] = []
    for jump in (True, False):
        simulator = Simulator(deployment, workload, None, jump=jump)
        for failure in failures:
            simulator.plan_failure(failure)
        runs.append(simulator.run(None))
        assert_nothing_is_left(simulator)
    for name in ("ttft_s", "tpot_s", "e2e_s", "transfer_s"):
        one, other = (getattr(run, name) for run in runs)
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-9, err_msg=name)
    if not failures:
        assert runs[0].num_served == NUM_REQUESTS
