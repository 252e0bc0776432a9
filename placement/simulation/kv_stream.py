"""KV on its way from prefill to decode, pushed layer by layer or fetched as one, as it is live.

Push: a chunk's layers follow while the next are computed. Fetch: a parked prompt comes as one.
Who gets blocks when is the simulator's.
"""

from __future__ import annotations

from .agenda import Action, Agenda
from .deployment import Deployment, WorkerModel
from .network import Flow, Flows


class Transfers:
    """All transfers of a cluster."""

    def __init__(self, deployment: Deployment, agenda: Agenda) -> None:
        self._token_bytes = deployment.kv_bytes_per_token
        self._num_layers = deployment.num_layers
        self._flows = Flows(deployment.network, agenda)

    def open(
        self, source: WorkerModel, target: WorkerModel, landed: Action, argument: object
    ) -> Flow:
        """A transfer without a byte yet; `landed(now, argument)` when it is closed and there."""
        return self._flows.open(
            (source.name, source.node, source.num_devices),
            (target.name, target.node, target.num_devices),
            landed,
            argument,
        )

    def chunk(self, flow: Flow, num_tokens: int, start_s: float, end_s: float) -> None:
        """Layer after layer of a chunk will be there, the last at `end_s`: from the first one on
        bytes flow, no faster than the layers are computed."""
        num_bytes = num_tokens * self._token_bytes
        if not flow.ports or not num_bytes:
            return
        compute_s = end_s - start_s
        pace_s = compute_s if self._num_layers > 1 and compute_s > 0 else 0.0
        first_s = start_s + compute_s / self._num_layers
        self._flows.add_later(flow, num_bytes, pace_s, first_s)

    def chunk_done(self, flow: Flow, now_s: float) -> None:
        """All layers of the chunk in progress are there."""
        self._flows.uncap(flow, now_s)

    def prompt_done(self, flow: Flow, now_s: float) -> None:
        """What was pushed is complete."""
        self._flows.close(flow, now_s)

    def send(self, flow: Flow, num_tokens: int, now_s: float) -> None:
        """All of a parked prompt that its receiver lacks."""
        num_bytes = num_tokens * self._token_bytes
        if num_bytes:
            self._flows.add(flow, num_bytes, now_s)
        self._flows.close(flow, now_s)

    def cancel(self, flow: Flow, now_s: float) -> None:
        """Nothing of it arrives any more."""
        self._flows.cancel(flow, now_s)
