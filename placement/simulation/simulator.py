"""The event loop: a workload served to its end by a simulated cluster, whose workers may die.

Deterministic: all chance is in the workload's seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from ...engine.errors import InvalidConfig
from ..workload.workload import Workload
from .cluster import SimulatedCluster
from .decode import SimulatedDecode
from .deployment import Deployment, Failure
from .fit_check import check_fit
from .prefill import SimulatedPrefill
from .run import Progress, Sample, SimulatedRun, StopRule

PROGRESS_EVERY = 1000  # arrivals

Worker = SimulatedPrefill | SimulatedDecode


def simulate(
    deployment: Deployment,
    workload: Workload,
    *,
    failures: Sequence[Failure] = (),
    stop: StopRule | None = None,
    sample_every_s: float = 0.0,
    progress: Progress | None = None,
    jump: bool = True,
) -> SimulatedRun:
    """Serve `workload` to its end. Deterministic: all chance is in the workload's seed.

    `sample_every_s` > 0 records how full workers are. `jump=False` takes every decode step for
    itself, the readable reference that jumps are tested against. Raises InvalidConfig for a
    request that fits into no worker.
    """
    check_fit(deployment, workload)
    simulator = Simulator(deployment, workload, stop, jump=jump)
    for failure in failures:
        simulator.plan_failure(failure)
    if sample_every_s:
        simulator.sample(0.0, sample_every_s)
    return simulator.run(progress)


class Simulator(SimulatedCluster):
    """A cluster under load: what arrives, who dies, and what is seen of it."""

    def __init__(
        self, deployment: Deployment, workload: Workload, stop: StopRule | None, *, jump: bool
    ) -> None:
        super().__init__(deployment, workload, stop, jump=jump)
        self._gone: list[Worker] = []  # incarnations that died
        self._arrived = 0
        self._samples: list[Sample] = []

    def run(self, progress: Progress | None) -> SimulatedRun:
        agenda, notes = self.agenda, self.notes
        for row, arrival_s in enumerate(notes.arrival_s):
            agenda.run_before(arrival_s)
            self._arrived = row + 1
            self.arrive(row, arrival_s)
            if notes.hopeless:
                break
            if progress is not None and row % PROGRESS_EVERY == 0:
                progress(row / len(notes.arrival_s))
        while agenda.next_s < inf and not notes.hopeless:
            agenda.step()
        if progress is not None:
            progress(1.0)
        workers = [*self.prefill, *self.decode, *self._gone]
        return SimulatedRun(
            **notes.columns(),
            workers=tuple(worker.use() for worker in workers),
            samples=tuple(self._samples),
            duration_s=agenda.now_s,
            stopped=notes.hopeless,
        )

    def plan_failure(self, failure: Failure) -> None:
        """Raises InvalidConfig for a worker that is not there."""
        names = [worker.model.name for worker in (*self.prefill, *self.decode)]
        if failure.worker not in names:
            raise InvalidConfig(
                "failure.worker", f"there is no {failure.worker!r}", f"use one of {names}"
            )
        self.agenda.at(failure.at_s, self._kill, failure)
        if failure.back_s is not None:
            self.agenda.at(failure.back_s, self._revive, failure)

    def sample(self, now_s: float, every_s: float) -> None:
        """How full each worker is now, and again later while anything is to come."""
        for worker in (*self.prefill, *self.decode):
            loads = [scheduler.load() for scheduler in worker.schedulers()]
            self._samples.append(
                Sample(
                    at_s=now_s,
                    name=worker.model.name,
                    running=sum(load.running for load in loads),
                    waiting=sum(load.waiting for load in loads),
                    used_blocks=sum(load.blocks.total - load.blocks.free for load in loads),
                )
            )
        if self._live or self._arrived < len(self.notes.arrival_s):
            self.agenda.at(now_s + every_s, self.sample, every_s)

    def _kill(self, now_s: float, failure: Failure) -> None:
        worker = self._find(failure.worker)
        if not worker.alive:
            return
        worker.alive = False
        if isinstance(worker, SimulatedPrefill):
            for name in list(worker.members):
                self._lose(self._attempts[name], failure.worker, now_s)
            return
        for lane in worker.lanes:
            lane.stop(now_s)
        for name in [name for lane in worker.lanes for name in lane.members]:
            attempt = self._attempts[name]
            if attempt.prefill is not None and not attempt.handed:
                self._cancel(attempt, now_s)  # only its grant is lost: the prompt will be parked
                attempt.lane = None
            else:
                self._lose(attempt, failure.worker, now_s)

    def _revive(self, now_s: float, failure: Failure) -> None:
        worker = self._find(failure.worker)
        if worker.alive:
            return
        self._gone.append(worker)
        if isinstance(worker, SimulatedPrefill):
            self.prefill[self.prefill.index(worker)] = self._new_prefill(worker.model)
        else:
            self.decode[self.decode.index(worker)] = self._new_decode(worker.model)

    def _find(self, name: str) -> Worker:
        return next(w for w in (*self.prefill, *self.decode) if w.model.name == name)
