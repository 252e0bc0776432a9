"""How long a step takes: the one latency model's evaluation, shared by schedulers and planner.

Knows a few numbers about a batch and a few coefficients; fitting them and hardware sheets live in
`placement/`. A step's time is taken as linear in

- 1 (launch, weights read once),
- new tokens of chunks (matrix products),
- attention pairs of chunks, sum of new * (context + new / 2),
- decoding rows,
- their context (KV read),

which holds DistServe's model (OSDI '24, §3 and appendix A) as a special case: its prefill is
a + b * sum(l) + c * sum(l^2) with attention coefficient 2c, its decode A + B * sum(context) +
C * rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from .batch import Batch


class StepFeatures(NamedTuple):
    """What a step's time depends on. A chunk of n tokens after c computed ones has c of context."""

    new_tokens: int = 0
    attention: float = 0.0  # sum over chunks of new * (context + new / 2)
    decode_rows: int = 0
    decode_context: int = 0  # sum over decoding rows of the positions computed before

    @classmethod
    def of_chunks(cls, chunks: Iterable[tuple[int, int]]) -> StepFeatures:
        """Of chunks given as (new tokens, context already computed)."""
        features = cls()
        for new_tokens, context in chunks:
            features = features.with_chunk(new_tokens, context)
        return features

    def with_chunk(self, new_tokens: int, context: int) -> StepFeatures:
        return StepFeatures(
            self.new_tokens + new_tokens,
            self.attention + new_tokens * (context + new_tokens / 2),
            self.decode_rows,
            self.decode_context,
        )


def features_of(batch: Batch) -> StepFeatures:
    """Of a whole batch. One token after an output token is a decoding row, the rest are chunks."""
    new_tokens = decode_rows = decode_context = 0
    attention = 0.0
    for sequence, start, count in zip(batch.sequences, batch.starts, batch.counts, strict=True):
        if count == 1 and sequence.num_tokens > sequence.num_prompt_tokens:
            decode_rows += 1
            decode_context += start
        else:
            new_tokens += count
            attention += count * (start + count / 2)
    return StepFeatures(new_tokens, attention, decode_rows, decode_context)


class StepTime(Protocol):
    """Predicts a step. Must not fall when a feature rises: chunk sizes are found by bisection."""

    def batch_s(self, features: StepFeatures) -> float:
        """Seconds that one step with these features takes."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCoefficients:
    """One linear piece, seconds per unit of each feature, none negative. Is a `StepTime`."""

    base_s: float
    new_token_s: float = 0.0
    attention_s: float = 0.0
    decode_row_s: float = 0.0
    decode_context_s: float = 0.0

    def batch_s(self, features: StepFeatures) -> float:
        new_tokens, attention, decode_rows, decode_context = features
        return (
            self.base_s
            + self.new_token_s * new_tokens
            + self.attention_s * attention
            + self.decode_row_s * decode_rows
            + self.decode_context_s * decode_context
        )


class PiecewiseStepTime:
    """Separate coefficients from given numbers of decoding rows on. Is a `StepTime`.

    DistServe's model is `{0: prefill, 1: decode, 95: decode of large batches}`.
    """

    def __init__(self, pieces: Mapping[int, StepCoefficients]) -> None:
        assert 0 in pieces, "a piece from 0 decoding rows on is needed"
        self._from_rows = sorted(pieces)
        self._pieces = [pieces[rows] for rows in self._from_rows]

    def batch_s(self, features: StepFeatures) -> float:
        piece = bisect_right(self._from_rows, features.decode_rows) - 1
        return self._pieces[piece].batch_s(features)


def prefill_s(step_time: StepTime, num_tokens: int, context: int, max_batch_tokens: int) -> float:
    """Seconds to prefill `num_tokens` after `context` computed ones, alone, in whole chunks."""
    whole = step_time.batch_s(StepFeatures(num_tokens, num_tokens * (context + num_tokens / 2)))
    more_chunks = (num_tokens - 1) // max_batch_tokens
    return whole + more_chunks * step_time.batch_s(StepFeatures()) if more_chunks > 0 else whole
