"""Streams are the reference's while steps are given out before the tokens before are known."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from phasewise.engine.batch import Batch, StepOutput, Underway
from phasewise.engine.errors import PhasewiseError
from phasewise.engine.runner import Runner
from phasewise.tests.engine.test_exactness import Case
from phasewise.tests.serving.in_process import Cluster, cluster

LIMIT_S = 100.0
NUM_TOKENS = 40


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def whole(reference: Case) -> list[list[int]]:
    """What follows the first four prompts."""
    return [reference.generate(prompt, NUM_TOKENS) for prompt in reference.prompts[:4]]


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, LIMIT_S))


def following(running: Cluster) -> int:
    """Steps of the decode workers that were given out before the one before was back."""
    workers = [worker for name, worker in running.workers.items() if name.startswith("decode")]
    return sum(worker.steps.decode.following for worker in workers)


SPLITS: dict[str, dict[str, Any]] = {
    "push": {"mode": "push"},
    "pull": {"mode": "pull"},
    "colocated": {"prefill": 0},
    "two ranks": {"mode": "push", "decode_split": (2, 1)},
    "two stages": {"mode": "push", "decode_split": (1, 2)},
}


@pytest.mark.parametrize("split", SPLITS)
def test_streams_that_end_at_stop_tokens_are_exact(
    split: str, reference: Case, whole: list[list[int]]
) -> None:
    prompts = reference.prompts
    asked = [(i, tokens[at]) for i, tokens in enumerate(whole) for at in (1, 7, 18, 31)]

    async def work() -> None:
        async with cluster(reference.directory, **SPLITS[split]) as running:
            streams = await asyncio.gather(
                *(
                    running.generate(prompts[i], max_tokens=NUM_TOKENS, stop_token_ids=[stop])
                    for i, stop in asked
                )
            )
            for (i, stop), stream in zip(asked, streams, strict=True):
                assert stream == whole[i][: whole[i].index(stop) + 1]
            assert following(running) > 20
            assert await running.leftovers() == {}

    run(work())


def test_streams_that_come_in_while_others_run_are_exact(
    reference: Case, whole: list[list[int]]
) -> None:
    prompts, expected = reference.prompts[:4] * 3, whole * 3

    async def work() -> None:
        async with cluster(reference.directory, prefill=0) as running:

            async def late(number: int) -> list[int]:
                await asyncio.sleep(number * 0.004)
                return await running.generate(prompts[number], max_tokens=NUM_TOKENS)

            assert await asyncio.gather(*map(late, range(len(prompts)))) == expected
            assert following(running) > 0
            assert await running.leftovers() == {}

    run(work())


def test_sampled_streams_are_the_same_alone_and_in_company(reference: Case) -> None:
    """Alone, with log-probabilities, no step is given out ahead."""
    prompts = reference.prompts[:4]
    sampling = {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "max_tokens": NUM_TOKENS}

    async def work() -> None:
        async with cluster(reference.directory, prefill=0) as running:
            alone = []
            for seed, prompt in enumerate(prompts):
                alone.append(await running.generate(prompt, seed=seed, logprobs=1, **sampling))
            assert following(running) == 0
            together = await asyncio.gather(
                *(running.generate(p, seed=seed, **sampling) for seed, p in enumerate(prompts))
            )
            assert together == alone
            assert following(running) > 0

    run(work())


def test_a_failed_step_ends_its_streams_once_and_the_worker_serves_on(
    reference: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever step it is, wherever in their blocks the streams stand; the step that follows it
    was given out already."""
    begin, left, broken = Runner.begin, 0, 0

    def breaks(
        self: Runner, batch: Batch, layer_done: Any = None, former: Any = None
    ) -> StepOutput | Underway:
        nonlocal left, broken
        left -= 1
        if left == 0:
            broken += batch.follows is not None
            raise RuntimeError("the device is gone")
        return begin(self, batch, layer_done, former)

    monkeypatch.setattr(Runner, "begin", breaks)
    prompts = [list(range(5, 5 + length)) for length in (15, 16, 17, 30)]

    async def work() -> None:
        nonlocal left
        expected = [reference.generate(prompt, NUM_TOKENS) for prompt in prompts]
        async with cluster(reference.directory, prefill=0, max_failovers=0) as running:
            for nth in range(8, 26):
                left = nth
                tasks = [running.generate(p, max_tokens=NUM_TOKENS) for p in prompts]
                outcomes = await asyncio.gather(*tasks, return_exceptions=True)
                failed = [one for one in outcomes if isinstance(one, PhasewiseError)]
                assert failed and "the device is gone" in str(failed[0])
                for outcome, stream in zip(outcomes, expected, strict=True):
                    assert outcome == stream or outcome in failed
                assert await running.leftovers() == {}
            assert await running.generate_all(prompts, max_tokens=NUM_TOKENS) == expected
        assert broken > 9

    run(work())
