"""Goodput of a worker that does both phases by chunked prefill, by recurrence, step by step.

Rows come first, then prompt chunks, as large as the tightest time between tokens allows; the
earliest first-token deadline first, what is late last. As the live decode scheduler, without
preemption and routing, which the simulator adds.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from itertools import chain, islice
from math import inf

import numpy as np

from ...engine.step_time import StepFeatures
from ..latency.step_costs import RowCosts, steps_to
from ..recurrences.phase_judge import highest_rate
from ..recurrences.served_steps import in_service, seen_by
from .phase_search import PhaseSearch
from .problem import WorkerShape

SLACK = 0.9  # of the TPOT target that a mixed step may take
LOOK = 64  # waiting prompts that one step considers


def colocated_rps(phases: PhaseSearch, shape: WorkerShape, workers: int = 1) -> tuple[float, str]:
    """Of one of so many workers, and what binds."""
    key = shape.key, seen_by(phases.problem.overheads, workers)
    known = phases.colocated.get(key)
    if known is None:
        known = phases.colocated[key] = _search(phases, shape, workers)
    return known


def _search(phases: PhaseSearch, shape: WorkerShape, workers: int) -> tuple[float, str]:
    guess = mean_rps(phases, shape, workers)
    if guess <= 0:
        return 0.0, "tpot"
    missed: dict[float, str] = {}

    def margin(rate_rps: float) -> float:
        times = outcome(phases, shape, rate_rps, workers)
        missed[rate_rps] = phases.judge.binds(*times)
        return phases.judge.margin(*times)

    rate_rps = highest_rate(margin, 0.7 * guess)
    above = [rate for rate in missed if rate > rate_rps]
    return rate_rps, missed[min(above)] if above else "tpot"


def mean_rps(phases: PhaseSearch, shape: WorkerShape, workers: int = 1) -> float:
    """The rate at which a mean mixed step is as long as the TPOT target: no rate above it holds."""
    workload, search = phases.workload, phases.problem.config.search
    prompt = float(workload.prompt_tokens.mean())
    square = float((workload.prompt_tokens.astype(float) ** 2).mean())
    output = max(1.0, float(workload.output_tokens.mean()) - 1)
    context = prompt + output / 2
    step_s = phases.judge.mean_tpot_s
    latency = in_service(shape.mixed, seen_by(phases.problem.overheads, workers))
    low, high = 0.0, min(search.max_batch_size, shape.kv_tokens / context) / (output * step_s)
    for _ in range(25):
        rate = (low + high) / 2
        rows = rate * output * step_s
        features = StepFeatures(
            new_tokens=round(rate * step_s * prompt),
            attention=rate * step_s * square / 2,
            decode_rows=round(rows),
            decode_context=round(rows * context),
        )
        low, high = (rate, high) if latency.interval_s(features) <= step_s else (low, rate)
    return low


def outcome(
    phases: PhaseSearch, shape: WorkerShape, rate_rps: float, workers: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """TTFT and TPOT of every request of one of so many workers, which gets `rate_rps`; of one that
    was late when the last had come, no end and 0."""
    arrival_s = phases.unit_arrival_s / rate_rps
    first_s, last_s = map(np.array, _Mixed(phases, shape, workers, arrival_s.tolist()).run())
    decoded_s = np.subtract(last_s, first_s, where=first_s < inf, out=np.zeros_like(first_s))
    return first_s - arrival_s + phases.told_s, decoded_s / phases.later


class _Mixed:
    """One worker; a pipeline is taken as one stage as long as its slowest, with all latency."""

    def __init__(
        self, phases: PhaseSearch, shape: WorkerShape, workers: int, arrival_s: list[float]
    ) -> None:
        search = phases.problem.config.search
        overheads = seen_by(phases.problem.overheads, workers)
        self.prompts, self.outputs = phases.prompts, phases.outputs
        self.latency = in_service(shape.mixed, overheads)
        # That chunks are cut by; on shared cores it is learnt from what steps took.
        learnt = phases.problem.overheads.cores > 0
        self.predicted = self.latency if learnt else shape.mixed
        self.prompt_s = overheads.prompt_s
        self.rows = RowCosts(self.latency)
        self.arrival_s = arrival_s
        self.ttft_s = (phases.judge.ttft_s - phases.told_s).tolist()
        self.tpot_s = phases.judge.tpot_s
        self.kv_tokens = shape.kv_tokens
        self.max_rows = search.max_batch_size
        self.budget = search.mixed_batch_tokens
        self.limit_s = SLACK * float(self.tpot_s.min())
        self.first_s, self.last_s = [inf] * len(arrival_s), [inf] * len(arrival_s)
        self.fresh: deque[int] = deque()
        self.late: deque[int] = deque()
        self.done = [0] * len(arrival_s)  # prompt tokens computed
        self.ends: list[tuple[int, int]] = []
        self.step = self.context = self.held = 0

    def run(self) -> tuple[list[float], list[float]]:
        now_s, next_one, total = 0.0, 0, len(self.arrival_s)
        while next_one < total or self.fresh or self.ends:
            if next_one == total and not self.fresh:
                self.late.clear()  # they have missed their target, and an overload's are many
            if not (self.fresh or self.late or self.ends):
                now_s = max(now_s, self.arrival_s[next_one])
            while next_one < total and self.arrival_s[next_one] <= now_s:
                self.fresh.append(next_one)
                next_one += 1
            if self.ends and not (self.fresh or self.late):
                now_s = self._stretch(now_s, self.arrival_s[next_one] if next_one < total else inf)
                continue
            chunks = self._chunks(now_s)
            now_s += self.latency.total_s(self._features(chunks)) + self.prompt_s * len(chunks)
            self._advance(chunks, now_s)
        return self.first_s, self.last_s

    def _stretch(self, now_s: float, until_s: float) -> float:
        """All steps to the next arrival or the next row's end, in one."""
        rows = len(self.ends)
        base_s, slope_s = self.rows.of(rows)
        first_s, rise_s = base_s + slope_s * self.context, slope_s * rows
        steps = self.ends[0][0] - self.step
        if until_s < inf:
            steps = min(steps, steps_to(until_s - now_s, first_s, rise_s))
        now_s += steps * first_s + rise_s * steps * (steps - 1) / 2
        self.step += steps - 1  # `_advance` takes the last
        self.context += rows * (steps - 1)
        self._advance([], now_s)
        return now_s

    def _features(self, chunks: list[tuple[int, int]]) -> StepFeatures:
        new = sum(count for _, count in chunks)
        attention = sum(count * (self.done[r] + count / 2) for r, count in chunks)
        return StepFeatures(
            new_tokens=new,
            attention=attention,
            decode_rows=len(self.ends),
            decode_context=self.context,
        )

    def _chunks(self, now_s: float) -> list[tuple[int, int]]:
        while self.fresh and now_s > self.arrival_s[self.fresh[0]] + self.ttft_s[self.fresh[0]]:
            self.late.append(self.fresh.popleft())
        left = self._room()
        chunks: list[tuple[int, int]] = []
        for request in islice(chain(self.fresh, self.late), LOOK):
            if left < 1 or len(self.ends) + len(chunks) >= self.max_rows:
                break
            need = self.prompts[request] + self.outputs[request] // 2
            if not self.done[request]:
                if self.held and self.held + need > self.kv_tokens:
                    continue  # who has begun goes on, or nobody would ever leave
                self.held += need
            count = min(left, self.prompts[request] - self.done[request])
            chunks.append((request, count))
            left -= count
        return chunks

    def _room(self) -> int:
        """The most prompt tokens whose step keeps within the limit; all of them without rows."""
        rows = len(self.ends)
        if not rows or not (self.fresh or self.late):
            return self.budget
        first = islice(chain(self.fresh, self.late), 8)
        wanted = sum(self.prompts[request] - self.done[request] for request in first)
        low, high = 0, min(self.budget - rows, wanted)
        if self._with_chunk_s(high) <= self.limit_s:
            return high
        while high - low > 32:
            middle = (low + high) // 2
            fits = self._with_chunk_s(middle) <= self.limit_s
            low, high = (middle, high) if fits else (low, middle)
        return max(low, 16)

    def _with_chunk_s(self, tokens: int) -> float:
        attention = tokens * tokens / 2
        features = StepFeatures(tokens, attention, len(self.ends), self.context)
        return self.predicted.total_s(features)

    def _advance(self, chunks: list[tuple[int, int]], now_s: float) -> None:
        self.step += 1
        self.context += len(self.ends)
        while self.ends and self.ends[0][0] == self.step:
            request = heappop(self.ends)[1]
            self.last_s[request] = now_s
            self.context -= self.prompts[request] + self.outputs[request] - 1
            self.held -= self.prompts[request] + self.outputs[request] // 2
        for request, count in chunks:
            self.done[request] += count
            if self.done[request] == self.prompts[request]:
                (self.fresh if request in self.fresh else self.late).remove(request)
                self.first_s[request] = self.last_s[request] = now_s
                if self.outputs[request] > 1:
                    heappush(self.ends, (self.step + self.outputs[request] - 1, request))
                    self.context += self.prompts[request]
                else:
                    self.held -= self.prompts[request]
