"""Goodput of a worker that does both phases by chunked prefill, by recurrence, step by step.

Rows come first, then prompt chunks, as large as the tightest time between tokens allows; the
earliest first-token deadline first, what is late last. As the live decode scheduler, without
preemption and routing, which the simulator adds.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from heapq import heappop, heappush
from itertools import chain, islice
from math import inf

import numpy as np

from ...engine.step_time import StepFeatures
from ..latency.phase_latency import PhaseLatency
from ..latency.step_costs import FAR, RowCosts, steps_to
from ..recurrences.highest_rate import rate_and_bound
from ..recurrences.served_steps import in_service, seen_by
from ..simulation.deployment import Overheads
from .phase_search import Column, PhaseSearch
from .problem import ShapeKey, WorkerShape

SLACK = 0.9  # of the TPOT target that a mixed step may take
LOOK = 64  # waiting prompts that one step considers
SHARING = 8  # of them are as many as share a step
CELL = 32  # tokens: the room of a step is found no finer
LEAST = 16  # tokens that a step takes whatever its rows wait

Key = tuple[ShapeKey, Overheads]


class Colocated:
    """Workers of both roles under the requests of a `PhaseSearch`; keeps what it found."""

    def __init__(self, phases: PhaseSearch) -> None:
        self.phases = phases
        self.found: dict[Key, tuple[float, str]] = {}
        self._steps: dict[Key, MixedSteps] = {}

    def goodput(self, shape: WorkerShape, workers: int) -> tuple[float, str]:
        """Requests a second of one of so many workers, and what binds."""
        key = self._key(shape, workers)
        if key not in self.found:
            guess_rps = 0.7 * self.mean_rps(shape, workers)
            self.found[key] = self._search(shape, workers, guess_rps, near=False)
        return self.found[key]

    def goodput_near(self, shape: WorkerShape, workers: int, near_rps: float) -> float:
        """The same where it is known what it is about."""
        return self._search(shape, workers, near_rps, near=True)[0]

    def _search(
        self, shape: WorkerShape, workers: int, guess_rps: float, *, near: bool
    ) -> tuple[float, str]:
        if guess_rps <= 0:
            return 0.0, "tpot"
        judge = self.phases.judge

        def tried(rate_rps: float) -> tuple[float, str]:
            times = self.outcome(shape, rate_rps, workers)
            return judge.margin(*times), judge.binds(*times)

        return rate_and_bound(tried, guess_rps, near=near)

    def mean_rps(self, shape: WorkerShape, workers: int = 1) -> float:
        """The rate at which a mean mixed step is as long as the TPOT target: none above holds."""
        workload, search = self.phases.workload, self.phases.problem.config.search
        prompt = float(workload.prompt_tokens.mean())
        square = float((workload.prompt_tokens.astype(float) ** 2).mean())
        output = max(1.0, float(workload.output_tokens.mean()) - 1)
        context = prompt + output / 2
        step_s = self.phases.judge.mean_tpot_s
        latency = self._steps_of(shape, workers).latency
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
        self, shape: WorkerShape, rate_rps: float, workers: int = 1
    ) -> tuple[Column, Column]:
        """TTFT and TPOT of every request of one of so many workers, which gets `rate_rps`; of one
        that was late when the last had come, no end and 0."""
        phases = self.phases
        arrival_s = phases.unit_arrival_s / rate_rps
        worker = _Mixed(phases, self._steps_of(shape, workers), shape.kv_tokens, arrival_s.tolist())
        first_s, last_s = map(np.array, worker.run())
        decoded_s = np.subtract(last_s, first_s, where=first_s < inf, out=np.zeros_like(first_s))
        return first_s - arrival_s + phases.told_s, decoded_s / phases.later

    def _key(self, shape: WorkerShape, workers: int) -> Key:
        return shape.key, seen_by(self.phases.problem.overheads, workers)

    def _steps_of(self, shape: WorkerShape, workers: int) -> MixedSteps:
        key = self._key(shape, workers)
        if key not in self._steps:
            self._steps[key] = MixedSteps(self.phases, shape, key[1])
        return self._steps[key]


class MixedSteps:
    """What steps of rows and chunks take on one shape, and how many tokens they have room for."""

    def __init__(self, phases: PhaseSearch, shape: WorkerShape, overheads: Overheads) -> None:
        """A pipeline is taken as one stage as long as its slowest, with all latency."""
        self.latency = in_service(shape.mixed, overheads)
        self.rows = RowCosts(self.latency)
        self.prompt_s = overheads.prompt_s
        self.budget = phases.problem.config.search.mixed_batch_tokens
        # That chunks are cut by; on shared cores it is learnt from what steps took.
        learnt = phases.problem.overheads.cores > 0
        self._predicted: PhaseLatency = self.latency if learnt else shape.mixed
        self._limit_s = SLACK * float(phases.judge.tpot_s.min())
        self._cells: dict[int, tuple[list[float], float]] = {}

    def room(self, rows: int, context: int, wanted: int) -> int:
        """The most prompt tokens, of so many wanted, whose step keeps within the limit."""
        high = min(self.budget - rows, wanted)
        cells, token_s = self._cells.get(rows) or self._measured(rows)
        cell = bisect_right(cells, self._limit_s - token_s * context) - 1
        surely, not_at_all = cell * CELL, (cell + 1) * CELL
        if high <= surely or (high < not_at_all and self._keeps(high, rows, context)):
            return high
        low = 0
        while high - low > CELL:
            middle = (low + high) // 2
            if middle <= surely or (middle < not_at_all and self._keeps(middle, rows, context)):
                low = middle
            else:
                high = middle
        return max(low, LEAST)

    def _keeps(self, tokens: int, rows: int, context: int) -> bool:
        features = StepFeatures(tokens, tokens * tokens / 2, rows, context)
        return self._predicted.total_s(features) <= self._limit_s

    def _measured(self, rows: int) -> tuple[list[float], float]:
        """Beside rows without context: seconds of steps of whole cells, rising, and how much
        longer a token of context makes one (step times are linear in it)."""
        total_s = self._predicted.total_s
        tokens = range(0, self.budget + 2 * CELL, CELL)
        cells = [total_s(StepFeatures(n, n * n / 2, rows, 0)) for n in tokens]
        far_s = total_s(StepFeatures(CELL, CELL * CELL / 2, rows, FAR))
        self._cells[rows] = cells, (far_s - cells[1]) / FAR
        return self._cells[rows]


class _Mixed:
    """One worker and its requests at one rate."""

    def __init__(
        self, phases: PhaseSearch, steps: MixedSteps, kv_tokens: int, arrival_s: list[float]
    ) -> None:
        self.steps, self.kv_tokens, self.arrival_s = steps, kv_tokens, arrival_s
        self.prompts, self.outputs = phases.prompts, phases.outputs
        limits_s = (phases.judge.ttft_s - phases.told_s).tolist()
        self.late_s = [at_s + limit_s for at_s, limit_s in zip(arrival_s, limits_s, strict=True)]
        self.max_rows = phases.problem.config.search.max_batch_size
        self.first_s, self.last_s = [inf] * len(arrival_s), [inf] * len(arrival_s)
        self.fresh: deque[int] = deque()
        self.late: deque[int] = deque()
        self.done = [0] * len(arrival_s)  # prompt tokens computed
        self.ends: list[tuple[int, int]] = []  # heap of (last step, request)
        self.step = self.context = self.held = 0

    def run(self) -> tuple[list[float], list[float]]:
        """When each first and each last token is there."""
        arrival_s, fresh, late, ends = self.arrival_s, self.fresh, self.late, self.ends
        now_s, next_one, total = 0.0, 0, len(arrival_s)
        while next_one < total or fresh or ends:
            if next_one == total and not fresh:
                late.clear()  # they have missed their target, and an overload's are many
            if not (fresh or late or ends):
                now_s = max(now_s, arrival_s[next_one])
            while next_one < total and arrival_s[next_one] <= now_s:
                fresh.append(next_one)
                next_one += 1
            if ends and not (fresh or late):
                now_s = self._stretch(now_s, arrival_s[next_one] if next_one < total else inf)
                continue
            chunks = self._chunks(now_s)
            now_s += self._step_s(chunks)
            self._advance(chunks, now_s)
        return self.first_s, self.last_s

    def _stretch(self, now_s: float, until_s: float) -> float:
        """All steps to the next arrival or the next row's end, in one."""
        rows = len(self.ends)
        base_s, slope_s = self.steps.rows.of(rows)
        first_s, rise_s = base_s + slope_s * self.context, slope_s * rows
        steps = self.ends[0][0] - self.step
        if until_s < inf:
            steps = min(steps, steps_to(until_s - now_s, first_s, rise_s))
        now_s += steps * first_s + rise_s * steps * (steps - 1) / 2
        self.step += steps - 1  # `_advance` takes the last
        self.context += rows * (steps - 1)
        self._advance([], now_s)
        return now_s

    def _step_s(self, chunks: list[tuple[int, int]]) -> float:
        new, attention, done = 0, 0.0, self.done
        for request, count in chunks:
            new += count
            attention += count * (done[request] + count / 2)
        features = StepFeatures(new, attention, len(self.ends), self.context)
        host_s = self.steps.prompt_s if chunks else 0.0
        return self.steps.latency.total_s(features) + host_s

    def _chunks(self, now_s: float) -> list[tuple[int, int]]:
        fresh, late, done, prompts = self.fresh, self.late, self.done, self.prompts
        while fresh and now_s > self.late_s[fresh[0]]:
            late.append(fresh.popleft())
        left, places = self._room(), self.max_rows - len(self.ends)
        chunks: list[tuple[int, int]] = []
        for request in islice(chain(fresh, late), LOOK):
            if left < 1 or len(chunks) >= places:
                break
            if not done[request]:
                need = prompts[request] + self.outputs[request] // 2
                if self.held and self.held + need > self.kv_tokens:
                    continue  # who has begun goes on, or nobody would ever leave
                self.held += need
            count = min(left, prompts[request] - done[request])
            chunks.append((request, count))
            left -= count
        return chunks

    def _room(self) -> int:
        """In prompt tokens; a whole step's without rows."""
        rows, budget = len(self.ends), self.steps.budget
        if not rows or not (self.fresh or self.late):
            return budget
        wanted = 0
        for request in islice(chain(self.fresh, self.late), SHARING):
            wanted += self.prompts[request] - self.done[request]
            if wanted >= budget:
                break
        return self.steps.room(rows, self.context, wanted)

    def _advance(self, chunks: list[tuple[int, int]], now_s: float) -> None:
        ends, prompts, outputs = self.ends, self.prompts, self.outputs
        self.step += 1
        self.context += len(ends)
        while ends and ends[0][0] == self.step:
            request = heappop(ends)[1]
            self.last_s[request] = now_s
            self.context -= prompts[request] + outputs[request] - 1
            self.held -= prompts[request] + outputs[request] // 2
        for request, count in chunks:
            self.done[request] += count
            if self.done[request] == prompts[request]:
                (self.fresh if request in self.fresh else self.late).remove(request)
                self.first_s[request] = self.last_s[request] = now_s
                if outputs[request] > 1:
                    heappush(ends, (self.step + outputs[request] - 1, request))
                    self.context += prompts[request]
                else:
                    self.held -= prompts[request]
