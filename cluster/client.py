"""The Python client, sync and async. Imports neither torch nor ray.

    with Client("127.0.0.1:50051") as client:
        for output in client.generate(prompt="Once", max_tokens=32, temperature=0):
            print(output.text, end="")

Whatever a request leaves out takes the server's value. Errors are those of `engine.errors`;
closing a generator, or leaving it behind, cancels its request.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import grpc

from ..engine.errors import InvalidRequest, PhasewiseError
from ..engine.request import TokenLogprobs
from .error_status import error_from_status
from .output import Output, Timings, Usage
from .proto import phasewise_pb2 as pb
from .proto.phasewise_pb2_grpc import AdminStub, GenerationStub

OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
)
CALL_MARGIN_S = 2.0
ANSWER_S = 30.0  # for a question that a living gateway answers in milliseconds
DRAIN_S = 30.0  # what the gateway takes when a drain gives no time
FIELDS = frozenset(field.name for field in pb.GenerateRequest.DESCRIPTOR.fields)


class Client:
    """Calls a cluster at "host:port". Safe to share between threads."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._channel = grpc.insecure_channel(address, options=OPTIONS)
        self._generation = GenerationStub(self._channel)
        self._admin = AdminStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection; requests that still run are cancelled."""
        self._channel.close()

    def wait_ready(self, timeout_s: float) -> None:
        """Returns once the address accepts connections. Raises Unavailable."""
        try:
            grpc.channel_ready_future(self._channel).result(timeout=timeout_s)
        except grpc.FutureTimeoutError as error:
            raise error_from_status(
                grpc.StatusCode.UNAVAILABLE,
                f"no connection to {self._address} within {timeout_s:g} s",
                None,
            ) from error

    def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        **sampling: Any,
    ) -> Iterator[Output]:
        """Stream one request. `sampling` takes the fields of `GenerateRequest` by name."""
        request = build_request(prompt, token_ids, sampling)
        call = self._generation.Generate(request, timeout=_call_timeout_s(request))
        return _outputs(call)

    def abort(self, request_id: str) -> bool:
        """End a request that another call made; False if there is none."""
        request = pb.AbortRequest(request_id=request_id)
        return _unary(self._generation.Abort, request, ANSWER_S).found

    def status(self) -> pb.ClusterStatus:
        return _unary(self._admin.Status, pb.StatusRequest(), ANSWER_S)

    def drain(self, worker: str = "", *, timeout_s: float | None = None) -> int:
        """Take a worker, or everything, out of service; returns the streams still running."""
        request = pb.DrainRequest(worker=worker, timeout_s=timeout_s)
        return _unary(self._admin.Drain, request, _drain_answer_s(timeout_s)).unfinished


class AsyncClient:
    """As `Client`, on the running event loop."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        self._generation = GenerationStub(self._channel)
        self._admin = AdminStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        **sampling: Any,
    ) -> AsyncIterator[Output]:
        """Stream one request. `sampling` takes the fields of `GenerateRequest` by name."""
        async for message in self.stream(build_request(prompt, token_ids, sampling)):
            yield output_from_pb(message)

    async def stream(self, request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        """As `generate`, with the messages as they travel, for whoever counts every microsecond."""
        call = self._generation.Generate(request, timeout=_call_timeout_s(request))
        try:
            async for message in call:
                yield message
        except grpc.aio.AioRpcError as error:
            raise _named(error) from error
        finally:
            call.cancel()

    async def abort(self, request_id: str) -> bool:
        request = pb.AbortRequest(request_id=request_id)
        return (await self._call(self._generation.Abort, request, ANSWER_S)).found

    async def status(self) -> pb.ClusterStatus:
        return await self._call(self._admin.Status, pb.StatusRequest(), ANSWER_S)

    async def drain(self, worker: str = "", *, timeout_s: float | None = None) -> int:
        request = pb.DrainRequest(worker=worker, timeout_s=timeout_s)
        answer = await self._call(self._admin.Drain, request, _drain_answer_s(timeout_s))
        return answer.unfinished

    async def _call(self, method: Any, request: Any, timeout_s: float) -> Any:
        try:
            return await method(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise _named(error) from error


def build_request(
    prompt: str | None, token_ids: Sequence[int] | None, sampling: dict[str, Any]
) -> pb.GenerateRequest:
    """Raises InvalidRequest for a name or type that the message does not have; values are the
    server's to judge. None is "left out"."""
    given = {"prompt": prompt, "token_ids": token_ids, **sampling}
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    request = pb.GenerateRequest()
    for field, value in given.items():
        if field not in FIELDS:
            raise InvalidRequest(field, "no such parameter", f"use one of {', '.join(FIELDS)}")
        try:
            request.MergeFrom(pb.GenerateRequest(**{field: value}))
        except (TypeError, ValueError) as error:
            raise InvalidRequest(
                field, f"not understood ({error})", "see GenerateRequest in phasewise.proto"
            ) from error
    return request


def _call_timeout_s(request: pb.GenerateRequest) -> float | None:
    """Later than the request's own deadline, so that the server's answer comes first and this
    one ends the call only when no server answers."""
    return request.timeout_s + CALL_MARGIN_S if request.timeout_s > 0 else None


def output_from_pb(message: pb.GenerateResponse) -> Output:
    timings = message.timings
    return Output(
        request_id=message.request_id,
        index=message.index,
        token_ids=tuple(message.token_ids),
        text=message.text,
        logprobs=tuple(
            TokenLogprobs(sampled=row.sampled, top_ids=tuple(row.top_ids), top=tuple(row.top))
            for row in message.logprobs
        ),
        finish_reason=message.finish_reason or None,
        usage=Usage(
            prompt_tokens=message.usage.prompt_tokens,
            completion_tokens=message.usage.completion_tokens,
            cached_tokens=message.usage.cached_tokens,
        )
        if message.HasField("usage")
        else None,
        timings=Timings(
            queue_ms=timings.queue_ms,
            prefill_ms=timings.prefill_ms,
            transfer_ms=timings.transfer_ms,
            ttft_ms=timings.ttft_ms,
            tpot_ms=timings.tpot_ms,
            e2e_ms=timings.e2e_ms,
            workers=tuple(timings.workers),
            failovers=timings.failovers,
            preemptions=timings.preemptions,
            local_prefill=timings.local_prefill,
        )
        if message.HasField("timings")
        else None,
    )


def _outputs(call: Any) -> Iterator[Output]:
    try:
        for message in call:
            yield output_from_pb(message)
    except grpc.RpcError as error:
        raise _named(error) from error
    finally:
        call.cancel()


def _drain_answer_s(timeout_s: float | None) -> float:
    return ANSWER_S + (DRAIN_S if timeout_s is None else max(0.0, timeout_s))


def _unary(method: Any, request: Any, timeout_s: float) -> Any:
    try:
        return method(request, timeout=timeout_s)
    except grpc.RpcError as error:
        raise _named(error) from error


def _named(error: Any) -> PhasewiseError:
    return error_from_status(error.code(), error.details(), error.trailing_metadata())
