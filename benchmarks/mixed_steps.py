"""Steps that mix a prompt's chunk with decoding rows: what they take, and what a profile says.

A profile holds prompts and decoding apart, and the curve that is fitted to both says what a mixed
step takes. Here all three are measured in the same rounds, alone and while a worker on the other
core computes; the curve sees the first two, and is held against the third. Leave the machine to
it; two cores.

    python benchmarks/mixed_steps.py [--config configs/colocated.yaml] [--seconds 60] [--json]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
from phasewise.cluster.checkpoint import resolve
from phasewise.configs.load import load_cluster
from phasewise.configs.schema import ClusterConfig
from phasewise.engine.batch import Batch
from phasewise.engine.request import Request, SamplingParams
from phasewise.engine.runner import Runner, build_runner
from phasewise.engine.sequence import Sequence as EngineSequence
from phasewise.engine.step_time import StepFeatures, features_of
from phasewise.placement.latency.fitting import fit_knots

COLOCATED = Path(__file__).parents[1] / "configs" / "colocated.yaml"
CONTEXTS = (50, 150, 500)  # of a decoding row
ROWS, CHUNKS = (1, 2, 4, 8, 16), (16, 32, 64, 128, 256, 490)
GRID = (  # rows, their context, chunk
    *[(rows, context, 0) for rows in ROWS for context in CONTEXTS],
    *[(0, 0, chunk) for chunk in CHUNKS],
    *[(rows, CONTEXTS[1], chunk) for rows in ROWS[::2] for chunk in CHUNKS[::2]],
)
SETTLE_S = 0.03
ALONE, BESIDE, END = 0, 1, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """All measured steps of one kind: prompts, decoding, or both in one step."""

    kind: str
    points: int
    error_median: float  # of the curve, which has seen all but mixed steps
    error_most: float
    beside: float  # a neighbour that computes: more time, mean over the points


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=COLOCATED)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    config = resolve(load_cluster(args.config, ("decode.threads=1",)))
    own, other = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, {own})
    with neighbour(args.config, other) as state:
        kinds = kinds_of(measure(runner_of(config), state, args.seconds))
    if args.json:
        print(json.dumps([asdict(kind) for kind in kinds], indent=1))
        return
    for kind in kinds:
        print(
            f"{kind.kind:8} {kind.points:3} points: predicted within {kind.error_median:.1%} "
            f"(median), {kind.error_most:.1%} at most; beside a neighbour {kind.beside:+.1%}"
        )


def measure(
    runner: Runner, state: Synchronized, seconds: float
) -> dict[tuple[StepFeatures, int], float]:
    """Medians by features, alone and beside; in rounds, each in another order."""
    batches = [batch_of(*point, runner) for point in GRID]
    times: dict[tuple[StepFeatures, int], list[float]] = {}
    order = random.Random(0)
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        for state.value in (ALONE, BESIDE):
            time.sleep(SETTLE_S)
            for batch in order.sample(batches, len(batches)):
                began_s = time.perf_counter()
                runner.run(batch)
                took_s = time.perf_counter() - began_s
                times.setdefault((features_of(batch), state.value), []).append(took_s)
    return {key: float(np.median(repeats)) for key, repeats in times.items()}


def kinds_of(times: dict[tuple[StepFeatures, int], float]) -> Sequence[Kind]:
    alone = {features: seconds for (features, state), seconds in times.items() if state == ALONE}
    curve = fit_knots([pair for pair in alone.items() if kind_of(pair[0]) != "mixed"])
    found: dict[str, list[tuple[float, float]]] = {}
    for features, seconds in alone.items():
        error = abs(curve.batch_s(features) / seconds - 1)
        pair = (error, times[features, BESIDE] / seconds - 1)
        found.setdefault(kind_of(features), []).append(pair)
    return [
        Kind(
            kind=kind,
            points=len(pairs),
            error_median=float(np.median([error for error, _ in pairs])),
            error_most=max(error for error, _ in pairs),
            beside=float(np.mean([more for _, more in pairs])),
        )
        for kind, pairs in found.items()
    ]


def kind_of(features: StepFeatures) -> str:
    if not features.decode_rows:
        return "prompt"
    return "mixed" if features.new_tokens else "decode"


@contextmanager
def neighbour(path: Path, core: int) -> Iterator[Synchronized]:
    """A worker on the other core, and what it is to do."""
    context = multiprocessing.get_context("spawn")
    state, ready = context.Value("i", ALONE), context.Event()
    what = (path, core, state, ready)
    process = context.Process(target=compute_beside, args=what, daemon=True)
    process.start()
    try:
        if not ready.wait(60.0):
            raise SystemExit("the neighbour did not start")
        yield state
    finally:
        state.value = END
        process.join(10.0)
        process.kill()


def compute_beside(path: Path, core: int, state: Synchronized, ready: Event) -> None:
    os.sched_setaffinity(0, {core})
    runner = runner_of(resolve(load_cluster(path, ("decode.threads=1",))))
    batches = [batch_of(6, CONTEXTS[1], 0, runner), batch_of(5, CONTEXTS[1], 128, runner)]
    ready.set()
    while state.value != END:
        if state.value == ALONE:
            time.sleep(0.002)
        else:
            runner.run(random.choices(batches, (4, 1))[0])


def runner_of(config: ClusterConfig) -> Runner:
    runner = build_runner(
        config.model.path,
        dtype=config.model.dtype,
        device="cpu",
        threads=1,
        block_size=config.kv.block_size,
        max_model_len=config.model.max_model_len,
        memory_bytes=config.kv.memory,
    )
    runner.cache.pool.zero_()
    return runner


def batch_of(rows: int, context: int, chunk: int, runner: Runner) -> Batch:
    """Rows that decode over `context` tokens, and a prompt's first chunk, in their own blocks."""
    sequences, used = [], 0
    starts = [context] * rows + [0] * bool(chunk)
    counts = [1] * rows + [chunk] * bool(chunk)
    for number, (start, count) in enumerate(zip(starts, counts, strict=True)):
        length = start + count
        tokens = tuple((number * 7919 + i * 104729) % runner.spec.vocab_size for i in range(length))
        request = Request(
            id=f"row-{number}",
            token_ids=tokens,
            num_prompt_tokens=start or length,
            sampling=SamplingParams(max_tokens=1 << 30, temperature=0.0, ignore_eos=True),
        )
        sequence = EngineSequence(request)
        each = runner.layout.blocks_for(length)
        sequence.blocks = list(range(used, used + each))
        sequence.num_computed = start
        used += each
        sequences.append(sequence)
    return Batch(sequences=sequences, starts=starts, counts=counts)


if __name__ == "__main__":
    main()
