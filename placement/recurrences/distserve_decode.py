"""The decode half of the mirror (`distserve_mirror.py`): when each request's last token is there.

One stage is jumped through: a stretch of steps in which no request joins or leaves is a quadratic
in their number. Stages in a row are followed step by step, by groups of requests that run
together; where memory is short, by single requests in queue order.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass
from math import ceil, inf, sqrt

from ..latency.distserve_profile import (
    FIRST_STAGE_MS,
    FIRST_STAGE_MS_PER_TOKEN,
    DistServeCoefficients,
)

UNLIMITED = 10**7  # its default for both token limits


@dataclass(frozen=True, kw_only=True, slots=True)
class MirrorPhase:
    """One phase's instances. Coefficients already stand for the tensor parallelism."""

    coefficients: DistServeCoefficients
    pipeline_parallel: int = 1
    instances: int = 1
    max_tokens: int = UNLIMITED  # a row of max_num_tokens.csv


def decode_end_ms(
    first_ms: list[float], prompts: list[int], outputs: list[int], phase: MirrorPhase
) -> list[float]:
    """When each request's last token is there; handed over at `first_ms`, least queued first."""
    if phase.pipeline_parallel == 1:
        return _decode(_DecodeInstance, first_ms, prompts, outputs, phase)
    try:
        return _decode(_GroupPipeline, first_ms, prompts, outputs, phase)
    except _MemoryShortError:
        return _decode(_QueuePipeline, first_ms, prompts, outputs, phase)


def _decode(
    kind: type[_DecodeInstance] | type[_GroupPipeline] | type[_QueuePipeline],
    first_ms: list[float],
    prompts: list[int],
    outputs: list[int],
    phase: MirrorPhase,
) -> list[float]:
    end_ms = list(first_ms)
    instances = [kind(phase, prompts, outputs, end_ms) for _ in range(phase.instances)]
    for request in sorted(range(len(first_ms)), key=first_ms.__getitem__):
        at_ms = first_ms[request]
        for instance in instances:
            instance.advance(at_ms)
        chosen = instances[0]
        if len(instances) > 1:
            chosen = min(instances, key=lambda instance: instance.load())
        chosen.push(at_ms, request)
    for instance in instances:
        instance.advance(inf)
    return end_ms


class _DecodeInstance:
    """One stage. All requests run in every step, but for the stretches where memory is short."""

    def __init__(
        self, phase: MirrorPhase, prompts: list[int], outputs: list[int], end_ms: list[float]
    ) -> None:
        self.coefficients = phase.coefficients
        self.limit = phase.max_tokens
        self.prompts, self.outputs = prompts, outputs
        self.end_ms = end_ms  # written here
        self.now_ms = 0.0  # the start of the step in progress
        self.waiting: deque[int] = deque()  # the scheduler sees only these, not the running
        self.running: deque[int] = deque()  # in queue order; the finished are left in, until read
        self.last_step: dict[int, int] = {}  # running request -> the step that ends it
        self.ends: list[tuple[int, int]] = []  # heap of (last step, request)
        self.step = 0
        self.context = 0  # Σ over running

    def push(self, now_ms: float, request: int) -> None:
        if not self.last_step and not self.waiting:
            self.now_ms = now_ms  # it was idle: the next step starts here
        self.waiting.append(request)

    def load(self) -> int:
        """Requests outside the step in progress: just arrived, or left out for want of room."""
        rows = len(self.last_step)
        if self.context + rows <= self.limit:
            return len(self.waiting)
        return len(self.waiting) + rows - len(self._fitting()[0])

    def advance(self, now_ms: float) -> None:
        """Take every step that ends before `now_ms`; what waits at its start joins it."""
        if self.now_ms >= now_ms:
            return
        if not self.last_step:
            self._admit()
        while self.last_step:
            rows, context = len(self.last_step), self.context
            fitting = (self.limit - context) // rows  # steps until Σ(context + 1) is too much
            if fitting < 1:
                if not self._short_step(now_ms):
                    return
                continue
            steps = 1 if self.waiting else min(self.ends[0][0] - self.step, fitting)
            first_ms = self.coefficients.decode_ms(rows, context + rows, 1) + (
                FIRST_STAGE_MS + context * FIRST_STAGE_MS_PER_TOKEN
            )
            slope_ms = self.coefficients.decode_slope_ms(rows) + rows * FIRST_STAGE_MS_PER_TOKEN
            total_ms = steps * first_ms + slope_ms * (steps * (steps - 1) / 2)
            if self.now_ms + total_ms >= now_ms:
                steps, total_ms = _steps_before(now_ms - self.now_ms, first_ms, slope_ms, steps)
                self._jump(steps, total_ms, rows)
                return
            self._jump(steps, total_ms, rows)
            self._admit()

    def _jump(self, steps: int, total_ms: float, rows: int) -> None:
        self.now_ms += total_ms
        self.step += steps
        self.context += steps * rows
        while self.ends and self.ends[0][0] == self.step:
            self._finish(heapq.heappop(self.ends)[1])

    def _finish(self, request: int) -> None:
        self.end_ms[request] = self.now_ms
        self.context -= self.prompts[request] + self.outputs[request]
        del self.last_step[request]

    def _admit(self) -> None:
        """What waited stands before what ran."""
        for request in reversed(self.waiting):
            self.running.appendleft(request)
            self.last_step[request] = self.step + self.outputs[request]
            heapq.heappush(self.ends, (self.last_step[request], request))
            self.context += self.prompts[request]
        self.waiting.clear()

    def _short_step(self, now_ms: float) -> bool:
        """One step of the requests that fit, in queue order; False if it ends too late."""
        batch, left = self._fitting()
        taken, context = len(batch), sum(map(self._context_of, batch))
        step_ms = self.coefficients.decode_ms(taken, context + taken, 1) + (
            FIRST_STAGE_MS + context * FIRST_STAGE_MS_PER_TOKEN
        )
        if self.now_ms + step_ms >= now_ms:
            return False
        self.now_ms += step_ms
        self.step += 1
        self.context += taken
        for request in left:  # they did not advance
            self.last_step[request] += 1
        newcomers = list(self.waiting)
        self._admit()
        for request in batch:
            if self.last_step[request] == self.step:
                self._finish(request)
        self.running = deque([*left, *newcomers, *batch])
        self.ends = [(step, request) for request, step in self.last_step.items()]
        heapq.heapify(self.ends)
        return True

    def _fitting(self) -> tuple[list[int], list[int]]:
        alive = [request for request in self.running if request in self.last_step]
        taken, room = 0, self.limit
        for request in alive:
            room -= self._context_of(request) + 1
            if room < 0:
                break
            taken += 1
        return alive[:taken], alive[taken:]

    def _context_of(self, request: int) -> int:
        done = self.outputs[request] - (self.last_step[request] - self.step)
        return self.prompts[request] + done


