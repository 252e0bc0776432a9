"""Law 1 through the whole cluster, with workers of several ranks on either side."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from typing import Any

import pytest
from phasewise.tests.engine.test_exactness import Case
from phasewise.tests.serving.in_process import cluster

LIMIT_S = 100.0
HEADS = {"num_attention_heads": 8}
MODES: dict[str, dict[str, Any]] = {
    "colocated": {"prefill": 0},
    "push": {"mode": "push"},
    "pull": {"mode": "pull"},
    "push-tcp": {"mode": "push", "transport": "tcp"},
}


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, LIMIT_S))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case("llama", tmp_path_factory.mktemp("llama"), **HEADS)


@pytest.fixture(scope="module")
def mixed(case: Case) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of 1 to 300 tokens and what follows each."""
    draw = random.Random(8)
    prompts = [[draw.randrange(131) for _ in range(n)] for n in (1, 15, 16, 17, 300, 90)]
    return prompts, [case.generate(prompt, 8) for prompt in prompts]


@pytest.mark.parametrize("split", [(2, 1), (1, 2), (4, 1), (2, 2)])
@pytest.mark.parametrize("mode", MODES)
def test_requests_at_once_are_exact_with_workers_of_several_ranks(
    mode: str,
    split: tuple[int, int],
    case: Case,
    mixed: tuple[list[list[int]], list[list[int]]],
) -> None:
    prompts, expected = mixed
    options = MODES[mode] | {"prefill_split": split, "decode_split": split}

    async def work() -> None:
        async with cluster(case.directory, **options) as running:
            assert await running.generate_all(prompts, max_tokens=8) == expected
            status = await running.client.status()
            assert status.gateway.failovers == 0, "no transfer failed on the way"
            assert await running.leftovers() == {}

    run(work())
