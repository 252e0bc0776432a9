"""Throughput of a GPU against speed for one user, by means: no queueing, no spread of lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...engine.step_time import StepFeatures
from .phase_search import PhaseSearch
from .problem import Problem

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True, kw_only=True)
class Tradeoff:
    """A prefill shape, and a decode shape at one batch size, in the ratio that balances them."""

    user_tps: float  # output tokens a second that one user sees
    gpu_tps: float  # output tokens a second, over all GPUs of both pools
    words: str


def tradeoffs(problem: Problem, phases: PhaseSearch) -> list[Tradeoff]:
    """Every decode shape at every batch size that its KV holds, with the cheapest prefill shape."""
    tokens = float(phases.workload.output_tokens.mean())
    context = float(phases.workload.prompt_tokens.mean()) + tokens / 2
    prefill = max(problem.shapes, key=lambda s: phases.prompt_costs(s).capacity_rps() / s.gpus)
    prompts = phases.prompt_costs(prefill).capacity_rps() / prefill.gpus  # a second a GPU
    found = []
    for shape in problem.shapes:
        for rows in ROWS:
            if rows * context > shape.kv_tokens or rows > problem.config.search.max_batch_size:
                break
            lane = max(1, rows // shape.pipeline_parallel)
            features = StepFeatures(decode_rows=lane, decode_context=round(lane * context))
            step_s = phases.decode(shape).total_s(features)
            decode = lane * shape.pipeline_parallel / step_s / tokens / shape.gpus
            found.append(
                Tradeoff(
                    user_tps=1 / step_s,
                    gpu_tps=tokens / (1 / decode + 1 / prompts),
                    words=f"decode {shape}, {rows} rows, prefill {prefill}",
                )
            )
    return found


def front(options: Sequence[Tradeoff]) -> list[Tradeoff]:
    """Those that no other beats in both, slowest for the user first."""
    best: list[Tradeoff] = []
    for option in sorted(options, key=lambda o: (-o.user_tps, -o.gpu_tps)):
        if not best or option.gpu_tps > best[-1].gpu_tps:
            best.append(option)
    return best[::-1]
