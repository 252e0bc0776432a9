"""The mirror against a literal event simulation of the same rules, one event a stage and step."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from phasewise.engine.errors import InvalidConfig
from phasewise.placement.latency.distserve_profile import DistServeCoefficients
from phasewise.placement.recurrences.distserve_mirror import MirrorPhase, mirror
from phasewise.placement.workload.workload import Workload

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
    """One worker of an instance: a queue, and at most one step in progress."""

    rank: int
    last: bool
    queue: list[Job] = field(default_factory=list)
    following: Stage | None = None
    in_step: int = 0
    busy: bool = False
    woken: bool = False


class LiteralSimulation:
    """An event heap; nothing is jumped or summed up. Ties go by the order of scheduling."""

    def __init__(self, prefill: MirrorPhase, decode: MirrorPhase) -> None:
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.numbers = itertools.count()
        self.now = 0.0
        self.prefill, self.decode = prefill, decode
        self.prefill_heads = [self.chain(prefill) for _ in range(prefill.instances)]
        self.decode_heads = [self.chain(decode) for _ in range(decode.instances)]

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

    def wake(self, stage: Stage, begin: Callable[[Stage], None]) -> None:
        if not stage.busy and not stage.woken:
            stage.woken = True
            self.at(self.now, lambda: begin(stage))

    def arrive(self, job: Job) -> None:
        head = min(self.prefill_heads, key=lambda s: s.in_step + len(s.queue))
        head.queue.append(job)
        self.wake(head, self.begin_prefill)

    def begin_prefill(self, stage: Stage) -> None:
        stage.woken, stage.busy = False, bool(stage.queue)
        if not stage.queue:
            return
        batch: list[Job] = []
        if stage.rank == 0:
            chunk, room = next(self.numbers), self.prefill.max_tokens
            while stage.queue and stage.queue[0].prompt <= room:
                job = stage.queue.pop(0)
                job.chunk = chunk
                room -= job.prompt
                batch.append(job)
        else:
            chunk = stage.queue[0].chunk
            while stage.queue and stage.queue[0].chunk == chunk:
                batch.append(stage.queue.pop(0))
        lengths = [job.prompt for job in batch]
        a, b, c = self.prefill.coefficients.prefill
        pp = self.prefill.pipeline_parallel
        delay = (a + b * sum(lengths) + c * sum(n**2 for n in lengths)) / pp + pp
        if stage.rank == 0:
            delay += 2 + 1e-4 * sum(lengths)
        stage.in_step = len(batch)
        self.at(self.now + delay, lambda: self.end_prefill(stage, batch))

    def end_prefill(self, stage: Stage, batch: list[Job]) -> None:
        stage.in_step = 0
        for job in batch:
            if stage.last:
                job.first = self.now
                head = min(self.decode_heads, key=lambda s: len(s.queue))
                head.queue.append(job)
                self.wake(head, self.begin_decode)
            else:
                assert stage.following
                stage.following.queue.append(job)
                self.wake(stage.following, self.begin_prefill)
        stage.busy = False
        self.begin_prefill(stage)

    def begin_decode(self, stage: Stage) -> None:
        stage.woken, stage.busy = False, bool(stage.queue)
        if not stage.queue:
            return
        batch, room = [], self.decode.max_tokens
        while stage.queue and stage.queue[0].prompt + stage.queue[0].done + 1 <= room:
            job = stage.queue.pop(0)
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
                stage.following.queue.append(job)
        stage.busy = False
        if stage.following is not stage and stage.following.queue:
            self.wake(stage.following, self.begin_decode)
        self.begin_decode(stage)


def poisson_jobs(rate_rps: float, num_requests: int, seed: int) -> Workload:
    rng = np.random.default_rng(seed)
    return Workload(
        arrival_s=np.cumsum(rng.exponential(1 / rate_rps, num_requests)),
        prompt_tokens=np.clip(rng.lognormal(5.5, 1.0, num_requests), 1, 1800).astype(np.int32),
        output_tokens=np.clip(rng.lognormal(4.0, 1.0, num_requests), 1, 900).astype(np.int32),
    )


def literal_times(
    workload: Workload, prefill: MirrorPhase, decode: MirrorPhase
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
    workload = poisson_jobs(rate_rps, 120, seed=int(rate_rps) + pipelines[1])
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
    times = mirror(workload, prefill, decode)
    np.testing.assert_allclose(times.ttft_s, ttft_s, rtol=0, atol=1e-9)
    np.testing.assert_allclose(times.tpot_s, tpot_s, rtol=0, atol=1e-9)


def test_decode_batches_past_the_threshold_use_the_large_coefficients() -> None:
    workload = poisson_jobs(60.0, 300, seed=3)
    prefill = MirrorPhase(coefficients=OPT_13B_TP2, instances=4)
    decode = MirrorPhase(coefficients=OPT_13B_TP1)
    times = mirror(workload, prefill, decode)
    ttft_s, tpot_s = literal_times(workload, prefill, decode)
    np.testing.assert_allclose(times.ttft_s, ttft_s, rtol=0, atol=1e-9)
    np.testing.assert_allclose(times.tpot_s, tpot_s, rtol=0, atol=1e-9)


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
