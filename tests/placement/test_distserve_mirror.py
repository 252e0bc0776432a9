"""The mirrors against a literal event simulation of the same rules, one event a stage and step."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from phasewise.engine.errors import InvalidConfig
from phasewise.placement.latency.distserve_profile import (
    DistServeCoefficients,
    read_distserve_profile,
    read_max_num_tokens,
)
from phasewise.placement.recurrences.distserve_mirror import MirrorPhase, MirrorTimes, mirror
from phasewise.placement.recurrences.vllm_mirror import mirror_vllm
from phasewise.placement.workload import arrivals
from phasewise.placement.workload.workload import Workload

DATA = Path(__file__).parent / "data"

# facebook/opt-13b at tensor parallel 2 and 1 on A100-80GB (profiler-a100-80g.distserve.json).
OPT_13B_TP2 = DistServeCoefficients(
    prefill=(14.742973695171262, 0.06857720739764, 2.4495727400243586e-06),
    decode_small=(13.294796350285385, 0.00034109219700723494, 0.06296393225243659),
    decode_large=(10.638741913126715, 0.00031183369638295723, 0.08562913604102729),
    large_from_rows=95,
)
OPT_13B_TP1 = DistServeCoefficients(
    prefill=(18.10254647486372, 0.1019122572698738, 7.122264314252114e-06),
    decode_small=(19.934702624895458, 0.0006269356524350583, 0.03850697740828398),
    decode_large=(7.1661889468253595, 0.0005798000403396046, 0.15831096191764046),
    large_from_rows=95,
)


@dataclass
class Job:
    prompt: int
    output: int
    arrival: float
    done: int = 0
    first: float = -1.0
    last: float = -1.0
    chunk: int = -1


@dataclass
class Stage:
    """One worker of an instance: two queues, and at most one step in progress."""

    rank: int
    last: bool
    prompts: list[Job] = field(default_factory=list)
    rows: list[Job] = field(default_factory=list)
    following: Stage | None = None
    in_step: int = 0
    busy: bool = False
    woken: bool = False


class LiteralSimulation:
    """An event heap; nothing is jumped or summed up. Ties go by the order of scheduling."""

    def __init__(self, prefill: MirrorPhase, decode: MirrorPhase | None) -> None:
        """`decode` None: the same instances do both, prompts first."""
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.numbers = itertools.count()
        self.now = 0.0
        self.prefill, self.decode = prefill, decode or prefill
        self.prefill_heads = [self.chain(prefill) for _ in range(prefill.instances)]
        self.decode_heads = [self.chain(decode) for _ in range(decode.instances)] if decode else []

    @staticmethod
    def chain(phase: MirrorPhase) -> Stage:
        n = phase.pipeline_parallel
        stages = [Stage(rank=i, last=i == n - 1) for i in range(n)]
        for i, stage in enumerate(stages):
            stage.following = stages[(i + 1) % n]
        return stages[0]

    def at(self, time: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.events, (time, next(self.numbers), action))

    def run(self, jobs: list[Job]) -> None:
        for job in jobs:
            self.at(job.arrival, lambda job=job: self.arrive(job))
        while self.events:
            self.now, _, action = heapq.heappop(self.events)
            action()

    def wake(self, stage: Stage) -> None:
        if not stage.busy and not stage.woken:
            stage.woken = True
            self.at(self.now, lambda: self.begin(stage))

    def arrive(self, job: Job) -> None:
        head = min(self.prefill_heads, key=lambda s: s.in_step + len(s.prompts))
        head.prompts.append(job)
        self.wake(head)

    def begin(self, stage: Stage) -> None:
        stage.woken, stage.busy = False, bool(stage.prompts or stage.rows)
        if stage.prompts:
            self.begin_prefill(stage)
        elif stage.rows:
            self.begin_decode(stage)

    def begin_prefill(self, stage: Stage) -> None:
        batch: list[Job] = []
        if stage.rank == 0:
            chunk, room = next(self.numbers), self.prefill.max_tokens
            while stage.prompts and stage.prompts[0].prompt <= room:
                job = stage.prompts.pop(0)
                job.chunk = chunk
                room -= job.prompt
                batch.append(job)
        else:
            chunk = stage.prompts[0].chunk
            while stage.prompts and stage.prompts[0].chunk == chunk:
                batch.append(stage.prompts.pop(0))
        lengths = [job.prompt for job in batch]
        a, b, c = self.prefill.coefficients.prefill
        pp = self.prefill.pipeline_parallel
        delay = (a + b * sum(lengths) + c * sum(n**2 for n in lengths)) / pp + pp
        if stage.rank == 0:
            delay += 2 + 1e-4 * sum(lengths)
        stage.in_step = len(batch)
        self.at(self.now + delay, lambda: self.end_prefill(stage, batch))

    def end_prefill(self, stage: Stage, batch: list[Job]) -> None:
        assert stage.following
        stage.in_step = 0
        for job in batch:
            following = stage.following
            if stage.last:
                job.first = self.now
                if self.decode_heads:
                    following = min(self.decode_heads, key=lambda s: len(s.rows))
                following.rows.append(job)
            else:
                following.prompts.append(job)
            if following is not stage:
                self.wake(following)
        stage.busy = False
        self.begin(stage)

    def begin_decode(self, stage: Stage) -> None:
        batch, room = [], self.decode.max_tokens
        while stage.rows and stage.rows[0].prompt + stage.rows[0].done + 1 <= room:
            job = stage.rows.pop(0)
            room -= job.prompt + job.done + 1
            batch.append(job)
        context = sum(job.prompt + job.done for job in batch)
        k = self.decode.coefficients
        a, b, c = k.decode_small if len(batch) < k.large_from_rows else k.decode_large
        delay = (a + b * (context + len(batch)) + c * len(batch)) / self.decode.pipeline_parallel
        if stage.rank == 0:
            delay += 2 + 1e-4 * context
        self.at(self.now + delay, lambda: self.end_decode(stage, batch))

    def end_decode(self, stage: Stage, batch: list[Job]) -> None:
        assert stage.following
        for job in batch:
            job.done += stage.last
            if job.done == job.output:
                job.last = self.now
            else:
                stage.following.rows.append(job)
        stage.busy = False
        if stage.following is not stage and stage.following.rows:
            self.wake(stage.following)
        self.begin(stage)


def poisson_jobs(rate_rps: float, num_requests: int, seed: int) -> Workload:
    rng = np.random.default_rng(seed)
    return Workload(
        arrival_s=np.cumsum(rng.exponential(1 / rate_rps, num_requests)),
        prompt_tokens=np.clip(rng.lognormal(5.5, 1.0, num_requests), 1, 1800).astype(np.int32),
        output_tokens=np.clip(rng.lognormal(4.0, 1.0, num_requests), 1, 900).astype(np.int32),
    )


def literal_times(
    workload: Workload, prefill: MirrorPhase, decode: MirrorPhase | None
) -> tuple[np.ndarray, np.ndarray]:
    jobs = [
        Job(prompt=int(p), output=int(o), arrival=float(a) * 1000)
        for a, p, o in zip(
            workload.arrival_s, workload.prompt_tokens, workload.output_tokens, strict=True
        )
    ]
    LiteralSimulation(prefill, decode).run(jobs)
    ttft = np.array([job.first - job.arrival for job in jobs]) / 1000
    tpot = np.array([(job.last - job.first) / job.output for job in jobs]) / 1000
    return ttft, tpot


@pytest.mark.parametrize("pipelines", [(1, 1), (2, 1), (1, 2), (2, 4)])
@pytest.mark.parametrize("instances", [(1, 1), (2, 1), (1, 3)])
@pytest.mark.parametrize("limits", [(10**7, 10**7), (2500, 10**7), (4000, 6000)])
@pytest.mark.parametrize("rate_rps", [2.0, 9.0])
def test_every_request_has_the_times_of_the_literal_simulation(
    pipelines: tuple[int, int], instances: tuple[int, int], limits: tuple[int, int], rate_rps: float
) -> None:
    workload = poisson_jobs(rate_rps, 60, seed=int(rate_rps) + pipelines[1])
    prefill, decode = (
        MirrorPhase(
            coefficients=coefficients,
            pipeline_parallel=pipelines[i],
            instances=instances[i],
            max_tokens=limits[i],
        )
        for i, coefficients in enumerate((OPT_13B_TP2, OPT_13B_TP1))
    )
    ttft_s, tpot_s = literal_times(workload, prefill, decode)
    assert_equal(mirror(workload, prefill, decode), ttft_s, tpot_s)


def assert_equal(times: MirrorTimes, ttft_s: np.ndarray, tpot_s: np.ndarray) -> None:
    np.testing.assert_allclose(times.ttft_s, ttft_s, rtol=0, atol=1e-9)
    np.testing.assert_allclose(times.tpot_s, tpot_s, rtol=0, atol=1e-9)


ARRIVALS = {
    "fixed": lambda rate_rps, rng: arrivals.uniform(60, rate_rps),
    "poisson": lambda rate_rps, rng: arrivals.poisson(60, rate_rps, rng),
    "gamma": lambda rate_rps, rng: arrivals.gamma(60, rate_rps, 4.0, rng),
}


@pytest.mark.parametrize("arrive", ARRIVALS)
@pytest.mark.parametrize(
    ("model", "tp"), [("13b", t) for t in (1, 2, 4)] + [("66b", t) for t in (2, 3, 4, 8)]
)
def test_so_it_is_for_every_published_profile_memory_and_arrival(
    model: str, tp: int, arrive: str
) -> None:
    """Both engines' coefficients, with the memory published for them."""
    rng = np.random.default_rng(tp)
    rate_rps, pp = {"13b": 6.0, "66b": 1.5}[model], int(rng.integers(1, 4))
    workload = replace(
        poisson_jobs(rate_rps, 60, seed=tp), arrival_s=ARRIVALS[arrive](rate_rps, rng)
    )
    name = f"facebook/opt-{model}"
    room = read_max_num_tokens(DATA / "distserve_max_num_tokens.csv").get((name, tp, pp), 10**7)
    own, vllm = (
        MirrorPhase(
            coefficients=read_distserve_profile(DATA / f"distserve_{engine}.json")[name, tp],
            pipeline_parallel=pp,
            instances=int(rng.integers(1, 3)),
            max_tokens=room,
        )
        for engine in ("distserve", "vllm")
    )
    assert_equal(mirror(workload, own, own), *literal_times(workload, own, own))
    assert_equal(mirror_vllm(workload, vllm), *literal_times(workload, vllm, None))


