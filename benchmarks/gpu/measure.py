"""Times and errors of calls on the current GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .case import Case

CALLS = 10  # in one graph
Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """What this GPU measurably can."""

    copy_tb_s: float = 4.3  # read + write; both as measured on an H200
    matmul_tflop_s: float = 790.0


def seconds_of(call: Callable[[], Any], budget_s: float = 0.3) -> float:
    """Median seconds of one call on the current GPU, replayed from a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and sets up what libraries set up once
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(CALLS):
            call()
    return replayed_seconds(graph, budget_s) / CALLS


def replayed_seconds(graph: torch.cuda.CUDAGraph, budget_s: float = 0.3) -> float:
    """Median seconds of one replay, on the device's clock."""
    times = []
    end = time.perf_counter() + budget_s
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 100):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e-3)
    return statistics.median(times)


def ceilings() -> Ceilings:
    """Bandwidth of a copy of 2 GiB, and FLOP/s of a bfloat16 product of 8,192 squared."""
    source = torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    copy_s = seconds_of(lambda: target.copy_(source))
    left, right = torch.randn(2, 8192, 8192, device="cuda").bfloat16()
    product_s = seconds_of(lambda: left @ right)
    return Ceilings(
        copy_tb_s=2 * source.nbytes / copy_s / 1e12,
        matmul_tflop_s=2 * 8192**3 / product_s / 1e12,
    )


def error_of(case: Case) -> float:
    """Largest difference from the truth, over the largest true value."""
    actual, truth = case.compared(case.run()).double(), case.truth().double()
    assert actual.shape == truth.shape, case.name
    return float((actual - truth).abs().max() / truth.abs().max().clamp(min=1e-30))


def checked(cases: Iterator[Case]) -> Iterator[tuple[Case, float, bool]]:
    """Each case, its error and whether that is allowed."""
    for case in cases:
        error = error_of(case)
        # Not `error > tolerance`: a NaN must count as wrong.
        yield case, error, error <= case.tolerance


def timing(case: Case, limits: Ceilings) -> Figures:
    """One case's time, what it achieves, and what torch's own takes."""
    taken_s = seconds_of(case.run)
    row: Figures = {"us": taken_s * 1e6}
    if case.num_bytes:
        row["tb_s"] = case.num_bytes / taken_s / 1e12
        row["of_copy"] = row["tb_s"] / limits.copy_tb_s
    if case.flops:
        row["tflop_s"] = case.flops / taken_s / 1e12
        row["of_matmul"] = row["tflop_s"] / limits.matmul_tflop_s
    for name, call in case.peers.items():
        try:
            row[f"{name} us"] = seconds_of(call) * 1e6
        except (RuntimeError, NotImplementedError) as error:  # a peer may lack the shape
            row[f"{name} us"] = f"not run: {str(error).splitlines()[0]}"
    return row
