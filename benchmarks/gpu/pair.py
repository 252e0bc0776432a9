"""A prefill and a decode worker as two processes on one GPU, KV over CUDA IPC.

First raw pushes of blocks and a kill of either side (`ipc_pair`), then whole requests: the pair's
tokens must be those that the decode worker computes alone. One GPU that two processes share shows
correctness and the way of the KV, not what disaggregation gains.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from phasewise.engine.report import Report
from phasewise.engine.request import Handoff, Request

from . import ipc_pair, pair_worker
from .bench import Bench, Target
from .models import BLOCK_SIZE, config_of
from .pair_worker import Half
from .serving import random_prompts, request_of

PUSH = Target(must=2.5, good=3.5, smaller=False)  # TB/s read + write, on the same GPU
_START_S = 70.0


def run(bench: Bench) -> None:
    try:
        _push(bench)
        _serve(bench)
    finally:
        for process in multiprocessing.active_children():
            process.kill()


def _push(bench: Bench) -> None:
    layout = ipc_pair.TINY if bench.dry else ipc_pair.LAYOUT
    device = "cpu" if bench.dry else "cuda"
    for row in ipc_pair.measured(
        device, layout, repeats=1 if bench.dry else 10, kills=not bench.dry
    ):
        name = row.pop("what")
        if "gb_per_s" in row:
            bench.add(f"push: {name}", row.pop("gb_per_s") / 1e3, "TB/s", PUSH, **row)
        else:
            bench.add(f"push: {name}", **row)
    if bench.dry:
        bench.skip("push: kills of either side", "`tests/kv_transfer` has them, over shared memory")


@dataclass(slots=True)
class _Stream:
    request: Request
    sent_s: float
    tokens: list[int] = field(default_factory=list)
    first_s: float = 0.0  # after `sent_s`
    done: bool = False


class _Child:
    """A worker's process, as its router sees it."""

    def __init__(self, half: Half) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=pair_worker.main, args=(half, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def call(self, name: str, *arguments: Any, **options: Any) -> None:
        self.pipe.send((name, arguments, options))

    def answer(self, kind: str, timeout_s: float = _START_S) -> Any:
        """The next message, which is of that kind."""
        if not self.pipe.poll(timeout_s):
            raise TimeoutError(f"no {kind!r} from {self.process.name} in {timeout_s:.0f} s")
        found, value = self.pipe.recv()
        if found != kind:
            raise RuntimeError(f"{found!r} instead of {kind!r}: {value}")
        return value


def _serve(bench: Bench) -> None:
    count, prompt, output = (2, 10, 3) if bench.dry else (16, 1024, 64)
    config = config_of("Qwen3-1.7B", tiny=bench.dry)
    length = prompt + output + BLOCK_SIZE
    shared: dict[str, Any] = {
        "device": bench.device.type,
        "config": config,
        "num_blocks": count * -(-length // BLOCK_SIZE),
        "max_model_len": length,
        "max_batch_size": count,
        "max_batch_tokens": 4096,
    }
    halves = [Half(role=r, incarnation=i, **shared) for i, r in enumerate(("prefill", "decode"), 1)]
    prefill, decode = (_Child(half) for half in halves)
    addresses = [child.answer("ready") for child in (prefill, decode)]
    prefill.call("connect", addresses[1])
    transport = prefill.answer("connected")
    prompts = random_prompts(count, prompt, config["vocab_size"])
    alone = _route(prefill, decode, None, _requests("alone", prompts, output))
    pairs = []
    for turn in range(1 if bench.dry else 2):  # the first one compiles what is left
        pairs = _route(prefill, decode, addresses[1], _requests(f"pair{turn}", prompts, output))
    bench.check(
        "tokens of the pair are those of one process",
        [s.tokens for s in pairs] == [s.tokens for s in alone],
        transport=transport,
        streams=count,
    )
    ttft = statistics.median(s.first_s for s in pairs)
    bench.add(f"pair: TTFT p50, {count} x {prompt} at once", ttft * 1e3, "ms")
    prefill.call("pairs")
    (status,) = prefill.answer("pairs")
    bench.add(
        "pair: KV handed over",
        status.num_bytes / 1e9,
        "GB",
        transfers=status.transfers,
        failures=status.failures,
        exposed_ms=status.exposed_s / max(1, status.transfers) * 1e3,
    )
    for child in (prefill, decode):
        child.call("stop")
        child.process.join(timeout=10)


def _requests(name: str, prompts: list[list[int]], output: int) -> list[Request]:
    return [request_of(f"{name}-{i}", prompt, output) for i, prompt in enumerate(prompts)]


def _route(
    prefill: _Child, decode: _Child, to: Any | None, requests: list[Request]
) -> list[_Stream]:
    """All requests at once, through the pair, or where `to` is None the decode worker alone."""
    streams = {r.id: _Stream(request=r, sent_s=time.perf_counter()) for r in requests}
    for request in requests:
        if to is None:
            decode.call("submit", request)
        else:
            prefill.call("submit", request, to)
    while not all(stream.done for stream in streams.values()):
        ready = wait([prefill.pipe, decode.pipe], timeout=30.0)
        if not ready:
            raise TimeoutError("no worker said anything for 30 s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            kind, report = pipe.recv()
            if kind != "report":
                raise RuntimeError(f"a worker sent {kind!r}: {report}")
            _take(report, streams, decode)
    return [streams[request.id] for request in requests]


def _take(report: Report, streams: dict[str, _Stream], decode: _Child) -> None:
    if report.failed:
        raise RuntimeError(f"a request failed: {report.failed[0]}")
    for handoff in report.handoffs:
        _hand_over(handoff, streams[handoff.request.id], decode)
    for name, token_id in zip(report.ids, report.token_ids, strict=True):
        stream = streams[name]
        stream.first_s = stream.first_s or time.perf_counter() - stream.sent_s
        stream.tokens.append(token_id)
    for finished in report.finished:
        streams[finished.id].done = True


def _hand_over(handoff: Handoff, stream: _Stream, decode: _Child) -> None:
    stream.first_s = time.perf_counter() - stream.sent_s
    stream.tokens.append(handoff.first_token)
    decode.call(
        "resume",
        handoff.request,
        first_token=handoff.first_token,
        lease=handoff.lease,
        granted=handoff.granted,
        source=handoff.source,
    )