@pytest.mark.parametrize("pipeline", [1, 2, 4])
@pytest.mark.parametrize("instances", [1, 2])
@pytest.mark.parametrize("limit", [10**7, 4000])
@pytest.mark.parametrize("rate_rps", [1.0, 9.0])
def test_the_baseline_has_the_times_of_the_literal_simulation(
    pipeline: int, instances: int, limit: int, rate_rps: float
) -> None:
    workload = poisson_jobs(rate_rps, 50, seed=int(rate_rps) + pipeline)
    workers = MirrorPhase(
        coefficients=OPT_13B_TP1,
        pipeline_parallel=pipeline,
        instances=instances,
        max_tokens=limit,
    )
    assert_equal(mirror_vllm(workload, workers), *literal_times(workload, workers, None))


def test_prompts_that_arrive_while_rows_decode_wait_for_one_step_only() -> None:
    """Worked out by hand: the row's step of 10 ms + 2 ms ends before the second prompt starts."""
    flat = replace(
        OPT_13B_TP1, prefill=(100.0, 0.0, 0.0), decode_small=(10.0, 0.0, 0.0), large_from_rows=99
    )
    workload = Workload(
        arrival_s=np.array([0.0, 0.110]),
        prompt_tokens=np.array([1, 1], dtype=np.int32),
        output_tokens=np.array([2, 1], dtype=np.int32),
    )
    times = mirror_vllm(workload, MirrorPhase(coefficients=flat))
    # 103.0001 ms a prefill step; rows from 103.0001 on, steps of 12 ms and 0.1 us a token.
    first, step = 0.1030001, 0.0120001
    second = first + step + first
    assert times.ttft_s.tolist() == pytest.approx([first, second - 0.110])
    last = second + 0.012 + 1e-7 * (2 + 1)  # both rows together
    assert times.finish_s.tolist() == pytest.approx([last, last])