def _steps_before(room_ms: float, first_ms: float, slope_ms: float, most: int) -> tuple[int, float]:
    """The largest k ≤ most with k·first + slope·k(k−1)/2 < room, and that sum."""
    if slope_ms > 0:
        b = first_ms - slope_ms / 2
        guess = (sqrt(b * b + 2 * slope_ms * room_ms) - b) / slope_ms
    else:
        guess = room_ms / first_ms
    k = min(most, max(0, ceil(guess)))
    while k and k * first_ms + slope_ms * (k * (k - 1) / 2) >= room_ms:
        k -= 1
    return k, k * first_ms + slope_ms * (k * (k - 1) / 2)


class _MemoryShortError(Exception):
    """A batch does not fit, so that the order in the queues matters."""


@dataclass(slots=True)
class _Group:
    """Requests that run in one batch; they are told apart only by the step that ends them."""

    context: int
    ends: list[tuple[int, int]]  # heap of (last step, request)
    step: int = 0

    def absorb(self, other: _Group) -> None:
        """Take another's requests; their last steps are counted from here."""
        for last_step, request in other.ends:
            heapq.heappush(self.ends, (last_step - other.step + self.step, request))
        self.context += other.context


class _GroupPipeline:
    """Stages of one instance while everything fits: every stage takes all that waits before it."""

    def __init__(
        self, phase: MirrorPhase, prompts: list[int], outputs: list[int], end_ms: list[float]
    ) -> None:
        stages = phase.pipeline_parallel
        self.coefficients, self.stages, self.limit = phase.coefficients, stages, phase.max_tokens
        self.prompts, self.outputs = prompts, outputs
        self.end_ms = end_ms  # written here
        self.queues: list[list[_Group]] = [[] for _ in range(stages)]
        self.batches: list[_Group | None] = [None] * stages
        self.idle_since_ms = 0.0  # of the first stage
        self.done: list[tuple[float, int, int]] = []  # heap of (end of step, order, stage)
        self.order = 0

    def push(self, now_ms: float, request: int) -> None:
        if self.batches[0] is None and not self.queues[0]:
            self.idle_since_ms = now_ms
        self.queues[0].append(_Group(self.prompts[request], [(self.outputs[request], request)]))

    def load(self) -> int:
        return sum(len(group.ends) for group in self.queues[0])

    def advance(self, now_ms: float) -> None:
        """Complete every step that ends before `now_ms`."""
        if self.queues[0] and self.batches[0] is None and self.idle_since_ms < now_ms:
            self._start(0, self.idle_since_ms)
        done = self.done
        while done and done[0][0] < now_ms:
            at_ms, _, stage = heapq.heappop(done)
            self._complete(stage, at_ms)

    def _complete(self, stage: int, at_ms: float) -> None:
        group, self.batches[stage] = self.batches[stage], None
        assert group is not None
        following = stage + 1
        if following == self.stages:
            following = 0
            group.step += 1
            group.context += len(group.ends)
            while group.ends and group.ends[0][0] == group.step:
                request = heapq.heappop(group.ends)[1]
                group.context -= self.prompts[request] + self.outputs[request]
                self.end_ms[request] = at_ms
        if group.ends:
            self.queues[following].append(group)
        if self.queues[stage]:
            self._start(stage, at_ms)
        if self.queues[following] and self.batches[following] is None:
            self._start(following, at_ms)

    def _start(self, stage: int, at_ms: float) -> None:
        queue = self.queues[stage]
        group = queue[0]
        if len(queue) > 1:
            group = max(queue, key=lambda waiting: len(waiting.ends))
            for other in queue:
                if other is not group:
                    group.absorb(other)
        queue.clear()
        rows = len(group.ends)
        if group.context + rows > self.limit:
            raise _MemoryShortError
        step_ms = self.coefficients.decode_ms(rows, group.context + rows, self.stages)
        if stage == 0:
            step_ms += FIRST_STAGE_MS + group.context * FIRST_STAGE_MS_PER_TOKEN
        self.batches[stage] = group
        self.order += 1
        heapq.heappush(self.done, (at_ms + step_ms, self.order, stage))


