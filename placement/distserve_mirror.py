"""The request times that DistServe's own simulator gives, from its recurrences alone.

Same assumptions, so that a difference is a defect: first come, first served; a prefill batch
takes every waiting prompt that fits into `max_prefill_tokens`; a decode batch every waiting
request while Σ(context + 1) fits into `max_decode_tokens`; unfinished rows queue again behind
what arrived meanwhile; pipeline stages hand whole batches on, and waiting decode batches merge;
the least queued instance takes the next request; KV transfer costs nothing; the first stage of
either phase adds 2 ms and 1e-4 ms a token. Times are in milliseconds inside, seconds outside.
At one instant arrivals come before the end of a step.

An output of n tokens here is n decode iterations *after* the first token, as it counts them.
Prefill does not depend on decode, so it is worked out first; a stretch of decode steps in which
no request joins or leaves is one jump (its total is a quadratic in the number of steps).
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass
from math import ceil, inf, sqrt

import numpy as np
from numpy.typing import NDArray

from ..engine.errors import InvalidConfig
from .distserve_profile import DistServeCoefficients
from .workload import Workload

FIRST_STAGE_MS = 2.0
FIRST_STAGE_MS_PER_TOKEN = 1e-4
UNLIMITED = 10**7  # its default for both token limits


@dataclass(frozen=True, kw_only=True, slots=True)
class MirrorPhase:
    """One phase's instances. Coefficients already stand for the tensor parallelism."""

    coefficients: DistServeCoefficients
    pipeline_parallel: int = 1
    instances: int = 1
    max_tokens: int = UNLIMITED  # a row of max_num_tokens.csv


@dataclass(frozen=True, kw_only=True, slots=True)
class MirrorTimes:
    """Per request, in the workload's order."""

    ttft_s: NDArray[np.float64]
    tpot_s: NDArray[np.float64]  # (last token − first token) / output tokens
    finish_s: NDArray[np.float64]


def mirror(workload: Workload, prefill: MirrorPhase, decode: MirrorPhase) -> MirrorTimes:
    """Simulate; raises InvalidConfig for a request that could never be scheduled."""
    prompts = workload.prompt_tokens.tolist()
    outputs = workload.output_tokens.tolist()
    _check_fit(prompts, outputs, prefill.max_tokens, decode.max_tokens)
    arrival_ms = workload.arrival_s * 1000.0
    first_ms = np.array(prefill_end_ms(arrival_ms.tolist(), prompts, prefill))
    finish_ms = np.array(decode_end_ms(first_ms.tolist(), prompts, outputs, decode))
    return MirrorTimes(
        ttft_s=(first_ms - arrival_ms) / 1000.0,
        tpot_s=(finish_ms - first_ms) / workload.output_tokens / 1000.0,
        finish_s=finish_ms / 1000.0,
    )


def _check_fit(prompts: list[int], outputs: list[int], prefill_max: int, decode_max: int) -> None:
    for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        if prompt > prefill_max or prompt + output > decode_max:
            raise InvalidConfig(
                f"workload request {i}",
                f"{prompt} + {output} tokens never fit ({prefill_max} prefill, {decode_max} decode)",
                "leave such requests out (max_total_tokens) or use more GPUs an instance",
            )


def prefill_end_ms(arrival_ms: list[float], prompts: list[int], phase: MirrorPhase) -> list[float]:
    """When each request's first token is there. Arrivals are sorted."""
    end_ms = [0.0] * len(prompts)
    pipelines = [_PrefillPipeline(phase, prompts, end_ms) for _ in range(phase.instances)]
    for request, at_ms in enumerate(arrival_ms):
        chosen = pipelines[0]
        if len(pipelines) > 1:
            for pipeline in pipelines:
                pipeline.advance(at_ms)
            chosen = min(pipelines, key=lambda p: p.load(at_ms))
        chosen.queue.append((at_ms, request))
    for pipeline in pipelines:
        pipeline.advance(inf)
    return end_ms


class _PrefillPipeline:
    """Batches leave the first stage in order, each later stage takes one at a time."""

    def __init__(self, phase: MirrorPhase, prompts: list[int], end_ms: list[float]) -> None:
        self.phase = phase
        self.prompts = prompts
        self.end_ms = end_ms  # written here
        self.queue: deque[tuple[float, int]] = deque()
        self.free_ms = [0.0] * phase.pipeline_parallel  # when each stage is done
        self.running = 0  # requests in the first stage

    def load(self, now_ms: float) -> int:
        return (self.running if self.free_ms[0] >= now_ms else 0) + len(self.queue)

    def advance(self, now_ms: float) -> None:
        """Start every batch that starts before `now_ms`."""
        queue, free_ms = self.queue, self.free_ms
        while queue:
            start_ms = max(free_ms[0], queue[0][0])
            if start_ms >= now_ms:
                return
            batch, tokens, squares = self._take(start_ms)
            step_ms = self.phase.coefficients.prefill_ms(tokens, squares, len(free_ms))
            at_ms = start_ms + (step_ms + (FIRST_STAGE_MS + tokens * FIRST_STAGE_MS_PER_TOKEN))
            free_ms[0] = at_ms
            self.running = len(batch)
            for stage in range(1, len(free_ms)):
                at_ms = free_ms[stage] = max(at_ms, free_ms[stage]) + step_ms
            for request in batch:
                self.end_ms[request] = at_ms

    def _take(self, start_ms: float) -> tuple[list[int], int, int]:
        batch, tokens, squares = [], 0, 0
        queue, prompts, limit = self.queue, self.prompts, self.phase.max_tokens
        while queue and queue[0][0] <= start_ms:
            length = prompts[queue[0][1]]
            if tokens + length > limit:
                break
            tokens += length
            squares += length * length
            batch.append(queue.popleft()[1])
        return batch, tokens, squares


def decode_end_ms(
    first_ms: list[float], prompts: list[int], outputs: list[int], phase: MirrorPhase
) -> list[float]:
    """When each request's last token is there; handed over at `first_ms`, least queued first."""
    end_ms = list(first_ms)
    kind = _DecodeInstance if phase.pipeline_parallel == 1 else _DecodePipeline
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


def _steps_before(
    room_ms: float, first_ms: float, slope_ms: float, most: int
) -> tuple[int, float]:
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


class _DecodePipeline:
    """Stages of one instance, step by step: every stage takes what waits before it."""

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


