"""One load for every server: OpenAI completions, streamed, all requests at once.

Plain sockets and a line scan, so that the load itself takes little of the cores it shares with
the servers, and the same from each.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass


class NothingWhole(Exception):
    """Every stream of a load was lost."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """`num_requests` prompts of random token ids, at most `concurrency` in flight."""

    num_requests: int
    input_tokens: int
    output_tokens: int
    concurrency: int
    vocab: int = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadResult:
    output_tokens_per_s: float
    requests_per_s: float
    ttft_p50_ms: float
    ttft_p90_ms: float
    tpot_p50_ms: float
    tpot_p90_ms: float
    lost: int  # streams that ended, or hung, before their last token

    def as_json(self) -> dict[str, float]:
        return {name: round(value, 3) for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class _Stream:
    ttft_s: float
    tpot_s: float
    num_tokens: int
    end_s: float


def run_load(port: int, model: str, load: Load, seed: int, limit_s: float = 60.0) -> LoadResult:
    """Send the load to 127.0.0.1:`port`.

    A stream that is refused, ends early, or has not ended by `limit_s` is lost, and neither its
    tokens nor the wait for it count. Raises NothingWhole.
    """
    return asyncio.run(_run(port, model, load, seed, limit_s))


async def _run(port: int, model: str, load: Load, seed: int, limit_s: float) -> LoadResult:
    draw = random.Random(seed)
    places = asyncio.Semaphore(load.concurrency)
    bodies = [
        {
            "model": model,
            "prompt": [draw.randrange(5, load.vocab) for _ in range(load.input_tokens)],
            "max_tokens": load.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for _ in range(load.num_requests)
    ]

    started_s = time.perf_counter()
    lost: Counter[str] = Counter()

    async def one(body: dict[str, object]) -> _Stream | None:
        try:
            async with asyncio.timeout(started_s + limit_s - time.perf_counter()), places:
                return await _stream(port, body)
        except (OSError, RuntimeError, asyncio.IncompleteReadError) as error:
            lost[repr(error)] += 1
            return None

    streams = await asyncio.gather(*(one(body) for body in bodies))
    for error, count in lost.items():
        print(f"port {port}: {count} streams were lost: {error}", file=sys.stderr)
    whole = [s for s in streams if s is not None and s.num_tokens == load.output_tokens]
    if not whole:
        raise NothingWhole(f"none of {len(streams)} streams was whole")
    seconds = max(s.end_s for s in whole) - started_s
    ttft, tpot = [s.ttft_s for s in whole], [s.tpot_s for s in whole]
    return LoadResult(
        output_tokens_per_s=sum(s.num_tokens for s in whole) / seconds,
        requests_per_s=len(whole) / seconds,
        ttft_p50_ms=statistics.median(ttft) * 1e3,
        ttft_p90_ms=_p90(ttft) * 1e3,
        tpot_p50_ms=statistics.median(tpot) * 1e3,
        tpot_p90_ms=_p90(tpot) * 1e3,
        lost=len(streams) - len(whole),
    )


async def _stream(port: int, body: dict[str, object]) -> _Stream:
    """One request. Tokens are counted by the server's own usage, at the end."""
    payload = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
        "Connection: close\r\n\r\n"
    )
    started_s = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        writer.write(head.encode() + payload)
        first_s = last_s = 0.0
        usage: dict[str, int] = {}
        async for line in reader:
            if not line.startswith(b"data: {"):
                if line.startswith(b"HTTP/1.1") and b" 200 " not in line:
                    raise RuntimeError(f"{line!r} {await reader.read(2000)!r}")
                continue
            now_s = time.perf_counter()
            if b'"usage"' in line and b'"completion_tokens"' in line:
                usage = json.loads(line[6:]).get("usage") or usage
                if b'"choices":[]' in line.replace(b" ", b""):
                    continue
            first_s, last_s = first_s or now_s, now_s
    finally:
        writer.close()
    count = usage.get("completion_tokens", 0)
    tpot_s = (last_s - first_s) / max(1, count - 1)
    return _Stream(first_s - started_s, tpot_s, count, time.perf_counter())


def _p90(values: list[float]) -> float:
    return sorted(values)[int(0.9 * (len(values) - 1))]
