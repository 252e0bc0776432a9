"""Several steps in flight, as a pipeline of stages has them."""

from __future__ import annotations

import random

import pytest
from phasewise.engine.batch import Batch, StepOutput
from phasewise.engine.blocks import BlockAllocator
from phasewise.engine.request import Request, SamplingParams
from phasewise.engine.sequence import Sequence
from phasewise.prefill_worker.scheduler import PrefillLimits, PrefillScheduler


def sequence(name: str, num_tokens: int) -> Sequence:
    request = Request(
        id=name,
        token_ids=(1,) * num_tokens,
        num_prompt_tokens=num_tokens,
        sampling=SamplingParams(max_tokens=4),
    )
    return Sequence(request)


def scheduler(*, max_in_flight: int, max_batch_tokens: int = 100) -> PrefillScheduler:
    limits = PrefillLimits(
        max_batch_tokens=max_batch_tokens,
        max_model_len=4096,
        max_in_flight=max_in_flight,
        max_wait_s=1.0,
    )
    return PrefillScheduler(BlockAllocator(1000, 16), limits)


def output(batch: Batch) -> StepOutput:
    return StepOutput(token_ids=[5] * batch.num_rows)


def test_steps_in_flight_hold_different_prompts() -> None:
    prefill = scheduler(max_in_flight=2)
    prefill.add(sequence("long", 250), 0.0)
    prefill.add(sequence("next", 80), 0.0)
    first, second = prefill.next_batch(0.0), prefill.next_batch(0.1)
    assert first is not None and second is not None
    assert [s.id for s in first.sequences] == ["long"]
    assert [s.id for s in second.sequences] == ["next"], "a chunk waits for the one before"
    prefill.advance(first, output(first), 0.2)
    third = prefill.next_batch(0.2)
    assert third is not None and third.starts == [100]
    done = prefill.advance(second, output(second), 0.3)
    assert [s.id for s in done.sequences] == ["next"]


def test_more_steps_than_stages_are_a_bug() -> None:
    prefill = scheduler(max_in_flight=1)
    prefill.add(sequence("a", 10), 0.0)
    prefill.add(sequence("b", 200), 0.0)
    assert prefill.next_batch(0.0) is not None
    with pytest.raises(AssertionError):
        prefill.next_batch(0.0)


@pytest.mark.parametrize("seed", range(5))
def test_every_prompt_ends_once_and_the_laws_hold(seed: int) -> None:
    """Overdue prompts among them: an overdue one may be in a step already."""
    draw = random.Random(seed)
    prefill = scheduler(max_in_flight=3)
    for index in range(60):
        prefill.add(sequence(str(index), draw.randint(1, 400)), 0.0)
    in_flight: list[Batch] = []
    ended: list[str] = []
    for step in range(2000):
        now_s = step * 0.05
        batch = prefill.next_batch(now_s) if len(in_flight) < 3 else None
        if batch is not None:
            in_flight.append(batch)
        if in_flight and (batch is None or draw.random() < 0.5):
            oldest = in_flight.pop(0)
            for done in prefill.advance(oldest, output(oldest), now_s).sequences:
                ended.append(done.id)
                prefill.release(done.id)
        if not in_flight:
            prefill.check()
        if len(ended) == 60:
            break
    assert sorted(ended, key=int) == [str(index) for index in range(60)]
