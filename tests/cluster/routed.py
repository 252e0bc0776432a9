"""Requests to a gateway's router, and what comes of them."""

from __future__ import annotations

import asyncio
from typing import Any

from phasewise.cluster.admission import Admitted
from phasewise.cluster.gateway import Gateway
from phasewise.cluster.output import Output
from phasewise.engine.request import SamplingParams
from phasewise.tests.cluster.fake_worker import FakeWorker

PROMPT = [5, 6, 7]


def admitted(name: str = "r", prompt: list[int] = PROMPT, **given: Any) -> Admitted:
    sampling = {"max_tokens": 8, "temperature": 0.0, **given.pop("sampling", {})}
    return Admitted(
        id=name,
        token_ids=tuple(prompt),
        sampling=SamplingParams(**sampling),
        n=given.pop("n", 1),
        arrival_s=asyncio.get_running_loop().time(),
        **given,
    )


async def outputs(gateway: Gateway, request: Admitted) -> list[Output]:
    return [o async for o in gateway.router.start(request).outputs()]


def tokens(pieces: list[Output], index: int = 0) -> list[int]:
    return [i for piece in pieces if piece.index == index for i in piece.token_ids]


async def settled(gateway: Gateway, workers: list[FakeWorker]) -> None:
    """Until no worker holds a row and no slot or request is open."""
    async with asyncio.timeout(30):
        while (
            gateway.router.in_flight
            or any(w.link.num_slots for w in gateway.fleet.workers if w.link)
            or any(w.rows for w in workers)
        ):
            await asyncio.sleep(0.005)
