"""Two workers' endpoints for the tests: one here, one in a process that may be killed."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import itertools
import json
import os
import signal
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import asdict
from multiprocessing.context import ForkServerProcess
from typing import Any, TypeVar

import numpy as np
from phasewise.engine.layout import KVLayout
from phasewise.engine.request import TransferAddress, WorkerId
from phasewise.kv_transfer.endpoint import KVEndpoint
from phasewise.kv_transfer.events import Asked, Ended, Released, TransferConfig
from phasewise.kv_transfer.memory import PoolMemory
from phasewise.tests.forked import forked_with_lines
from phasewise.tests.kv_transfer import peer_process

Another = TypeVar("Another", bound="There")
LAYOUT = KVLayout(
    num_layers=4,
    num_blocks=64,
    num_kv_heads=2,
    block_size=16,
    head_dim=16,
    dtype="float32",
    fingerprint="tiny",
)
TEST_S = 90.0
BOUND_S = 30.0  # of every wait: a hang fails, slowness does not
CALM: dict[str, Any] = {"checksum": True, "silence_s": 10.0, "answer_s": 20.0}  # nobody hangs
LAYERED: dict[str, Any] = {**CALM, "small_bytes": 0}
# A hang is found soon, and yet a process that a busy machine leaves waiting is not taken for one.
QUICK: dict[str, Any] = {**CALM, "silence_s": 2.0, "answer_s": 2.0}


def pool_bytes(seed: int) -> np.ndarray:
    """What `peer_process.fill` puts in a pool."""
    shape = (LAYOUT.num_layers, LAYOUT.num_blocks, LAYOUT.block_bytes)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def bounded(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test on a loop of its own."""

    @functools.wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*arguments, **named), TEST_S))

    return run


def at_once(**cases: Sequence[Any]) -> Callable[..., Callable[..., None]]:
    """Run an async test for every combination of `cases` on one loop, so that the time in which
    nothing happens until a hang is found passes for all of them together."""

    def decorate(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
        async def one(case: dict[str, Any], named: dict[str, Any]) -> None:
            try:
                await test(**named, **case)
            except BaseException as error:  # whatever it is, it says of which case
                error.add_note(f"where {case}")
                raise

        async def every(named: dict[str, Any]) -> None:
            async with asyncio.timeout(TEST_S), asyncio.TaskGroup() as group:
                for values in itertools.product(*cases.values()):
                    group.create_task(one(dict(zip(cases, values, strict=True)), named))

        @functools.wraps(test)
        def run(**named: Any) -> None:
            asyncio.run(every(named))

        signature = inspect.signature(test)
        left = [one for name, one in signature.parameters.items() if name not in cases]
        vars(run)["__signature__"] = signature.replace(parameters=left)  # what pytest has to give
        return run

    return decorate


class Here:
    """An endpoint in this process."""

    def __init__(self, name: str, seed: int, config: dict[str, Any], incarnation: int = 1) -> None:
        self.memory = PoolMemory(LAYOUT.num_bytes)
        shape = (LAYOUT.num_layers, LAYOUT.num_blocks, LAYOUT.block_bytes)
        self.pool = np.frombuffer(self.memory.buffer, np.uint8).reshape(shape)
        self.pool[:] = pool_bytes(seed)
        worker = WorkerId(name=name, incarnation=incarnation)
        self.endpoint = KVEndpoint(worker, LAYOUT, self.memory, TransferConfig(**config))
        self.stream = self.endpoint.events()

    async def next(self) -> Asked | Ended | Released:
        return await asyncio.wait_for(anext(self.stream), BOUND_S)

    async def ended(self) -> Ended:
        event = await self.next()
        assert isinstance(event, Ended), event
        return event

    async def released(self) -> Released:
        event = await self.next()
        assert isinstance(event, Released), event
        return event

    async def asked(self) -> Asked:
        event = await self.next()
        assert isinstance(event, Asked), event
        return event

    async def is_quiet(self, seconds: float) -> bool:
        """No event comes for a while."""
        await asyncio.sleep(seconds)
        return self.endpoint._events.empty()


@contextlib.asynccontextmanager
async def here(
    name: str, seed: int, config: dict[str, Any], incarnation: int = 1
) -> AsyncIterator[tuple[Here, TransferAddress]]:
    worker = Here(name, seed, config, incarnation)
    address = await worker.endpoint.start()
    try:
        yield worker, address
    finally:
        await worker.endpoint.close()
        worker.memory.close()


class There:
    """An endpoint in another process."""

    def __init__(
        self, process: ForkServerProcess, reader: StreamReader, writer: StreamWriter
    ) -> None:
        self.process, self.reader, self.writer = process, reader, writer
        self.events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.answers: asyncio.Queue[Any] = asyncio.Queue()
        self.address: TransferAddress

    async def read(self) -> None:
        with contextlib.suppress(ConnectionResetError):  # killed with a command unread
            while line := await self.reader.readline():
                fields = json.loads(line)
                if "done" in fields:
                    self.answers.put_nowait(fields["done"])
                elif "event" in fields:
                    self.events.put_nowait(fields)
                else:
                    self.answers.put_nowait(fields)

    async def do(self, command: str, **arguments: Any) -> Any:
        self.writer.write(json.dumps({"do": command, **arguments}).encode() + b"\n")
        return await asyncio.wait_for(self.answers.get(), BOUND_S)

    async def event(self, kind: str) -> dict[str, Any]:
        fields = await asyncio.wait_for(self.events.get(), BOUND_S)
        assert fields["event"] == kind, fields
        return fields

    def signal(self, number: signal.Signals) -> None:
        """ProcessLookupError: it has ended."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)


@contextlib.asynccontextmanager
async def process_of(
    kind: type[Another], main: Callable[[dict[str, Any]], None], setup: dict[str, Any]
) -> AsyncIterator[Another]:
    """What `main` does in a process of its own; killed at the end."""
    process, sock = await asyncio.to_thread(forked_with_lines, main, setup)
    reader, writer = await asyncio.open_connection(sock=sock)
    another = kind(process, reader, writer)
    reading = asyncio.create_task(another.read())
    try:
        yield another
    finally:
        process.kill()
        await asyncio.to_thread(process.join, BOUND_S)
        process.close()
        reading.cancel()
        writer.close()


@contextlib.asynccontextmanager
async def there(
    name: str, seed: int, config: dict[str, Any], incarnation: int = 1, **layout: Any
) -> AsyncIterator[There]:
    setup = {
        "name": name,
        "incarnation": incarnation,
        "seed": seed,
        "config": config,
        "layout": {**asdict(LAYOUT), **layout},
    }
    async with process_of(There, peer_process.main, setup) as worker:
        hello = await asyncio.wait_for(worker.answers.get(), BOUND_S)
        fields = hello["address"]
        worker.address = TransferAddress(**{**fields, "worker": WorkerId(**fields["worker"])})
        yield worker
