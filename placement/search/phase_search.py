"""Goodput of each phase apart, and of a pair, by recurrences: DistServe's Algorithm 1 up to `n, m`.

Prefill does not depend on decode, so each (shape, count) is worked out once and reused by every
pair it stands in. All rates are tried on one stream of requests, stretched in time.
"""

from __future__ import annotations

from dataclasses import replace
from math import log2

import numpy as np
from numpy.typing import NDArray

from ...engine.step_time import StepFeatures
from ..latency.phase_latency import PhaseLatency
from ..latency.step_costs import PromptCosts, RowCosts
from ..latency.transfer import Link, visible_s
from ..recurrences.highest_rate import highest_rate, rate_and_bound
from ..recurrences.phase_judge import JointRows, PhaseJudge, SlowdownRows
from ..recurrences.phase_times import PoolLimits, decode_end_s, prefill_end_s
from ..recurrences.served_steps import in_service, prefill_stretch
from ..workload.workload import Workload
from .problem import Problem, ShapeKey, WorkerShape

QUICK_REQUESTS = 1000
BEYOND_MEAN = 1.1  # times the mean-value bound: a rate above is not believed
GRID = (1, 2, 4, 8, 16)  # counts whose pooling is worked out; between them by logarithm
# Workers of a pool that are worked out. A larger one is as many times as good: there is little
# left to gain by pooling, and the stream of requests would be over before its batches are full.
PREFILL_SLICE = 16
DECODE_SLICE = 4

Column = NDArray[np.float64]


