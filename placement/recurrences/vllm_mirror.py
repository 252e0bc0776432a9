"""The request times that DistServe's simulator gives its baseline: vLLM without chunked prefill.

Both phases share an instance, and prompts go first: a step of every waiting prompt that fits, and
only while none waits a step of rows. Else the assumptions are those of `distserve_mirror.py`: step
times by the engine's coefficients, the first stage's overhead, queues, what an output token is.
Prompts and rows meet in the queue of every stage, so steps are followed one by one. Left out is
its back-pressure, which begins at nine million tokens of waiting rows.
"""

from __future__ import annotations

import heapq
from collections import deque
from math import inf

import numpy as np

from ..latency.distserve_profile import FIRST_STAGE_MS, FIRST_STAGE_MS_PER_TOKEN
from ..workload.workload import Workload
from .distserve_decode import MirrorPhase
from .distserve_mirror import MirrorTimes, check_fit

Batch = tuple[int, ...]  # requests of one step


def mirror_vllm(workload: Workload, workers: MirrorPhase) -> MirrorTimes:
    """Simulate `workers.instances` of them, the least loaded takes the next request.

    `workers.max_tokens` bounds Σ prompt of a prefill step and Σ(context + 1) of a decode step.
    Raises InvalidConfig for a request that could never be scheduled.
    """
    prompts, outputs = workload.prompt_tokens.tolist(), workload.output_tokens.tolist()
    check_fit(prompts, outputs, workers.max_tokens, workers.max_tokens)
    arrival_ms = workload.arrival_s * 1000.0
    first_ms, last_ms = [0.0] * len(prompts), [0.0] * len(prompts)
    pool = [
        _Instance(workers, prompts, outputs, first_ms, last_ms) for _ in range(workers.instances)
    ]
    for request, at_ms in enumerate(arrival_ms.tolist()):
        for instance in pool:
            instance.advance(at_ms)
        min(pool, key=_Instance.load).push(at_ms, request)
    for instance in pool:
        instance.advance(inf)
    first, last = np.array(first_ms), np.array(last_ms)
    return MirrorTimes(
        ttft_s=(first - arrival_ms) / 1000.0,
        tpot_s=(last - first) / workload.output_tokens / 1000.0,
        finish_s=last / 1000.0,
    )


class _Stage:
    """What waits before one stage, and whether a step is in progress there."""

    def __init__(self) -> None:
        self.prompts: deque[Batch] = deque()  # in the batches in which they left the first stage
        self.rows: deque[int] = deque()
        self.busy = False


class _Instance:
    """A ring of stages. At one instant arrivals come before the end of a step."""

    def __init__(
        self,
        phase: MirrorPhase,
        prompts: list[int],
        outputs: list[int],
        first_ms: list[float],
        last_ms: list[float],
    ) -> None:
        self.phase, self.prompts, self.outputs = phase, prompts, outputs
        self.first_ms, self.last_ms = first_ms, last_ms  # written here
        self.done: dict[int, int] = {}  # tokens after the first, of each row
        self.fresh: deque[int] = deque()  # prompts that wait for the first stage
        self.in_first = 0  # prompts in the first stage's step
        self.stages = [_Stage() for _ in range(phase.pipeline_parallel)]
        self.ends: list[tuple[float, int, int, bool, Batch]] = []  # heap: at, order, stage, prefill
        self.order = 0
        self.idle_since_ms = 0.0  # of the first stage

    def load(self) -> int:
        return self.in_first + len(self.fresh)

    def push(self, now_ms: float, request: int) -> None:
        if not self.fresh and not self.stages[0].busy:
            self.idle_since_ms = now_ms
        self.fresh.append(request)

    def advance(self, now_ms: float) -> None:
        """Complete every step that ends before `now_ms`."""
        if self.fresh and not self.stages[0].busy and self.idle_since_ms < now_ms:
            self._start(0, self.idle_since_ms)
        while self.ends and self.ends[0][0] < now_ms:
            at_ms, _, number, prefill, batch = heapq.heappop(self.ends)
            self.stages[number].busy = False
            following = (number + 1) % len(self.stages)
            if prefill:
                self._hand_on_prompts(number, following, batch, at_ms)
            else:
                self._hand_on_rows(following, batch, at_ms)
            for candidate in dict.fromkeys((number, following)):
                if not self.stages[candidate].busy:
                    self._start(candidate, at_ms)

    def _hand_on_prompts(self, number: int, following: int, batch: Batch, at_ms: float) -> None:
        if number == 0:
            self.in_first = 0
        if following:
            self.stages[following].prompts.append(batch)
            return
        for request in batch:
            self.first_ms[request] = at_ms
            self.done[request] = 0
        self.stages[0].rows.extend(batch)

    def _hand_on_rows(self, following: int, batch: Batch, at_ms: float) -> None:
        for request in batch:
            if not following:
                self.done[request] += 1
                if self.done[request] == self.outputs[request]:
                    self.last_ms[request] = at_ms
                    del self.done[request]
                    continue
            self.stages[following].rows.append(request)

    def _start(self, number: int, at_ms: float) -> None:
        """The next step of a stage that is free, if anything waits there."""
        stage, prefill = self.stages[number], True
        if number == 0 and self.fresh:
            batch = self._fitting_prompts()
            self.in_first = len(batch)
        elif stage.prompts:
            batch = stage.prompts.popleft()
        elif stage.rows:
            batch, prefill = self._fitting_rows(stage.rows), False
        else:
            return
        step_ms = self._prefill_ms(number, batch) if prefill else self._decode_ms(number, batch)
        stage.busy = True
        self.order += 1
        heapq.heappush(self.ends, (at_ms + step_ms, self.order, number, prefill, batch))

    def _fitting_prompts(self) -> Batch:
        batch, room = [], self.phase.max_tokens
        while self.fresh and self.prompts[self.fresh[0]] <= room:
            room -= self.prompts[self.fresh[0]]
            batch.append(self.fresh.popleft())
        return tuple(batch)

    def _fitting_rows(self, rows: deque[int]) -> Batch:
        batch, room = [], self.phase.max_tokens
        while rows and self._context(rows[0]) + 1 <= room:
            room -= self._context(rows[0]) + 1
            batch.append(rows.popleft())
        return tuple(batch)

    def _context(self, row: int) -> int:
        return self.prompts[row] + self.done[row]

    def _prefill_ms(self, number: int, batch: Batch) -> float:
        lengths = [self.prompts[request] for request in batch]
        tokens, squares = sum(lengths), sum(length * length for length in lengths)
        step_ms = self.phase.coefficients.prefill_ms(tokens, squares, len(self.stages))
        return step_ms + (FIRST_STAGE_MS + tokens * FIRST_STAGE_MS_PER_TOKEN) * (number == 0)

    def _decode_ms(self, number: int, batch: Batch) -> float:
        context = sum(map(self._context, batch))
        rows = len(batch)
        step_ms = self.phase.coefficients.decode_ms(rows, context + rows, len(self.stages))
        return step_ms + (FIRST_STAGE_MS + context * FIRST_STAGE_MS_PER_TOKEN) * (number == 0)
