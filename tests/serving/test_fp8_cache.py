"""An FP8 cache through the whole cluster: the same tokens wherever they are computed.

The bar is one process with an FP8 cache, not transformers: FP8 rounds. What it must not do is to
round differently by chunk, by worker, by rank or after a preemption. A float32 sum that differs in
its last bit may still fall on the other side of an FP8 boundary, so prompts are taken whose tokens
win by more than a few such values could change.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
import torch
from phasewise.engine.batch import Batch
from phasewise.engine.layout import FP8
from phasewise.engine.request import Request, SamplingParams, TokenLogprobs
from phasewise.engine.runner import Runner, build_runner
from phasewise.engine.sequence import Sequence
from phasewise.tests.engine.test_exactness import Case
from phasewise.tests.serving.in_process import cluster

LIMIT_S = 100.0
MARGIN = 0.02  # between the two largest logits
BLOCK_BYTES = 3 * 2 * 2 * 16 * (10 + 1)  # layers, K and V, KV heads, tokens, values and a scale
MODES: dict[str, dict[str, Any]] = {
    "colocated": {"prefill": 0},
    "push": {"mode": "push"},
    "pull": {"mode": "pull"},
    "push-tcp": {"mode": "push", "transport": "tcp"},
    "pull-gloo": {"mode": "pull", "transport": "gloo"},
    "chunked": {"mode": "push", "max_batch_tokens": 67},
    "tp2": {"mode": "push", "prefill_split": (2, 1), "decode_split": (2, 1)},
    "pp2": {"prefill": 0, "decode_split": (1, 2)},
    "uneven": {"mode": "push", "prefill_split": (2, 1), "decode_split": (1, 1)},
}


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, LIMIT_S))


class Greedy:
    """Takes the largest logit and remembers the narrowest win."""

    def __init__(self) -> None:
        self.margin = torch.inf

    def sample(
        self, logits: torch.Tensor, sequences: list[Sequence], positions: list[int]
    ) -> tuple[list[int], list[TokenLogprobs | None] | None]:
        best = logits.topk(2).values
        self.margin = min(self.margin, float((best[:, 0] - best[:, 1]).min()))
        return logits.argmax(-1).tolist(), None


class Alone:
    """One process with an FP8 cache: a prompt in one step, then token by token."""

    def __init__(self, case: Case) -> None:
        self.greedy = Greedy()
        sizes: dict[str, Any] = {"num_blocks": 40, "max_model_len": 600, "threads": 1}
        self.runner: Runner = build_runner(
            case.directory, dtype="float32", kv_dtype=FP8, sampler=self.greedy, **sizes
        )

    def answers(self, draw: random.Random, length: int, count: int) -> tuple[list[int], list[int]]:
        """A prompt of so many tokens whose answer wins clearly, and the answer."""
        for _ in range(50):
            prompt = [draw.randrange(131) for _ in range(length)]
            self.greedy.margin = torch.inf
            tokens = list(self._tokens(prompt, count))
            if self.greedy.margin > MARGIN:
                return prompt, tokens
        raise AssertionError("no prompt wins clearly")

    def _tokens(self, prompt: list[int], count: int) -> Iterator[int]:
        sampling = SamplingParams(max_tokens=count, temperature=0.0)
        sequence = Sequence(
            Request(
                id="a", token_ids=tuple(prompt), num_prompt_tokens=len(prompt), sampling=sampling
            )
        )
        sequence.blocks = list(range(self.runner.layout.blocks_for(len(prompt) + count)))
        start = 0
        for _ in range(count):
            new = sequence.num_tokens - start
            batch = Batch(sequences=[sequence], starts=[start], counts=[new])
            start = sequence.num_tokens
            (token,) = self.runner.run(batch).token_ids
            sequence.append(token)
            yield token


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case("llama", tmp_path_factory.mktemp("llama"), num_attention_heads=8)


@pytest.fixture(scope="module")
def mixed(case: Case) -> list[tuple[list[int], list[int]]]:
    """Prompts of 1 to 500 tokens, and what one process answers."""
    alone, draw = Alone(case), random.Random(16)
    return [alone.answers(draw, length, 10) for length in (1, 15, 16, 17, 500, 90, 33)]


@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_of_one_process_in_every_mode(
    mode: str, case: Case, mixed: list[tuple[list[int], list[int]]]
) -> None:
    prompts, expected = map(list, zip(*mixed, strict=True))

    async def work() -> None:
        async with cluster(case.directory, kv_dtype=FP8, **MODES[mode]) as running:
            assert await running.generate_all(prompts, max_tokens=10) == expected
            # Once more, now from the prefix cache.
            assert await running.generate_all(prompts, max_tokens=10) == expected
            assert await running.leftovers() == {}

    run(work())


def test_a_preempted_request_resumes_with_the_same_tokens(case: Case) -> None:
    alone, draw = Alone(case), random.Random(5)
    served = [alone.answers(draw, length, 60) for length in (20, 45, 70)] * 4
    prompts, expected = map(list, zip(*served, strict=True))

    async def work() -> None:
        options: dict[str, Any] = {"num_bytes": 34 * BLOCK_BYTES, "max_model_len": 520}
        async with cluster(case.directory, kv_dtype=FP8, mode="push", **options) as running:
            assert await running.generate_all(prompts, max_tokens=60) == expected
            status = await running.client.status()
            assert await running.leftovers() == {}
        decode = next(worker for worker in status.workers if worker.role == "decode")
        assert decode.preemptions > 0
        assert decode.blocks_total == 34, "the pool's size counts values and scales"

    run(work())


def test_the_wire_carries_values_and_scales_of_a_byte_and_nothing_else(case: Case) -> None:
    prompt = [token % 131 for token in range(320)]

    async def sent(**options: Any) -> int:
        async with cluster(case.directory, mode="push", **options) as running:
            await running.generate(prompt)
            (pair,) = [
                pair
                for worker in (await running.client.status()).workers
                for pair in worker.pairs
                if worker.role == "prefill"
            ]
            return pair.bytes

    async def work() -> None:
        halves, eighths = await sent(dtype="bfloat16"), await sent(dtype="bfloat16", kv_dtype=FP8)
        assert halves == 20 * BLOCK_BYTES // 11 * 20
        assert eighths == 20 * BLOCK_BYTES

    run(work())
