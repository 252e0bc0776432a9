"""The state machine over real links to fake peers: routes, bounds, and exactly one end."""

from __future__ import annotations

import asyncio
import random

import pytest
from phasewise.cluster.gateway import Gateway
from phasewise.engine.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from phasewise.engine.routing import LeastOutstandingTokens, RoundRobin, WorkerView
from phasewise.tests.cluster.fake_worker import Run, Serving, expected
from phasewise.tests.cluster.routed import PROMPT, admitted, outputs, settled, tokens


def test_request_goes_through_prefill_and_decode_and_tells_where(
    run: Run, serving: Serving
) -> None:
    async def scenario() -> None:
        async with serving() as (gateway, prefills, decodes):
            pieces = await outputs(gateway, admitted())
            assert tokens(pieces) == expected(PROMPT, 8)
            last = pieces[-1]
            assert last.finish_reason == "length"
            assert last.usage.prompt_tokens == 3 and last.usage.completion_tokens == 8
            assert [w.split("#")[0] for w in last.timings.workers] == ["prefill-0", "decode-0"]
            assert not last.timings.local_prefill and last.timings.failovers == 0
            assert last.timings.transfer_ms == pytest.approx(3.0)
            assert prefills[0].submits[0].decode.worker.name == "decode-0"
            assert decodes[0].resumes[0].first_token == expected(PROMPT, 1)[0]
            assert decodes[0].resumes[0].granted
            assert [p.finish_reason for p in pieces[:-1]] == [None] * (len(pieces) - 1)
            await settled(gateway, prefills + decodes)

    run(scenario())


def test_one_token_request_ends_at_the_handoff_and_decode_is_let_go(
    run: Run, serving: Serving
) -> None:
    async def scenario() -> None:
        async with serving() as (gateway, prefills, decodes):
            pieces = await outputs(gateway, admitted(sampling={"max_tokens": 1}))
            assert tokens(pieces) == expected(PROMPT, 1)
            assert pieces[-1].finish_reason == "length"
            await settled(gateway, prefills + decodes)

    run(scenario())


def test_without_a_prefill_pool_decode_computes_the_prompt(run: Run, serving: Serving) -> None:
    async def scenario() -> None:
        async with serving(prefill=0, local_prefill="always") as (gateway, _, decodes):
            pieces = await outputs(gateway, admitted())
            assert tokens(pieces) == expected(PROMPT, 8)
            assert pieces[-1].timings.local_prefill
            assert not decodes[0].resumes

    run(scenario())


def test_short_prompts_skip_the_hop_where_configured(run: Run, serving: Serving) -> None:
    async def scenario() -> None:
        async with serving(local_prefill_tokens=3) as (gateway, prefills, decodes):
            await outputs(gateway, admitted("short"))
            assert len(prefills[0].submits) == 0 and len(decodes[0].submits) == 1
            await outputs(gateway, admitted("long", prompt=[1, 2, 3, 4]))
            assert len(prefills[0].submits) == 1 and len(decodes[0].submits) == 1
            assert gateway.metrics.local_prefills == 1

    run(scenario())


def test_handoff_without_a_grant_goes_to_a_decode_worker_that_is_there(
    run: Run, serving: Serving
) -> None:
    async def scenario() -> None:
        async with serving(decode=2) as (gateway, prefills, decodes):
            prefills[0].granted = False
            prefills[0].stalled = True
            pending = asyncio.create_task(outputs(gateway, admitted()))
            while not prefills[0].submits:
                await asyncio.sleep(0.002)
            planned = prefills[0].submits[0].decode.worker.name
            await next(w for w in decodes if w.ref.name == planned).stop()
            prefills[0].stalled = False
            pieces = await pending
            assert tokens(pieces) == expected(PROMPT, 8)
            other = next(w for w in decodes if w.ref.name != planned)
            assert len(other.resumes) == 1 and not other.resumes[0].granted

    run(scenario())


def test_without_prefill_workers_auto_falls_back_and_counts_it(run: Run, serving: Serving) -> None:
    async def scenario() -> None:
        async with serving() as (gateway, prefills, _):
            await prefills[0].stop()
            while gateway.fleet.ready("prefill"):
                await asyncio.sleep(0.005)
            pieces = await outputs(gateway, admitted())
            assert tokens(pieces) == expected(PROMPT, 8)
            assert pieces[-1].timings.local_prefill
            assert b'local_prefills_total{cause="no_prefill_worker"} 1.0' in (
                gateway.metrics.exposition()
            )

    run(scenario())


def test_without_prefill_workers_never_is_unavailable(run: Run, serving: Serving) -> None:
    async def scenario() -> None:
        async with serving(local_prefill="never") as (gateway, prefills, _):
            await prefills[0].stop()
            while gateway.fleet.ready("prefill"):
                await asyncio.sleep(0.005)
            with pytest.raises(Unavailable, match="no prefill worker"):
                await outputs(gateway, admitted())
            assert gateway.state == "unavailable"

    run(scenario())


def test_deadline_ends_the_stream_and_aborts_the_worker(run: Run, serving: Serving) -> None:
    async def scenario() -> None:
        async with serving() as (gateway, prefills, decodes):
            decodes[0].step_s = 0.05
            with pytest.raises(DeadlineExceeded):
                await outputs(gateway, admitted(timeout_s=1.0, sampling={"max_tokens": 400}))
            await settled(gateway, prefills + decodes)
            assert decodes[0].num_aborts == 1

    run(scenario())


