"""Law 1 with workers that are split differently: exact tokens, and the same KV bytes on both
sides, over every CPU transport, push and pull, and blocks of other sizes."""

from __future__ import annotations

import asyncio
import itertools
import random
from typing import Any

import pytest
from phasewise.tests.engine.test_exactness import Case
from phasewise.tests.serving.in_process import Cluster, cluster
from phasewise.tests.serving.kv_bytes import LivePools

LIMIT_S = 100.0
HEADS = {
    "gqa": {"num_attention_heads": 8},
    "mha": {"num_attention_heads": 8, "num_key_value_heads": 8},
}
SPLITS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2)]
SIZES = [(16, 16), (16, 32), (32, 16)]
LENGTHS = (1, 17, 64, 300, 90)
Options = dict[str, Any]


def options(source: Any, target: Any, transport: str, sizes: Any, mode: str) -> Options:
    return {
        "prefill_split": source,
        "decode_split": target,
        "transport": transport,
        "block_size": sizes[0],
        "decode_block_size": sizes[1],
        "mode": mode,
    }


# Each split on each side, each transport with each pair of sizes, both modes, both kinds of heads.
CASES = [
    ("gqa", options((2, 1), (1, 1), "shm", (16, 16), "push")),
    ("mha", options((1, 1), (4, 1), "tcp", (16, 32), "pull")),
    ("gqa", options((4, 1), (2, 1), "gloo", (32, 16), "push")),
    ("gqa", options((1, 2), (2, 2), "tcp", (32, 16), "push")),
    ("mha", options((2, 2), (1, 2), "shm", (16, 32), "push")),
    ("gqa", options((4, 2), (1, 1), "shm", (32, 16), "pull")),
    ("gqa", options((1, 2), (4, 2), "gloo", (16, 32), "pull")),
    ("mha", options((2, 1), (1, 2), "tcp", (16, 16), "pull")),
    ("mha", options((1, 1), (2, 1), "gloo", (16, 16), "push")),
]
CHOSEN = {(one["prefill_split"], one["decode_split"]) for _, one in CASES}
REST = [
    (
        ("mha", "gqa")[n // 2 % 2],
        options(*pair, ("shm", "tcp", "gloo")[n % 3], SIZES[n // 3 % 3], ("push", "pull")[n % 2]),
    )
    for n, pair in enumerate(p for p in itertools.product(SPLITS, SPLITS) if p not in CHOSEN)
]


class Reference:
    """A checkpoint, prompts and what follows each."""

    def __init__(self, case: Case) -> None:
        draw = random.Random(8)
        self.case = case
        self.prompts = [[draw.randrange(131) for _ in range(n)] for n in LENGTHS]
        self.expected = [case.generate(prompt, 8) for prompt in self.prompts]
        head = self.prompts[3][:100]  # known to both sides by then; decode holds whole blocks of it
        self.later = [head + [draw.randrange(131) for _ in range(n)] for n in (20, 131)]
        self.expected_later = [case.generate(prompt, 8) for prompt in self.later]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    return {
        name: Reference(Case("llama", tmp_path_factory.mktemp(name), **heads))
        for name, heads in HEADS.items()
    }


def assert_equal_kv(reference: Reference) -> None:
    """What decode holds of each prompt is what prefill holds, byte for byte."""
    pools = LivePools()
    for prompt in (*reference.prompts, *reference.later):
        if len(prompt) < 33:
            continue  # no block that is full on both sides for sure
        sent, received = pools.kv("prefill", prompt), pools.kv("decode", prompt)
        count = min(sent.shape[3], received.shape[3])
        assert count >= len(prompt) // 32 * 32
        assert (sent[:, :, :, :count] == received[:, :, :, :count]).all()


async def check(running: Cluster, reference: Reference) -> None:
    """Exact, without a stream that had to move, and nothing left."""
    assert await running.generate_all(reference.prompts, max_tokens=8) == reference.expected
    assert await running.generate_all(reference.later, max_tokens=8) == reference.expected_later
    status = await running.client.status()
    assert status.gateway.failovers == 0, "no transfer failed on the way"
    assert await running.leftovers() == {}
    assert_equal_kv(reference)


def serve(reference: Reference, chosen: Options) -> None:
    async def work() -> None:
        async with cluster(reference.case.directory, **chosen) as running:
            await check(running, reference)

    asyncio.run(asyncio.wait_for(work(), LIMIT_S))


@pytest.mark.parametrize(("heads", "chosen"), CASES)
def test_unequal_sides_are_exact_and_hold_the_same_kv(
    heads: str, chosen: Options, references: dict[str, Reference]
) -> None:
    serve(references[heads], chosen)


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "chosen"), REST)
def test_every_other_pair_of_splits_is_exact_and_holds_the_same_kv(
    heads: str, chosen: Options, references: dict[str, Reference]
) -> None:
    serve(references[heads], chosen)
