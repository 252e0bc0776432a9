"""How long a step of one phase takes on named hardware, and whether that was measured or guessed.

Every source (a measured profile, DistServe's coefficients, a roofline over a hardware sheet)
yields a `PhaseLatency` for (phase, tensor parallel, pipeline parallel): one `StepTime` a pipeline
stage, the same objects that live schedulers use.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal, Protocol

from ...engine.errors import InvalidConfig
from ...engine.step_time import StepFeatures, StepTime

Phase = Literal["prefill", "decode", "mixed"]  # mixed: chunks and decoding rows in one step


class KnotStepTime:
    """Monotone and piecewise linear in tokens, linear in attention and context. Is a `StepTime`.

    seconds = curve(new tokens + w·decoding rows) + attention·a + rows·r + context·c. Matrix
    products see all tokens alike, so one curve carries them (weights read at few tokens,
    arithmetic at many) and w = `row_tokens` is 1, unless rows were measured to be cheaper.
    Beyond the last knot the last slope goes on.
    """

    __slots__ = (
        "attention_s",
        "decode_context_s",
        "decode_row_s",
        "row_tokens",
        "seconds",
        "slopes",
        "tokens",
    )

    def __init__(
        self,
        tokens: Sequence[float],
        seconds: Sequence[float],
        *,
        attention_s: float = 0.0,
        decode_row_s: float = 0.0,
        decode_context_s: float = 0.0,
        row_tokens: float = 1.0,
    ) -> None:
        assert len(tokens) == len(seconds) >= 2
        pairs = list(zip(tokens, seconds, strict=True))
        steps = [(t1 - t0, s1 - s0) for (t0, s0), (t1, s1) in zip(pairs, pairs[1:], strict=False)]
        assert all(dt > 0 and ds >= 0 for dt, ds in steps), "a step time never falls"
        assert min(attention_s, decode_row_s, decode_context_s, *seconds) >= 0
        self.tokens = list(map(float, tokens))
        self.seconds = list(map(float, seconds))
        self.slopes = [ds / dt for dt, ds in steps]
        self.attention_s = attention_s
        self.decode_row_s = decode_row_s
        self.decode_context_s = decode_context_s
        self.row_tokens = row_tokens

    def curve_s(self, tokens: float) -> float:
        """Of the matrix products; below the first knot its own value."""
        i = min(bisect_right(self.tokens, tokens), len(self.slopes)) - 1
        if i < 0:
            return self.seconds[0]
        return self.seconds[i] + self.slopes[i] * (tokens - self.tokens[i])

    def batch_s(self, features: StepFeatures) -> float:
        new_tokens, attention, decode_rows, decode_context = features
        return (
            self.curve_s(new_tokens + self.row_tokens * decode_rows)
            + self.attention_s * attention
            + self.decode_row_s * decode_rows
            + self.decode_context_s * decode_context
        )

    def divided(self, parts: int, more_s: float = 0.0) -> KnotStepTime:
        """One of `parts` equal stages, and `more_s` for handing on."""
        return KnotStepTime(
            self.tokens,
            [seconds / parts + more_s for seconds in self.seconds],
            attention_s=self.attention_s / parts,
            decode_row_s=self.decode_row_s / parts,
            decode_context_s=self.decode_context_s / parts,
            row_tokens=self.row_tokens,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The largest features that stand on a measurement; beyond them an answer extrapolates."""

    new_tokens: float = inf
    attention: float = inf
    decode_rows: float = inf
    decode_context: float = inf

    def exceeded_by(self, features: StepFeatures) -> list[tuple[str, float, float]]:
        """(what, asked, known up to) of each feature that is beyond."""
        names = ("new tokens in a step", "attention pairs", "decoding rows", "tokens of context")
        known = (self.new_tokens, self.attention, self.decode_rows, self.decode_context)
        pairs = zip(names, features, known, strict=True)
        return [(name, asked, most) for name, asked, most in pairs if asked > most]


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseLatency:
    """Step times of one (hardware, model, phase, tensor parallel, pipeline parallel)."""

    hardware: str
    model: str
    phase: Phase
    tensor_parallel: int
    stages: tuple[StepTime, ...]  # one a pipeline stage; a batch passes them in order
    limits: Limits
    origin: str  # "measured …", "published …", or "computed, not measured by us"

    @property
    def pipeline_parallel(self) -> int:
        return len(self.stages)

    def total_s(self, features: StepFeatures) -> float:
        """From the start of a step to its output: the sum over stages."""
        if len(self.stages) == 1:
            return self.stages[0].batch_s(features)
        return sum([stage.batch_s(features) for stage in self.stages])

    def interval_s(self, features: StepFeatures) -> float:
        """Between equal batches that follow each other closely: the slowest stage."""
        return max(stage.batch_s(features) for stage in self.stages)


class LatencySource(Protocol):
    """Where step times come from."""

    def phase(self, phase: Phase, tensor_parallel: int, pipeline_parallel: int) -> PhaseLatency:
        """Raises NoLatency where this shape is not known."""
        ...


class NoLatency(InvalidConfig):
    """The source holds nothing for this phase and parallelism."""


def prompt_features(num_tokens: int, context: int = 0) -> StepFeatures:
    """One prompt's chunk alone."""
    return StepFeatures().with_chunk(num_tokens, context)


def decode_features(rows: int, context_per_row: int) -> StepFeatures:
    """A decode step of equal rows."""
    return StepFeatures(decode_rows=rows, decode_context=rows * context_per_row)
