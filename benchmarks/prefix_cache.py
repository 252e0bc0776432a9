"""What the prefix cache saves: TTFT with it and without, and how often a prefix is computed.

    python benchmarks/prefix_cache.py [--checkpoint DIR] [--prefill 1] [--decode 1] [--json]

A cluster in this process (real workers, real gateway, gRPC). Without a checkpoint, one with random
weights (4M parameters). Two loads: a system prompt of 1,024 tokens shared by 64 requests, one
after the other and all at once; and chats of eight turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers.random_checkpoint import SHAPES, write_checkpoint
from phasewise.cluster.output import Output
from phasewise.tests.serving.in_process import Cluster, cluster

SYSTEM_TOKENS = 1024
OWN_TOKENS = 24
REQUESTS = 64
TURNS = 8
TURN_TOKENS = 64


def tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(3, 2000) for _ in range(count)]


async def last_output(running: Cluster, prompt: Sequence[int], max_tokens: int) -> Output:
    """The end of one stream, with the tokens of all of it."""
    found: list[int] = []
    last = None
    async for output in running.client.generate(
        token_ids=prompt, max_tokens=max_tokens, temperature=0.0, ignore_eos=True
    ):
        found += output.token_ids
        last = output
    assert last is not None and last.usage is not None
    return Output(
        request_id=last.request_id,
        token_ids=tuple(found),
        usage=last.usage,
        timings=last.timings,
    )


def ttft_ms(outputs: Sequence[Output]) -> float:
    """The median."""
    return statistics.median(o.timings.ttft_ms for o in outputs if o.timings is not None)


async def prefill_counts(running: Cluster) -> list[tuple[int, int]]:
    """Tokens asked and hit, of each worker that computes prompts."""
    rows = (await running.client.status()).workers
    return [(w.asked_tokens, w.hit_tokens) for w in rows if w.asked_tokens]


async def measure(path: Path, args: argparse.Namespace, *, prefix_cache: bool) -> dict[str, Any]:
    draw = random.Random(1)
    options = {"prefill": args.prefill, "decode": args.decode, "max_model_len": 2048}
    async with cluster(path, num_bytes=256 << 20, prefix_cache=prefix_cache, **options) as running:
        for _ in range(4):  # warm up, with prompts of the same length
            await last_output(running, tokens(draw, SYSTEM_TOKENS + OWN_TOKENS), 2)
        before = await prefill_counts(running)
        system = tokens(draw, SYSTEM_TOKENS)
        prompts = [system + tokens(draw, OWN_TOKENS) for _ in range(REQUESTS)]
        first = await last_output(running, prompts[0], 2)
        await asyncio.sleep(0.6)  # the gateway hears of it
        rest = [await last_output(running, prompt, 2) for prompt in prompts[1:]]
        after = await prefill_counts(running)
        system = tokens(draw, SYSTEM_TOKENS)
        prompts = [system + tokens(draw, OWN_TOKENS) for _ in range(REQUESTS)]
        burst = await asyncio.gather(*(last_output(running, prompt, 2) for prompt in prompts))
        at_once = await prefill_counts(running)
        history = tokens(draw, 256)
        turns = []
        for _ in range(TURNS):
            history = history + tokens(draw, TURN_TOKENS)
            turns.append(await last_output(running, history, 32))
            history += turns[-1].token_ids
    return {
        "first_ttft_ms": ttft_ms([first]),
        "rest_ttft_ms": ttft_ms(rest),
        "times_computed": _times_computed(before, after),
        "at_once_ttft_ms": ttft_ms(burst),
        "at_once_times_computed": _times_computed(after, at_once),
        "turns_ttft_ms": [ttft_ms([turn]) for turn in turns],
        "turns_cached_tokens": [turn.usage.cached_tokens for turn in turns if turn.usage],
    }


def _times_computed(
    before: Sequence[tuple[int, int]], after: Sequence[tuple[int, int]]
) -> list[float]:
    """How often each worker computed the system prompt."""
    pairs = [(*a, *b) for b, a in zip(before, after, strict=True)]
    return [
        (asked - asked_before - (hit - hit_before)) / SYSTEM_TOKENS
        - (asked - asked_before) / (SYSTEM_TOKENS + OWN_TOKENS) * OWN_TOKENS / SYSTEM_TOKENS
        for asked, hit, asked_before, hit_before in pairs
    ]


async def compare(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    on = await measure(path, args, prefix_cache=True)
    off = await measure(path, args, prefix_cache=False)
    return {
        "with_cache": on,
        "without_cache": off,
        "ttft_ratio_hits": off["rest_ttft_ms"] / on["rest_ttft_ms"],
        "ttft_ratio_hits_to_own_miss": on["first_ttft_ms"] / on["rest_ttft_ms"],
        "ttft_ratio_at_once": off["at_once_ttft_ms"] / on["at_once_ttft_ms"],
        "ttft_ratio_last_turn": off["turns_ttft_ms"][-1] / on["turns_ttft_ms"][-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--prefill", type=int, default=1)
    parser.add_argument("--decode", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.checkpoint or write_checkpoint(Path(folder) / "4M", SHAPES["4M"])
        results = asyncio.run(compare(path, args))
    if args.json:
        json.dump(results, sys.stdout, indent=2)
        print()
        return
    for name, figures in results.items():
        if isinstance(figures, dict):
            print(name)
            for key, value in figures.items():
                many = value if isinstance(value, list) else [value]
                print(f"  {key:26}", "  ".join(f"{one:.2f}" for one in many))
        else:
            print(f"{name:28} {figures:.1f}")


if __name__ == "__main__":
    main()
