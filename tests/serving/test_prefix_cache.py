"""The prefix cache through the whole cluster: what is shared is computed once, and law 1 holds.

With hits, partial hits, hits on one side only, eviction under pressure, and chats of many turns.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from phasewise.cluster.output import Usage
from phasewise.tests.engine.test_exactness import Case
from phasewise.tests.serving.in_process import Cluster, cluster

LIMIT_S = 100.0
BLOCK_BYTES = 3 * 2 * 2 * 10 * 4 * 16  # layers, K and V, heads, head_dim, float32, tokens
MODES: dict[str, dict[str, Any]] = {
    "push": {"mode": "push"},
    "pull": {"mode": "pull"},
    "push-tcp": {"mode": "push", "transport": "tcp"},
    "pull-tcp": {"mode": "pull", "transport": "tcp"},
    "colocated": {"prefill": 0},
    "auto": {"local_prefill": "auto"},
}


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, LIMIT_S))


def tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(131) for _ in range(count)]


async def serve(running: Cluster, prompt: list[int], **sampling: Any) -> tuple[list[int], Usage]:
    """A greedy stream's tokens and usage."""
    found: list[int] = []
    usage: Usage | None = None
    options = {"temperature": 0.0, "max_tokens": 8} | sampling
    async for output in running.client.generate(token_ids=prompt, **options):
        found += output.token_ids
        usage = output.usage or usage
    assert usage is not None
    return found, usage


async def asked_and_hit(running: Cluster, role: str) -> tuple[int, int]:
    """Tokens that came to be computed on a pool, and those that its caches saved."""
    workers = [w for w in (await running.client.status()).workers if w.role == role]
    return sum(w.asked_tokens for w in workers), sum(w.hit_tokens for w in workers)


@pytest.mark.parametrize("mode", ["push", "pull", "colocated"])
def test_a_shared_system_prompt_is_computed_once_for_all_requests_at_once(
    mode: str, case: Callable[[str], Case]
) -> None:
    reference, draw = case("llama"), random.Random(1)
    system = tokens(draw, 512)
    prompts = [system + tokens(draw, 1 + i) for i in range(16)]
    expected = [reference.generate(prompt, 4) for prompt in prompts]

    async def work() -> None:
        async with cluster(reference.directory, **MODES[mode]) as running:
            assert await running.generate_all(prompts, max_tokens=4) == expected
            role = "decode" if mode == "colocated" else "prefill"
            asked, hit = await asked_and_hit(running, role)
            assert asked == sum(map(len, prompts)) and hit == 15 * 512
            assert await running.leftovers() == {}

    run(work())


@pytest.mark.parametrize("mode", MODES)
def test_chats_of_eight_turns_are_exact_and_hit_more_with_every_turn(
    mode: str, case: Callable[[str], Case]
) -> None:
    reference = case("llama")

    async def chat(running: Cluster, number: int) -> None:
        draw = random.Random(20 + number)  # its own: what is said depends on no other chat
        history = tokens(draw, 40 + number)
        for turn in range(8):
            history = history + tokens(draw, 23)
            expected = reference.generate(history, 20)
            found, usage = await serve(running, history, max_tokens=20)
            assert found == expected
            if turn:  # what was the prompt of the turn before, up to whole blocks
                assert usage.cached_tokens >= (len(history) - 23 - 20) // 16 * 16
            history = history + found

    async def work() -> None:
        async with cluster(reference.directory, **MODES[mode]) as running:
            await asyncio.gather(*(chat(running, number) for number in range(3)))
            assert await running.leftovers() == {}

    run(work())


@pytest.mark.parametrize("mode", MODES)
def test_any_mixture_of_hits_and_misses_is_exact(mode: str, case: Callable[[str], Case]) -> None:
    """Whole prompts again, prompts cut in blocks and beside them, prefixes of all lengths."""
    reference, draw = case("llama"), random.Random(3)
    root = tokens(draw, 300)
    cuts = [16, 17, 31, 32, 33, 160, 299, 300]
    prompts = [root[:cut] for cut in cuts] + [root[:cut] + tokens(draw, 20) for cut in cuts]
    expected = [reference.generate(prompt, 6) for prompt in prompts]

    async def work() -> None:
        async with cluster(reference.directory, max_batch_tokens=67, **MODES[mode]) as running:
            for _ in range(3):
                assert await running.generate_all(prompts, max_tokens=6) == expected
            assert await running.leftovers() == {}

    run(work())


@pytest.mark.parametrize("mode", MODES)
def test_evictions_and_preemptions_under_pressure_are_exact(
    mode: str, case: Callable[[str], Case]
) -> None:
    reference, draw = case("llama"), random.Random(4)
    roots = [tokens(draw, 100) for _ in range(4)]
    prompts = [roots[i % 4] + tokens(draw, 5 + i) for i in range(16)]
    expected = [reference.generate(prompt, 40) for prompt in prompts]

    async def work() -> None:
        options = MODES[mode] | {"num_bytes": 36 * BLOCK_BYTES, "max_model_len": 520}
        async with cluster(reference.directory, **options) as running:
            for _ in range(2):
                assert await running.generate_all(prompts, max_tokens=40) == expected
            assert await running.leftovers() == {}
            for row in (await running.client.status()).workers:
                states = (row.blocks_free, row.blocks_active, row.blocks_cached, row.blocks_leased)
                assert sum(states) == row.blocks_total

    run(work())


