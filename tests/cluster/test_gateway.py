"""The gRPC front door, as any client in any language sees it."""

from __future__ import annotations

import asyncio
import socket

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from phasewise.cluster.client import AsyncClient
from phasewise.cluster.gateway import Gateway, GatewaySettings
from phasewise.cluster.proto import phasewise_pb2 as pb
from phasewise.cluster.proto.phasewise_pb2_grpc import GenerationStub
from phasewise.cluster.served_model import ServedModel
from phasewise.engine.errors import InvalidConfig, InvalidRequest, Unavailable
from phasewise.tests.cluster.fake_worker import VOCAB, Run, Serving, expected

SERVED = ServedModel(name="fake", vocab_size=VOCAB, max_model_len=512)


async def health_of(channel: grpc.aio.Channel, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
    return answer.status


def test_health_follows_whether_some_workers_can_serve(run: Run, serving: Serving) -> None:
    async def scenario() -> None:
        async with (
            serving() as (gateway, _, decodes),
            grpc.aio.insecure_channel(gateway.grpc_address) as channel,
        ):
            serving_now = health_pb2.HealthCheckResponse.SERVING
            async with asyncio.timeout(30):
                while await health_of(channel, "phasewise.v1.Generation") != serving_now:
                    await asyncio.sleep(0.02)
            await decodes[0].stop()
            async with asyncio.timeout(30):
                while await health_of(channel, "") == serving_now:
                    await asyncio.sleep(0.02)
            assert await health_of(channel, "phasewise.v1.Admin") == serving_now

    run(scenario())


def test_reflection_names_the_services(run: Run, serving: Serving) -> None:
    async def scenario() -> None:
        async with (
            serving() as (gateway, *_),
            grpc.aio.insecure_channel(gateway.grpc_address) as channel,
        ):
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            call = stub.ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            )
            answer = await call.read()
            names = {s.name for s in answer.list_services_response.service}
            assert {"phasewise.v1.Generation", "phasewise.v1.Admin"} <= names

    run(scenario())


def test_refusal_carries_field_and_remedy_in_trailing_metadata(run: Run, serving: Serving) -> None:
    async def scenario() -> None:
        async with (
            serving() as (gateway, *_),
            grpc.aio.insecure_channel(gateway.grpc_address) as channel,
        ):
            call = GenerationStub(channel).Generate(pb.GenerateRequest(token_ids=[1], top_k=-9))
            assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT
            metadata = dict(await call.trailing_metadata())
            assert metadata["phasewise-field"] == "top_k"
            assert metadata["phasewise-error"] == "InvalidRequest"
            assert "phasewise-remedy" in metadata

    run(scenario())


def test_prompt_of_a_million_tokens_is_refused_by_its_length(run: Run, serving: Serving) -> None:
    async def scenario() -> None:
        async with (
            serving() as (gateway, *_),
            AsyncClient(gateway.grpc_address) as client,
        ):
            with pytest.raises(InvalidRequest, match="max_model_len is 512"):
                async for _ in client.generate(token_ids=[255] * 1_000_000):
                    pass

    run(scenario())


def test_deadline_of_the_call_is_the_deadline_of_the_request(run: Run, serving: Serving) -> None:
    async def scenario() -> None:
        async with (
            serving() as (gateway, prefills, _),
            grpc.aio.insecure_channel(gateway.grpc_address) as channel,
        ):
            prefills[0].stalled = True
            request = pb.GenerateRequest(token_ids=[1])
            call = GenerationStub(channel).Generate(request, timeout=1.0)
            assert await call.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            prefills[0].stalled = False
            async with asyncio.timeout(30):
                while gateway.router.in_flight:
                    await asyncio.sleep(0.01)
            assert 0 < prefills[0].submits[0].request.deadline_s <= 1.0

    run(scenario())


def test_client_that_goes_away_frees_the_workers(run: Run, serving: Serving) -> None:
    async def scenario() -> None:
        async with serving() as (gateway, _, decodes):
            async with AsyncClient(gateway.grpc_address) as client:
                async for _ in client.generate(token_ids=[1], max_tokens=500):
                    if decodes[0].rows:
                        break
            async with asyncio.timeout(30):
                while gateway.router.in_flight or decodes[0].rows:
                    await asyncio.sleep(0.005)
            assert gateway.metrics.ended["Cancelled"] == 1

    run(scenario())


def test_slow_client_gets_fewer_and_larger_pieces_and_every_token(
    run: Run, serving: Serving
) -> None:
    async def scenario() -> None:
        async with serving(step_s=0.001) as (gateway, *_), AsyncClient(gateway.grpc_address) as c:
            pieces = []
            async for piece in c.generate(token_ids=[4], max_tokens=300):
                pieces.append(piece)
                if len(pieces) == 1:
                    await asyncio.sleep(0.3)
            assert [i for p in pieces for i in p.token_ids] == expected([4], 300)

    run(scenario())


def test_status_shows_gateway_and_workers(run: Run, serving: Serving) -> None:
    async def scenario() -> None:
        async with serving() as (gateway, *_), AsyncClient(gateway.grpc_address) as client:
            assert [p async for p in client.generate(token_ids=[1], max_tokens=3)]
            status = await client.status()
            assert status.gateway.state == "ready" and status.gateway.ended["length"] == 1
            rows = {row.name: row for row in status.workers}
            assert set(rows) == {"prefill-0", "decode-0"}
            row = rows["decode-0"]
            assert (row.state, row.role, row.pid) == ("ready", "decode", 4242)
            assert (row.blocks_total, row.blocks_free, row.open_slots) == (64, 64, 0)
            assert row.incarnation and row.address and row.heartbeat_age_s < 30

    run(scenario())


def test_drained_gateway_refuses_and_is_not_serving(run: Run, serving: Serving) -> None:
    async def scenario() -> None:
        async with serving() as (gateway, *_), AsyncClient(gateway.grpc_address) as client:
            assert await client.drain() == 0
            with pytest.raises(Unavailable, match="shutting down"):
                async for _ in client.generate(token_ids=[1]):
                    pass
            assert (await client.status()).gateway.state == "draining"
            with pytest.raises(InvalidRequest, match="nobody"):
                await client.drain("nobody")

    run(scenario())


def test_drained_worker_gets_no_new_request(run: Run, serving: Serving) -> None:
    async def scenario() -> None:
        async with serving(decode=2) as (gateway, _, decodes):
            async with AsyncClient(gateway.grpc_address) as client:
                assert await client.drain("decode-0") == 0
                for i in range(4):
                    assert [p async for p in client.generate(token_ids=[i], max_tokens=3)]
            assert not decodes[0].resumes and len(decodes[1].resumes) == 4

    run(scenario())


@pytest.mark.parametrize("front", ["grpc", "http"])
def test_port_that_is_taken_is_named_and_nothing_listens(run: Run, front: str) -> None:
    async def scenario(address: str) -> None:
        free = "127.0.0.1:0"
        settings = GatewaySettings(
            grpc_address=address if front == "grpc" else free,
            http_address=address if front == "http" else free,
        )
        with pytest.raises(InvalidConfig) as caught:
            await Gateway(SERVED, settings).start()
        assert caught.value.where == f"gateway.{front}" and address in caught.value.reason

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        run(scenario(f"127.0.0.1:{taken.getsockname()[1]}"))
