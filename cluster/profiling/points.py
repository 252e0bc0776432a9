"""The steps a profile measures: prompts over tokens and context, decoding over rows and context."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

FEWEST_TOKENS = 16  # of a prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step of `batch` equal rows: `new_tokens` each after `context` computed ones."""

    phase: str  # "prefill" | "decode"
    new_tokens: int
    context: int
    batch: int

    @property
    def size(self) -> int:
        """Positions that are computed or read: a rough order of cost."""
        return self.batch * self.new_tokens * (self.context + self.new_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """What a step may be at most: the worker's own limits."""

    max_model_len: int
    max_batch_tokens: int
    max_batch_size: int
    pool_tokens: int  # positions that the KV pool holds

    def holds(self, step: Step) -> bool:
        length = step.context + step.new_tokens
        tokens = step.batch * step.new_tokens
        return (
            length <= self.max_model_len
            and step.batch * length <= self.pool_tokens
            and tokens <= self.max_batch_tokens
            and (step.phase == "prefill" or step.batch <= self.max_batch_size)
        )


def prefill_steps(room: Room, *, quick: bool) -> list[Step]:
    """Single prompts of doubling lengths with nothing, a quarter, half, … of the context before
    them, and batches of equal prompts: one long and many short ones cost differently."""
    most = min(room.max_batch_tokens, room.max_model_len)
    factor = 4 if quick else 2
    steps = []
    for tokens in (*powers(FEWEST_TOKENS, most, factor), most):
        contexts = [0, *(room.max_model_len * part // 4 for part in ((2,) if quick else (1, 2, 3)))]
        steps += [
            Step(phase="prefill", new_tokens=tokens, context=context, batch=1)
            for context in contexts
        ]
        if not quick and tokens >= 4 * FEWEST_TOKENS:
            steps.append(Step(phase="prefill", new_tokens=tokens // 4, context=0, batch=4))
    return _fitting(steps, room)


def decode_steps(room: Room, *, quick: bool) -> list[Step]:
    """Doubling rows, each over doubling contexts."""
    factor = 4 if quick else 2
    longest = room.max_model_len - 1
    contexts = sorted({*powers(FEWEST_TOKENS, longest, 2 * factor), longest})
    rows = (*powers(1, room.max_batch_size, factor), room.max_batch_size)
    steps = [
        Step(phase="decode", new_tokens=1, context=context, batch=batch)
        for batch in rows
        for context in contexts
    ]
    return _fitting(steps, room)


def powers(first: int, last: int, factor: int) -> Iterator[int]:
    """`first`, times `factor`, … up to `last`."""
    while first <= last:
        yield first
        first *= factor


def _fitting(steps: list[Step], room: Room) -> list[Step]:
    """Once each, cheapest first."""
    return sorted({s for s in steps if room.holds(s)}, key=lambda s: (s.size, s.batch, s.context))
