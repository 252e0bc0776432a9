"""Decode steps of Llama-3.1-8B's shape: the graph alone, and with scheduler and host around it."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from phasewise.engine.runner import Runner
from phasewise.engine.spec import ModelSpec

from .bench import Bench, Target
from .measure import replayed_seconds
from .models import (
    BLOCK_SIZE,
    config_of,
    kv_bytes_per_token,
    matrix_parameters,
    random_runner,
    spec_of,
)
from .serving import scheduler_of, seat, step

CONTEXT = 2048
STEPS = 40
# Milliseconds of a step on an H200, as vLLM, SGLang and TensorRT-LLM take without CPU time (good),
# and with a fifth more (must). Batch 8 has no figure of theirs.
TARGETS = {
    1: Target(must=6.0, good=5.0),
    64: Target(must=11.0, good=9.6),
    256: Target(must=27.0, good=24.0),
}
HOST_GAP = Target(must=0.5, good=0.1)  # ms a step


def run(bench: Bench) -> None:
    batches, context = ((1, 3), 20) if bench.dry else ((1, 8, 64, 256), CONTEXT)
    max_len = context + (16 if bench.dry else 256)
    with tempfile.TemporaryDirectory() as folder:
        spec = spec_of(config_of("Llama-3.1-8B", tiny=bench.dry), Path(folder))
    num_blocks = batches[-1] * -(-max_len // BLOCK_SIZE)
    runner = random_runner(spec, bench.device, num_blocks=num_blocks, max_model_len=max_len)
    graphs = runner.keep_decode_on_device(batches[-1])
    assert graphs is not None, "this model's steps can be captured"
    if bench.dry:
        bench.skip("capture", "CUDA graphs need a device; steps are launched one by one")
    else:
        begin = time.perf_counter()
        graphs.capture(_nobody)
        seconds = time.perf_counter() - begin
        bench.add("capture of all buckets", seconds, "s", buckets=len(graphs.buckets))
    for rows in batches:
        _measure(bench, runner, spec, rows, context, max_len)


def _nobody(done: int, of: int) -> None:
    """Nobody watches."""


def _measure(
    bench: Bench, runner: Runner, spec: ModelSpec, rows: int, context: int, max_len: int
) -> None:
    scheduler = scheduler_of(runner, max_batch_size=rows)
    steps = 3 if bench.dry else STEPS
    seat(scheduler, rows, context, spec.vocab_size, max_tokens=max_len - context)
    wall_s = _median_s(lambda: step(scheduler, runner), steps)
    kv_bytes = kv_bytes_per_token(spec) * rows * (context + steps // 2)
    weight_bytes = matrix_parameters(spec) * bench.dtype.itemsize
    floor_ms = (weight_bytes + kv_bytes) / bench.limits.copy_tb_s / 1e9
    name = f"step, batch {rows}, context {context}"
    figures = {"floor_ms": floor_ms, "of_floor": floor_ms / wall_s / 1e3}
    bench.add(name, wall_s * 1e3, "ms", TARGETS.get(rows), **figures)
    graphs = runner._graphs
    assert graphs is not None
    if not bench.dry:
        device_s = replayed_seconds(graphs.graph_of(rows))
        bench.add(f"{name}: the graph alone", device_s * 1e3, "ms")
        bench.add(f"{name}: host's gap", (wall_s - device_s) * 1e3, "ms", HOST_GAP)


def _median_s(call: Callable[[], object], times: int) -> float:
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[len(taken) // 4 :])
