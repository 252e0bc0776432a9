"""The Python client: pieces as dataclasses, failures as named errors."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from typing import Any

import grpc
import pytest
from phasewise.cluster.client import AsyncClient, Client
from phasewise.cluster.error_status import error_from_status, grpc_code, trailing_metadata
from phasewise.engine.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PhasewiseError,
    Unavailable,
)
from phasewise.tests.cluster.fake_worker import Run, Serving, expected


def in_thread(function: Any) -> Any:
    return asyncio.to_thread(function)


def test_sync_client_streams_tokens_usage_and_timings(run: Run, serving: Serving) -> None:
    def use(address: str) -> Any:
        with Client(address) as client:
            client.wait_ready(30)
            pieces = list(
                client.generate(token_ids=[3, 4], max_tokens=6, temperature=0, logprobs=1)
            )
            return pieces, client.status(), client.abort("nobody")

    async def scenario() -> None:
        async with serving() as (gateway, *_):
            pieces, status, found = await in_thread(lambda: use(gateway.grpc_address))
            assert [i for p in pieces for i in p.token_ids] == expected([3, 4], 6)
            assert [r.top_ids[0] for p in pieces for r in p.logprobs] == expected([3, 4], 6)
            assert pieces[-1].finish_reason == "length"
            assert pieces[-1].usage.total_tokens == 8
            assert pieces[-1].timings.e2e_ms >= pieces[-1].timings.ttft_ms > 0
            assert status.gateway.model == "fake" and not found

    run(scenario())


def test_closing_a_sync_generator_cancels_its_request(run: Run, serving: Serving) -> None:
    def use(address: str) -> Any:
        with Client(address) as client:
            pieces = client.generate(token_ids=[1], max_tokens=500)
            next(pieces)
            pieces.close()
            closed.wait(30)

    closed = threading.Event()

    async def scenario() -> None:
        async with serving() as (gateway, *_):
            using = asyncio.create_task(in_thread(lambda: use(gateway.grpc_address)))
            async with asyncio.timeout(30):
                while not gateway.metrics.ended["Cancelled"]:
                    await asyncio.sleep(0.005)
            closed.set()
            await using

    run(scenario())


def test_abort_from_another_call_raises_cancelled(run: Run, serving: Serving) -> None:
    async def scenario() -> None:
        async with serving() as (gateway, *_), AsyncClient(gateway.grpc_address) as client:
            with pytest.raises(Cancelled):
                async for _ in client.generate(token_ids=[1], max_tokens=500, request_id="me"):
                    await client.abort("me")

    run(scenario())


def test_misspelt_or_mistyped_parameter_is_refused_before_the_call(
    run: Run, serving: Serving
) -> None:
    with Client("127.0.0.1:1") as client:
        with pytest.raises(InvalidRequest, match="temprature"):
            next(client.generate(token_ids=[1], temprature=1))
        with pytest.raises(InvalidRequest, match="max_tokens"):
            next(client.generate(token_ids=[1], max_tokens="many"))


def test_refused_connection_is_unavailable() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(Unavailable):
        list(client.generate(token_ids=[1]))


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("top_k", "too ünïcode", "mend it"),
        Overloaded("full", retry_after_s=2.5),
        Unavailable("gone", retry_after_s=0.5),
        DeadlineExceeded("late"),
        Cancelled("enough"),
        PhasewiseError("internal error: x"),
    ],
)
def test_named_errors_survive_the_wire(error: Any) -> None:
    again = error_from_status(grpc_code(error), str(error), trailing_metadata(error))
    assert type(again) is type(error) and str(again) == str(error)
    assert vars(again) == vars(error)


def test_status_of_a_stranger_keeps_its_sentence() -> None:
    error = error_from_status(grpc.StatusCode.UNIMPLEMENTED, "no such method", None)
    assert type(error) is PhasewiseError and "no such method" in str(error)


def test_client_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys, phasewise.cluster.client; "
        "sys.exit(bool({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
