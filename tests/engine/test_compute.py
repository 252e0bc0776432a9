"""The compute thread: one step after the other, a following one with what the one before chose."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import pytest
from phasewise.engine.batch import Batch, StepOutput, Underway
from phasewise.engine.compute import ComputeThread, StepFailed
from phasewise.engine.request import Request, SamplingParams
from phasewise.engine.sequence import Sequence

LIMIT_S = 10.0


class Doubler:
    """Chooses twice the token it is given; may hold a step until told, launch it, or fail."""

    max_model_len = 100
    spec = layout = None

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.go_on.set()
        self.launches = False
        self.log: list[str] = []

    def run(self, batch: Batch, layer_done: object = None) -> StepOutput:
        raise NotImplementedError

    def begin(
        self, batch: Batch, layer_done: object = None, former: StepOutput | Underway | None = None
    ) -> StepOutput | Underway:
        self.log.append(f"begin {batch.starts[0]}")
        assert self.go_on.wait(LIMIT_S)
        if isinstance(former, Launched):
            tokens = batch.tokens_of(former.found)
        elif former is not None:
            tokens = batch.tokens_of(former)
        else:
            tokens = [
                (s.tokens or [])[i] for s, i in zip(batch.sequences, batch.starts, strict=True)
            ]
        if min(tokens) < 0:
            raise ValueError("no such token")
        found = StepOutput(token_ids=[2 * token for token in tokens])
        return Launched(self, batch.starts[0], found) if self.launches else found

    def check_ranks(self) -> None: ...

    def close(self) -> None: ...


class Launched:
    def __init__(self, runner: Doubler, number: int, found: StepOutput) -> None:
        self.runner, self.number, self.found = runner, number, found

    def output(self) -> StepOutput:
        self.runner.log.append(f"output {self.number}")
        if max(self.found.token_ids) > 1000:
            raise ValueError("broken")
        return self.found


def batches(*token_ids: int) -> tuple[Batch, Batch]:
    """A step over rows with these next tokens, and the one that follows with them in reverse."""
    params = SamplingParams(max_tokens=9)
    sequences = [
        Sequence(Request(id=str(i), token_ids=(token,), num_prompt_tokens=1, sampling=params))
        for i, token in enumerate(token_ids)
    ]
    count = len(sequences)
    first = Batch(sequences=sequences, starts=[0] * count, counts=[1] * count)
    follows = list(range(count))[::-1]
    second = Batch(
        sequences=[sequences[row] for row in follows],
        starts=[1] * count,
        counts=[1] * count,
        follows=follows,
    )
    return first, second


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, LIMIT_S))


@pytest.fixture
def runner() -> Doubler:
    return Doubler()


@pytest.mark.parametrize("launches", [False, True])
def test_a_following_step_computes_what_the_one_before_chose(
    launches: bool, runner: Doubler
) -> None:
    runner.launches = launches

    async def work() -> None:
        compute = ComputeThread(runner)  # pyright: ignore[reportArgumentType]
        steps = [compute.start(batch) for batch in batches(3, 5)]
        found = [await compute.finish(step) for step in steps]
        assert [output.token_ids for output, _ in found] == [[6, 10], [20, 12]]
        assert min(seconds for _, seconds in found) >= 0
        assert compute.steps == 2
        compute.close()

    run(work())
    if launches:
        assert runner.log == ["begin 0", "begin 1", "output 0", "output 1"]


@pytest.mark.parametrize("launches", [False, True])
def test_a_step_that_follows_a_failed_one_fails_and_the_next_is_served(
    launches: bool, runner: Doubler
) -> None:
    runner.launches = launches

    async def work() -> None:
        compute = ComputeThread(runner)  # pyright: ignore[reportArgumentType]
        for step in [compute.start(batch) for batch in batches(3, -1)]:
            with pytest.raises(StepFailed):
                await compute.finish(step)
        output, _ = await compute.run(batches(4)[0])
        assert output.token_ids == [8]
        compute.close()

    run(work())
    assert runner.log[0] == "begin 0" and "begin 1" not in runner.log


def test_a_step_whose_tokens_are_broken_fails_when_they_are_asked_for(runner: Doubler) -> None:
    runner.launches = True

    async def work() -> None:
        compute = ComputeThread(runner)  # pyright: ignore[reportArgumentType]
        first, second = [compute.start(batch) for batch in batches(300)]
        assert (await compute.finish(first))[0].token_ids == [600]
        with pytest.raises(StepFailed, match="broken"):
            await compute.finish(second)
        compute.close()

    run(work())


def test_a_step_is_recalled_until_it_has_begun(runner: Doubler) -> None:
    async def work() -> None:
        compute = ComputeThread(runner)  # pyright: ignore[reportArgumentType]
        runner.go_on.clear()
        first, second = [compute.start(batch) for batch in batches(3)]
        assert compute.recall(second)
        runner.go_on.set()
        assert (await compute.finish(first))[0].token_ids == [6]
        assert compute.step_age_s() == 0 and not compute.recall(first)
        assert (await compute.run(batches(4)[0]))[0].token_ids == [8]
        compute.close()

    run(work())
    assert runner.log == ["begin 0", "begin 0"]


def test_a_steps_age_counts_from_when_it_could_begin(runner: Doubler) -> None:
    async def work() -> None:
        compute = ComputeThread(runner)  # pyright: ignore[reportArgumentType]
        assert compute.step_age_s() == 0
        runner.go_on.clear()
        first, second = [compute.start(batch) for batch in batches(3)]
        await asyncio.sleep(0.02)
        before_s = compute.step_age_s()
        assert before_s >= 0.02
        runner.go_on.set()
        await compute.finish(first)
        assert 0 < compute.step_age_s() < before_s, "the following step is a young one"
        await compute.finish(second)
        assert compute.step_age_s() == 0
        compute.close()

    run(work())
