"""A worker without a file descriptor left serves whom it knows, and others once it has some."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from phasewise.engine.request import TransferAddress
from phasewise.kv_transfer.events import Outcome, PeerUnavailable

from .harness import CALM, Here, bounded, here

every = pytest.mark.parametrize("transport", ["shm", "tcp"])


@contextlib.contextmanager
def descriptors(count: int) -> Iterator[None]:
    """Of this process's, so many more can be opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.dup(0) for _ in range(count + 1)]  # the lowest there are, in order
    for fd in free:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def open_socket(transport: str) -> socket.socket:
    family = socket.AF_UNIX if transport == "shm" else socket.AF_INET
    return socket.socket(family, socket.SOCK_STREAM)


def call(caller: socket.socket, address: TransferAddress) -> None:
    """The kernel takes the call; whoever listens has not picked it up."""
    host, _, port = address.tcp.rpartition(":")
    caller.connect("\0" + address.shm if address.shm else (host, int(port)))


async def moves(receiver: Here, sender: Here, source: TransferAddress) -> None:
    lease = sender.endpoint.new_lease()
    sender.endpoint.park(lease, [3], 9, 1)
    await receiver.endpoint.grant(source, lease, [5], 1)
    assert (await receiver.ended()).outcome is Outcome.COMMITTED
    assert (await sender.ended()).outcome is Outcome.COMMITTED


@every
@bounded
async def test_calls_that_find_no_descriptor_wait_while_known_peers_are_served(
    transport: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = {**CALM, "transport": transport}
    broken: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: broken.append(context))
    async with (
        here("decode", 1, config) as (decode, address),
        here("known", 2, config) as (known, back),
        here("late", 3, config) as (late, there),
    ):
        await moves(decode, known, back)
        caller = open_socket(transport)
        with caller, caplog.at_level(logging.WARNING):
            with descriptors(0):
                call(caller, address)
                for _ in range(3):  # it is served, turn by turn
                    await moves(decode, known, back)
                    await asyncio.sleep(0.2)
                assert not broken
                assert [record.levelname for record in caplog.records] == ["WARNING"]
                assert "file descriptor" in caplog.text
            assert decode.endpoint.counters()["no descriptor for a call"] < 20
        await late.endpoint.connect(address)
        await moves(decode, late, there)
        assert not broken and len(caplog.records) == 1


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("count", range(7))
@every
@bounded
async def test_a_meeting_that_runs_out_of_descriptors_gives_back_those_it_took(
    transport: str, count: int
) -> None:
    """Both ends are in this process, and take theirs from the same few."""
    config = {**CALM, "transport": transport, "answer_s": 0.3}
    async with here("decode", 1, config) as (_, address), here("p", 2, config) as (p, _):
        before = open_descriptors()
        with descriptors(count), contextlib.suppress(PeerUnavailable):
            await p.endpoint.connect(address)
        if not p.endpoint.pairs():
            async with asyncio.timeout(5):
                while open_descriptors() != before:
                    await asyncio.sleep(0.02)
