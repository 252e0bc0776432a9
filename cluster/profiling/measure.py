"""Times steps on a worker's own runner.

Repeats of all points are interleaved, each round in another order, so that a machine that gets
slower or faster meanwhile bends no curve. Points too slow for the time there is are left out, and
said to be.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...configs.errors import InvalidConfig
from ...engine.batch import Batch
from ...engine.compute import StepRunner
from ...engine.request import Request, SamplingParams
from ...engine.sequence import Sequence as EngineSequence
from .points import Step

SHARE = 0.1  # of the time there is that a single step may take
MOST_REPEATS = 9


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    step: Step
    seconds: tuple[float, ...]  # of each repeat


def measure(
    runner: StepRunner,
    steps: Sequence[Step],
    *,
    within_s: float,
    progress: Callable[[float], None],
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[Timed], list[Step]]:
    """The points with their times, and those left out. `steps` come cheapest first.

    A first round is not counted: it compiles, touches memory and finds what is too slow.
    `progress` is told the share that is done.
    """
    started_s = clock()
    usable: list[Step] = []
    for step in steps:
        seconds = _time(runner, step, clock)
        progress(min(1.0, (clock() - started_s) / within_s))
        usable.append(step)
        if seconds > SHARE * within_s or clock() - started_s > within_s / 2:
            break  # those that follow are slower still
    times: dict[Step, list[float]] = {step: [] for step in usable}
    order = random.Random(0)
    for _ in range(MOST_REPEATS):
        for step in order.sample(usable, len(usable)):
            if clock() - started_s > within_s and all(times.values()):
                break
            times[step].append(_time(runner, step, clock))
            progress(min(1.0, (clock() - started_s) / within_s))
    timed = [Timed(step=step, seconds=tuple(repeats)) for step, repeats in times.items()]
    return timed, list(steps[len(usable) :])


def _time(runner: StepRunner, step: Step, clock: Callable[[], float]) -> float:
    batch = batch_of(step, runner)
    started_s = clock()
    runner.run(batch)
    return clock() - started_s


def batch_of(step: Step, runner: StepRunner) -> Batch:
    """Rows in blocks of their own, as in service. What their KV holds does not matter."""
    layout, vocab_size = runner.layout, runner.spec.vocab_size
    length = step.context + step.new_tokens
    each = layout.blocks_for(length)
    if step.batch * each > layout.num_blocks:
        raise InvalidConfig(
            "kv.memory", f"holds {layout.num_blocks} blocks, a step needs more", "give more"
        )
    sequences = []
    for row in range(step.batch):
        tokens = tuple((row * 7919 + i * 104729) % vocab_size for i in range(length))
        sequence = EngineSequence(
            Request(
                id=f"row-{row}",
                token_ids=tokens,
                num_prompt_tokens=length if step.phase == "prefill" else step.context,
                sampling=SamplingParams(max_tokens=1 << 30, temperature=0.0, ignore_eos=True),
            )
        )
        sequence.blocks = list(range(row * each, (row + 1) * each))
        sequence.num_computed = step.context
        sequences.append(sequence)
    return Batch(
        sequences=sequences,
        starts=[step.context] * step.batch,
        counts=[step.new_tokens] * step.batch,
    )
