"""What scheduling itself costs: microseconds per row and step, and per request.

    python benchmarks/scheduler.py [--json]

No model runs; tokens are made up. The same classes run live and in the simulator.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

from phasewise.decode_worker.scheduler import DecodeLimits, DecodeScheduler
from phasewise.engine.batch import StepOutput
from phasewise.engine.blocks import BlockAllocator
from phasewise.engine.request import Request, SamplingParams
from phasewise.engine.sequence import Sequence
from phasewise.prefill_worker.scheduler import PrefillLimits, PrefillScheduler

NUM_BLOCKS = 100_000
BLOCK_SIZE = 16


def sequence(name: str, num_tokens: int, max_tokens: int, *, tokens: bool) -> Sequence:
    request = Request(
        id=name,
        token_ids=(7,) * num_tokens,
        num_prompt_tokens=num_tokens,
        sampling=SamplingParams(max_tokens=max_tokens),
    )
    made = Sequence(request)
    if not tokens:
        made.tokens = None
    return made


def decoder() -> DecodeScheduler:
    limits = DecodeLimits(max_batch_size=256, max_batch_tokens=2048, max_model_len=1 << 20)
    return DecodeScheduler(BlockAllocator(NUM_BLOCKS, BLOCK_SIZE), limits)


def decode_rows(num_rows: int, num_steps: int = 500) -> float:
    """Microseconds per row and step: next_batch, advance and load, no request ending."""
    scheduler = decoder()
    for index in range(num_rows):
        made = sequence(str(index), 300 + 7 * index, num_steps + 100, tokens=True)
        made.append(7)
        blocks = scheduler.lease(made.num_tokens - 1)
        assert blocks is not None
        scheduler.resume(made, blocks, 0.0)
    output = StepOutput(token_ids=[7] * num_rows)
    start_s = time.perf_counter()
    for _ in range(num_steps):
        batch = scheduler.next_batch(0.0)
        assert batch is not None
        scheduler.advance(batch, output, 0.0)
        scheduler.load()
    return (time.perf_counter() - start_s) / num_steps / num_rows * 1e6


def decode_requests(num_requests: int = 5000) -> float:
    """Microseconds per request of 512 prompt tokens: lease, resume, two steps, end."""
    scheduler = decoder()
    made = [sequence(str(i), 512, 3, tokens=False) for i in range(num_requests)]
    start_s = time.perf_counter()
    for first in range(0, num_requests, 100):
        for item in made[first : first + 100]:
            item.num_tokens += 1
            blocks = scheduler.lease(item.num_tokens - 1)
            assert blocks is not None
            scheduler.resume(item, blocks, 0.0)
        while (batch := scheduler.next_batch(0.0)) is not None:
            scheduler.advance(batch, StepOutput(token_ids=[7] * batch.num_rows), 0.0)
    return (time.perf_counter() - start_s) / num_requests * 1e6


def prefill_requests(num_waiting: int, num_requests: int = 5000) -> float:
    """Microseconds per request of 512 prompt tokens, with so many others in the queue."""
    limits = PrefillLimits(max_batch_tokens=2048, max_model_len=1 << 20, ttft_ms=250)
    scheduler = PrefillScheduler(BlockAllocator(NUM_BLOCKS, BLOCK_SIZE), limits)
    made = [sequence(str(i), 512, 3, tokens=False) for i in range(num_requests + num_waiting)]
    for item in made[:num_waiting]:
        scheduler.add(item, 0.0)
    start_s = time.perf_counter()
    for index in range(0, num_requests, 4):
        now_s = index * 1e-3
        for item in made[num_waiting + index : num_waiting + index + 4]:
            scheduler.add(item, now_s)
        batch = scheduler.next_batch(now_s)
        assert batch is not None
        output = StepOutput(token_ids=[7] * batch.num_rows)
        for done in scheduler.advance(batch, output, now_s).sequences:
            scheduler.release(done.id)
    return (time.perf_counter() - start_s) / num_requests * 1e6


def best(measure: Callable[[], float], repeats: int = 5) -> float:
    return min(measure() for _ in range(repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = parser.parse_args().json
    figures = {
        "decode_row_step_us_batch_8": best(lambda: decode_rows(8)),
        "decode_row_step_us_batch_64": best(lambda: decode_rows(64)),
        "decode_row_step_us_batch_256": best(lambda: decode_rows(256)),
        "decode_request_us": best(decode_requests),
        "prefill_request_us_queue_0": best(lambda: prefill_requests(0)),
        "prefill_request_us_queue_10000": best(lambda: prefill_requests(10_000), 2),
    }
    if as_json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:34s} {value:8.2f}")


if __name__ == "__main__":
    main()
