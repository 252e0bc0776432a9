"""Control between a worker's leader and its followers: one connection each, one message a step.

It also tells who lives: a follower beats while it lives, and its connection ends with its process.
A follower whose leader's connection ends has nothing left to do.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

from .columns import Columns
from .errors import InvalidConfig, RankLost

BEAT_S = 0.25
SILENCE_S = 5.0  # a follower that says nothing this long is lost
_LENGTH = struct.Struct("<I")
_STEP = struct.Struct("<q")


class RankHost:
    """The leader's door while its followers come. `address` is what they are given."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.host = host
        self.note: dict[str, Any] = {}  # what else the followers are told
        self._listener = socket.create_server((host, 0))
        self.secret = secrets.token_hex(8)
        self.address = f"{host}:{self._listener.getsockname()[1]}/{self.secret}"

    def welcome(self, num_ranks: int, message: dict[str, Any], timeout_s: float) -> Followers:
        """Wait for ranks 1 to `num_ranks - 1` and hand each the message. Raises RankLost."""
        found: dict[int, socket.socket] = {}
        deadline_s = time.monotonic() + timeout_s
        with self._listener:
            while len(found) < num_ranks - 1:
                self._listener.settimeout(max(0.01, deadline_s - time.monotonic()))
                try:
                    connection, _ = self._listener.accept()
                    rank = self._greet(connection)
                except TimeoutError:
                    missing = sorted(set(range(1, num_ranks)) - found.keys())
                    _close(found.values())
                    raise RankLost(f"ranks {missing} did not come in {timeout_s:g} s") from None
                if rank is None or rank in found or not 0 < rank < num_ranks:
                    connection.close()  # no follower of this worker
                else:
                    _send(connection, json.dumps(message | {"note": self.note}).encode())
                    found[rank] = connection
        return Followers([found[rank] for rank in sorted(found)])

    def close(self) -> None:
        self._listener.close()

    def _greet(self, connection: socket.socket) -> int | None:
        connection.settimeout(1.0)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            hello = json.loads(_receive(connection) or b"")
            rank, secret = int(hello["rank"]), str(hello["secret"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        connection.settimeout(None)
        return rank if secrets.compare_digest(secret, self.secret) else None


class Followers:
    """The leader's connections to its followers, by rank. Steps are sent by the compute thread,
    `check` may come from any."""

    def __init__(self, connections: list[socket.socket]) -> None:
        self._connections = connections
        self._heard_s = [time.monotonic()] * len(connections)
        self._buffers = [bytearray() for _ in connections]
        self._lock = threading.Lock()

    def wait_ready(self, timeout_s: float) -> None:
        """Until every follower has loaded its shard. Raises RankLost, or what one refused with."""
        waiting = set(range(len(self._connections)))
        deadline_s = time.monotonic() + timeout_s
        while waiting:
            if time.monotonic() > deadline_s:
                ranks = [index + 1 for index in sorted(waiting)]
                raise RankLost(f"ranks {ranks} were not ready in {timeout_s:g} s")
            for index, frames in self._listen():
                for frame in filter(None, frames):
                    _raise_refusal(json.loads(frame))
                    waiting.discard(index)
            time.sleep(0.005)

    def send(self, step: int, columns: Columns) -> None:
        """The next step and its number, to all. Raises RankLost."""
        self.check()
        message = _STEP.pack(step) + columns.to_bytes()
        try:
            for connection in self._connections:
                _send(connection, message)
        except OSError as error:
            raise RankLost(f"a rank of this worker is gone: {error}") from error

    def check(self) -> None:
        """Raises RankLost when a follower has died or is silent."""
        self._listen()
        now_s = time.monotonic()
        for index, heard_s in enumerate(self._heard_s):
            if now_s - heard_s > SILENCE_S:
                raise RankLost(f"rank {index + 1} was silent for {now_s - heard_s:.1f} s")

    def close(self) -> None:
        """Let the followers go. Idempotent."""
        _close(self._connections)

    def _listen(self) -> list[tuple[int, list[bytes]]]:
        """What each follower said since; empty frames are beats."""
        said = []
        with self._lock:
            for index, connection in enumerate(self._connections):
                buffer = self._buffers[index]
                with contextlib.suppress(BlockingIOError):
                    while data := _read_now(connection, index + 1):
                        buffer += data
                        self._heard_s[index] = time.monotonic()
                said.append((index, _take(buffer)))
        return said


class LeaderLink:
    """A follower's connection to its leader."""

    def __init__(self, connection: socket.socket, message: dict[str, Any]) -> None:
        self.message = message  # what the leader welcomed this rank with
        self.own_host = connection.getsockname()[0]  # as the leader reaches it
        self.leader_host = connection.getpeername()[0]
        self._connection = connection
        self._lock = threading.Lock()
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def ready(self, refusal: InvalidConfig | None = None) -> None:
        """The shard is loaded, or this is why not."""
        answer = {}
        if refusal is not None:
            answer = {"key": refusal.where, "reason": refusal.reason, "remedy": refusal.remedy}
        with contextlib.suppress(OSError), self._lock:  # a leader that is gone ends `steps`
            _send(self._connection, json.dumps(answer).encode())

    def steps(self) -> Iterator[tuple[int, Columns]]:
        """Steps to compute with their numbers, until the leader closes or dies."""
        while True:
            try:
                frame = _receive(self._connection)
            except OSError:
                return
            if frame is None:
                return
            yield _STEP.unpack_from(frame)[0], Columns.from_bytes(frame[_STEP.size :])

    def close(self) -> None:
        _close([self._connection])

    def _beat(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                with self._lock:
                    _send(self._connection, b"")
                time.sleep(BEAT_S)


def join_leader(address: str, rank: int, timeout_s: float) -> LeaderLink:
    """Called by follower `rank` with its leader's `RankHost.address`. Raises RankLost."""
    place, _, secret = address.partition("/")
    host, _, port = place.rpartition(":")
    try:
        connection = socket.create_connection((host, int(port)), timeout_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        _send(connection, json.dumps({"rank": rank, "secret": secret}).encode())
        frame = _receive(connection)
    except OSError as error:
        raise RankLost(f"the leader at {place} does not answer: {error}") from error
    if frame is None:
        raise RankLost(f"the leader at {place} hung up")
    connection.settimeout(None)
    return LeaderLink(connection, json.loads(frame))


def _raise_refusal(answer: dict[str, str]) -> None:
    if answer:
        raise InvalidConfig(answer["key"], answer["reason"], answer["remedy"])


def _send(connection: socket.socket, frame: bytes) -> None:
    connection.sendall(_LENGTH.pack(len(frame)) + frame)


def _receive(connection: socket.socket) -> bytes | None:
    """The next frame; None when the peer has closed."""
    header = _exactly(connection, _LENGTH.size)
    return None if header is None else _exactly(connection, _LENGTH.unpack(header)[0])


def _exactly(connection: socket.socket, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            return None
        data += part
    return bytes(data)


def _read_now(connection: socket.socket, rank: int) -> bytes:
    """What is there; raises BlockingIOError when nothing is, RankLost at the end."""
    try:
        data = connection.recv(4096, socket.MSG_DONTWAIT)
    except BlockingIOError:
        raise
    except OSError as error:
        raise RankLost(f"rank {rank} is gone: {error}") from error
    if not data:
        raise RankLost(f"rank {rank} has ended")
    return data


def _take(buffer: bytearray) -> list[bytes]:
    """The complete frames, off the front of `buffer`."""
    frames = []
    while len(buffer) >= _LENGTH.size:
        end = _LENGTH.size + _LENGTH.unpack_from(buffer)[0]
        if len(buffer) < end:
            break
        frames.append(bytes(buffer[_LENGTH.size : end]))
        del buffer[:end]
    return frames


def _close(connections: Any) -> None:
    for connection in connections:
        with contextlib.suppress(OSError):  # it may be closed by the other side
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()
