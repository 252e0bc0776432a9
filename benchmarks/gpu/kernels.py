"""Every kernel's achieved bandwidth or FLOP/s over what this GPU measurably can.

    python benchmarks/gpu/kernels.py [--json FILE] [--sweep]
    python benchmarks/gpu/kernels.py --dry-run     # no GPU: tiny shapes under Triton's interpreter

First the ceilings (a large copy, a large matrix product), then every kernel against float64, and
only then times, beside torch's own where there is one. Times are of CUDA graphs, so that a
launch's cost on the host is not in them; the median of many replays. Each row is printed as it is
made. Exit status 1 if a kernel is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

CALLS = 10  # in one graph
Row = dict[str, Any]


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
    times = []
    end = time.perf_counter() + budget_s
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 100):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e-3 / CALLS)
    return statistics.median(times)


def ceilings() -> Row:
    """Read + write bandwidth of a copy of 2 GiB, and FLOP/s of a product of 8,192 squared."""
    source = torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    copy_s = seconds_of(lambda: target.copy_(source))
    left, right = torch.randn(2, 8192, 8192, device="cuda").bfloat16()
    product_s = seconds_of(lambda: left @ right)
    return {
        "gpu": torch.cuda.get_device_name(),
        "copy_tb_s": 2 * source.nbytes / copy_s / 1e12,
        "matmul_tflop_s": 2 * 8192**3 / product_s / 1e12,
    }


def error_of(case: Any) -> float:
    """Largest difference from the truth, over the largest true value."""
    actual, truth = case.compared(case.run()).double(), case.truth().double()
    assert actual.shape == truth.shape, case.name
    return float((actual - truth).abs().max() / truth.abs().max().clamp(min=1e-30))


def check(cases: Iterator[Any]) -> Iterator[Row]:
    for case in cases:
        error = error_of(case)
        # Not `error > tolerance`: a NaN must count as wrong.
        right = error <= case.tolerance
        yield {"checked": case.name, "error": error, "allowed": case.tolerance, "right": right}


def timing(case: Any, limits: Row) -> Row:
    """One case's time, what it achieves, and what torch's own takes."""
    taken_s = seconds_of(case.run)
    row: Row = {"timed": case.name, "us": taken_s * 1e6}
    if case.num_bytes:
        row["tb_s"] = case.num_bytes / taken_s / 1e12
        row["of_copy"] = row["tb_s"] / limits["copy_tb_s"]
    if case.flops:
        row["tflop_s"] = case.flops / taken_s / 1e12
        row["of_matmul"] = row["tflop_s"] / limits["matmul_tflop_s"]
    for name, call in case.peers.items():
        try:
            row[f"{name} us"] = seconds_of(call) * 1e6
        except (RuntimeError, NotImplementedError) as error:  # a peer may lack the shape
            row[f"{name} us"] = f"not run: {str(error).splitlines()[0]}"
    return row


def sweep(cases: Iterator[tuple[str, Callable[[], Any]]], limits: Row) -> Iterator[Row]:
    from triton.runtime.errors import OutOfResources

    for name, build in cases:
        case = build()
        case.peers.clear()
        try:
            yield {"tiling": name, **timing(case, limits)}
        except OutOfResources as error:
            yield {"tiling": name, "not run": str(error)}
        torch.cuda.empty_cache()


def rows(*, swept: bool) -> Iterator[Row]:
    from phasewise.benchmarks.gpu import kernel_cases as cases

    count = torch.cuda.get_device_properties(0).multi_processor_count
    on = cases.Device(device=torch.device("cuda"), dtype=torch.bfloat16, multiprocessors=count)
    limits = ceilings()
    yield limits
    yield from check(cases.checked_cases(on, cases.CHECKED))
    for case in cases.timed_cases(on):
        yield timing(case, limits)
        torch.cuda.empty_cache()
    if swept:
        yield from sweep(cases.sweep_cases(on), limits)


def dry_rows() -> Iterator[Row]:
    """Everything but time, on a CPU: imports, shapes, kernels against references."""
    from phasewise.benchmarks.gpu import kernel_cases as cases

    on = cases.Device(device=torch.device("cpu"), dtype=torch.float32, multiprocessors=2)
    for case in cases.checked_cases(on, cases.TINY):
        yield from check(iter([case]))
        for call in case.peers.values():
            call()


def show(row: Row) -> None:
    fields = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()]
    names = [f"{name} {value}" for name, value in zip(row, fields, strict=True)]
    print("  ".join(names), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="no GPU: tiny shapes, no times")
    parser.add_argument("--sweep", action="store_true", help="also try other tilings")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    elif not torch.cuda.is_available():
        print("no GPU here: use --dry-run", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    made = []
    for row in dry_rows() if arguments.dry_run else rows(swept=arguments.sweep):
        show(row)
        made.append(row)
        if arguments.json:  # what was measured survives whatever comes after
            arguments.json.write_text(json.dumps(made, indent=1))
    return int(any(row.get("right") is False for row in made))


if __name__ == "__main__":
    sys.exit(main())
