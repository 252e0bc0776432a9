"""A launched cluster, Ray and all, on a checkpoint it has never seen: exact, and clean after."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
from phasewise.engine.errors import Unavailable
from phasewise.tests.engine.test_exactness import Case
from phasewise.tests.serving.launched import MAIN, Launched

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

LENGTHS = (1, 15, 16, 17, 500)
PROMPTLY_S = 10.0  # clients are told before a worker could be back and ready


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def cluster(case: Case) -> Iterator[Launched]:
    settings = ("decode.local_prefill=never", "kv.memory=64MiB", "transfer.mode=push")
    launched = Launched([f"model.path={case.directory}", *settings])
    launched.wait_ready()
    yield launched
    assert launched.stop() == 0


def _in_threads(count: int, work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a request never ended"


def _used_blocks(launched: Launched) -> dict[str, int]:
    """As `phasewise status --json` shows them."""
    command = [sys.executable, "-c", MAIN, "status", "--address", launched.address, "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return {
        worker["name"]: worker["blocks_used"] for worker in json.loads(answer.stdout)["workers"]
    }


def _prompt(length: int) -> list[int]:
    return [random.Random(length).randrange(131) for _ in range(length)]


def test_a_checkpoint_it_has_never_seen_is_served_exactly(case: Case, cluster: Launched) -> None:
    expected = {length: case.generate(_prompt(length), 12) for length in LENGTHS}
    got: dict[int, list[int]] = {}

    def one(index: int) -> None:
        length = LENGTHS[index % len(LENGTHS)]
        with cluster.client() as client:
            outputs = client.generate(token_ids=_prompt(length), max_tokens=12, temperature=0)
            got[index] = [token for output in outputs for token in output.token_ids]

    _in_threads(15, one)
    assert got == {index: expected[LENGTHS[index % len(LENGTHS)]] for index in range(15)}


def test_two_hundred_requests_with_random_cancels_leave_no_block_in_use(cluster: Launched) -> None:
    draw = random.Random(0)
    plans = [
        (draw.randrange(1, 200), draw.randrange(1, 50), draw.randrange(60)) for _ in range(200)
    ]
    ends: list[str] = []

    def one(index: int) -> None:
        length, wanted, keep = plans[index]
        count = 0
        outputs = client.generate(token_ids=_prompt(length), max_tokens=wanted, temperature=0)
        for output in outputs:
            count += len(output.token_ids)
            if output.finish_reason:
                ends.append(output.finish_reason)
            elif count >= keep:
                ends.append("cancelled")
                break
        del outputs  # leaving the stream behind cancels its request

    with cluster.client() as client:
        _in_threads(200, one)
    assert len(ends) == 200
    deadline_s = time.monotonic() + 120
    while any(used := _used_blocks(cluster).values()):
        assert time.monotonic() < deadline_s, used
        time.sleep(0.2)


def _end_of(launched: Launched, started: threading.Event) -> tuple[str, float]:
    """How a long stream ended, and when."""
    try:
        with launched.client() as client:
            for output in client.generate(token_ids=[5, 6], max_tokens=400, temperature=0):
                started.set()
                if output.finish_reason:
                    return output.finish_reason, time.monotonic()
    except Unavailable:
        return "unavailable", time.monotonic()
    return "nothing", time.monotonic()


def test_requests_of_a_killed_worker_end_and_the_next_ones_are_served(cluster: Launched) -> None:
    started = threading.Event()
    ends: list[tuple[str, float]] = []
    thread = threading.Thread(target=lambda: ends.append(_end_of(cluster, started)))
    thread.start()
    assert started.wait(60)
    _kill(cluster, "decode-0")
    killed_s = time.monotonic()
    thread.join(60)
    (reason, ended_s), *_ = ends
    assert reason == "unavailable"
    assert ended_s - killed_s < PROMPTLY_S
    _wait_served(cluster)


def _kill(launched: Launched, name: str) -> None:
    with launched.client() as client:
        pids = {worker.name: worker.pid for worker in client.status().workers}
    subprocess.run(["kill", "-9", str(pids[name])], check=True)


def _wait_served(launched: Launched) -> None:
    deadline_s = time.monotonic() + 120
    with launched.client() as client:
        while True:
            try:
                tokens: Sequence[int] = [
                    token
                    for output in client.generate(token_ids=[5], max_tokens=3, temperature=0)
                    for token in output.token_ids
                ]
            except Unavailable:
                assert time.monotonic() < deadline_s
                time.sleep(0.2)
            else:
                assert len(tokens) == 3
                return
