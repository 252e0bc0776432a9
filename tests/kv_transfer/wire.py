"""A network between two endpoints on which one thing goes wrong: a relay before a TCP port."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from phasewise.engine.request import TransferAddress
from phasewise.kv_transfer.handshake import CONTROL
from phasewise.kv_transfer.messages import HEAD

BYTES = ("flip", "drop", "repeat", "swap", "cut", "half cut", "stall", "silence", "half silence")
FRAMES = ("frame lost", "frame twice", "frame late", "frames swapped")
STALL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Fault:
    """`what` happens at byte `at` of one stream, or, to a frame, at the `at`-th of them."""

    what: str
    is_control: bool
    to_called: bool  # the caller's bytes, or the called one's
    at: int
    size: int


def any_fault(what: str, rng: random.Random, data_bytes: int) -> Fault:
    """Somewhere. Control streams are a few hundred bytes of handshake and some frames a lease."""
    to_called = rng.random() < 0.5
    if what in FRAMES:
        at = rng.randrange(9)
        return Fault(what=what, is_control=True, to_called=to_called, at=at, size=1)
    is_control = rng.random() < 0.6
    at = int(rng.triangular(0, 900, 300)) if is_control else rng.randrange(data_bytes)
    size = rng.choice([1, 2, 7, 40])
    return Fault(what=what, is_control=is_control, to_called=to_called, at=at, size=size)


class Wire:
    """Carries every connection to `behind`; the fault happens once, on the first stream of its
    kind that comes so far."""

    def __init__(self, behind: TransferAddress, fault: Fault | None) -> None:
        self._behind, self._fault = behind, fault
        self._is_silent = asyncio.Event()
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.has_struck = False

    async def start(self) -> TransferAddress:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        return replace(self._behind, tcp=f"127.0.0.1:{port}", shm="")

    def lead_to(self, behind: TransferAddress) -> None:
        """Whoever calls from now on reaches another worker."""
        self._behind = behind

    async def close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._hang_up()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.append(writer)
        host, _, port = self._behind.tcp.rpartition(":")
        gone = (OSError, asyncio.IncompleteReadError, asyncio.CancelledError)
        with contextlib.suppress(*gone):  # a cancelled one too: its server would print it
            preface = await reader.readexactly(len(CONTROL))
            back, forth = await asyncio.open_connection(host, int(port))
            self._writers.append(forth)
            forth.write(preface)
            is_control = preface == CONTROL
            await asyncio.gather(
                self._pump(reader, forth, is_control, to_called=True),
                self._pump(back, writer, is_control, to_called=False),
            )

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        is_control: bool,
        to_called: bool,
    ) -> None:
        fault = self._fault
        if fault and (fault.is_control, fault.to_called) == (is_control, to_called):
            if fault.what in FRAMES:
                await self._pump_frames(reader, writer, fault)
            else:
                await self._pump_bytes(reader, writer, fault)
        while data := await reader.read(1 << 16):
            await self._pass(writer, data)
        writer.close()

    async def _pass(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        if not self._is_silent.is_set():
            writer.write(data)
            await writer.drain()

    async def _pump_bytes(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: Fault
    ) -> None:
        """Up to the fault, and over it."""
        seen = 0
        while data := await reader.read(1 << 16):
            at = fault.at - seen
            seen += len(data)
            if at >= len(data) or self.has_struck:
                await self._pass(writer, data)
                continue
            self.has_struck = True
            await self._pass(writer, data[:at])
            await self._pass(writer, await self._mangle(fault, data[at:]))
            if fault.what == "half cut":  # one way of one connection
                writer.close()
            while fault.what == "half silence" and await reader.read(1 << 16):
                pass
            return

    async def _mangle(self, fault: Fault, data: bytes) -> bytes:
        size = fault.size
        match fault.what:
            case "flip":
                return bytes([data[0] ^ 1 << size % 8]) + data[1:]
            case "drop":
                return data[size:]
            case "repeat":
                return data[:size] + data
            case "swap":
                return data[size : 2 * size] + data[:size] + data[2 * size :]
            case "cut":
                self._hang_up()
                return b""
            case "silence":
                self._is_silent.set()
                return b""
            case "half cut" | "half silence":
                return b""
            case _:
                await asyncio.sleep(STALL_S)
                return data

    async def _pump_frames(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: Fault
    ) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            for _ in range(fault.at + 1):  # and the hello
                await self._pass(writer, await _frame(reader))
            frame, self.has_struck = await _frame(reader), True
            match fault.what:
                case "frame twice":
                    await self._pass(writer, frame + frame)
                case "frame late":
                    asyncio.get_running_loop().call_later(STALL_S, writer.write, frame)
                case "frames swapped":
                    await self._pass(writer, await _frame(reader) + frame)

    def _hang_up(self) -> None:
        for writer in self._writers:
            writer.close()


async def _frame(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readexactly(HEAD.size)
    return head + await reader.readexactly(HEAD.unpack(head)[0])


@contextlib.asynccontextmanager
async def wire(
    behind: TransferAddress, fault: Fault | None
) -> AsyncIterator[tuple[Wire, TransferAddress]]:
    """A relay, and the address by which it is reached."""
    relay = Wire(behind, fault)
    address = await relay.start()
    try:
        yield relay, address
    finally:
        await relay.close()
