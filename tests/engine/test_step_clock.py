"""Every moment of a step belongs to one part."""

from __future__ import annotations

import itertools

import pytest
from phasewise.engine.batch import Batch, StepTimes
from phasewise.engine.request import Request, SamplingParams
from phasewise.engine.sequence import Sequence
from phasewise.engine.step_clock import PARTS, StepClock


def batch_of(*counts: int) -> Batch:
    request = Request(
        id="r", token_ids=(1,) * 64, num_prompt_tokens=64, sampling=SamplingParams(max_tokens=1)
    )
    sequences = [Sequence(request) for _ in counts]
    return Batch(sequences=sequences, starts=[0 for _ in counts], counts=list(counts))


def test_the_parts_add_up_to_the_step_and_the_model_is_apart() -> None:
    readings = iter([10.0, 10.5, 14.0, 14.25])  # begin, scheduled, ran, end
    clock = StepClock(lambda: next(readings))
    clock.begin()
    clock.scheduled()
    clock.ran(StepTimes(begun_s=10.625, prepared_s=10.75, computed_s=13.75, ended_s=13.875))
    clock.end(batch_of(1, 1))
    assert clock.decode.seconds == {
        "schedule": 0.5,
        "prepare": 0.125,
        "model": 3.0,
        "sample": 0.125,
        "emit": 0.25,
        "switch": 0.25,
    }
    assert sum(clock.decode.seconds.values()) == 4.25
    assert clock.decode.overhead_s == 1.25
    assert (clock.decode.steps, clock.decode.rows) == (1, 2)


def test_steps_with_chunks_are_counted_apart() -> None:
    ticks = itertools.count()
    clock = StepClock(lambda: float(next(ticks)))
    for counts in ((1, 1, 1), (1, 32), (64,)):
        clock.begin()
        clock.scheduled()
        clock.ran(None)
        clock.end(batch_of(*counts))
    assert (clock.decode.steps, clock.chunked.steps) == (1, 2)
    assert clock.decode.seconds == dict.fromkeys(PARTS, 0.0) | {
        "schedule": 1.0,
        "model": 1.0,
        "emit": 1.0,
    }


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_step_that_failed_counts_nowhere(scheduled: bool) -> None:
    clock = StepClock()
    clock.begin()
    clock.scheduled()
    clock.ran(None)
    clock.end(batch_of(1))
    clock.begin()
    if scheduled:
        clock.scheduled()
    clock.end(batch_of(1))
    assert clock.decode.steps == 1
