"""KV on its way from prefill to decode, asked for, pushed, parked and fetched as it is live.

Push: when a prompt's first chunk starts, decode is asked for blocks; each chunk's layers follow
while the next are computed. Pull: without a grant the prompt waits in the prefill pool until a
decode worker has room, and then comes as one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from .agenda import Agenda
from .deployment import Deployment, WorkerModel
from .network import Flows
from .simulated_request import Attempt, SimulatedSequence

if TYPE_CHECKING:
    from .simulated_decode import SimulatedDecode

REFUSAL_MEMORY_S = 0.05  # as in prefill_worker/outgoing.py: `auto` spares who had no room


class Transfers:
    """All transfers of a cluster."""

    def __init__(self, deployment: Deployment, agenda: Agenda) -> None:
        self._agenda = agenda
        self._mode = deployment.transfer_mode
        self._token_bytes = deployment.kv_bytes_per_token
        self._num_layers = deployment.num_layers
        self._flows = Flows(deployment.network, agenda)
        self._refused_until_s: dict[tuple[str, SimulatedDecode], float] = {}

    def ask(self, attempt: Attempt, now_s: float) -> None:
        """The prompt's compute starts: get blocks in decode, unless it pulls or has no room."""
        decode, prefill = attempt.decode, attempt.prefill
        assert decode is not None and prefill is not None
        if self._mode == "pull" or not decode.alive:
            return
        pair = (prefill.model.name, decode)
        if self._mode == "auto" and now_s < self._refused_until_s.get(pair, 0.0):
            return
        lane = decode.lane_with_room()
        blocks = lane.lease(attempt.num_tokens, now_s)
        if blocks is None:
            self._refused_until_s[pair] = now_s + REFUSAL_MEMORY_S
            return
        lane.attempts[attempt] = None
        attempt.lane, attempt.blocks = lane, blocks
        self._open(attempt, prefill.model, decode.model)

    def chunk(self, attempt: Attempt, num_tokens: int, start_s: float, end_s: float) -> None:
        """Layer after layer of a chunk will be there, the last at `end_s`."""
        if attempt.flow is None or not attempt.flow.ports:
            return
        first_s = start_s + (end_s - start_s) / self._num_layers
        num_bytes = num_tokens * self._token_bytes
        self._agenda.at(first_s, self._first_layer, (attempt, num_bytes, end_s - start_s))

    def chunk_done(self, attempt: Attempt, now_s: float) -> None:
        """All layers of the chunk in progress are there."""
        if attempt.flow is not None:
            self._flows.uncap(attempt.flow, now_s)

    def prompt_done(self, attempt: Attempt, now_s: float) -> None:
        """What was pushed is complete; without a grant it stays parked."""
        if attempt.flow is not None:
            self._flows.close(attempt.flow, now_s)

    def fetch(self, sequence: SimulatedSequence, blocks: list[int], now_s: float) -> None:
        """Decode has room for a parked prompt: send all of it."""
        attempt = sequence.attempt
        prefill, decode = attempt.prefill, attempt.decode
        assert prefill is not None and decode is not None
        attempt.blocks = blocks
        self._open(attempt, prefill.model, decode.model)
        assert attempt.flow is not None
        num_bytes = attempt.num_tokens * self._token_bytes
        if num_bytes:
            self._flows.add(attempt.flow, num_bytes, float("inf"), now_s)
        self._flows.close(attempt.flow, now_s)

    def cancel(self, attempt: Attempt, now_s: float) -> None:
        """Nothing of it arrives any more; blocks leased for it are free."""
        if attempt.flow is not None:
            self._flows.cancel(attempt.flow, now_s)
            attempt.flow = None
        if attempt.blocks is not None and not attempt.landed:
            assert attempt.lane is not None
            attempt.lane.unlease(attempt.blocks, now_s)
            attempt.blocks = None

    def _open(self, attempt: Attempt, source: WorkerModel, target: WorkerModel) -> None:
        attempt.flow = self._flows.open(
            (source.name, source.node, source.num_devices),
            (target.name, target.node, target.num_devices),
            self._landed,
            attempt,
        )

    def _first_layer(self, now_s: float, chunk: tuple[Attempt, float, float]) -> None:
        """From here on bytes flow, no faster than the layers are computed."""
        attempt, num_bytes, compute_s = chunk
        flow = attempt.flow
        if flow is not None and num_bytes:
            cap = (flow.left + num_bytes) / compute_s if self._num_layers > 1 else float("inf")
            self._flows.add(flow, num_bytes, cap, now_s)

    def _landed(self, now_s: float, attempt: Attempt) -> None:
        prefill, lane = attempt.prefill, attempt.lane
        assert prefill is not None and lane is not None
        attempt.flow = None
        attempt.landed = True
        attempt.prefill = None
        prefill.release(attempt, now_s)
        if attempt.told:
            lane.go_on(attempt, now_s)


def as_simulated(sequence: object) -> SimulatedSequence:
    """Every sequence that a simulated scheduler holds is one."""
    return cast(SimulatedSequence, sequence)
