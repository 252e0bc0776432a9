"""Whole prompts of Llama-3.1-8B's shape, to their first token."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from phasewise.engine.batch import Batch
from phasewise.engine.sequence import Sequence
from phasewise.engine.spec import ModelSpec

from .bench import Bench, Target
from .models import BLOCK_SIZE, config_of, matrix_parameters, random_runner, spec_of
from .serving import random_prompts, request_of

# Milliseconds on an H200, as for decode steps.
TARGETS = {2048: Target(must=52.0, good=45.0), 8192: Target(must=240.0, good=205.0)}


def run(bench: Bench) -> None:
    lengths = (5, 20) if bench.dry else (512, 2048, 8192)
    with tempfile.TemporaryDirectory() as folder:
        spec = spec_of(config_of("Llama-3.1-8B", tiny=bench.dry), Path(folder))
    longest = lengths[-1] + BLOCK_SIZE
    runner = random_runner(
        spec, bench.device, num_blocks=-(-longest // BLOCK_SIZE), max_model_len=longest
    )
    runner.warm_up()
    for length in lengths:
        (prompt,) = random_prompts(1, length, spec.vocab_size)
        taken = []
        for _ in range(2 if bench.dry else 8):
            sequence = Sequence(request_of("prompt", prompt, 1))
            sequence.blocks = list(range(runner.layout.blocks_for(length)))
            begin = time.perf_counter()
            runner.run(Batch(sequences=[sequence], starts=[0], counts=[length]))
            taken.append(time.perf_counter() - begin)
        seconds = statistics.median(taken[1:])
        floor_ms = prompt_flops(spec, length) / bench.limits.matmul_tflop_s / 1e9
        bench.add(
            f"prompt of {length}",
            seconds * 1e3,
            "ms",
            TARGETS.get(length),
            floor_ms=floor_ms,
            of_floor=floor_ms / seconds / 1e3,
            tokens_per_s=length / seconds,
        )


def prompt_flops(spec: ModelSpec, length: int) -> float:
    """Of the matrices, the head for one token, and the half of attention that is seen."""
    head = spec.vocab_size * spec.embed_dim
    layers = 2 * length * (matrix_parameters(spec) - head) + 2 * head
    pairs = length * (length + 1) / 2
    return layers + 4 * pairs * spec.num_heads * spec.head_dim * spec.num_layers
