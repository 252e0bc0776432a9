"""A worker that beats but never steps: lost once its step is older than any honest one."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from phasewise.cluster.fleet import Fleet
from phasewise.cluster.resources import worker_specs
from phasewise.cluster.supervisor import RestartPolicy, Supervisor
from phasewise.cluster.worker_link import LinkTimes, Lost, WorkerLink
from phasewise.configs.schema import PacedConfig
from phasewise.engine.errors import Unavailable
from phasewise.engine.request import WorkerId
from phasewise.placement.latency.step_profile import ProfilePoint, StepProfile, write_profile
from phasewise.tests.serving.in_process import cluster

from .fake_worker import FakeWorker, Run, Serving, expected
from .routed import admitted, outputs, tokens
from .test_supervisor import CONFIG, LoopLauncher, is_ready, until
from .test_worker_link import message_of, stream_of

TINY = Path(__file__).parents[2] / "models" / "tiny"
STEP_S = 30.0  # as the workers here tell it; nobody waits for it
TIMES = LinkTimes(connect_s=10.0, heartbeat_s=10.0, step_s=STEP_S)


def hang(worker: FakeWorker, age_s: float = STEP_S + 1) -> None:
    worker.stalled, worker.step_age_s = True, age_s


async def linked(worker: FakeWorker) -> WorkerLink:
    link = WorkerLink(worker.address, TIMES, time.monotonic)
    await link.connect()
    return link


def test_requests_on_a_worker_whose_step_hangs_are_lost_with_the_reason(run: Run) -> None:
    async def scenario() -> None:
        worker = await FakeWorker("decode", "d").start()
        link = await linked(worker)
        stream = stream_of([1], 500)
        slot = link.submit(stream, message_of(stream), None)
        hang(worker)
        outcome = await slot.outcome
        assert isinstance(outcome, Lost)
        assert "step has run for 31 s; gateway.step_timeout_s allows 30 s" in outcome.reason
        with pytest.raises(Unavailable, match="step_timeout_s"):
            await linked(worker)  # it answers, and hangs still
        await link.close("done")
        await worker.stop()

    run(scenario())


def test_a_long_step_within_its_bound_is_waited_for(run: Run) -> None:
    async def scenario() -> None:
        worker = await FakeWorker("decode", "d").start()
        link = await linked(worker)
        stream = stream_of([1], 5)
        hang(worker, STEP_S - 1)
        slot = link.submit(stream, message_of(stream), None)
        await asyncio.sleep(0.1)
        assert not slot.outcome.done()
        worker.stalled = False
        assert (await slot.outcome).reason == "length"
        await link.close("done")
        await worker.stop()

    run(scenario())


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_streams_of_a_worker_whose_step_hangs_go_on_unbroken_elsewhere(
    run: Run, serving: Serving, role: str
) -> None:
    async def scenario() -> None:
        async with serving(prefill=2, decode=2, step_s=0.02) as served:
            gateway, prefills, decodes = served
            pending = [
                asyncio.create_task(outputs(gateway, admitted(f"r{i}", [i]))) for i in range(6)
            ]
            await asyncio.sleep(0.05)
            hang((prefills if role == "prefill" else decodes)[0], 1e6)
            for i, pieces in enumerate(await asyncio.gather(*pending)):
                assert tokens(pieces) == expected([i], 8)
            row = next(w for w in gateway.fleet.workers if w.name == f"{role}-0")
            while "a model step has run" not in row.reason:
                await asyncio.sleep(0.005)

    run(scenario())


async def supervised(check: Any) -> None:
    loop = asyncio.get_running_loop()
    fleet = Fleet(TIMES, loop.time)
    launcher = LoopLauncher()
    policy = RestartPolicy(max_restarts=3)
    supervisor = Supervisor(launcher, fleet, policy, loop.time, silence_s=0.5)
    try:
        await check(supervisor, launcher, fleet)
    finally:
        await supervisor.stop(0.0)
        await fleet.close()


def test_a_worker_whose_step_hangs_is_killed_and_replaced(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def check(supervisor: Supervisor, launcher: LoopLauncher, fleet: Fleet) -> None:
        await supervisor.start(worker_specs(CONFIG, 2))
        await until(lambda: is_ready(fleet, "decode"))
        hang(launcher.live[WorkerId(name="decode-0", incarnation=1)])
        await until(lambda: WorkerId(name="decode-0", incarnation=2) in launcher.live)
        await until(lambda: is_ready(fleet, "decode"))
        assert WorkerId(name="decode-0", incarnation=1) not in launcher.live
        assert "a model step has run for 31 s" in caplog.text

    asyncio.run(asyncio.wait_for(supervised(check), 60))


def slow_profile(path: Path) -> PacedConfig:
    """Every step takes a second."""
    points = tuple(
        ProfilePoint(
            phase=phase, tp=1, pp=1, new_tokens=tokens, context=context, batch=1, seconds=1.0
        )
        for phase, tokens in (("prefill", 16), ("prefill", 64), ("decode", 1))
        for context in (0, 64)
    )
    write_profile(
        StepProfile(hardware="slow", model="tiny", dtype="", origin="", points=points), path
    )
    return PacedConfig(profile=path)


def test_a_real_worker_tells_how_old_its_step_is_while_it_runs(tmp_path: Path) -> None:
    """Its loop beats beside the compute thread, and says what the gateway needs."""

    async def scenario() -> None:
        paced = slow_profile(tmp_path / "slow.json")
        async with cluster(TINY, prefill=0, paced=paced) as running:
            (worker,) = running.gateway.fleet.workers
            times = replace(TIMES, step_s=0.2)
            link = WorkerLink(worker.address, times, time.monotonic)
            await link.connect()
            stream = stream_of([1, 2, 3])
            slot = link.submit(stream, message_of(stream), None)
            outcome = await slot.outcome
            assert isinstance(outcome, Lost) and "a model step has run" in outcome.reason
            await link.close("done")

    asyncio.run(asyncio.wait_for(scenario(), 60))
