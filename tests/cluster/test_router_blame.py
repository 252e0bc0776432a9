"""A decode worker that leaves while the prompt is computed: the attempt's failure is its own."""

from __future__ import annotations

import asyncio

import pytest
from phasewise.cluster.gateway import Gateway
from phasewise.engine.errors import Unavailable
from phasewise.tests.cluster.fake_worker import FakeWorker, Run, Serving, expected
from phasewise.tests.cluster.routed import PROMPT, admitted, outputs, settled, tokens


async def submitted(prefills: list[FakeWorker]) -> FakeWorker:
    """Who computes the first prompt; it is not done before it may be."""
    for worker in prefills:
        worker.stalled = True
    while not any(worker.submits for worker in prefills):
        await asyncio.sleep(0.002)
    return next(worker for worker in prefills if worker.submits)


async def leaves(gateway: Gateway, decode: FakeWorker) -> None:
    await decode.stop()
    while any(w.address == decode.address for w in gateway.fleet.ready("decode")):
        await asyncio.sleep(0.002)


def go_on(prefills: list[FakeWorker]) -> None:
    for worker in prefills:
        worker.stalled = False


def test_the_prefill_worker_is_asked_again_when_decode_left_before_the_handoff(
    run: Run, serving: Serving
) -> None:
    """The others are busy with a long prompt, and remain so."""

    async def scenario() -> None:
        async with serving(prefill=2, decode=2) as (gateway, prefills, decodes):
            long = asyncio.create_task(outputs(gateway, admitted("long", [1] * 300)))
            busy = await submitted(prefills)
            pending = asyncio.create_task(outputs(gateway, admitted()))
            (free,) = [worker for worker in prefills if worker is not busy]
            assert await submitted([free]) is free
            granted = free.submits[0].decode.worker.name
            await leaves(gateway, next(w for w in decodes if w.ref.name == granted))
            go_on([free])
            pieces = await pending
            assert tokens(pieces) == expected(PROMPT, 8)
            ran_on = [name.split("#")[0] for name in pieces[-1].timings.workers]
            (other,) = [worker for worker in decodes if worker.ref.name != granted]
            assert ran_on == [free.ref.name, free.ref.name, other.ref.name]
            go_on([busy])
            assert tokens(await long) == expected([1] * 300, 8)
            await settled(gateway, [*prefills, other])

    run(scenario())


def test_a_client_is_told_that_decode_was_lost_and_not_prefill(run: Run, serving: Serving) -> None:
    async def scenario() -> None:
        async with serving() as (gateway, prefills, decodes):
            pending = asyncio.create_task(outputs(gateway, admitted()))
            await submitted(prefills)
            await leaves(gateway, decodes[0])
            go_on(prefills)
            with pytest.raises(Unavailable, match=r"decode-0#\d+ was lost"):
                await pending

    run(scenario())


def test_what_one_incarnation_granted_is_not_asked_of_the_next(run: Run, serving: Serving) -> None:
    async def scenario() -> None:
        async with serving() as (gateway, prefills, decodes):
            pending = asyncio.create_task(outputs(gateway, admitted()))
            await submitted(prefills)
            await leaves(gateway, decodes[0])
            again = await FakeWorker("decode", "decode-0").start(decodes[0].address)
            await gateway.wait_ready(5)
            go_on(prefills)
            assert tokens(await pending) == expected(PROMPT, 8)
            asked = [submit.decode.worker.incarnation for submit in prefills[0].submits]
            assert asked == [decodes[0].ref.incarnation, again.ref.incarnation]
            assert len(again.resumes) == 1
            await settled(gateway, [*prefills, again])
            await again.stop()

    run(scenario())
