"""Prefix caches in the simulator: what the live classes find is found, and it saves time."""

from __future__ import annotations

import heapq
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from phasewise.configs.load import load_cluster
from phasewise.engine.batch import Batch, StepOutput
from phasewise.engine.blocks import BlockAllocator
from phasewise.engine.step_time import features_of
from phasewise.placement.latency.hardware import read_hardware
from phasewise.placement.latency.roofline import RooflineLatency
from phasewise.placement.latency.transfer import Link
from phasewise.placement.simulation.network import Network
from phasewise.placement.simulation.run import SimulatedRun
from phasewise.placement.simulation.sequence import SequenceMaker
from phasewise.placement.simulation.simulator import simulate
from phasewise.placement.simulation.twin import shape_of_cluster, twin_of
from phasewise.placement.workload.traces import PrefixHashes, read_trace
from phasewise.placement.workload.workload import Workload, WorkloadSpec
from phasewise.prefill_worker.scheduler import PrefillLimits, PrefillScheduler

from .simulated_clusters import STEP, at, pair

MOONCAKE = Path(__file__).parent / "data" / "mooncake_conversation_head.jsonl.gz"
LOCAL = Path(__file__).parents[2] / "configs" / "local.yaml"
BLOCK = 512
BLOCKS = 8000  # fewer than the trace has, so that some are given up


@cache
def conversation(count: int = 1000) -> Workload:
    spec = WorkloadSpec(process="trace", trace=read_trace(MOONCAKE), num_requests=count)
    return spec.build(0, rate_rps=0.3)


def served(workload: Workload, **changes: object) -> SimulatedRun:
    wide = {"num_blocks": BLOCKS, "max_batch_tokens": 8192, "block_size": BLOCK}
    return simulate(pair(**{**wide, "prefix_cache": True, **changes}), workload)  # type: ignore[arg-type]


def live_hit_tokens(workload: Workload) -> int:
    """The live prefill scheduler over the live cache, stepped by hand."""
    allocator = BlockAllocator(BLOCKS, BLOCK, prefix_cache=True)
    limits = PrefillLimits(max_batch_tokens=8192, max_model_len=1 << 40)
    scheduler = PrefillScheduler(allocator, limits)
    maker = SequenceMaker(workload, BLOCK, with_prefixes=True)
    events = [(at_s, 0, row) for row, at_s in enumerate(workload.arrival_s.tolist())]
    heapq.heapify(events)
    batch: Batch | None = None
    while events:
        now_s, is_end, row = heapq.heappop(events)
        if is_end:
            assert batch is not None
            output = StepOutput(token_ids=[0] * batch.num_rows)
            for sequence in scheduler.advance(batch, output, now_s).sequences:
                if sequence.num_tokens < sequence.max_total_tokens:
                    scheduler.release(sequence.id)
            batch = None
        else:
            scheduler.add(maker.make(row, now_s, 0, 0), now_s)
        if batch is None and (batch := scheduler.next_batch(now_s)) is not None:
            heapq.heappush(events, (now_s + STEP.batch_s(features_of(batch)), 1, 0))
    scheduler.check()
    return scheduler.prefix.hit_tokens


def test_simulated_hits_are_those_of_the_live_scheduler_and_cache() -> None:
    run = served(conversation(), kv_bytes_per_token=0.0)
    expected = live_hit_tokens(conversation())
    assert expected > 0.05 * conversation().prompt_tokens.sum()
    prefill = next(worker for worker in run.workers if worker.role == "prefill")
    assert prefill.hit_tokens == expected
    assert prefill.tokens + expected == conversation().prompt_tokens.sum()


def test_first_tokens_come_sooner_with_a_cache() -> None:
    on, off = (served(conversation(), prefix_cache=on) for on in (True, False))
    assert off.hit_tokens == 0 < on.hit_tokens
    assert on.ttft_s.mean() < 0.95 * off.ttft_s.mean()
    assert on.num_served == off.num_served == conversation().num_requests


def test_routing_by_prefix_finds_more_than_taking_turns() -> None:
    hits = {
        policy: served(conversation(), prefill=4, num_blocks=BLOCKS // 4, policy=policy).hit_tokens
        for policy in ("round_robin", "prefix_aware")
    }
    assert hits["prefix_aware"] > 1.2 * hits["round_robin"]


def test_what_decode_has_already_is_not_sent_again() -> None:
    """The second prompt shares three of its four blocks; pushed or fetched, only one moves."""
    ids = np.array([7, 8, 9, 10, 7, 8, 9, 11], dtype=np.int64)
    prefix = PrefixHashes(offsets=np.array([0, 4, 8]), ids=ids, block_tokens=BLOCK)
    workload = replace(at((0.0, 4 * BLOCK, 3), (60.0, 4 * BLOCK, 3)), prefix=prefix)
    network = Network(local=Link(bytes_per_s=1e5))
    for mode in ("push", "pull"):
        first, second = served(workload, network=network, transfer_mode=mode).transfer_s
        assert second < 0.4 * first, mode


def test_equal_ids_behind_different_beginnings_share_nothing() -> None:
    ids = np.array([1, 5, 2, 5], dtype=np.int64)
    prefix = PrefixHashes(offsets=np.array([0, 2, 4]), ids=ids, block_tokens=BLOCK)
    workload = replace(at((0.0, 2 * BLOCK, 3), (60.0, 2 * BLOCK, 3)), prefix=prefix)
    assert served(workload).hit_tokens == 0


@pytest.mark.parametrize("on", [True, False])
def test_the_twin_of_a_cluster_file_caches_as_the_file_says(on: bool) -> None:
    config = load_cluster(LOCAL, (f"kv.prefix_cache={str(on).lower()}",))
    source = RooflineLatency(shape=shape_of_cluster(config), hardware=read_hardware("cpu"))
    twin = twin_of(config, source)
    assert twin.policy == "prefix_aware"
    ids = np.array([7, 8, 7, 9], dtype=np.int64)
    prefix = PrefixHashes(offsets=np.array([0, 2, 4]), ids=ids, block_tokens=64)
    workload = replace(at((0.0, 128, 3), (5.0, 128, 3)), prefix=prefix)
    assert (simulate(twin, workload).hit_tokens > 0) == on
