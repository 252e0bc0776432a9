"""DistServe's published coefficients and memory capacities, evaluated as its simulator does.

Origin of the files: LLMServe/DistServe, `simdistserve/estimators/profile_data` (Apache-2.0),
measured by its authors on A100-SXM4-80GB, FP16. Milliseconds; not measured by us.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..engine.errors import InvalidConfig

Triple = tuple[float, float, float]


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
            str(path), f"not a DistServe profile: {error!r}", "give a profiler-*.json of simdistserve"
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
