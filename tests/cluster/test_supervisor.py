"""The supervisor keeps workers alive, whatever launches them."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from phasewise.cluster.fleet import Fleet
from phasewise.cluster.resources import worker_specs
from phasewise.cluster.spec import WorkerSpec
from phasewise.cluster.supervisor import WINDOW_S, RestartPolicy, Supervisor
from phasewise.cluster.worker_actor import LaunchError, Started
from phasewise.cluster.worker_link import LinkTimes
from phasewise.configs.schema import ClusterConfig, ModelConfig
from phasewise.engine.request import WorkerId
from phasewise.tests.cluster.fake_worker import FakeWorker

CONFIG = ClusterConfig(model=ModelConfig(path=Path("nowhere")))


class LoopLauncher:
    """Workers are servers on the test's own loop."""

    def __init__(self) -> None:
        self.live: dict[WorkerId, FakeWorker] = {}
        self.deaths: dict[WorkerId, asyncio.Event] = defaultdict(asyncio.Event)
        self.failures = 0  # starts that are to fail
        self.failure: Exception = LaunchError("no memory")
        self.attempts: list[WorkerId] = []

    async def start(self, spec: WorkerSpec) -> Started:
        self.attempts.append(spec.worker)
        if self.failures:
            self.failures -= 1
            raise self.failure
        worker = FakeWorker(spec.role, spec.worker.name, step_s=0.002)
        await worker.start()
        self.live[spec.worker] = worker
        return Started(address=worker.address, pid=1, host="")

    async def wait_death(self, worker: WorkerId) -> str:
        await self.deaths[worker].wait()
        return "died"

    async def stop(self, worker: WorkerId, drain_s: float) -> None:
        server = self.live.pop(worker, None)
        if server is not None:
            await server.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


async def supervised(check: Any, max_restarts: int = 3) -> None:
    loop = asyncio.get_running_loop()
    fleet = Fleet(LinkTimes(heartbeat_s=10.0), loop.time)
    launcher = LoopLauncher()
    policy = RestartPolicy(max_restarts=max_restarts)
    supervisor = Supervisor(launcher, fleet, policy, loop.time, silence_s=0.5)
    try:
        await check(supervisor, launcher, fleet)
    finally:
        await supervisor.stop(0.0)
        await fleet.close()
        assert not launcher.live


def run(check: Any, **options: Any) -> None:
    asyncio.run(asyncio.wait_for(supervised(check, **options), 60))


def is_ready(fleet: Fleet, role: str) -> bool:
    return len(fleet.ready(role)) == 1


def test_a_dead_worker_is_replaced_by_its_next_incarnation() -> None:
    async def check(supervisor: Supervisor, launcher: LoopLauncher, fleet: Fleet) -> None:
        await supervisor.start(worker_specs(CONFIG, 2))
        await until(lambda: is_ready(fleet, "decode") and is_ready(fleet, "prefill"))
        first = WorkerId(name="decode-0", incarnation=1)
        address = fleet.ready("decode")[0].address
        launcher.deaths[first].set()
        await until(lambda: WorkerId(name="decode-0", incarnation=2) in launcher.live)
        await until(lambda: is_ready(fleet, "decode"))
        assert first not in launcher.live
        assert fleet.ready("decode")[0].address != address
        assert fleet.ready("decode")[0].restarts == 1
        assert WorkerId(name="prefill-0", incarnation=1) in launcher.live

    run(check)


def test_a_silent_worker_is_killed_and_replaced() -> None:
    async def check(supervisor: Supervisor, launcher: LoopLauncher, fleet: Fleet) -> None:
        await supervisor.start(worker_specs(CONFIG, 2))
        await until(lambda: is_ready(fleet, "decode"))
        await launcher.live[WorkerId(name="decode-0", incarnation=1)].stop()  # no death is told
        await until(lambda: WorkerId(name="decode-0", incarnation=2) in launcher.live)
        await until(lambda: is_ready(fleet, "decode"))

    run(check)


def test_a_start_that_fails_is_tried_again_under_a_new_incarnation() -> None:
    async def check(supervisor: Supervisor, launcher: LoopLauncher, fleet: Fleet) -> None:
        await supervisor.start(worker_specs(CONFIG, 2))
        launcher.failures = 1
        launcher.deaths[WorkerId(name="prefill-0", incarnation=1)].set()
        await until(lambda: WorkerId(name="prefill-0", incarnation=3) in launcher.live)
        await until(lambda: is_ready(fleet, "prefill"))

    run(check)


def test_a_launcher_that_breaks_is_told_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    async def check(supervisor: Supervisor, launcher: LoopLauncher, fleet: Fleet) -> None:
        await supervisor.start(worker_specs(CONFIG, 2))
        launcher.failures, launcher.failure = 1, RuntimeError("no connection to the launcher")
        launcher.deaths[WorkerId(name="prefill-0", incarnation=1)].set()
        await until(lambda: WorkerId(name="prefill-0", incarnation=3) in launcher.live)
        assert "no connection to the launcher" in caplog.text

    run(check)


def test_the_first_start_fails_as_a_whole() -> None:
    async def check(supervisor: Supervisor, launcher: LoopLauncher, fleet: Fleet) -> None:
        launcher.failures = 1
        with pytest.raises(LaunchError):
            await supervisor.start(worker_specs(CONFIG, 2))
        assert len(launcher.attempts) == 2
        assert not fleet.workers

    run(check)


def test_nothing_is_restarted_where_the_file_says_so(caplog: pytest.LogCaptureFixture) -> None:
    async def check(supervisor: Supervisor, launcher: LoopLauncher, fleet: Fleet) -> None:
        await supervisor.start(worker_specs(CONFIG, 2))
        launcher.deaths[WorkerId(name="decode-0", incarnation=1)].set()
        await until(lambda: "stays down" in caplog.text)
        assert len(launcher.attempts) == 2

    run(check, max_restarts=0)


@given(
    st.integers(1, 5),
    st.lists(st.floats(0, 200), min_size=1, max_size=12).map(sorted),
)
def test_restarts_never_come_faster_than_the_limit(limit: int, gaps: list[float]) -> None:
    policy = RestartPolicy(max_restarts=limit)
    now_s, deaths, starts = 0.0, [], []
    for gap in gaps:
        now_s += gap % 20
        deaths.append(now_s)
        delay = policy.delay_s(deaths, now_s)
        assert delay is not None
        assert delay >= 0
        now_s += delay
        starts.append(now_s)
    for first, last in zip(starts, starts[limit:], strict=False):
        assert last - first >= 0
    for index, start in enumerate(starts):
        in_window = [death for death in deaths[: index + 1] if start - death < WINDOW_S - 1e-6]
        assert len(in_window) <= limit


def test_one_death_costs_no_wait_and_more_of_them_double_it() -> None:
    policy = RestartPolicy(max_restarts=5)
    assert policy.delay_s([10.0], 10.0) == 0
    assert policy.delay_s([9.0, 10.0], 10.0) == 0.5
    assert policy.delay_s([8.0, 9.0, 10.0], 10.0) == 1.0
    assert policy.delay_s([8.0], 8.0 + WINDOW_S) == 0
