"""When each request leaves one phase: recurrences of a pool alone, for the search's first passes.

Prefill: a pool of equal workers, each request to the least outstanding tokens, earliest deadline
first and what is late last (as the live scheduler orders it), whole prompts in a step. Decode:
equal workers of `stages` micro-batches each, stretches without a change taken in one jump. Chunk
packing, preemption and shared links are left to the simulator, which verifies what wins here.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from ..latency.step_costs import PromptCosts, RowCosts, steps_to


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolLimits:
    """What bounds a step of one worker."""

    max_batch_tokens: int = 8192  # prompt tokens in a prefill step
    max_batch_size: int = 256  # rows in a decode step, over all micro-batches
    kv_tokens: int = 1 << 40  # positions a worker holds


def prefill_end_s(
    costs: PromptCosts, arrival_s: list[float], workers: int, ttft_s: list[float]
) -> list[float]:
    """When each first token is there. Arrivals are sorted."""
    end_s = [0.0] * len(arrival_s)
    pool = [_PrefillWorker(costs, arrival_s, ttft_s, end_s) for _ in range(workers)]
    if workers == 1:
        pool[0].fresh.extend(range(len(arrival_s)))
        pool[0].advance(inf)
        return end_s
    for request, at_s in enumerate(arrival_s):
        chosen, least = pool[0], inf
        for worker in pool:
            if worker.pending:
                worker.advance(at_s)
            load = worker.outstanding(at_s)
            if load < least:
                chosen, least = worker, load
                if not load:
                    break
        chosen.add(request)
    for worker in pool:
        worker.advance(inf)
    return end_s


class _PrefillWorker:
    """Batches leave the first stage in order, each later stage takes one at a time."""

    def __init__(
        self, costs: PromptCosts, arrival_s: list[float], ttft_s: list[float], end_s: list[float]
    ) -> None:
        self.costs, self.arrival_s, self.ttft_s = costs, arrival_s, ttft_s
        self.end_s = end_s  # written here
        self.fresh: deque[int] = deque()
        self.late: deque[int] = deque()
        self.free_s = [0.0] * len(costs.bases)
        self.running_tokens = 0
        self.pending = 0  # tokens not begun

    def add(self, request: int) -> None:
        self.fresh.append(request)
        self.pending += self.costs.prompts[request]

    def outstanding(self, now_s: float) -> int:
        return self.pending + (self.running_tokens if self.free_s[0] > now_s else 0)

    def advance(self, now_s: float) -> None:
        """Start every step that starts before `now_s`."""
        free_s = self.free_s
        while self.fresh or self.late:
            start_s = free_s[0]
            if not self.late:
                start_s = max(start_s, self.arrival_s[self.fresh[0]])
            if start_s >= now_s:
                return
            batch = self._take(start_s)
            steps = self.costs.batch(batch)
            at_s = free_s[0] = start_s + steps[0]
            for stage in range(1, len(free_s)):
                at_s = free_s[stage] = max(at_s, free_s[stage]) + steps[stage]
            for request in batch:
                self.end_s[request] = at_s

    def _take(self, start_s: float) -> list[int]:
        costs, fresh = self.costs, self.fresh
        batch: list[int] = []
        left = costs.budget
        while fresh and left > 0:
            request = fresh[0]
            arrived_s = self.arrival_s[request]
            if arrived_s > start_s:
                break
            if start_s + sum(costs.alone(request)) > arrived_s + self.ttft_s[request]:
                self.late.append(fresh.popleft())
                continue
            if batch and costs.prompts[request] > left:
                break
            left -= costs.prompts[request]
            batch.append(fresh.popleft())
        while self.late and left > 0 and not (batch and costs.prompts[self.late[0]] > left):
            left -= costs.prompts[self.late[0]]
            batch.append(self.late.popleft())
        self.running_tokens = costs.budget - left
        self.pending -= self.running_tokens
        return batch


def decode_end_s(
    costs: RowCosts,
    ready_s: list[float],
    prompts: Sequence[int],
    outputs: Sequence[int],
    workers: int,
    limits: PoolLimits,
) -> list[float]:
    """When each last token is there, for requests whose first token and KV are at `ready_s`."""
    stages = costs.latency.pipeline_parallel
    end_s = list(ready_s)
    rows = max(1, limits.max_batch_size // stages)
    lanes = [
        _DecodeLane(costs, prompts, outputs, rows, limits.kv_tokens // stages, end_s)
        for _ in range(workers * stages)
    ]
    for request in sorted(range(len(ready_s)), key=ready_s.__getitem__):
        if outputs[request] <= 1:
            continue
        at_s = ready_s[request]
        for lane in lanes:
            lane.advance(at_s)
        chosen = lanes[0]
        if len(lanes) > 1:
            chosen = min(lanes, key=_DecodeLane.outstanding)
        chosen.add(at_s, request)
    for lane in lanes:
        lane.advance(inf)
    return end_s


class _DecodeLane:
    """One micro-batch of one worker: all its rows are in every step."""

    __slots__ = (
        "context",
        "costs",
        "end_s",
        "ends",
        "held",
        "kv_tokens",
        "max_rows",
        "now_s",
        "outputs",
        "prompts",
        "queued",
        "step",
        "waiting",
    )

    def __init__(
        self,
        costs: RowCosts,
        prompts: Sequence[int],
        outputs: Sequence[int],
        max_rows: int,
        kv_tokens: int,
        end_s: list[float],
    ) -> None:
        self.costs, self.prompts, self.outputs, self.end_s = costs, prompts, outputs, end_s
        self.max_rows, self.kv_tokens = max_rows, kv_tokens
        self.now_s = 0.0
        self.step = self.context = self.held = self.queued = 0  # the last two in positions
        self.ends: list[tuple[int, int]] = []  # heap of (last step, request)
        self.waiting: deque[int] = deque()

    def outstanding(self) -> int:
        return self.held + self.queued

    def _need(self, request: int) -> int:
        """Positions it holds on the mean over its life: rows in all stages of growth share them."""
        return self.prompts[request] + self.outputs[request] // 2

    def add(self, at_s: float, request: int) -> None:
        if not self.ends and not self.waiting:
            self.now_s = max(self.now_s, at_s)
        self.waiting.append(request)
        self.queued += self._need(request)
        self._admit()

    def _admit(self) -> None:
        while self.waiting and len(self.ends) < self.max_rows:
            request = self.waiting[0]
            need = self._need(request)
            if self.ends and self.held + need > self.kv_tokens:
                return
            self.waiting.popleft()
            self.held += need
            self.queued -= need
            self.context += self.prompts[request]
            heapq.heappush(self.ends, (self.step + self.outputs[request] - 1, request))

    def advance(self, until_s: float) -> None:
        """Take every step that starts before `until_s`."""
        ends = self.ends
        while ends and self.now_s < until_s:
            rows = len(ends)
            base_s, slope_s = self.costs.of(rows)
            first_s = base_s + slope_s * self.context
            rise_s = slope_s * rows
            steps = ends[0][0] - self.step
            end_s = self.now_s + steps * first_s + rise_s * steps * (steps - 1) / 2
            if end_s > until_s:
                steps = min(steps, steps_to(until_s - self.now_s, first_s, rise_s))
                end_s = self.now_s + steps * first_s + rise_s * steps * (steps - 1) / 2
            self.now_s = end_s
            self.step += steps
            self.context += rows * steps
            done = False
            while ends and ends[0][0] == self.step:
                request = heapq.heappop(ends)[1]
                self.end_s[request] = end_s
                self.context -= self.prompts[request] + self.outputs[request] - 1
                self.held -= self._need(request)
                done = True
            if done and self.waiting:
                self._admit()
