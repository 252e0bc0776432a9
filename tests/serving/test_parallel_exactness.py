"""Law 1 through the whole cluster, with workers of several ranks on either side."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from phasewise.cluster.client import Client
from phasewise.tests.engine.test_exactness import Case
from phasewise.tests.serving.in_process import cluster
from phasewise.tests.serving.launched import Launched

LIMIT_S = 60.0
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


@pytest.mark.slow
def test_a_worker_whose_follower_is_killed_ends_as_one_and_comes_back_whole() -> None:
    split = ["prefill.replicas=0", "decode.tensor_parallel=2", "decode.local_prefill=always"]
    launched = Launched(split)
    try:
        launched.wait_ready()
        with launched.client() as client:
            before = _tokens(client)
            (follower,) = [p for p in launched.descendants() if _is_follower(p.pid)]
            os.kill(follower.pid, signal.SIGKILL)
            deadline_s = time.monotonic() + LIMIT_S
            while not _is_restarted(client) and time.monotonic() < deadline_s:
                time.sleep(0.1)
            assert _is_restarted(client)
            assert _tokens(client) == before
        assert launched.stop() == 0
    finally:
        launched.kill()


def _tokens(client: Client) -> list[int]:
    prompt = list(range(1, 100))
    outputs = client.generate(token_ids=prompt, max_tokens=16, temperature=0.0, ignore_eos=True)
    return [token for output in outputs for token in output.token_ids]


def _is_follower(pid: int) -> bool:
    return b"PlacedFollower" in Path(f"/proc/{pid}/cmdline").read_bytes()


def _is_restarted(client: Client) -> bool:
    (worker,) = client.status().workers
    return worker.incarnation == 2 and worker.state == "ready"
