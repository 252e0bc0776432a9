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


def test_what_the_loop_does_while_a_following_step_computes_is_summed_aside() -> None:
    readings = iter([0.0, 1.0, 2.0, 3.0, 10.5, 11.0, 20.5, 21.5])
    clock = StepClock(lambda: next(readings))
    for _ in range(2):  # the second is given out while the first computes
        clock.begin()
        clock.scheduled()
    clock.ran(StepTimes(begun_s=1.5, prepared_s=2.0, computed_s=9.0, ended_s=10.0))
    clock.end(batch_of(1))
    clock.ran(StepTimes(begun_s=10.25, prepared_s=11.0, computed_s=19.0, ended_s=20.0))
    clock.end(batch_of(1))
    assert clock.decode.seconds == {
        "schedule": 1.0,
        "prepare": 0.5 + 0.75,
        "model": 7.0 + 8.0,
        "sample": 1.0 + 1.0,
        "emit": 1.0,
        "switch": 0.5 + 0.25 + 0.5,
    }
    assert clock.decode.aside == {"schedule": 1.0, "emit": 0.5}
    assert (clock.decode.steps, clock.decode.following) == (2, 1)
    wall_s = 21.5  # from the first question to the last news, all on the path
    assert sum(clock.decode.seconds.values()) == wall_s


def test_a_recalled_step_counts_nowhere() -> None:
    clock = StepClock()
    for _ in range(2):
        clock.begin()
        clock.scheduled()
    clock.recalled()
    clock.ran(None)
    clock.end(batch_of(1))
    assert (clock.decode.steps, clock.decode.following) == (1, 0)
    assert clock.decode.seconds["emit"] > 0 and clock.decode.aside["emit"] == 0


def test_a_following_step_that_tells_no_times_computes_from_the_formers_end() -> None:
    readings = iter([0.0, 0.0, 1.0, 1.0, 10.0, 11.0, 18.0, 19.0])
    clock = StepClock(lambda: next(readings))
    for _ in range(2):
        clock.begin()
        clock.scheduled()
    for _ in range(2):
        clock.ran(None)
        clock.end(batch_of(1))
    assert clock.decode.seconds["model"] == 10.0 + 8.0
    assert clock.decode.seconds["switch"] == 0.0
