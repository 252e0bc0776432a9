"""One link: columns in, one outcome a slot, and what happens when the peer misbehaves."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest
from phasewise.cluster import wire
from phasewise.cluster.proto import worker_pb2 as pb
from phasewise.cluster.stream import TokenStream
from phasewise.cluster.worker_link import LinkTimes, Lost, WorkerLink
from phasewise.engine.errors import Overloaded, Unavailable
from phasewise.engine.request import Request, SamplingParams
from phasewise.tests.cluster.fake_worker import FakeWorker, Run, expected

TIMES = LinkTimes(connect_s=10.0, heartbeat_s=10.0, abort_s=30.0)


def stream_of(prompt: list[int], max_tokens: int = 5, **given: Any) -> TokenStream:
    request = Request(
        id="r",
        token_ids=tuple(prompt),
        num_prompt_tokens=len(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, logprobs=given.pop("logprobs", None)),
    )
    wake = asyncio.Event()
    return TokenStream(
        request, client_id="r", index=0, text=None, wake=wake, clock=time.monotonic, **given
    )


def message_of(stream: TokenStream) -> pb.Request:
    return wire.request_to_pb(stream.request, now_s=0.0, deadline_s=0.0)


async def linked(worker: FakeWorker, **times: float) -> WorkerLink:
    link = WorkerLink(worker.address, replace(TIMES, **times), time.monotonic)
    await link.connect()
    return link


def test_tokens_and_outcome_arrive_at_the_slots_own_stream(run: Run) -> None:
    async def scenario() -> None:
        worker = await FakeWorker("decode", "d").start()
        link = await linked(worker)
        streams = [stream_of([i], logprobs=1) for i in range(20)]
        slots = [link.submit(s, message_of(s), None) for s in streams]
        outcomes = await asyncio.gather(*(slot.outcome for slot in slots))
        for i, stream in enumerate(streams):
            assert stream.token_ids == expected([i], 5)
            assert [row.top_ids[0] for row in stream.take().logprobs] == expected([i], 5)
        assert all(o.reason == "length" for o in outcomes)
        assert link.num_slots == 0
        again = link.submit(stream_of([1]), message_of(streams[0]), None)
        assert again.number < 20, "numbers are used again"
        await link.close("done")
        await worker.stop()

    run(scenario())


def test_submits_of_one_tick_travel_in_one_message(run: Run) -> None:
    async def scenario() -> None:
        worker = await FakeWorker("decode", "d").start()
        sizes = []
        read = worker._read

        async def counted(messages: Any) -> None:
            async def through() -> Any:
                async for message in messages:
                    sizes.append(len(message.submit))
                    yield message

            await read(through())

        worker._read = counted
        link = await linked(worker)
        slots = [link.submit(s := stream_of([i]), message_of(s), None) for i in range(50)]
        await asyncio.gather(*(slot.outcome for slot in slots))
        assert sizes == [50]
        await link.close("done")
        await worker.stop()

    run(scenario())


def test_long_prompts_are_split_over_messages(run: Run) -> None:
    async def scenario() -> None:
        worker = await FakeWorker("decode", "d").start()
        link = await linked(worker)
        streams = [stream_of([1] * 300_000, max_tokens=1) for _ in range(3)]
        slots = [link.submit(s, message_of(s), None) for s in streams]
        await asyncio.gather(*(slot.outcome for slot in slots))
        assert len(worker.submits) == 3
        await link.close("done")
        await worker.stop()

    run(scenario())


@pytest.mark.parametrize("fault", ["stop", "silent"])
def test_every_open_slot_is_lost_when_the_worker_is(run: Run, fault: str) -> None:
    async def scenario() -> None:
        worker = await FakeWorker("decode", "d").start()
        worker.stalled = True
        link = await linked(worker, heartbeat_s=0.3)
        slots = [link.submit(s := stream_of([i]), message_of(s), None) for i in range(5)]
        await asyncio.sleep(0.02)
        if fault == "stop":
            await worker.stop()
        else:
            worker.silent = True
        outcomes = await asyncio.gather(*(slot.outcome for slot in slots))
        assert all(isinstance(o, Lost) for o in outcomes) and link.closed.done()
        with pytest.raises(Unavailable):
            link.submit(stream_of([1]), message_of(stream_of([1])), None)
        await link.close("done")
        await worker.stop()

    run(scenario())


def test_abort_is_answered_once_and_an_unanswered_one_is_given_up(run: Run) -> None:
    async def scenario() -> None:
        worker = await FakeWorker("decode", "d").start()
        link = await linked(worker)
        stream = stream_of([1], max_tokens=400)
        slot = link.submit(stream, message_of(stream), None)
        link.abort(slot)
        link.abort(slot)
        assert (await slot.outcome).code == pb.Failed.CANCELLED
        assert worker.num_aborts == 1
        await link.close("done")
        worker.stalled = True
        link = await linked(worker, abort_s=0.2)
        slot = link.submit(stream, message_of(stream), None)
        await asyncio.sleep(0.02)
        link.abort(slot)
        assert isinstance(await slot.outcome, Lost)
        assert link.num_slots == 1, "its number stays taken: the worker may still speak of it"
        await link.close("done")
        await worker.stop()

    run(scenario())


def test_worker_that_speaks_of_an_unknown_slot_is_lost(run: Run) -> None:
    async def scenario() -> None:
        worker = await FakeWorker("decode", "d").start()
        link = await linked(worker)
        worker._failed.append(pb.Failed(slot=77))
        assert "columns that do not fit" in await link.closed
        await link.close("done")
        await worker.stop()

    run(scenario())


def test_address_where_nobody_listens_is_unavailable(run: Run) -> None:
    async def scenario() -> None:
        link = WorkerLink("127.0.0.1:1", TIMES, time.monotonic)
        with pytest.raises(Unavailable):
            await link.connect()

    run(scenario())


def test_client_that_does_not_read_is_ended_at_the_bound(run: Run) -> None:
    async def scenario() -> None:
        stream = stream_of([1], max_tokens=100, max_unread_tokens=10)
        for i in range(50):
            stream.push(i)
        assert stream.take().token_ids == tuple(range(11))
        with pytest.raises(Overloaded):
            stream.take()

    run(scenario())


@pytest.mark.parametrize("when", ["meanwhile", "before"])
def test_a_question_to_a_closed_link_is_answered_with_unavailable(run: Run, when: str) -> None:
    """Not with a cancellation: in a handler of gRPC that would leave the caller without answer."""

    async def scenario() -> None:
        worker = await FakeWorker("decode", "d").start()
        link = await linked(worker)
        worker.mute = asyncio.Event()
        if when == "before":
            await link.close("done")
        asked = asyncio.create_task(link.describe(30.0))
        await asyncio.sleep(0.05)
        await link.close("done")
        with pytest.raises(Unavailable):
            await asked
        worker.mute.set()
        await worker.stop()

    run(scenario())


def test_whoever_asks_can_still_be_cancelled(run: Run) -> None:
    async def scenario() -> None:
        worker = await FakeWorker("decode", "d").start()
        link = await linked(worker)
        worker.mute = asyncio.Event()
        asked = asyncio.create_task(link.describe(30.0))
        await asyncio.sleep(0.05)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        worker.mute.set()
        await link.close("done")
        await worker.stop()

    run(scenario())
