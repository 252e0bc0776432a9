"""Making connections: calls peers, answers calls, and checks whom it talks to.

What comes out is a `Contact`: sockets and a hello that fits. It knows nothing of leases.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine.request import TransferAddress, WorkerId
from . import handshake
from .contact import Contact, drop_contact
from .events import PeerRefused, TransferConfig
from .fit import Fit, Held, holds_of
from .handshake import CONTROL, DATA, TOKEN_BYTES, Hello, Received
from .listener import Listener
from .memory import KVMemory
from .messages import MalformedFrame
from .shm import peer_pidfd, peer_uid
from .tcp import SOCKET_BUFFER, prepare
from .ways import GROUP, NEIGHBOUR, ways_of

if TYPE_CHECKING:  # torch comes with the first group only
    from torch._C._distributed_c10d import Store

    from .contact import PeerMemory
    from .group import Group

_MAX_PENDING = 64  # calls being answered at once; more are hung up on


class Caller:
    """Listens and dials for one worker."""

    def __init__(
        self, worker: WorkerId, held: Held, memory: KVMemory, config: TransferConfig
    ) -> None:
        self._worker, self._held, self._memory, self._config = worker, held, memory, config
        self.ways = ways_of(config, memory.device)
        self._store: tuple[Store, int] | None = None  # and its port
        # Of their own: two workers that call each other over many ranks would wait for ever for
        # a thread of the loop's few.
        self._meetings = ThreadPoolExecutor(_MAX_PENDING, thread_name_prefix="kv-meeting")
        self._numbers = 0
        self._latest: dict[str, int] = {}  # newest incarnation met, by name
        self._tokens: dict[bytes, asyncio.Future[socket.socket]] = {}
        self.counters: Counter[str] = Counter()
        self._listener = Listener(worker.name, self._pick_up, self.counters)
        self._answering: set[asyncio.Task[None]] = set()
        self.contacts: deque[Contact] = deque()  # from answered calls
        self.answered = asyncio.Event()  # a contact was added

    def listen(self) -> TransferAddress:
        """Open the ports that the configuration allows."""
        shm = tcp = ""
        if any(way in NEIGHBOUR for way in self.ways):
            shm = self._listener.bind_unix()
        if any(way not in NEIGHBOUR for way in self.ways):
            tcp = self._listener.bind_tcp(self._config.host)
        if any(way in GROUP for way in self.ways):
            from ..engine.shard import serve_store

            self._store = serve_store(self._config.host, max(map(self._meeting_s, self.ways)))
        self._listener.listen()
        return TransferAddress(
            worker=self._worker,
            host_id=host_id(),
            shm=shm,
            tcp=tcp,
            holds=holds_of(self._held.own),
        )

    async def dial(self, peer: TransferAddress, transport: str) -> Contact:
        """Raises PeerRefused where it can never work, OSError or TimeoutError otherwise."""
        self.check_incarnation(peer.worker)
        if transport in NEIGHBOUR:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            where: str | tuple[str, int] = "\0" + peer.shm
        else:
            sock = _tcp_socket()
            where = _host_port(peer.tcp)
        try:
            async with asyncio.timeout(self._meeting_s(transport)):
                await asyncio.get_running_loop().sock_connect(sock, where)
                number = self._number()
                fd = self._memory.fd if transport == "shm" else None
                hello = self._hello(number, transport, wants=peer.worker)
                await handshake.say(sock, hello, fd, CONTROL)
                received = await handshake.hear(sock)
                if not received.hello.transport == transport:
                    raise MalformedFrame(f"{transport} was answered by another transport")
                return await self._met(number, sock, received, peer)
        except BaseException:
            sock.close()
            raise

    async def close(self) -> None:
        """Listen no longer; calls that are being answered are dropped."""
        self._listener.close()
        self._store = None
        self._meetings.shutdown(wait=False, cancel_futures=True)
        for task in list(self._answering):
            task.cancel()
        await asyncio.gather(*self._answering, return_exceptions=True)

    def check_incarnation(self, worker: WorkerId) -> None:
        """Raises PeerRefused if a newer incarnation of the worker is known."""
        latest = self._latest.get(worker.name, worker.incarnation)
        if worker.incarnation < latest:
            raise PeerRefused(f"{worker} was replaced by {worker.name}#{latest}; ask for that one")

    def _meeting_s(self, transport: str) -> float:
        return self._config.nccl_s if transport == "nccl" else self._config.answer_s

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _hello(
        self, number: int, transport: str, wants: WorkerId | None = None, token: bytes = b""
    ) -> Hello:
        return Hello(
            worker=self._worker,
            wants=wants,
            layout=self._held.own.layout,
            rank=self._held.rank,
            holds=self._held.holds,
            pool_bytes=self._memory.num_bytes,
            canary_slot=number,
            checksum=self._config.checksum,
            transport=transport,
            token=token,
            handle=self._memory.handle if transport == "cuda_ipc" else b"",
            store=self._store[1] if token and self._store is not None else 0,
        )

    async def _met(
        self, number: int, sock: socket.socket, received: Received, peer: TransferAddress
    ) -> Contact:
        """The called one answered: is it the one, and does it fit?"""
        try:
            hello = received.hello
            if hello.worker != peer.worker:
                raise PeerRefused(f"{hello.worker} answered where {peer.worker} was expected")
            fit = self._fit(hello)
            if sock.family == socket.AF_UNIX:
                return self._neighbour(number, sock, received, fit)
            data = await self._dial_data(peer, hello.token)
            host = _host_port(peer.tcp)[0]
            return await self._joined(number, sock, received, fit, data, hello.token, host)
        finally:
            _drop(received)

    async def _dial_data(self, peer: TransferAddress, token: bytes) -> socket.socket:
        loop = asyncio.get_running_loop()
        data = _tcp_socket()
        try:
            await loop.sock_connect(data, _host_port(peer.tcp))
            await loop.sock_sendall(data, DATA + token)
        except BaseException:
            data.close()
            raise
        data.setblocking(True)  # the copier waits in it; the loop never does
        return data

    async def _joined(
        self,
        number: int,
        sock: socket.socket,
        received: Received,
        fit: Fit,
        data: socket.socket,
        token: bytes,
        store_host: str | None,
    ) -> Contact:
        """Both connections stand; where a group carries the payload, meet in it."""
        hello = received.hello
        group = None
        if hello.transport in GROUP:
            try:
                group = await self._open_group(hello, token, store_host)
            except BaseException:
                data.close()
                raise
        self._latest[hello.worker.name] = hello.worker.incarnation
        return Contact(
            number=number,
            hello=hello,
            fit=fit,
            sock=sock,
            rest=received.rest,
            data=data,
            group=group,
        )

    async def _open_group(self, hello: Hello, token: bytes, store_host: str | None) -> Group:
        """`store_host`: where the called one's store is; None on its own side, as rank 0."""
        from .group import device_of, join_store, open_group

        config, within_s = self._config, self._meeting_s(hello.transport)

        def meet() -> Group:
            if store_host is None:
                assert self._store is not None, "listening for groups, it serves a store"
                store, rank = self._store[0], 0
            else:
                store, rank = join_store(store_host, hello.store, within_s), 1
            return open_group(
                store,
                token.hex(),
                rank,
                device=device_of(self._memory),
                host=config.host,
                open_s=within_s,
                stall_s=config.lease_s,
            )

        return await asyncio.get_running_loop().run_in_executor(self._meetings, meet)

    def _neighbour(self, number: int, sock: socket.socket, received: Received, fit: Fit) -> Contact:
        hello = received.hello
        memory = self._map(received)
        try:
            pidfd = peer_pidfd(sock)
        except OSError:
            memory.close()
            raise
        self._latest[hello.worker.name] = hello.worker.incarnation
        return Contact(
            number=number,
            hello=hello,
            fit=fit,
            sock=sock,
            rest=received.rest,
            memory=memory,
            pidfd=pidfd,
        )

    def _map(self, received: Received) -> PeerMemory:
        if received.hello.transport == "shm":
            return handshake.attach(received)
        from .device_memory import DeviceMemory, PeerDeviceMemory

        assert isinstance(self._memory, DeviceMemory), "only a GPU's worker has this way"
        hello = received.hello
        return PeerDeviceMemory(hello.handle, hello.pool_bytes, self._memory.gpu)

    def _fit(self, hello: Hello) -> Fit:
        self.check_incarnation(hello.worker)
        try:
            return handshake.fit_of(self._held, hello)
        except PeerRefused as error:
            raise PeerRefused(
                f"KV of {hello.worker} does not fit {self._worker}: {error}; serve the same "
                "checkpoint in the same dtype on both, in block sizes that divide one another"
            ) from None

    def _pick_up(self, sock: socket.socket) -> None:
        if len(self._answering) >= _MAX_PENDING:
            self.counters["call refused"] += 1
            sock.close()
            return
        task = asyncio.get_running_loop().create_task(self._answer(sock))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _answer(self, sock: socket.socket) -> None:
        """One call, until it is a contact, a data connection or hung up on."""
        kept = False
        try:
            async with asyncio.timeout(self._config.answer_s) as limit:
                preface = await handshake.read_exactly(sock, len(CONTROL))
                if preface == DATA and sock.family == socket.AF_INET:
                    kept = await self._answer_data(sock)
                elif preface == CONTROL:
                    await self._answer_control(sock, limit)
                    kept = True
        except (MalformedFrame, PeerRefused, OSError, ValueError, TimeoutError):
            self.counters["call refused"] += 1
        finally:
            if not kept:
                sock.close()

    async def _answer_data(self, sock: socket.socket) -> bool:
        token = await handshake.read_exactly(sock, TOKEN_BYTES)
        waiting = self._tokens.pop(token, None)
        if waiting is None or waiting.done():
            return False
        prepare(sock)
        sock.setblocking(True)
        waiting.set_result(sock)
        return True

    async def _answer_control(self, sock: socket.socket, limit: asyncio.Timeout) -> None:
        received = await handshake.hear(sock)
        try:
            try:
                fit = self._check_caller(sock, received.hello)
            except PeerRefused as error:
                await handshake.refuse(sock, str(error))
                raise
            within_s = self._meeting_s(received.hello.transport)
            limit.reschedule(asyncio.get_running_loop().time() + within_s)
            number = self._number()
            if sock.family == socket.AF_UNIX:
                contact = self._neighbour(number, sock, received, fit)
                try:
                    agreed = self._hello(number, received.hello.transport)
                    fd = self._memory.fd if agreed.transport == "shm" else None
                    await handshake.say(sock, agreed, fd)
                except OSError:
                    drop_contact(contact)
                    raise
            else:
                contact = await self._answer_tcp(number, sock, received, fit)
            self.contacts.append(contact)
            self.answered.set()
        finally:
            _drop(received)

    async def _answer_tcp(
        self, number: int, sock: socket.socket, received: Received, fit: Fit
    ) -> Contact:
        prepare(sock)
        token = secrets.token_bytes(TOKEN_BYTES)
        waiting: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()
        self._tokens[token] = waiting
        try:
            agreed = self._hello(number, received.hello.transport, token=token)
            await handshake.say(sock, agreed, None)
            data = await waiting
        finally:
            self._tokens.pop(token, None)
        return await self._joined(number, sock, received, fit, data, token, None)

    def _check_caller(self, sock: socket.socket, hello: Hello) -> Fit:
        if sock.family == socket.AF_UNIX and peer_uid(sock) != os.getuid():
            raise PeerRefused("another user's process; run both workers as one user")
        if hello.wants != self._worker:
            raise PeerRefused(
                f"this is {self._worker}, not {hello.wants}; look the address up anew"
            )
        if hello.transport not in self.ways or (
            (hello.transport in NEIGHBOUR) != (sock.family == socket.AF_UNIX)
        ):
            raise PeerRefused(
                f"{self._worker} takes KV by {' or '.join(self.ways)}, not by {hello.transport}; "
                "set transfer.transport alike on both sides"
            )
        return self._fit(hello)


def host_id() -> str:
    """Equal for processes that run under one kernel."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _tcp_socket() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)
    prepare(sock)
    return sock


def _host_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        raise PeerRefused(f"{address!r} is no host:port")
    return host, int(port)


def _drop(received: Received) -> None:
    """Close a descriptor that came along and was not taken."""
    if received.fd is not None:
        with contextlib.suppress(OSError):
            os.close(received.fd)
        received.fd = None
