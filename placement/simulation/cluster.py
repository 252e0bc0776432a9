"""A simulated cluster at one moment: requests on their way, and the steps of all workers.

The schedulers and the routing policies are the live classes themselves; what is written here
is only what surrounds them: a request's way, and time. Workers, transfers and the router
below decide and tell; all that happens at a later time is put on the agenda here.
"""

from __future__ import annotations

from dataclasses import replace

from ...engine.batch import Batch
from ..workload.workload import Workload
from .agenda import Agenda
from .cores import SharedCores
from .decode import SimulatedDecode
from .deployment import Deployment, WorkerModel
from .kv_stream import Transfers
from .lane import Lane
from .prefill import SimulatedPrefill
from .request import Attempt, Notes
from .router import SimulatedRouter
from .run import StopRule
from .sequence import SequenceMaker

REFUSAL_MEMORY_S = 0.05  # as in prefill_worker/outgoing.py: `auto` spares who had no room


class SimulatedCluster:
    """A cluster at one moment, and the agenda."""

    def __init__(
        self, deployment: Deployment, workload: Workload, stop: StopRule | None, *, jump: bool
    ) -> None:
        if workload.prefix is None:  # nobody asks the caches: spare their upkeep
            deployment = replace(deployment, prefix_cache=False)
        self.deployment = deployment
        self.agenda = Agenda()
        self.notes = Notes(workload, stop)
        self.transfers = Transfers(deployment, self.agenda)
        self.router = SimulatedRouter(deployment)
        self._views_matter = max(len(deployment.prefill), len(deployment.decode)) > 1
        self._jump = jump
        shared = deployment.overheads.cores > 0
        self._cores = SharedCores(deployment.overheads) if shared else None
        self.prefill = [self._new_prefill(model) for model in deployment.prefill]
        self.decode = [self._new_decode(model) for model in deployment.decode]
        self._overheads = deployment.overheads
        self._maker = SequenceMaker(
            workload, deployment.block_size, with_prefixes=deployment.prefix_cache
        )
        self._attempts: dict[str, Attempt] = {}  # by sequence id
        self._refused_until_s: dict[tuple[str, SimulatedDecode], float] = {}
        self._live = 0  # requests that are neither ended nor refused

    # A request's way.

    def arrive(self, row: int, now_s: float) -> None:
        if self._live < self.deployment.max_in_flight:
            self._live += 1
            self._route(Attempt(row, self._maker.make(row, now_s, 0, 0)), None, now_s)

    def _route(self, attempt: Attempt, avoid: str | None, now_s: float) -> None:
        sequence = attempt.sequence
        pair = self.router.pick(self.prefill, self.decode, sequence, avoid, now_s)
        if pair is None:  # nobody is ready: the stream ends as unavailable
            self._live -= 1
            return
        prefill, decode = attempt.prefill, attempt.decode = pair
        self._attempts[sequence.id] = attempt
        _hold(attempt, decode)
        if prefill is not None:
            prefill.outstanding_tokens += attempt.num_tokens
        if self._overheads.admit_s:
            self.agenda.at(now_s + self._overheads.admit_s, self._submit, attempt)
        else:
            self._submit(now_s, attempt)

    def _submit(self, now_s: float, attempt: Attempt) -> None:
        prefill, decode = attempt.prefill, attempt.decode
        assert decode is not None
        target = prefill or decode
        if not target.alive:
            self._lose(attempt, target.model.name, now_s)
        elif prefill is not None:
            prefill.add(attempt.sequence, now_s)
            self._wake(prefill, now_s)
        else:
            lane = attempt.lane = decode.emptiest_lane()
            lane.add(attempt.sequence, now_s)
            self._follow(lane, now_s)

    def _ask(self, attempt: Attempt, now_s: float) -> None:
        """The prompt's compute starts: get blocks in decode, unless it pulls or has no room."""
        decode, prefill = attempt.decode, attempt.prefill
        assert decode is not None and prefill is not None
        mode = self.deployment.transfer_mode
        if mode == "pull" or not decode.alive:
            return
        pair = (prefill.model.name, decode)
        if (
            mode == "auto"
            and self._refused_until_s
            and (now_s < self._refused_until_s.get(pair, 0.0))
        ):
            return
        lane = decode.emptiest_lane()
        granted = lane.lease(attempt.sequence, now_s)
        self._follow(lane, now_s)
        if granted is None:
            self._refused_until_s[pair] = now_s + REFUSAL_MEMORY_S
            return
        attempt.found, attempt.blocks = granted
        attempt.lane = lane
        lane.members[attempt.sequence.id] = attempt.sequence
        attempt.flow = self.transfers.open(prefill.model, decode.model, self._landed, attempt)

    def _prompt_done(self, attempt: Attempt, now_s: float, *, ended: bool) -> None:
        """A prefill worker has a prompt's first token, which may be its last."""
        prefill = attempt.prefill
        assert prefill is not None
        report_s = now_s + self._overheads.report_s
        self.notes.first(attempt.row, report_s, now_s, attempt.sequence.first_scheduled_s)
        prefill.outstanding_tokens -= attempt.num_tokens
        if ended:
            attempt.prefill = None
            self._end(attempt, report_s)
            return
        attempt.handed_s = now_s
        if attempt.flow is not None:
            self.transfers.prompt_done(attempt.flow, now_s)
        if self._overheads.handoff_s:
            self.agenda.at(now_s + self._overheads.handoff_s, self._tell, attempt)
        else:
            self._tell(now_s, attempt)

    def _tell(self, now_s: float, attempt: Attempt) -> None:
        """The gateway's word to go on: to whoever granted blocks, else to whoever is best now."""
        if attempt.lost:
            return
        attempt.told = True
        if attempt.landed:
            self._go_on(attempt, now_s)
        elif attempt.flow is None:
            assert attempt.decode is not None
            decode = self.router.choose(self.decode, attempt.sequence, None, now_s)
            if decode is None:
                self._lose(attempt, attempt.decode.model.name, now_s)
                return
            if decode is not attempt.decode:
                _unhold(attempt)
                attempt.decode = decode
                _hold(attempt, decode)
            lane = attempt.lane = decode.emptiest_lane()
            attempt.sequence = attempt.sequence.after_prefill()  # prefill holds its own
            lane.wait_for_room(attempt.sequence, now_s)
            self._follow(lane, now_s)

    def _fetch(self, attempt: Attempt, blocks: list[int], now_s: float) -> None:
        """Decode has room for a parked prompt, and lacks what these blocks are for."""
        prefill, decode = attempt.prefill, attempt.decode
        assert prefill is not None and decode is not None
        attempt.blocks = blocks
        here = len(attempt.sequence.blocks) * self.deployment.block_size
        flow = self.transfers.open(prefill.model, decode.model, self._landed, attempt)
        attempt.flow = flow
        self.transfers.send(flow, attempt.num_tokens - here, now_s)

    def _landed(self, now_s: float, attempt: Attempt) -> None:
        prefill = attempt.prefill
        assert prefill is not None
        attempt.flow = attempt.prefill = None
        attempt.landed = True
        prefill.release(attempt.sequence.id)
        self._wake(prefill, now_s)
        if attempt.told:
            self._go_on(attempt, now_s)

    def _go_on(self, attempt: Attempt, now_s: float) -> None:
        lane, blocks = attempt.lane, attempt.blocks
        assert lane is not None and blocks is not None
        self.notes.transfer_s[attempt.row] = now_s - attempt.handed_s
        if attempt.found:
            attempt.sequence.blocks = attempt.found
        lane.resume(attempt.sequence, blocks, now_s)
        self._follow(lane, now_s)

    def _end(self, attempt: Attempt, at_s: float) -> None:
        """The client has its last token at `at_s`."""
        del self._attempts[attempt.sequence.id]
        self.notes.preemptions[attempt.row] += attempt.sequence.num_preemptions
        _unhold(attempt)
        self._live -= 1
        self.notes.last(attempt.row, at_s)

    def _lose(self, attempt: Attempt, worker: str, now_s: float) -> None:
        """The attempt ends; what was delivered goes on elsewhere once the death is noticed."""
        attempt.lost = True
        row = attempt.row
        lane, prefill = attempt.lane, attempt.prefill
        known = attempt.num_tokens
        if lane is not None and attempt.told and (attempt.landed or prefill is None):
            known = lane.delivered(attempt.sequence, known + 1)
        elif attempt.handed:
            known += 1
        self._clear(attempt, now_s)
        del self._attempts[attempt.sequence.id]
        _unhold(attempt)
        self.notes.preemptions[row] += attempt.sequence.num_preemptions
        if self.notes.failovers[row] >= self.deployment.max_failovers:
            self._live -= 1
            return
        self.notes.failovers[row] += 1
        again = (row, known - self._maker.prompts[row], worker)
        self.agenda.at(now_s + self._overheads.detect_s, self._again, again)

    def _clear(self, attempt: Attempt, now_s: float) -> None:
        """Take the attempt from whatever of its workers is alive."""
        lane, prefill, name = attempt.lane, attempt.prefill, attempt.sequence.id
        self._cancel(attempt, now_s)
        if lane is not None:
            lane.members.pop(name, None)
            if lane.alive:
                lane.abort(name, now_s)
                self._follow(lane, now_s)
        if prefill is None:
            return
        if not attempt.handed:
            prefill.outstanding_tokens -= attempt.num_tokens
        if prefill.alive and name in prefill.members:
            prefill.release(name)
            self._wake(prefill, now_s)

    def _cancel(self, attempt: Attempt, now_s: float) -> None:
        """Its transfer is given up; blocks leased for it are free."""
        if attempt.flow is not None:
            self.transfers.cancel(attempt.flow, now_s)
            attempt.flow = None
        if attempt.blocks is not None and not attempt.landed:
            lane = attempt.lane
            assert lane is not None
            lane.unlease(attempt.found, attempt.blocks, now_s)
            attempt.found, attempt.blocks = [], None
            self._follow(lane, now_s)

    def _again(self, now_s: float, lost: tuple[int, int, str]) -> None:
        row, delivered, worker = lost
        number = self.notes.failovers[row]
        sequence = self._maker.make(row, self.notes.arrival_s[row], delivered, number)
        self._route(Attempt(row, sequence), worker, now_s)

    def _new_prefill(self, model: WorkerModel) -> SimulatedPrefill:
        return SimulatedPrefill(model, self.deployment, self._cores)

    def _new_decode(self, model: WorkerModel) -> SimulatedDecode:
        return SimulatedDecode(
            model,
            self.deployment,
            self._cores,
            jump=self._jump,
            views_matter=self._views_matter,
        )

    # Steps.

    def _wake(self, worker: SimulatedPrefill, now_s: float) -> None:
        """Look for work once everything else of this moment has happened."""
        if not worker.woken and worker.may_begin:
            worker.woken = True
            free_s = worker.stages.free_s[0]
            self.agenda.at(now_s if now_s > free_s else free_s, self._look, worker)

    def _look(self, now_s: float, worker: SimulatedPrefill) -> None:
        worker.woken = False
        if worker.alive and worker.may_begin:
            self._begin(worker, now_s)

    def _begin(self, worker: SimulatedPrefill, now_s: float) -> None:
        started = worker.begin(now_s)
        if started is None:
            return
        batch, end_s = started
        for sequence, start, count in zip(batch.sequences, batch.starts, batch.counts, strict=True):
            attempt = self._attempts[sequence.id]
            if start == sequence.cached_tokens:  # its first chunk: what was found is sent too
                if sequence.num_tokens + 1 < sequence.max_total_tokens:
                    self._ask(attempt, now_s)
                start, count = 0, start + count
            if attempt.flow is not None:
                here = len(attempt.found) * self.deployment.block_size - start
                count -= min(count, max(0, here))
                self.transfers.chunk(attempt.flow, count, now_s, end_s)
        self.agenda.at(end_s, self._step_ended, (worker, batch))
        self._wake(worker, now_s)

    def _step_ended(self, now_s: float, step: tuple[SimulatedPrefill, Batch]) -> None:
        worker, batch = step
        if not worker.alive:
            return
        if self._cores is not None and (late_s := worker.stages.late_s()):
            self.agenda.at(now_s + late_s, self._step_ended, step)
            return
        progress = worker.end(batch, now_s)
        if self._views_matter:
            worker.report()
        if len(progress.sequences) < len(batch.sequences):
            for sequence in batch.sequences:
                flow = self._attempts[sequence.id].flow
                if flow is not None:
                    self.transfers.chunk_done(flow, now_s)
        finished = {sequence.id for sequence, _ in progress.finished}
        for sequence in progress.sequences:
            attempt = self._attempts[sequence.id]
            self._prompt_done(attempt, now_s, ended=sequence.id in finished)
        if not worker.woken and worker.may_begin and worker.stages.free_s[0] <= now_s:
            self._begin(worker, now_s)
        else:
            self._wake(worker, now_s)
        if self._cores is not None:
            self._cores.serve(len(progress.sequences), now_s)

    def _follow(self, lane: Lane, now_s: float) -> None:
        """Be there when what the lane does now ends; or look for work for it, once everything
        else of this moment has happened."""
        if lane.busy:
            if lane.turn != lane.followed:
                lane.followed = lane.turn
                self.agenda.at(lane.due_s, self._lane_ended, (lane, lane.turn))
        elif not lane.woken and lane.alive:
            lane.woken = True
            free_s = lane.stages.free_s[0]
            self.agenda.at(now_s if now_s > free_s else free_s, self._look_at_lane, lane)

    def _look_at_lane(self, now_s: float, lane: Lane) -> None:
        lane.woken = False
        if lane.alive and not lane.busy:
            self._begin_lane(lane, now_s)

    def _begin_lane(self, lane: Lane, now_s: float) -> None:
        if lane.stages.free_s[0] > now_s:  # another lane has the first stage
            self._follow(lane, now_s)
            return
        if lane.parked:
            for sequence, blocks in lane.next_fetches(now_s):
                self._fetch(self._attempts[sequence.id], blocks, now_s)
        if lane.begin(now_s):
            self._follow(lane, now_s)

    def _lane_ended(self, now_s: float, followed: tuple[Lane, int]) -> None:
        lane, turn = followed
        if turn != lane.turn or not lane.alive:
            return
        if self._cores is not None and (late_s := lane.stages.late_s()):
            lane.due_s = now_s + late_s
            self.agenda.at(lane.due_s, self._lane_ended, followed)
            return
        tokens = lane.stages.tokens
        prompts, finished = lane.end(now_s)
        report_s = now_s + self._overheads.report_s
        for sequence in prompts:
            attempt = self._attempts[sequence.id]
            attempt.told = True
            self.notes.first(attempt.row, report_s, now_s, sequence.first_scheduled_s)
        for sequence in finished:
            self._end(self._attempts[sequence.id], report_s)
        self._begin_lane(lane, now_s)
        if self._cores is not None:
            self._cores.serve(tokens, now_s)


def _hold(attempt: Attempt, decode: SimulatedDecode) -> None:
    decode.outstanding_tokens += attempt.num_tokens
    decode.requests += 1


def _unhold(attempt: Attempt) -> None:
    assert attempt.decode is not None
    attempt.decode.outstanding_tokens -= attempt.num_tokens
    attempt.decode.requests -= 1
