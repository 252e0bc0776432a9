"""The OpenAI-style HTTP front door: the same admission and router as gRPC's, on the same loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from ..engine.errors import InvalidConfig, InvalidRequest, PhasewiseError
from . import openai_api as api
from .chat import ChatTemplate, check_messages
from .error_status import http_code
from .openai_api import Call
from .output import Output, Usage
from .stream import Generation

if TYPE_CHECKING:
    from .gateway import Gateway

STOP_S = 2.0  # for responses in progress, once the router has ended their streams
MAX_BODY_BYTES = 64 * 2**20


class HttpServer:
    """Holds its socket from the start, so that a port that is taken is known before serving."""

    def __init__(self, gateway: Gateway, address: str) -> None:
        self._socket = _bind(address)
        host, port = self._socket.getsockname()[:2]
        self.address = f"{host}:{port}"
        config = uvicorn.Config(
            build_app(gateway), log_level="warning", access_log=False, lifespan="off"
        )
        config.timeout_graceful_shutdown = int(STOP_S)
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started and not self._task.done():
            await asyncio.sleep(0.005)
        if self._task.done():
            self._task.result()

    async def stop(self) -> None:
        self._server.should_exit = True
        if self._task is not None:
            await self._task
        self._socket.close()


class _Server(uvicorn.Server):
    """Signals belong to the process that serves, not to this part of it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _bind(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not while another listens
        sock.bind((host.strip("[]"), int(port)))
        sock.listen(1024)
    except (OSError, ValueError, OverflowError) as error:
        sock.close()
        raise InvalidConfig(
            "gateway.http",
            f"cannot listen on {address} ({error})",
            "choose another port, or 0 for any free one",
        ) from error
    return sock


def build_app(gateway: Gateway) -> FastAPI:
    app = FastAPI(title="Phasewise", docs_url=None, redoc_url=None)
    routes = _Routes(gateway)
    app.add_api_route("/v1/completions", routes.completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", routes.chat_completions, methods=["POST"])
    app.add_api_route("/v1/models", routes.models, methods=["GET"])
    app.add_api_route("/health", routes.health, methods=["GET"])
    app.add_api_route("/metrics", routes.metrics, methods=["GET"])
    return app


class _Routes:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._served = gateway.admission.served
        self._template = ChatTemplate(self._served)

    async def models(self) -> Response:
        model = {
            "id": self._served.name,
            "object": "model",
            "owned_by": "phasewise",
            "max_model_len": self._served.max_model_len,
        }
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self) -> Response:
        state = self._gateway.state
        return JSONResponse({"state": state}, status_code=200 if state == "ready" else 503)

    async def metrics(self) -> Response:
        return Response(self._gateway.metrics.exposition(), media_type="text/plain; version=0.0.4")

    async def completions(self, request: Request) -> Response:
        return await self._respond(request, chat=False)

    async def chat_completions(self, request: Request) -> Response:
        return await self._respond(request, chat=True)

    async def _respond(self, request: Request, *, chat: bool) -> Response:
        try:
            call = api.parse(await _body(request), self._served, chat=chat)
            generation = await self._start(call)
            answer = _Answer(call, generation, self)
            if call.stream:
                return await answer.streamed(request.receive)
            return await answer.whole(request.receive)
        except PhasewiseError as error:
            return JSONResponse(
                api.error_body(error), http_code(error), headers=api.error_headers(error)
            )

    async def _start(self, call: Call) -> Generation:
        message = call.message
        if call.chat:
            message.prompt = self._template.render(check_messages(call.body.get("messages")))
            if not message.HasField("max_tokens"):
                message.max_tokens = self._served.max_model_len  # admission cuts it to the room
        else:
            api.put_prompt(message, call.body.get("prompt"))
        admitted = await self._gateway.admission.admit(message, add_special_tokens=not call.chat)
        return self._gateway.router.start(admitted)

    def choice(self, output: Output, call: Call, first: bool) -> dict[str, Any]:
        return api.choice(output, call, self._served, first=first)

    @property
    def model(self) -> str:
        return self._served.name


class _Answer:
    """One request's response, whole or as server-sent events."""

    def __init__(self, call: Call, generation: Generation, routes: _Routes) -> None:
        self._call = call
        self._generation = generation
        self._routes = routes
        kind = "chat.completion" if call.chat else "text_completion"
        chunk = ".chunk" if call.chat and call.stream else ""
        self._head = {
            "id": f"{'chatcmpl' if call.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": kind + chunk,
            "created": int(time.time()),
            "model": routes.model,
        }

    async def whole(self, receive: Receive) -> Response:
        """Raises the stream's error. A client that leaves cancels."""
        pieces: dict[int, list[Output]] = {}
        with _cancelling_on_disconnect(receive, self._generation):
            async for output in self._generation.outputs():
                pieces.setdefault(output.index, []).append(output)
        outputs = [_joined(pieces[index]) for index in sorted(pieces)]
        return JSONResponse(
            {
                **self._head,
                "choices": [self._routes.choice(o, self._call, True) for o in outputs],
                "usage": api.usage([o.usage for o in outputs if o.usage is not None]),
                "timings": [api.timings(o.timings) for o in outputs if o.timings is not None],
            }
        )

    async def streamed(self, receive: Receive) -> Response:
        """Waits for the first piece, so that a refusal still has a status code of its own."""
        outputs = self._generation.outputs()
        with _cancelling_on_disconnect(receive, self._generation):
            first = await anext(outputs)
        return _EventStream(self._events(first, outputs), self._generation)

    async def _events(self, first: Output, rest: AsyncIterator[Output]) -> AsyncIterator[bytes]:
        begun: set[int] = set()
        usages: list[Usage] = []
        try:
            async for output in _chain(first, rest):
                choice = self._routes.choice(output, self._call, output.index not in begun)
                begun.add(output.index)
                chunk: dict[str, Any] = {**self._head, "choices": [choice]}
                if output.usage is not None and output.timings is not None:
                    usages.append(output.usage)
                    chunk["timings"] = api.timings(output.timings)
                yield _event(chunk)
        except PhasewiseError as error:
            yield _event(api.error_body(error))
            return
        if self._call.include_usage:
            yield _event({**self._head, "choices": [], "usage": api.usage(usages)})
        yield b"data: [DONE]\n\n"


class _EventStream(Response):
    """Server-sent events. Each send waits for the connection, which is the back-pressure; a
    client that leaves is noticed also while nothing is sent."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], generation: Generation) -> None:
        super().__init__(headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._events = events
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            with _cancelling_on_disconnect(receive, self._generation):
                await send(start)
                async for event in self._events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._generation.cancel("the client went away")


@contextlib.contextmanager
def _cancelling_on_disconnect(receive: Receive, generation: Generation) -> Iterator[None]:
    """A client that leaves meanwhile ends the request."""
    watch = asyncio.create_task(_cancel_on_disconnect(receive, generation))
    try:
        yield
    finally:
        watch.cancel()


async def _cancel_on_disconnect(receive: Receive, generation: Generation) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    generation.cancel("the client went away")


async def _chain(first: Output, rest: AsyncIterator[Output]) -> AsyncIterator[Output]:
    yield first
    async for output in rest:
        yield output


async def _body(request: Request) -> Any:
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY_BYTES:
            raise InvalidRequest("body", f"over {MAX_BODY_BYTES} bytes", "send a shorter prompt")
    try:
        body = json.loads(data)
        if b"\\ud" in data.lower():  # an escape that may be half of a pair, which is no character
            json.dumps(body, ensure_ascii=False).encode()
        return body
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("body", f"not JSON ({error})", "send a JSON object") from error


def _joined(pieces: list[Output]) -> Output:
    """A whole stream; its last piece has the end."""
    last = pieces[-1]
    return Output(
        request_id=last.request_id,
        index=last.index,
        token_ids=tuple(i for piece in pieces for i in piece.token_ids),
        text="".join(piece.text for piece in pieces),
        logprobs=tuple(row for piece in pieces for row in piece.logprobs),
        finish_reason=last.finish_reason,
        usage=last.usage,
        timings=last.timings,
    )


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"
