"""A measured profile: what `phasewise profile` writes and the planner reads.

```json
{"format": "phasewise-profile/1", "hardware": "cpu-xeon", "model": "tiny", "dtype": "float32",
 "origin": "measured 2026-11-21 by phasewise profile",
 "points": [{"phase": "prefill", "tp": 1, "pp": 1, "new_tokens": 128, "context": 0, "batch": 1,
             "seconds": 0.0123}, …]}
```
A point is one step of `batch` equal rows: each computes `new_tokens` (1 in decode) after
`context` tokens that are in the cache. `seconds` is the whole step; repeats are separate points.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...engine.errors import InvalidConfig
from ...engine.step_time import StepFeatures
from .fitting import Point, contradicted, fit_knots, limits_of, medians
from .phase_latency import NoLatency, Phase, PhaseLatency

FORMAT = "phasewise-profile/1"
ENOUGH_POINTS = 3  # fewer do not tell a slope from a constant


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfilePoint:
    """One measured step. See the module's words on the fields."""

    phase: str  # "prefill" | "decode"
    tp: int
    pp: int
    new_tokens: int
    context: int
    batch: int
    seconds: float

    @property
    def features(self) -> StepFeatures:
        if self.phase == "decode":
            return StepFeatures(decode_rows=self.batch, decode_context=self.batch * self.context)
        return StepFeatures.of_chunks([(self.new_tokens, self.context)] * self.batch)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepProfile:
    """All points of one model on one kind of hardware. Is a `LatencySource`."""

    hardware: str
    model: str
    dtype: str
    origin: str
    points: tuple[ProfilePoint, ...]

    def phase(
        self, phase: Phase, tensor_parallel: int = 1, pipeline_parallel: int = 1
    ) -> PhaseLatency:
        """Fitted to this parallelism's points; a pipeline not measured is divided from pp 1."""
        found = self._points(phase, tensor_parallel, pipeline_parallel)
        whole = found or self._points(phase, tensor_parallel, 1)
        if len({features for features, _ in whole}) < ENOUGH_POINTS:
            known = sorted({(p.tp, p.pp) for p in self.points if phase in ("mixed", p.phase)})
            raise NoLatency(
                f"profile of {self.model} on {self.hardware}",
                f"too few {phase} points for tensor parallel {tensor_parallel}",
                f"profile it; (tp, pp) with points: {known}",
            )
        origin = self.origin if found else f"{self.origin}; divided by {pipeline_parallel} stages"
        if refuted := len(contradicted(medians(whole))):
            origin += f"; {refuted} points left out, which others contradict"
        stage = fit_knots(whole).divided(pipeline_parallel)
        return PhaseLatency(
            hardware=self.hardware,
            model=self.model,
            phase=phase,
            tensor_parallel=tensor_parallel,
            stages=(stage,) * pipeline_parallel,
            limits=limits_of(whole),
            origin=origin,
        )

    def _points(self, phase: Phase, tp: int, pp: int) -> list[Point]:
        return [
            (point.features, point.seconds)
            for point in self.points
            if phase in ("mixed", point.phase) and (point.tp, point.pp) == (tp, pp)
        ]

    def require(self, *, hardware: str | None = None, model: str | None = None) -> None:
        """Refuse a profile of something else. None: not asked."""
        for field, wanted, own in (
            ("hardware", hardware, self.hardware),
            ("model", model, self.model),
        ):
            if wanted is not None and wanted != own and not _names(wanted, own):
                raise InvalidConfig(
                    f"profile.{field}", f"was measured for {own!r}, not {wanted!r}", "profile it"
                )


def _names(sheet: str, device: str) -> bool:
    """Whether a sheet is of a device by the driver's name: "h100" of "NVIDIA H100 80GB HBM3",
    "a100-80g" of "NVIDIA A100-SXM4-80GB"."""
    words = re.findall(r"[a-z0-9]+", device.lower())
    parts = sheet.split("-")
    return len(words) > 1 and all(part in words or f"{part}b" in words for part in parts)


def write_profile(profile: StepProfile, path: str | Path) -> None:
    text = json.dumps({"format": FORMAT, **asdict(profile)}, indent=1)
    Path(path).write_text(text + "\n", encoding="utf-8")


def read_profile(path: str | Path) -> StepProfile:
    """Raises InvalidConfig with the file, and the point where one is wrong."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidConfig(
            str(path), f"cannot read the profile: {error}", "write one with phasewise profile"
        ) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise InvalidConfig(
            str(path), f"not of format {FORMAT}", "write one with phasewise profile"
        )
    points = document.get("points")
    if not isinstance(points, list) or not points:
        raise InvalidConfig(f"{path}: points", "the profile holds none", "profile again")
    return StepProfile(
        hardware=str(document.get("hardware", "")),
        model=str(document.get("model", "")),
        dtype=str(document.get("dtype", "")),
        origin=str(document.get("origin", "measured, origin not stated")),
        points=_points_of(str(path), points),
    )


def _points_of(where: str, points: Sequence[Mapping[str, Any]]) -> tuple[ProfilePoint, ...]:
    parsed = []
    for i, entry in enumerate(points):
        try:
            point = ProfilePoint(**entry)
            counts = (point.tp, point.pp, point.new_tokens, point.batch, point.context + 1)
            if point.phase not in ("prefill", "decode") or not all(
                isinstance(count, int) and count >= 1 for count in counts
            ):
                raise ValueError(f"phase {point.phase!r} or a count is wrong")
            if not 0 < point.seconds < 1e6:
                raise ValueError(f"seconds {point.seconds!r} is not positive")
        except (TypeError, ValueError) as error:
            raise InvalidConfig(f"{where}: points[{i}]", str(error), "profile again") from error
        parsed.append(point)
    return tuple(parsed)
