"""Sequences through the decode scheduler and a runner, as a worker's loop drives them."""

from __future__ import annotations

import random
import time

from phasewise.decode_worker.limits import DecodeLimits
from phasewise.decode_worker.scheduler import DecodeScheduler
from phasewise.engine.blocks import BlockAllocator
from phasewise.engine.request import Request, SamplingParams
from phasewise.engine.runner import Runner
from phasewise.engine.sequence import Sequence


def scheduler_of(
    runner: Runner, *, max_batch_size: int, max_batch_tokens: int = 2048
) -> DecodeScheduler:
    limits = DecodeLimits(
        max_batch_size=max_batch_size,
        max_batch_tokens=max(max_batch_tokens, max_batch_size + 1),
        max_model_len=runner.max_model_len,
        eos_token_ids=runner.spec.eos_token_ids,
    )
    layout = runner.layout
    return DecodeScheduler(BlockAllocator(layout.num_blocks, layout.block_size), limits)


def request_of(name: str, prompt: list[int], max_tokens: int) -> Request:
    """A greedy request that only its length ends."""
    return Request(
        id=name,
        token_ids=tuple(prompt),
        num_prompt_tokens=len(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
    )


def random_prompts(count: int, length: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(length)] for _ in range(count)]


def step(scheduler: DecodeScheduler, runner: Runner) -> int:
    """One step; how many sequences it was the last of."""
    batch = scheduler.next_batch(time.monotonic())
    assert batch is not None, "the pool holds what is asked of it"
    output = runner.run(batch)
    return len(scheduler.advance(batch, output, time.monotonic()).finished)


def serve(
    scheduler: DecodeScheduler, runner: Runner, prompts: list[list[int]], max_tokens: int
) -> list[list[int]]:
    """Greedy tokens after each prompt, computed together."""
    sequences = [
        Sequence(request_of(f"served-{i}", prompt, max_tokens)) for i, prompt in enumerate(prompts)
    ]
    for sequence in sequences:
        scheduler.add(sequence, time.monotonic())
    done = 0
    while done < len(sequences):
        done += step(scheduler, runner)
    return [(s.tokens or [])[s.num_prompt_tokens :] for s in sequences]


def seat(
    scheduler: DecodeScheduler, rows: int, context: int, vocab_size: int, max_tokens: int
) -> None:
    """`rows` sequences of `context` positions whose KV is taken to be in its blocks."""
    for i, prompt in enumerate(random_prompts(rows, context, vocab_size)):
        sequence = Sequence(request_of(f"seated-{i}", prompt, max_tokens))
        sequence.append(0)
        blocks = scheduler.lease(context)
        assert blocks is not None, "the pool holds all rows"
        scheduler.resume(sequence, blocks, time.monotonic())
