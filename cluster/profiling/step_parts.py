"""Where a live worker's decode steps spend their time.

A worker as `serve` starts it, loop, compute thread, gRPC and all, is given one full batch by a
gateway's link in another process, and says from its own step clock where the time went.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from ...configs.errors import InvalidConfig, PhasewiseError
from ...engine.request import Request, SamplingParams
from ...engine.step_clock import ASIDE, PARTS, StepSums
from .. import wire
from ..endpoint import WorkerServer
from ..proto import worker_pb2 as pb
from ..spec import WorkerSpec
from ..stream import TokenStream
from ..worker_link import LinkTimes, WorkerLink

PROMPT_TOKENS = 16
WITHIN_S = 300.0
FULL = 0.9  # of the rows that were asked for


@dataclass(frozen=True, kw_only=True, slots=True)
class StepParts:
    """Means over the decode steps of one full batch, in milliseconds."""

    rows: float  # of a step
    steps: int
    following: int  # steps that were given out before the one before had come back
    parts_ms: dict[str, float]  # from one step's end to the next one's
    aside_ms: dict[str, float]  # done by the loop meanwhile

    @property
    def overhead_ms(self) -> float:
        """All but the model, of what a step waits for."""
        return sum(ms for part, ms in self.parts_ms.items() if part != "model")

    def as_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "steps": self.steps,
            "following": self.following,
            "parts_ms": _rounded(self.parts_ms),
            "aside_ms": _rounded(self.aside_ms),
            "overhead_ms": round(self.overhead_ms, 4),
        }


def _rounded(parts_ms: dict[str, float]) -> dict[str, float]:
    return {part: round(ms, 4) for part, ms in parts_ms.items()}


def measure_step_parts(spec: WorkerSpec, *, batch: int, steps: int) -> StepParts:
    """Decode `batch` sequences for `steps` steps on a worker of `spec`, once before it counts.

    Raises InvalidConfig where the worker cannot hold such a batch.
    """
    limits = spec.decode
    assert limits is not None, "a decode worker is measured"
    if not 0 < batch <= limits.max_batch_size:
        raise InvalidConfig(
            "--batch", f"{batch}", f"give 1 to decode.max_batch_size ({limits.max_batch_size})"
        )
    length = PROMPT_TOKENS + steps + 1
    if steps < 1 or length > spec.model.max_model_len:
        raise InvalidConfig("--steps", f"{steps}", "keep to model.max_model_len")
    server = WorkerServer(spec)
    address = server.start()
    try:
        _decode_apart(address, batch, 2)
        before = _copy(server.steps.decode)
        _decode_apart(address, batch, steps + 1)
        after = _copy(server.steps.decode)
    finally:
        server.stop()
    count = after.steps - before.steps
    rows = (after.rows - before.rows) / count
    if rows < FULL * batch:  # prompts come in over a few steps, and leave so
        raise InvalidConfig("kv.memory", f"does not hold {batch} sequences at once", "give more")
    return StepParts(
        rows=round(rows, 1),
        steps=count,
        following=after.following - before.following,
        parts_ms={p: (after.seconds[p] - before.seconds[p]) / count * 1e3 for p in PARTS},
        aside_ms={p: (after.aside[p] - before.aside[p]) / count * 1e3 for p in ASIDE},
    )


def _copy(sums: StepSums) -> StepSums:
    return replace(sums, seconds=dict(sums.seconds), aside=dict(sums.aside))


def _decode_apart(address: str, batch: int, max_tokens: int) -> None:
    """From a process of its own, as a gateway is: it would take the worker's interpreter lock."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as gateway:
        gateway.submit(_run_decode, address, batch, max_tokens).result(2 * WITHIN_S)


def _run_decode(address: str, batch: int, max_tokens: int) -> None:
    asyncio.run(_decode(address, batch, max_tokens))


async def _decode(address: str, batch: int, max_tokens: int) -> None:
    """Stream `batch` sequences to their end, all at once."""
    link = WorkerLink(address, LinkTimes(heartbeat_s=WITHIN_S), time.monotonic)
    await link.connect()
    try:
        slots = []
        for number in range(batch):
            request = _request(number, max_tokens)
            message = wire.request_to_pb(request, now_s=time.monotonic(), deadline_s=0.0)
            slots.append(link.submit(_stream(request), message, None))
        async with asyncio.timeout(WITHIN_S):
            outcomes = await asyncio.gather(*(slot.outcome for slot in slots))
    finally:
        await link.close("measured")
    ended = [outcome for outcome in outcomes if not isinstance(outcome, pb.Finished)]
    if ended:
        raise PhasewiseError(f"{len(ended)} of {batch} sequences did not finish: {ended[0]}")


def _request(number: int, max_tokens: int) -> Request:
    return Request(
        id=f"step-{number}",
        token_ids=tuple((7 * number + place) % 97 for place in range(PROMPT_TOKENS)),
        num_prompt_tokens=PROMPT_TOKENS,
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
        arrival_s=time.monotonic(),
    )


def _stream(request: Request) -> TokenStream:
    return TokenStream(
        request,
        client_id=request.id,
        index=0,
        text=None,
        wake=asyncio.Event(),
        clock=time.monotonic,
    )
