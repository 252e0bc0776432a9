"""Law 1 through the whole cluster: the tokens a client gets are transformers' own.

Every architecture, disaggregated by push and by pull, colocated, over shared memory and TCP,
with blocks so few that sequences are preempted, and after the loss of a worker.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from phasewise.tests.engine.test_exactness import MODELS, Case
from phasewise.tests.serving.in_process import Cluster, cluster

LIMIT_S = 100.0
MODES: dict[str, dict[str, Any]] = {
    "push": {"mode": "push"},
    "pull": {"mode": "pull"},
    "auto": {"mode": "auto"},
    "push-tcp": {"mode": "push", "transport": "tcp"},
    "pull-tcp": {"mode": "pull", "transport": "tcp"},
    "push-gloo": {"mode": "push", "transport": "gloo"},
    "pull-gloo": {"mode": "pull", "transport": "gloo"},
    "colocated": {"prefill": 0},
    "two-each": {"prefill": 2, "decode": 2},
    "chunked": {"mode": "push", "max_batch_tokens": 67},
}


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, LIMIT_S))


@pytest.fixture(scope="module")
def mixed(case: Callable[[str], Case]) -> tuple[Path, list[list[int]], list[list[int]]]:
    """A checkpoint, sixteen prompts of 1 to 500 tokens, and what follows each."""
    reference = case("llama")
    draw = random.Random(16)
    lengths = [1, 15, 16, 17, 500, *(draw.randrange(1, 200) for _ in range(11))]
    prompts = [[draw.randrange(131) for _ in range(length)] for length in lengths]
    return reference.directory, prompts, [reference.generate(p, 12) for p in prompts]


async def serve_all(
    path: Path, prompts: list[list[int]], expected: list[list[int]], **options: Any
) -> None:
    async with cluster(path, **options) as running:
        assert await running.generate_all(prompts, max_tokens=len(expected[0])) == expected
        assert await running.leftovers() == {}


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_streams_the_reference_tokens_through_two_pools(
    name: str, case: Callable[[str], Case]
) -> None:
    reference = case(name)
    learned = name.startswith("opt")  # a table of 300 positions
    prompts = reference.prompts + ([] if learned else [[i * 7 % 131 for i in range(500)]])
    expected = [reference.generate(prompt) for prompt in prompts]
    limit = 299 if learned else 1024
    run(serve_all(reference.directory, prompts, expected, max_model_len=limit))


@pytest.mark.parametrize("mode", MODES)
def test_sixteen_mixed_requests_at_once_are_exact_in_every_mode(
    mode: str, mixed: tuple[Path, list[list[int]], list[list[int]]]
) -> None:
    run(serve_all(*mixed, **MODES[mode]))


@pytest.mark.parametrize("mode", ["push", "pull", "colocated"])
def test_preempted_requests_resume_with_the_same_tokens(
    mode: str, case: Callable[[str], Case]
) -> None:
    reference = case("llama")
    prompts = reference.prompts[:4] * 4
    expected = [reference.generate(prompt, 100) for prompt in reference.prompts[:4]] * 4

    async def work() -> None:
        block_bytes = 3 * 2 * 2 * 10 * 4 * 16  # layers, K and V, heads, head_dim, float32, tokens
        options = MODES[mode] | {"num_bytes": 36 * block_bytes, "max_model_len": 520}
        async with cluster(reference.directory, **options) as running:
            assert await running.generate_all(prompts, max_tokens=100) == expected
            status = await running.client.status()
            assert await running.leftovers() == {}
        assert sum(worker.preemptions for worker in status.workers) > 0

    run(work())


def test_a_sampled_stream_is_the_same_wherever_it_is_computed(
    mixed: tuple[Path, list[list[int]], list[list[int]]],
) -> None:
    path, prompts, _ = mixed
    sampling = {"temperature": 0.9, "top_p": 0.95, "seed": 7, "presence_penalty": 0.5}

    async def work() -> None:
        streams = []
        for options in ({"prefill": 0}, {"mode": "push"}, {"mode": "pull"}):
            async with cluster(path, **options) as running:
                streams.append(await running.generate_all(prompts[:6], max_tokens=12, **sampling))
        assert streams[0] == streams[1] == streams[2]

    run(work())


async def _stop_when_streaming(running: Cluster, name: str, started: asyncio.Event) -> None:
    await started.wait()
    await asyncio.to_thread(running.workers[name].stop)


@pytest.mark.parametrize("lost", ["decode-0", "prefill-0"])
def test_streams_go_on_unbroken_when_a_worker_is_lost(
    lost: str, case: Callable[[str], Case]
) -> None:
    reference = case("llama")
    prompts = reference.prompts * 3
    expected = [reference.generate(prompt, 60) for prompt in reference.prompts] * 3

    async def work() -> None:
        started = asyncio.Event()
        async with cluster(reference.directory, prefill=2, decode=2) as running:

            async def stream(prompt: list[int]) -> list[int]:
                tokens: list[int] = []
                outputs = running.client.generate(token_ids=prompt, max_tokens=60, temperature=0)
                async for output in outputs:
                    tokens += output.token_ids
                    started.set()
                return tokens

            stopping = asyncio.create_task(_stop_when_streaming(running, lost, started))
            assert await asyncio.gather(*(stream(p) for p in prompts)) == expected
            await stopping

    run(work())


def test_two_hundred_requests_with_random_cancels_leave_nothing_behind(
    case: Callable[[str], Case],
) -> None:
    reference = case("llama")
    draw = random.Random(200)
    ends: list[str] = []

    async def one(running: Cluster) -> None:
        prompt = [draw.randrange(131) for _ in range(draw.randrange(1, 120))]
        wanted, keep = draw.randrange(1, 40), draw.randrange(0, 60)
        await asyncio.sleep(draw.random() * 0.5)
        tokens: list[int] = []
        outputs = running.client.generate(token_ids=prompt, max_tokens=wanted, temperature=0)
        async for output in outputs:
            tokens += output.token_ids
            if output.finish_reason:
                assert len(tokens) == wanted
                ends.append(output.finish_reason)
            elif len(tokens) >= keep:
                ends.append("cancelled")
                break
        await outputs.aclose()

    async def work() -> None:
        async with cluster(reference.directory) as running:
            await asyncio.gather(*(one(running) for _ in range(200)))
            assert len(ends) == 200
            assert await running.leftovers() == {}

    run(work())