@pytest.mark.parametrize("cold", ["prefill-0", "decode-0"])
@pytest.mark.parametrize("mode", ["push", "pull"])
def test_hits_on_one_side_only_are_exact(mode: str, cold: str, case: Callable[[str], Case]) -> None:
    """A worker is replaced by one that has nothing; its partner still has everything."""
    reference, draw = case("llama"), random.Random(5)
    root = tokens(draw, 200)
    prompts = [root + tokens(draw, 10 + i) for i in range(4)]
    expected = [reference.generate(prompt, 6) for prompt in prompts]

    async def work() -> None:
        pools = {cold.partition("-")[0]: 2}
        async with cluster(reference.directory, mode=mode, **pools) as running:
            first = await running.generate_all(prompts[:1], max_tokens=6)
            assert first == expected[:1]
            rows = {w.name: w for w in (await running.client.status()).workers}
            warm = [name for name in rows if name.startswith(cold[:6]) and rows[name].steps > 0]
            assert len(warm) == 1
            await asyncio.to_thread(running.workers[warm[0]].stop)
            assert await running.generate_all(prompts, max_tokens=6) == expected
            prefill = [w for w in (await running.client.status()).workers if w.role == "prefill"]
            if cold == "decode-0":
                assert prefill[0].hit_tokens == 208 + 3 * 192, "it had all, decode nothing"

    run(work())


def test_decode_gets_only_the_blocks_that_it_lacks(case: Callable[[str], Case]) -> None:
    reference, draw = case("llama"), random.Random(6)
    root = tokens(draw, 320)
    prompts = [root + tokens(draw, 16 * 2 - 1) for _ in range(3)]
    expected = [reference.generate(prompt, 6) for prompt in prompts]

    async def work(mode: str) -> None:
        async with cluster(reference.directory, mode=mode) as running:
            sent = []
            for prompt, answer in zip(prompts, expected, strict=True):
                assert (await serve(running, prompt, max_tokens=6))[0] == answer
                assert await running.leftovers() == {}
                rows = (await running.client.status()).workers
                sent.append(sum(p.bytes for w in rows if w.role == "decode" for p in w.pairs))
            whole = len(prompts[0]) // 16 + 1
            assert sent == [BLOCK_BYTES * blocks for blocks in (whole, whole + 2, whole + 4)]

    for mode in ("push", "pull"):
        run(work(mode))


def test_tenants_share_nothing(case: Callable[[str], Case]) -> None:
    reference, draw = case("llama"), random.Random(7)
    prompt = tokens(draw, 100)
    expected = reference.generate(prompt)

    async def work() -> None:
        async with cluster(reference.directory) as running:
            cached = []
            for salt in ("", "a", "b", "a", ""):
                found, usage = await serve(running, prompt, cache_salt=salt)
                assert found == expected
                cached.append(usage.cached_tokens)
            assert cached == [0, 0, 0, 96, 96]

    run(work())


def test_a_model_whose_angles_depend_on_the_prompts_length_shares_nothing(
    case: Callable[[str], Case],
) -> None:
    reference = case("llama-dynamic")
    draw = random.Random(8)
    root = tokens(draw, 200)
    prompts = [root[:150], root]
    expected = [reference.generate(prompt) for prompt in prompts]

    async def work() -> None:
        async with cluster(reference.directory) as running:
            for prompt, answer in zip(prompts, expected, strict=True):
                found, usage = await serve(running, prompt)
                assert found == answer and usage.cached_tokens == 0

    run(work())


def test_the_cache_can_be_switched_off(case: Callable[[str], Case]) -> None:
    reference, draw = case("llama"), random.Random(9)
    prompt = tokens(draw, 100)

    async def work() -> None:
        async with cluster(reference.directory, prefix_cache=False) as running:
            for _ in range(2):
                found, usage = await serve(running, prompt)
                assert found == reference.generate(prompt) and usage.cached_tokens == 0
            assert all(w.blocks_cached == 0 for w in (await running.client.status()).workers)

    run(work())


async def known(running: Cluster, count: int) -> None:
    """Until the gateway has heard of so many blocks on prefill workers."""
    links = [w.link for w in running.gateway.fleet.workers if w.role == "prefill"]
    while sum(len(link.prefixes._names) for link in links if link) < count:
        await asyncio.sleep(0.02)


def test_requests_go_where_their_prefix_is(case: Callable[[str], Case]) -> None:
    reference, draw = case("llama"), random.Random(10)
    roots = [tokens(draw, 128) for _ in range(3)]

    async def work() -> None:
        async with cluster(reference.directory, prefill=3, decode=2) as running:
            await running.generate_all(roots)
            await known(running, sum(len(root) // 16 for root in roots))
            for root in roots:
                for _ in range(2):
                    _, usage = await serve(running, root + tokens(draw, 9))
                    assert usage.cached_tokens == 128

    run(work())


@pytest.mark.parametrize("split", [(2, 1), (1, 2)])
@pytest.mark.parametrize("mode", ["push", "pull"])
def test_hits_are_exact_with_workers_of_several_ranks(
    mode: str, split: tuple[int, int], tmp_path: Path
) -> None:
    reference, draw = Case("llama", tmp_path, num_attention_heads=8), random.Random(11)
    root = tokens(draw, 150)
    prompts = [root[:cut] + tokens(draw, 9) for cut in (16, 33, 100, 150)]
    expected = [reference.generate(prompt, 6) for prompt in prompts]

    async def work() -> None:
        splits = {"prefill_split": split, "decode_split": split}
        async with cluster(reference.directory, mode=mode, **splits) as running:
            for _ in range(3):
                assert await running.generate_all(prompts, max_tokens=6) == expected
            asked, hit = await asked_and_hit(running, "prefill")
            assert 0.5 < hit / asked < 1.0
            assert (await running.client.status()).gateway.failovers == 0
            assert await running.leftovers() == {}

    run(work())
