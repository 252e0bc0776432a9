"""DistServe's published coefficients and memory capacities, evaluated as its simulator does.

Origin of the files: LLMServe/DistServe, `simdistserve/estimators/profile_data` (Apache-2.0),
measured by its authors on A100-SXM4-80GB, FP16. Milliseconds; not measured by us.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ...engine.errors import InvalidConfig
from ...engine.step_time import PiecewiseStepTime, StepCoefficients
from .phase_latency import Limits, NoLatency, Phase, PhaseLatency

Triple = tuple[float, float, float]
ORIGIN = "published: DistServe (OSDI '24) on A100-SXM4-80GB, FP16; not measured by us"
FIRST_STAGE_MS = 2.0  # what its simulator adds to a step's first stage, and a token
FIRST_STAGE_MS_PER_TOKEN = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class DistServeCoefficients:
    """Step times of one model at one tensor parallelism.

    A pipeline of `stages` is not measured: a stage takes 1/stages of the time, and a prefill
    stage `stages` milliseconds more.
    """

    prefill: Triple  # a + b·Σ length + c·Σ length²
    decode_small: Triple  # A + B·Σ context + C·rows
    decode_large: Triple
    large_from_rows: int

    def prefill_ms(self, tokens: int, squares: int, stages: int) -> float:
        """One stage of a prompt batch; `squares` is the sum of the squared lengths."""
        a, b, c = self.prefill
        return (a + b * tokens + c * squares) * (1 / stages) + stages

    def decode_ms(self, rows: int, context: int, stages: int) -> float:
        """One stage of a decode step; `context` counts the token being computed."""
        a, b, c = self.decode_small if rows < self.large_from_rows else self.decode_large
        return (a + b * context + c * rows) * (1 / stages)

    def decode_slope_ms(self, rows: int) -> float:
        """How much longer each step takes than the one before, as every context grows by one."""
        return (self.decode_small if rows < self.large_from_rows else self.decode_large)[1] * rows


DistServeProfile = Mapping[tuple[str, int], DistServeCoefficients]  # (model, tensor parallel)


@dataclass(frozen=True, kw_only=True, slots=True)
class DistServeLatency:
    """The same times in the form that every source has. Is a `LatencySource`."""

    model: str
    profile: DistServeProfile

    def phase(
        self, phase: Phase, tensor_parallel: int = 1, pipeline_parallel: int = 1
    ) -> PhaseLatency:
        coefficients = self.profile.get((self.model, tensor_parallel))
        if coefficients is None:
            known = sorted(tp for model, tp in self.profile if model == self.model)
            raise NoLatency(
                f"DistServe's profile of {self.model}",
                f"holds no tensor parallel {tensor_parallel}",
                f"use one of {known}",
            )
        stages = tuple(
            _stage(coefficients, pipeline_parallel, first=i == 0) for i in range(pipeline_parallel)
        )
        return PhaseLatency(
            hardware="a100-80g",
            model=self.model,
            phase=phase,
            tensor_parallel=tensor_parallel,
            stages=stages,
            limits=Limits(),
            origin=ORIGIN,
        )


def _stage(k: DistServeCoefficients, stages: int, *, first: bool) -> PiecewiseStepTime:
    """Of one stage, in seconds. `attention` holds Σ length²/2, so its coefficient is 2c.

    The published context counts the token being computed, a `StepFeatures` does not: that token's
    share goes to the row. Its overhead a token counts chunks' tokens and rows' context.
    A step with both, which it never measured, is taken as the decode step and the chunks' share.
    """
    fixed_ms, token_ms = (FIRST_STAGE_MS, FIRST_STAGE_MS_PER_TOKEN) if first else (0.0, 0.0)
    a, b, c = k.prefill
    alone = StepCoefficients(
        base_s=(a / stages + stages + fixed_ms) / 1e3,
        new_token_s=(b / stages + token_ms) / 1e3,
        attention_s=2 * c / stages / 1e3,
    )
    pieces = {0: alone}
    for rows, (fixed, context, row) in (
        (1, k.decode_small),
        (k.large_from_rows, k.decode_large),
    ):
        pieces[rows] = replace(
            alone,
            base_s=(fixed / stages + fixed_ms) / 1e3,
            decode_row_s=(row + context) / stages / 1e3,
            decode_context_s=(context / stages + token_ms) / 1e3,
        )
    return PiecewiseStepTime(pieces)


def read_distserve_profile(path: str | Path) -> DistServeProfile:
    """Read `profiler-*.json`. Raises InvalidConfig where it is not of that form."""
    try:
        models = json.loads(Path(path).read_text(encoding="utf-8"))
        return {
            (model, int(tp)): DistServeCoefficients(
                prefill=_triple(entry["prefill"]),
                decode_small=_triple(entry["decoding_smallbs"]),
                decode_large=_triple(entry["decoding_largebs"]),
                large_from_rows=int(entry["decoding_large_small_bs_threshold"]),
            )
            for model, by_tp in models.items()
            for tp, entry in by_tp.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidConfig(
            str(path),
            f"not a DistServe profile: {error!r}",
            "give a profiler-*.json of simdistserve",
        ) from error


def _triple(values: list[float]) -> Triple:
    a, b, c = map(float, values)
    return a, b, c


def read_max_num_tokens(path: str | Path) -> Mapping[tuple[str, int, int], int]:
    """KV tokens an instance holds, by (model, tensor parallel, pipeline parallel)."""
    try:
        with open(path, encoding="utf-8", newline="") as lines:
            return {
                (row["model"], int(row["tp"]), int(row["pp"])): int(row["max_num_tokens"])
                for row in csv.DictReader(lines)
            }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidConfig(
            str(path),
            f"not a table of capacities: {error!r}",
            "give a CSV with the columns model, tp, pp, max_num_tokens",
        ) from error