class PhaseSearch:
    """One stream of requests, and all that was found out on it."""

    def __init__(
        self, problem: Problem, seed: int = 0, lengths: tuple[float, float] = (1.0, 1.0)
    ) -> None:
        """`lengths` stretches prompts and outputs, within the longest sequence."""
        self.problem = problem
        full = problem.workload.build(seed, rate_rps=1.0).head(QUICK_REQUESTS)
        self.workload = full if lengths == (1.0, 1.0) else _stretched(full, problem, lengths)
        self.unit_arrival_s = self.workload.at_rate(1.0).arrival_s
        self.prompts: list[int] = self.workload.prompt_tokens.tolist()
        self.outputs: list[int] = self.workload.output_tokens.tolist()
        self.later = np.maximum(self.workload.output_tokens - 1, 1)
        slowdown = problem.slowdown
        self.judge: PhaseJudge = (
            JointRows(self.workload, problem.slo)
            if slowdown is None
            else SlowdownRows(self.workload, problem.slo, slowdown)
        )
        # Of shared cores only what `prefill_stretch` says: a pool does not know the other.
        self._overheads = replace(problem.overheads, cores=0, warm_s=0.0)
        self.told_s = problem.overheads.admit_s + problem.overheads.report_s
        self._prompt_costs: dict[ShapeKey, PromptCosts] = {}
        self._row_costs: dict[ShapeKey, RowCosts] = {}
        self._prefill: dict[tuple[ShapeKey, int], float] = {}  # by workers
        self._decode: dict[ShapeKey, float] = {}  # of one worker
        self.simulations = 0

    def rows_of(self, name: str) -> NDArray[np.bool_]:
        """The requests of a class."""
        ids = self.workload.class_ids
        if ids is None:
            return np.ones(self.workload.num_requests, dtype=bool)
        return ids == self.workload.class_names.index(name)

    # prefill

    def prompt_costs(self, shape: WorkerShape) -> PromptCosts:
        costs = self._prompt_costs.get(shape.key)
        if costs is None:
            budget = min(self.problem.config.search.max_batch_tokens, shape.kv_tokens)
            latency = in_service(shape.prefill, self._overheads)
            costs = PromptCosts(latency, self.prompts, budget, self._overheads.prompt_s)
            self._prompt_costs[shape.key] = costs
        return costs

    def alone_s(self, shape: WorkerShape) -> Column:
        """TTFT with nobody else there."""
        return self.prompt_costs(shape).alone_s() + self.told_s

    def waited_s(
        self, shape: WorkerShape, workers: int, arrival_s: Column, stretch: float = 1.0
    ) -> Column:
        """From each arrival in the queue until the first token is there; steps take `stretch`
        times as long."""
        self.simulations += 1
        limits_s = (self.judge.ttft_s - self.told_s) / stretch
        shorter_s = arrival_s / stretch
        costs = self.prompt_costs(shape)
        end_s = prefill_end_s(costs, shorter_s.tolist(), workers, limits_s.tolist())
        return np.array(end_s) * stretch - arrival_s

    def prefill_rps(self, shape: WorkerShape, workers: int) -> float:
        """Goodput of a pool, TTFT alone. Pools between the counts of `GRID` are interpolated."""
        below = max(n for n in GRID if n <= workers)
        if below == workers or below == GRID[-1]:
            return self._prefill_at(shape, below) * workers / below
        above = 2 * below
        weight = log2(workers / below)
        each = [self._prefill_at(shape, n) / n for n in (below, above)]
        return workers * ((1 - weight) * each[0] + weight * each[1])

    def _prefill_at(self, shape: WorkerShape, workers: int) -> float:
        known = self._prefill.get((shape.key, workers))
        if known is None:

            def margin(rate_rps: float) -> float:
                waited_s = self.waited_s(shape, workers, self.unit_arrival_s / rate_rps)
                return self.judge.margin(waited_s + self.told_s, None)

            if self.judge.margin(self.alone_s(shape), None) < 0:
                known = 0.0  # late even with nobody else there
            else:
                capacity_rps = self.prompt_costs(shape).capacity_rps()
                known = highest_rate(margin, 0.9 * workers * capacity_rps)
            self._prefill[shape.key, workers] = known
        return known

    # decode

    def row_costs(self, shape: WorkerShape) -> RowCosts:
        costs = self._row_costs.get(shape.key)
        if costs is None:
            latency = in_service(shape.decode, self._overheads)
            costs = self._row_costs[shape.key] = RowCosts(latency)
        return costs

    def decode(self, shape: WorkerShape) -> PhaseLatency:
        """Decode steps in service."""
        return self.row_costs(shape).latency

    def last_s(self, shape: WorkerShape, workers: int, ready_s: Column) -> Column:
        """When each last token is there, with KV there at `ready_s`."""
        self.simulations += 1
        limits = PoolLimits(
            max_batch_size=self.problem.config.search.max_batch_size, kv_tokens=shape.kv_tokens
        )
        return np.array(
            decode_end_s(
                self.row_costs(shape),
                ready_s.tolist(),
                self.prompts,
                self.outputs,
                workers,
                limits,
            )
        )

    def decode_rps(self, shape: WorkerShape, workers: int) -> float:
        """Goodput of a pool, TPOT alone: large batches gain little from pooling, so one counts."""
        known = self._decode.get(shape.key)
        if known is None:
            bound_rps = self.mean_decode_rps(shape)

            def margin(rate_rps: float) -> float:
                if rate_rps > bound_rps * BEYOND_MEAN:
                    return -1.0  # the stream would be over before the batch is full
                ready_s = self.unit_arrival_s / rate_rps
                tpot_s = (self.last_s(shape, 1, ready_s) - ready_s) / self.later
                return self.judge.margin(None, tpot_s)

            known = highest_rate(margin, 0.8 * bound_rps) if bound_rps else 0.0
            self._decode[shape.key] = known
        return workers * known

    def mean_decode_rps(self, shape: WorkerShape) -> float:
        """Little's law: rows = rate · outputs · step; the rate at which a mean step is as long as
        the targets allow, or rows and their KV fill the worker. A bound, and a start."""
        tokens = float(self.workload.output_tokens.mean())
        held = self.workload.prompt_tokens + self.workload.output_tokens / 2
        per_row = float((held * self.workload.output_tokens).mean()) / tokens
        limit_s = self.judge.mean_tpot_s
        most = min(self.problem.config.search.max_batch_size, shape.kv_tokens / per_row)
        stages = shape.pipeline_parallel
        steps = self.decode(shape)
        low, high = 0.0, most / stages
        for _ in range(20):
            rows = (low + high) / 2
            step_s = steps.total_s(
                StepFeatures(decode_rows=max(1, round(rows)), decode_context=round(rows * per_row))
            )
            low, high = (rows, high) if step_s <= limit_s else (low, rows)
        if low == 0.0:
            return 0.0
        features = StepFeatures(decode_rows=max(1, round(low)), decode_context=round(low * per_row))
        return low * stages / steps.total_s(features) / max(1.0, tokens - 1)

    # pairs

    def link_rps(self, prefill: WorkerShape, n: int, decode: WorkerShape, m: int) -> float:
        """Requests a second whose KV the narrower side's network ports carry; inf when free."""
        kv_bytes = self.problem.kv_bytes_per_token * float(self.workload.prompt_tokens.mean())
        if not kv_bytes:
            return float("inf")
        return (
            min(
                n * prefill.gpus * prefill.machine.hardware.network_bandwidth,
                m * decode.gpus * decode.machine.hardware.network_bandwidth,
            )
            / kv_bytes
        )

    def pair_rps(
        self,
        prefill: WorkerShape,
        n: int,
        decode: WorkerShape,
        m: int,
        *,
        local: bool,
        near_rps: float | None = None,
    ) -> tuple[float, str]:
        """Goodput of both pools in a row, TTFT and TPOT jointly, KV charged; and what binds.

        `near_rps`: about what it is, where that is known; it saves searching the phases apart.
        """
        guess_rps = near_rps or min(self.prefill_rps(prefill, n), self.decode_rps(decode, m))
        if guess_rps <= 0:
            return 0.0, "ttft" if not self.prefill_rps(prefill, n) else "tpot"
        links = float("inf") if local else self.link_rps(prefill, n, decode, m)
        behind_s = self.behind_s(prefill, decode, local=local)
        bound_rps = m * self.mean_decode_rps(decode) * BEYOND_MEAN

        def tried(rate_rps: float) -> tuple[float, str]:
            if rate_rps > bound_rps:
                return -1.0, "tpot"
            if rate_rps > links:
                return -1.0, "network"
            times = self.outcome(prefill, n, decode, m, rate_rps, behind_s)
            return self.judge.margin(*times), self.judge.binds(*times)

        return rate_and_bound(tried, guess_rps, near=near_rps is not None)

    def behind_s(self, prefill: WorkerShape, decode: WorkerShape, *, local: bool) -> Column:
        """From the end of prefill until decode can go on, on links with nobody else there: once it
        has the KV and the gateway's word."""
        handoff_s = self.problem.overheads.handoff_s
        if not self.problem.kv_bytes_per_token:
            return np.full(self.workload.num_requests, handoff_s)
        ends = (prefill.machine.network, decode.machine.network)
        sides = [end.local if local else end.remote for end in ends]
        width = min(prefill.gpus, decode.gpus)
        link = Link(
            bytes_per_s=width * min(side.bytes_per_s for side in sides),
            latency_s=max(side.latency_s for side in sides),
        )
        sent_s = visible_s(
            self.workload.prompt_tokens * self.problem.kv_bytes_per_token,
            self.problem.model.num_layers,
            self.prompt_costs(prefill).alone_s(),
            link,
        )
        return np.maximum(sent_s, handoff_s)

    def outcome(
        self,
        prefill: WorkerShape,
        n: int,
        decode: WorkerShape,
        m: int,
        rate_rps: float,
        behind_s: Column,
    ) -> tuple[Column, Column]:
        """TTFT and TPOT of every request.

        Of a pool larger than its slice so many workers are worked out, at the same rate a worker;
        where the two are cut differently, what leaves prefill reaches decode stretched in time.
        """
        some = min(n, PREFILL_SLICE)
        arrival_s = self.unit_arrival_s / (rate_rps * some / n)
        tokens_per_s = rate_rps * float(self.workload.output_tokens.mean())
        stretch = prefill_stretch(self.problem.overheads, n, m, tokens_per_s, self.decode(decode))
        waited_s = self.waited_s(prefill, some, arrival_s, stretch)
        others = min(m, DECODE_SLICE)
        ready_s = self.unit_arrival_s / (rate_rps * others / m) + waited_s + behind_s
        last_s = self.last_s(decode, others, ready_s)
        return waited_s + self.told_s, (last_s - ready_s + behind_s) / self.later


def _stretched(workload: Workload, problem: Problem, lengths: tuple[float, float]) -> Workload:
    longest = problem.max_model_len
    prompts = np.clip(np.rint(workload.prompt_tokens * lengths[0]), 1, longest - 1)
    outputs = np.clip(np.rint(workload.output_tokens * lengths[1]), 1, longest - prompts)
    return replace(
        workload,
        prompt_tokens=prompts.astype(np.int32),
        output_tokens=outputs.astype(np.int32),
        prefix=None,
    )