class _QueuePipeline:
    """The same by single requests: a stage takes, in queue order, as many as fit."""

    def __init__(
        self, phase: MirrorPhase, prompts: list[int], outputs: list[int], end_ms: list[float]
    ) -> None:
        stages = phase.pipeline_parallel
        self.coefficients, self.stages, self.limit = phase.coefficients, stages, phase.max_tokens
        self.context, self.left = list(prompts), list(outputs)
        self.end_ms = end_ms  # written here
        self.queues: list[deque[int]] = [deque() for _ in range(stages)]
        self.waiting = self.queues[0]
        self.batches: list[list[int]] = [[] for _ in range(stages)]
        self.idle_since_ms = 0.0  # of the first stage
        self.done: list[tuple[float, int, int]] = []  # heap of (end of step, order, stage)
        self.order = 0

    def push(self, now_ms: float, request: int) -> None:
        if not self.batches[0] and not self.waiting:
            self.idle_since_ms = now_ms
        self.waiting.append(request)

    def load(self) -> int:
        return len(self.waiting)

    def advance(self, now_ms: float) -> None:
        if self.waiting and not self.batches[0] and self.idle_since_ms < now_ms:
            self._start(0, self.idle_since_ms)
        while self.done and self.done[0][0] < now_ms:
            at_ms, _, stage = heapq.heappop(self.done)
            self._complete(stage, at_ms)

    def _complete(self, stage: int, at_ms: float) -> None:
        batch, self.batches[stage] = self.batches[stage], []
        following = (stage + 1) % self.stages
        if following == 0:
            batch = [request for request in batch if not self._advanced(request, at_ms)]
        self.queues[following].extend(batch)
        for candidate in dict.fromkeys((stage, following)):
            if self.queues[candidate] and not self.batches[candidate]:
                self._start(candidate, at_ms)

    def _advanced(self, request: int, at_ms: float) -> bool:
        """Count one token; whether it was the last."""
        self.context[request] += 1
        self.left[request] -= 1
        if not self.left[request]:
            self.end_ms[request] = at_ms
        return not self.left[request]

    def _start(self, stage: int, at_ms: float) -> None:
        queue, context = self.queues[stage], self.context
        total = sum(map(context.__getitem__, queue))
        batch = list(queue)
        while total + len(batch) > self.limit:
            total -= context[batch.pop()]
        for _ in batch:
            queue.popleft()
        step_ms = self.coefficients.decode_ms(len(batch), total + len(batch), self.stages)
        if stage == 0:
            step_ms += FIRST_STAGE_MS + total * FIRST_STAGE_MS_PER_TOKEN
        self.batches[stage] = batch
        self.order += 1
        heapq.heappush(self.done, (at_ms + step_ms, self.order, stage))