def test_decode_batches_past_the_threshold_use_the_large_coefficients() -> None:
    workload = poisson_jobs(60.0, 300, seed=3)
    prefill = MirrorPhase(coefficients=OPT_13B_TP2, instances=4)
    decode = MirrorPhase(coefficients=OPT_13B_TP1)
    assert_equal(mirror(workload, prefill, decode), *literal_times(workload, prefill, decode))


def test_requests_that_arrive_at_one_instant_share_the_first_batch() -> None:
    workload = Workload(
        arrival_s=np.zeros(3),
        prompt_tokens=np.array([100, 200, 300], dtype=np.int32),
        output_tokens=np.ones(3, dtype=np.int32),
    )
    phase = MirrorPhase(coefficients=OPT_13B_TP1)
    a, b, c = OPT_13B_TP1.prefill
    expected_ms = a + b * 600 + c * (100**2 + 200**2 + 300**2) + 1 + 2 + 0.06
    np.testing.assert_allclose(mirror(workload, phase, phase).ttft_s, expected_ms / 1000)


def test_a_request_that_never_fits_is_named_instead_of_waiting_for_ever() -> None:
    workload = poisson_jobs(1.0, 10, seed=0)
    phase = MirrorPhase(coefficients=OPT_13B_TP1, max_tokens=50)
    with pytest.raises(InvalidConfig, match="request 0"):
        mirror(workload, phase, phase)
    with pytest.raises(InvalidConfig, match="request 0"):
        mirror_vllm(workload, phase)
