"""Start, serve, drain, die: what `phasewise serve` leaves behind, which is nothing."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from phasewise.cluster.client import Client
from phasewise.engine.errors import Unavailable
from phasewise.tests.serving.launched import Launched, all_end

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # a busy machine starts slowly
DIE_S = 30.0
WAIT_S = 120.0


def can_bind(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, int(port)))
        except OSError:
            return False
    return True


def generate(client: Client, num_tokens: int = 8) -> list[int]:
    stream = client.generate(
        token_ids=[5, 6, 7] * 20, max_tokens=num_tokens, temperature=0, ignore_eos=True
    )
    return [token for output in stream for token in output.token_ids]


def wait_for(condition: Callable[[], bool], within_s: float = WAIT_S) -> bool:
    deadline_s = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.1)
    return True


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Where run folders go."""
    with TemporaryDirectory(prefix="pw", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Callable[..., Launched]]:
    """`running()`: the cluster that runs, or a new one where none does: a start takes seconds."""
    started: list[Launched] = []

    def get(*overrides: str) -> Launched:
        if not started or started[-1].process.poll() is not None:
            started.append(Launched(overrides, folder=folder))
            started[-1].wait_ready()
        return started[-1]

    yield get
    for launched in started:
        if launched.process.poll() is None:
            launched.kill()


def test_a_cluster_serves_through_prefill_and_decode(running: Callable[..., Launched]) -> None:
    with running().client() as client:
        assert len(generate(client)) == 8
        status = client.status()
    assert {row.name: row.state for row in status.workers} == {
        "prefill-0": "ready",
        "decode-0": "ready",
    }
    assert sum(row.blocks_active + row.blocks_leased for row in status.workers) == 0


def test_a_killed_worker_comes_back_as_a_new_incarnation(running: Callable[..., Launched]) -> None:
    with running().client() as client:
        before = generate(client)
        decode = next(row for row in client.status().workers if row.role == "decode")
        os.kill(decode.pid, signal.SIGKILL)

        def is_back() -> bool:
            row = next((r for r in client.status().workers if r.role == "decode"), None)
            return row is not None and row.state == "ready" and row.incarnation > decode.incarnation

        assert wait_for(is_back)
        assert generate(client) == before


def test_a_killed_serve_takes_everything_along_and_the_next_start_sweeps(
    running: Callable[..., Launched], folder: Path
) -> None:
    """What it left is gone when the next one has ended: see the test below."""
    first = running()
    watched = first.descendants()
    assert len(watched) >= 4
    first.kill()
    assert all_end(watched, DIE_S)
    abandoned = folder / "phasewise-abandoned"  # as if the reaper was killed too
    abandoned.mkdir()
    (abandoned / "lock").touch()
    second = running(f"gateway.grpc={first.address}")
    assert second.address == first.address
    assert not abandoned.exists()


def test_sigterm_finishes_what_runs_and_leaves_nothing(
    running: Callable[..., Launched], folder: Path
) -> None:
    launched = running()
    tokens: list[int] = []
    started = threading.Event()

    def read() -> None:
        with launched.client() as client:
            for output in client.generate(
                token_ids=[5, 6, 7], max_tokens=400, temperature=0, ignore_eos=True
            ):
                tokens.extend(output.token_ids)
                started.set()

    def refuses() -> bool:
        try:
            generate(client, 1)
        except Unavailable:
            return True
        return False

    reader = threading.Thread(target=read)
    reader.start()
    assert started.wait(WAIT_S)
    watched = launched.descendants()
    launched.signal(signal.SIGTERM)
    with launched.client() as client:
        assert wait_for(refuses)
    reader.join(WAIT_S)
    assert len(tokens) == 400
    assert launched.wait() == 0, launched.error_text()
    assert all_end(watched, DIE_S)
    assert can_bind(launched.address)
    assert can_bind(launched.http)
    assert os.listdir(folder) == []


def test_a_taken_port_is_named_and_nothing_is_started() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        launched = Launched([f"gateway.grpc=127.0.0.1:{port}"])
        assert launched.wait() == 2
    assert "gateway.grpc" in launched.error_text()
    assert str(port) in launched.error_text()


def test_more_devices_than_there_are_is_one_named_error() -> None:
    launched = Launched(["decode.threads=4096"])
    assert launched.wait() == 2
    assert "decode.replicas" in launched.error_text()
    assert "4096" in launched.error_text()
    assert "Ray has" in launched.error_text()
