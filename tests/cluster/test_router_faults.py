"""Workers that fail, fall silent or die: streams go on elsewhere, or end once, as what it was."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from phasewise.cluster.gateway import Gateway
from phasewise.cluster.proto import worker_pb2 as pb
from phasewise.engine.errors import (
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PhasewiseError,
    Unavailable,
)
from phasewise.tests.cluster.fake_worker import FakeWorker, Run, Serving, expected
from phasewise.tests.cluster.routed import PROMPT, admitted, outputs, settled, tokens


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_stream_goes_on_unbroken_when_a_worker_dies(run: Run, serving: Serving, role: str) -> None:
    async def scenario() -> None:
        async with serving(prefill=2, decode=2) as (gateway, prefills, decodes):
            victims = prefills if role == "prefill" else decodes
            pending = [
                asyncio.create_task(
                    outputs(gateway, admitted(f"r{i}", [i, 2], sampling={"max_tokens": 60}))
                )
                for i in range(8)
            ]
            if role == "prefill":
                victims[0].stalled = True
            while not (victims[0].resumes or victims[0].submits):
                await asyncio.sleep(0.002)
            await asyncio.sleep(0.02)
            await victims[0].stop()
            for i, pieces in enumerate(await asyncio.gather(*pending)):
                assert tokens(pieces) == expected([i, 2], 60)
                assert pieces[-1].finish_reason == "length"
            assert gateway.metrics.failovers >= 1
            survivors = [w for w in prefills + decodes if w is not victims[0]]
            await settled(gateway, survivors)

    run(scenario())


def test_continued_request_keeps_its_prompt_length_and_gets_a_new_name(
    run: Run, serving: Serving
) -> None:
    async def scenario() -> None:
        async with serving(decode=2) as (gateway, prefills, decodes):
            for worker in decodes:
                worker.fail_next = []
            decodes[0].stop_after = decodes[1].stop_after = 5
            decodes[1].stop_after = None
            pieces = []
            for i in range(2):  # in turn: one of them meets the worker that dies
                pieces.append(await outputs(gateway, admitted(f"r{i}", [i, 9])))
            for i in range(2):
                assert tokens(pieces[i]) == expected([i, 9], 8)
            again = next(s for s in prefills[0].submits if len(s.request.token_ids) > 2)
            assert again.request.num_prompt_tokens == 2
            assert again.request.sampling.max_tokens == 8
            names = [s.request.id for s in prefills[0].submits]
            assert len(set(names)) == len(names)

    run(scenario())


def test_last_worker_dying_ends_the_stream_as_unavailable_at_once(
    run: Run, serving: Serving
) -> None:
    async def scenario() -> None:
        async with serving() as (gateway, prefills, decodes):
            generation = gateway.router.start(admitted(sampling={"max_tokens": 400}))
            got, began = [], None
            with pytest.raises(Unavailable, match="decode-0"):
                async for piece in generation.outputs():
                    got.append(piece)
                    if began is None and len(tokens(got)) > 3:
                        began = asyncio.get_running_loop().time()
                        await decodes[0].stop()
            assert asyncio.get_running_loop().time() - began < 10, "nothing was waited for"
            assert tokens(got) == expected(PROMPT, len(tokens(got)))
            with pytest.raises(Unavailable, match="no decode worker"):
                await outputs(gateway, admitted("next"))

    run(scenario())


def test_worker_that_falls_silent_is_lost_and_its_streams_go_on(run: Run, serving: Serving) -> None:
    async def scenario() -> None:
        async with serving(decode=2, heartbeat_s=1.0) as (gateway, prefills, decodes):
            pending = [
                asyncio.create_task(outputs(gateway, admitted(f"r{i}", [i]))) for i in range(4)
            ]
            decodes[0].silent = True
            for i, pieces in enumerate(await asyncio.gather(*pending)):
                assert tokens(pieces) == expected([i], 8)
            row = next(w for w in gateway.fleet.workers if w.name == "decode-0")
            assert "heartbeat" in row.reason

    run(scenario())


def test_lost_worker_is_back_in_rotation_when_it_answers_again(run: Run, serving: Serving) -> None:
    async def scenario() -> None:
        async with serving() as (gateway, _, decodes):
            await decodes[0].stop()
            while gateway.state == "ready":
                await asyncio.sleep(0.005)
            again = await FakeWorker("decode", "decode-0").start(decodes[0].address)
            await gateway.wait_ready(30)
            pieces = await outputs(gateway, admitted())
            assert tokens(pieces) == expected(PROMPT, 8)
            assert pieces[-1].timings.workers[-1] == f"decode-0#{again.ref.incarnation}"
            await again.stop()

    run(scenario())


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (pb.Failed.INVALID, InvalidRequest),
        (pb.Failed.INTERNAL, PhasewiseError),
        (pb.Failed.DEADLINE, DeadlineExceeded),
    ],
)
def test_failure_that_no_other_worker_can_mend_ends_the_stream(
    run: Run, serving: Serving, code: Any, error: Any
) -> None:
    async def scenario() -> None:
        async with serving(prefill=2) as (gateway, prefills, _):
            for worker in prefills:
                worker.fail_next = [pb.Failed(code=code, reason="so it is")]
            with pytest.raises(error, match="so it is"):
                await outputs(gateway, admitted())
            assert sum(len(w.submits) for w in prefills) == 1

    run(scenario())


@pytest.mark.parametrize("code", [pb.Failed.UNAVAILABLE, pb.Failed.OVERLOADED])
def test_failure_that_another_worker_can_mend_is_tried_there(
    run: Run, serving: Serving, code: Any
) -> None:
    async def scenario() -> None:
        async with serving(prefill=2) as (gateway, prefills, _):
            for worker in prefills[:1]:
                worker.fail_next = [pb.Failed(code=code, reason="not now")] * 2
            for i in range(2):
                pieces = await outputs(gateway, admitted(f"r{i}"))
                assert tokens(pieces) == expected(PROMPT, 8)
            assert gateway.metrics.failovers == 2 - len(prefills[0].fail_next) > 0

    run(scenario())


def test_only_worker_being_full_is_told_with_its_delay(run: Run, serving: Serving) -> None:
    async def scenario() -> None:
        async with serving() as (gateway, _, decodes):
            full = pb.Failed(code=pb.Failed.OVERLOADED, reason="full", retry_after_s=2.5)
            decodes[0].fail_next = [full]
            with pytest.raises(Overloaded, match="full") as caught:
                await outputs(gateway, admitted())
            assert caught.value.retry_after_s == 2.5

    run(scenario())


def test_tries_are_bounded(run: Run, serving: Serving) -> None:
    async def scenario() -> None:
        async with serving(max_failovers=2) as (gateway, prefills, _):
            lost = pb.Failed(code=pb.Failed.UNAVAILABLE, reason="KV lost")
            prefills[0].fail_next = [
                pb.Failed.FromString(lost.SerializeToString()) for _ in range(9)
            ]
            with pytest.raises(Unavailable, match="KV lost"):
                await outputs(gateway, admitted())
            assert len(prefills[0].submits) == 3

    run(scenario())


def test_faults_at_random_still_give_every_request_exactly_one_end(
    run: Run, serving: Serving
) -> None:
    async def end(gateway: Gateway, i: int) -> None:
        got: list[int] = []
        try:
            async for piece in gateway.router.start(
                admitted(f"r{i}", [i], sampling={"max_tokens": 40}, timeout_s=30.0)
            ).outputs():
                got += piece.token_ids
        except PhasewiseError:
            assert got == expected([i], len(got))
        else:
            assert got == expected([i], 40)

    async def scenario() -> None:
        rng = random.Random(7)
        async with serving(prefill=3, decode=3, heartbeat_s=1.0) as (gateway, prefills, decodes):
            pending = [asyncio.create_task(end(gateway, i)) for i in range(60)]
            for victim in (decodes[0], prefills[0]):
                await asyncio.sleep(rng.uniform(0.01, 0.03))
                await victim.stop()
            decodes[1].silent = True
            prefills[1].fail_next = [pb.Failed(code=pb.Failed.UNAVAILABLE) for _ in range(5)]
            await asyncio.gather(*pending)
            assert sum(gateway.metrics.ended.values()) == 60
            assert gateway.metrics.ended["length"] > 0
            await settled(gateway, [prefills[1], prefills[2], decodes[2]])

    run(scenario())