def test_worker_that_never_answers_is_given_up_at_the_deadline(run: Run, serving: Serving) -> None:
    async def scenario() -> None:
        async with serving(abort_s=0.2) as (gateway, prefills, decodes):
            prefills[0].stalled = True
            with pytest.raises(DeadlineExceeded):
                await outputs(gateway, admitted(timeout_s=0.1))
            async with asyncio.timeout(30):
                while gateway.router.in_flight:
                    await asyncio.sleep(0.01)

    run(scenario())


def test_abort_ends_the_stream_as_cancelled_and_frees_the_worker(
    run: Run, serving: Serving
) -> None:
    async def scenario() -> None:
        async with serving() as (gateway, prefills, decodes):
            pending = asyncio.create_task(outputs(gateway, admitted(sampling={"max_tokens": 400})))
            while not decodes[0].rows:
                await asyncio.sleep(0.002)
            assert gateway.router.abort("r")
            with pytest.raises(Cancelled):
                await pending
            assert not gateway.router.abort("r")
            await settled(gateway, prefills + decodes)

    run(scenario())


def test_live_request_id_is_refused_and_free_again_after_the_end(
    run: Run, serving: Serving
) -> None:
    async def scenario() -> None:
        async with serving() as (gateway, _, decodes):
            pending = asyncio.create_task(outputs(gateway, admitted(sampling={"max_tokens": 50})))
            await asyncio.sleep(0)
            with pytest.raises(InvalidRequest, match="request_id"):
                gateway.router.start(admitted())
            await pending
            await outputs(gateway, admitted())

    run(scenario())


def test_requests_beyond_the_bound_are_refused_with_a_delay(run: Run, serving: Serving) -> None:
    async def scenario() -> None:
        async with serving(max_in_flight=2) as (gateway, *_):
            first = gateway.router.start(admitted("a", sampling={"max_tokens": 100}))
            second = gateway.router.start(admitted("b", sampling={"max_tokens": 100}))
            with pytest.raises(Overloaded) as caught:
                gateway.router.start(admitted("c"))
            assert caught.value.retry_after_s > 0
            first.cancel("enough")
            second.cancel("enough")

    run(scenario())


def test_n_streams_have_seeds_of_their_own_and_end_each(run: Run, serving: Serving) -> None:
    async def scenario() -> None:
        async with serving() as (gateway, prefills, _):
            request = admitted(n=3, sampling={"temperature": 1.0, "seed": 11})
            pieces = await outputs(gateway, request)
            for index in range(3):
                assert tokens(pieces, index) == expected(PROMPT, 8)
            assert sum(p.finish_reason is not None for p in pieces) == 3
            seeds = [s.request.sampling.seed for s in prefills[0].submits]
            assert seeds[0] == 11 and len(set(seeds)) == 3

    run(scenario())


def test_drain_finishes_what_runs_and_refuses_what_comes(run: Run, serving: Serving) -> None:
    async def scenario() -> None:
        async with serving() as (gateway, *_):
            pending = asyncio.create_task(outputs(gateway, admitted(sampling={"max_tokens": 50})))
            await asyncio.sleep(0.02)
            draining = asyncio.create_task(gateway.drain(30))
            await asyncio.sleep(0)
            with pytest.raises(Unavailable, match="shutting down"):
                gateway.router.start(admitted("late"))
            assert await draining == 0
            assert tokens(await pending) == expected(PROMPT, 50)

    run(scenario())


def test_drain_cuts_off_what_does_not_finish_in_time(run: Run, serving: Serving) -> None:
    async def scenario() -> None:
        async with serving(abort_s=0.2) as (gateway, prefills, _):
            prefills[0].stalled = True
            pending = asyncio.create_task(outputs(gateway, admitted()))
            await asyncio.sleep(0.02)
            assert await gateway.drain(0.1) == 1
            with pytest.raises(Unavailable, match="shutting down"):
                await pending

    run(scenario())


def test_200_requests_with_random_cancels_end_once_each_and_leave_no_slot(
    run: Run, serving: Serving
) -> None:
    async def one(gateway: Gateway, i: int, rng: random.Random) -> str:
        generation = gateway.router.start(admitted(f"r{i}", [i], sampling={"max_tokens": 30}))
        stop_at = rng.choice([None, 0, 1, 5, 20])
        if stop_at == 0:
            generation.cancel("at once")
        got: list[int] = []
        try:
            async for piece in generation.outputs():
                got += piece.token_ids
                if stop_at is not None and len(got) >= stop_at:
                    generation.cancel("enough")
                assert piece.finish_reason is None or got == expected([i], 30)
        except Cancelled:
            assert got == expected([i], len(got))
            return "cancelled"
        return "finished"

    async def scenario() -> None:
        rng = random.Random(3)
        async with serving(prefill=2, decode=2) as (gateway, prefills, decodes):
            ends = await asyncio.gather(*(one(gateway, i, rng) for i in range(200)))
            await settled(gateway, prefills + decodes)
            assert len(ends) == 200 and set(ends) == {"cancelled", "finished"}
            assert sum(gateway.metrics.ended.values()) == 200
            assert all(w.outstanding_tokens == w.requests == 0 for w in gateway.fleet.workers)

    run(scenario())


def test_policies_choose_by_load_and_in_turn_among_equals() -> None:
    views = [WorkerView(name=n, outstanding_tokens=t) for n, t in (("a", 9), ("b", 3), ("c", 3))]
    least = LeastOutstandingTokens()
    assert [least.choose(views, 1) for _ in range(4)] == [1, 2, 1, 2]
    turn = RoundRobin()
    assert [turn.choose(views, 1) for _ in range(4)] == [0, 1, 2, 0]
    assert turn.choose(views[:1], 1) == 0
