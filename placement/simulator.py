"""The event loop: arrivals, steps, transfers and deaths, over the schedulers that run live.

The schedulers and the routing policies are the live classes themselves; what is written here
is only what surrounds them: the router's bookkeeping, and time.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

from ..engine.errors import InvalidConfig
from ..engine.routing import POLICIES
from .agenda import Agenda
from .deployment import Deployment, Failure
from .simulated_decode import SimulatedDecode
from .simulated_prefill import SimulatedPrefill
from .simulated_request import Attempt, Notes, RequestMaker
from .simulated_run import Progress, Sample, SimulatedRun, StopRule
from .simulated_transfer import Transfers
from .workload import Workload

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


def check_fit(deployment: Deployment, workload: Workload) -> None:
    """Refuse what live admission refuses: a request that some worker could never hold."""
    room = min(
        [
            worker.num_blocks // worker.latency.pipeline_parallel * deployment.block_size
            for worker in deployment.decode
        ]
    )
    prompt_room = min(
        [worker.num_blocks * deployment.block_size for worker in deployment.prefill], default=room
    )
    totals = workload.prompt_tokens.astype("int64") + workload.output_tokens
    for tokens, limit, what in (
        (totals, deployment.max_model_len, "max_model_len"),
        (totals, room, "a decode worker's KV pool"),
        (workload.prompt_tokens, prompt_room, "a prefill worker's KV pool"),
    ):
        longest = int(tokens.argmax())
        if tokens[longest] > limit:
            raise InvalidConfig(
                f"workload request {longest}",
                f"{int(tokens[longest])} tokens exceed the {limit} of {what}",
                "leave such requests out (workload.max_total_tokens) or give more KV memory",
            )


class Simulator:
    """A cluster at one moment: the router's view of it, and the agenda."""

    def __init__(
        self, deployment: Deployment, workload: Workload, stop: StopRule | None, *, jump: bool
    ) -> None:
        self.deployment = deployment
        self.jump = jump
        self.agenda = Agenda()
        self.notes = Notes(workload, stop)
        self.transfers = Transfers(deployment, self.agenda)
        self.views_matter = max(len(deployment.prefill), len(deployment.decode)) > 1
        self.prefill = [SimulatedPrefill(model, deployment, self) for model in deployment.prefill]
        self.decode = [SimulatedDecode(model, deployment, self) for model in deployment.decode]
        self._gone: list[Worker] = []  # incarnations that died
        self._overheads = deployment.overheads
        self._maker = RequestMaker(
            workload, deployment.block_size, with_prefixes=deployment.prefix_cache
        )
        self._policies = {role: POLICIES[deployment.policy]() for role in ("prefill", "decode")}
        self._live = 0
        self._arrived = 0
        self._samples: list[Sample] = []

    def run(self, progress: Progress | None) -> SimulatedRun:
        agenda, notes = self.agenda, self.notes
        for row, arrival_s in enumerate(notes.arrival_s):
            agenda.run_before(arrival_s)
            self._arrive(row, arrival_s)
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

    # A request's way.

    def prompt_done(self, attempt: Attempt, now_s: float, *, ended: bool) -> None:
        """A prefill worker has a prompt's first token, which may be its last."""
        prefill = attempt.prefill
        assert prefill is not None
        row = attempt.row
        report_s = now_s + self._overheads.report_s
        self.notes.first(row, report_s, now_s, attempt.sequence.first_scheduled_s)
        prefill.outstanding_tokens -= attempt.num_tokens
        if ended:
            attempt.prefill = None
            self._let_go(attempt)
            self._end(row, report_s)
            return
        attempt.handed_s = now_s
        self.transfers.prompt_done(attempt, now_s)
        if self._overheads.handoff_s:
            self.agenda.at(now_s + self._overheads.handoff_s, self._tell, attempt)
        else:
            self._tell(now_s, attempt)

    def prompt_done_here(self, attempt: Attempt, now_s: float) -> None:
        """A decode worker has computed a prompt itself."""
        report_s = now_s + self._overheads.report_s
        self.notes.first(attempt.row, report_s, now_s, attempt.sequence.first_scheduled_s)

    def finished(self, attempt: Attempt, now_s: float) -> None:
        self.notes.preemptions[attempt.row] += attempt.sequence.num_preemptions
        self._let_go(attempt)
        self._end(attempt.row, now_s + self._overheads.report_s)

    def _arrive(self, row: int, now_s: float) -> None:
        self._arrived += 1
        if self._live >= self.deployment.max_in_flight:
            return
        self._live += 1
        self._route(self._maker.attempt(row, now_s, 0, 0), None, now_s)

    def _route(self, attempt: Attempt, avoid: str | None, now_s: float) -> None:
        """As `cluster.router` picks: a prefill worker or none, and a decode worker."""
        decode = self._choose(self.decode, attempt.num_tokens, avoid, now_s)
        prefill = None
        if not self._computed_locally(attempt.num_tokens):
            prefill = self._choose(self.prefill, attempt.num_tokens, avoid, now_s)
            if prefill is None:
                decode = None
        if decode is None:  # nobody is ready: the stream ends as unavailable
            self._live -= 1
            return
        attempt.prefill, attempt.decode = prefill, decode
        self._hold(attempt, decode)
        if prefill is not None:
            prefill.outstanding_tokens += attempt.num_tokens
        if self._overheads.admit_s:
            self.agenda.at(now_s + self._overheads.admit_s, self._submit, attempt)
        else:
            self._submit(now_s, attempt)

    def _computed_locally(self, num_tokens: int) -> bool:
        mode = self.deployment.local_prefill
        if mode != "auto":
            return mode == "always"
        short = num_tokens <= self.deployment.local_prefill_tokens
        return short or not any(worker.alive for worker in self.prefill)

    def _choose(self, pool: Sequence[Any], num_tokens: int, avoid: str | None, now_s: float) -> Any:
        """A worker that is ready, not the one that was just lost if there is another."""
        if len(pool) == 1:
            return pool[0] if pool[0].alive else None
        ready = [worker for worker in pool if worker.alive]
        candidates = [worker for worker in ready if worker.model.name != avoid] or ready
        if not candidates:
            return None
        views = [worker.view(now_s) for worker in candidates]
        return candidates[self._policies[pool[0].role].choose(views, num_tokens)]

    def _submit(self, now_s: float, attempt: Attempt) -> None:
        assert attempt.decode is not None
        target = attempt.prefill or attempt.decode
        if not target.alive:
            self._lose(attempt, target.model.name, now_s)
        elif attempt.prefill is not None:
            attempt.prefill.add(attempt, now_s)
        else:
            attempt.lane = attempt.decode.lane_with_room()
            attempt.lane.add(attempt, now_s)

    def _tell(self, now_s: float, attempt: Attempt) -> None:
        """The gateway's word to go on: to whoever granted blocks, else to whoever is best now."""
        if attempt.lost:
            return
        assert attempt.decode is not None
        attempt.told = True
        if attempt.landed:
            assert attempt.lane is not None
            attempt.lane.go_on(attempt, now_s)
        elif attempt.flow is None:
            decode = self._choose(self.decode, attempt.num_tokens, None, now_s)
            if decode is None:
                self._lose(attempt, attempt.decode.model.name, now_s)
                return
            if decode is not attempt.decode:
                self._unhold(attempt)
                attempt.decode = decode
                self._hold(attempt, decode)
            lane = attempt.lane = decode.lane_with_room()
            lane.wait_for_room(attempt, now_s)

    def _hold(self, attempt: Attempt, decode: SimulatedDecode) -> None:
        decode.outstanding_tokens += attempt.num_tokens
        decode.requests += 1

    def _unhold(self, attempt: Attempt) -> None:
        assert attempt.decode is not None
        attempt.decode.outstanding_tokens -= attempt.num_tokens
        attempt.decode.requests -= 1

    def _let_go(self, attempt: Attempt) -> None:
        self._unhold(attempt)
        self._live -= 1

    def _end(self, row: int, at_s: float) -> None:
        self.notes.last(row, at_s)

    # Deaths.

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

    def _kill(self, now_s: float, failure: Failure) -> None:
        worker = self._find(failure.worker)
        if not worker.alive:
            return
        worker.alive = False
        if isinstance(worker, SimulatedPrefill):
            lost = list(worker.attempts)
        else:
            for lane in worker.lanes:
                lane.stop(now_s)
            lost = [attempt for lane in worker.lanes for attempt in lane.attempts]
        for attempt in lost:
            if isinstance(worker, SimulatedDecode) and attempt.handed_s != attempt.handed_s:
                in_prefill = attempt.prefill is not None
                if in_prefill:  # only its grant is lost: the prompt will be parked
                    self.transfers.cancel(attempt, now_s)
                    attempt.lane = None
                    continue
            self._lose(attempt, failure.worker, now_s)

    def _revive(self, now_s: float, failure: Failure) -> None:
        worker = self._find(failure.worker)
        if worker.alive:
            return
        self._gone.append(worker)
        if isinstance(worker, SimulatedPrefill):
            fresh = SimulatedPrefill(worker.model, self.deployment, self)
            self.prefill[self.prefill.index(worker)] = fresh
        else:
            successor = SimulatedDecode(worker.model, self.deployment, self)
            self.decode[self.decode.index(worker)] = successor

    def _lose(self, attempt: Attempt, worker: str, now_s: float) -> None:
        """The attempt ends; what was delivered goes on elsewhere once the death is noticed."""
        attempt.lost = True
        row = attempt.row
        lane, prefill = attempt.lane, attempt.prefill
        known = attempt.num_tokens
        if lane is not None and attempt.told and (attempt.landed or prefill is None):
            known = lane.delivered(attempt)
        elif attempt.handed_s == attempt.handed_s:
            known += 1
        self._clear(attempt, now_s)
        self._unhold(attempt)
        self.notes.preemptions[row] += attempt.sequence.num_preemptions
        if self.notes.failovers[row] >= self.deployment.max_failovers:
            self._live -= 1
            return
        self.notes.failovers[row] += 1
        delivered = known - self._maker.prompts[row]
        again = (row, delivered, worker)
        self.agenda.at(now_s + self._overheads.detect_s, self._again, again)

    def _clear(self, attempt: Attempt, now_s: float) -> None:
        """Take the attempt from whatever of its workers is alive."""
        lane, prefill = attempt.lane, attempt.prefill
        self.transfers.cancel(attempt, now_s)
        if lane is not None:
            lane.attempts.pop(attempt, None)
            if lane.worker.alive:
                lane.abort(attempt, now_s)
        if prefill is None:
            return
        if attempt.handed_s != attempt.handed_s:
            prefill.outstanding_tokens -= attempt.num_tokens
        if prefill.alive and attempt in prefill.attempts:
            prefill.release(attempt, now_s)

    def _again(self, now_s: float, lost: tuple[int, int, str]) -> None:
        row, delivered, worker = lost
        attempt = self._maker.attempt(
            row, self.notes.arrival_s[row], delivered, self.notes.failovers[row]
        )
        self._route(attempt, worker, now_s)

    def _find(self, name: str) -> Worker:
        return next(w for w in (*self.prefill, *self.decode) if w.model.name == name)

    # Over time.

    def sample(self, now_s: float, every_s: float) -> None:
        """How full each worker is now, and again later while anything is to come."""
        for worker in (*self.prefill, *self.decode):
            schedulers = (
                [worker.scheduler]
                if isinstance(worker, SimulatedPrefill)
                else [lane.scheduler for lane in worker.lanes]
            )
            loads = [scheduler.load() for scheduler in schedulers]
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
