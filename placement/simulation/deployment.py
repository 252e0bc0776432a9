"""What is simulated: workers with their step times, memory and place, and what joins them.

Plain values. `placement/simulation/twin.py` makes one from a cluster file, a search makes its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..latency.phase_latency import PhaseLatency
from .network import Network

UNLIMITED_TOKENS = 1 << 40  # a limit on tokens that is never reached


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerModel:
    """One worker of either pool. Workers of a pool may differ in everything.

    `latency.stages` with more than one entry is a pipeline: that many micro-batches are in
    flight. A decode worker that computes prompts too needs step times of phase "mixed".
    """

    name: str
    latency: PhaseLatency
    num_blocks: int
    max_batch_size: int = 64  # sequences in a step
    max_batch_tokens: int = 2048  # in a step, rows and chunks together
    node: str = ""  # workers of one node reach each other without its network
    num_devices: int = 1  # GPUs; each has its own links


@dataclass(frozen=True, kw_only=True, slots=True)
class Overheads:
    """Seconds a request spends outside steps and links. Calibrated, so that twin and live match."""

    admit_s: float = 0.0  # from the client's send until it stands in a worker's queue
    report_s: float = 0.0  # from a sampled token until the client has it
    handoff_s: float = 0.0  # from prefill's end until the decode worker is told to go on
    step_s: float = 0.0  # host work a step, beside the model's own time
    row_s: float = 0.0  # and a decoding row of it
    prompt_s: float = 0.0  # and, with prompts, of it: their grants, transfers and handoffs
    prompt_share: float = 0.0  # of steps with prompts: what sending their KV meanwhile adds
    cores: int = 0  # that workers share with the gateway and its clients; 0: these have their own
    serve_s: float = 0.0  # core time that these spend on a step's tokens; where a core is idle, it
    serve_row_s: float = 0.0  # is spent there, else a worker waits. And a row of the step
    crowd_share: float = 0.0  # that serving takes longer, and host work on its core, where none is
    warm_s: float = 0.0  # that a decode step saves where its worker alone computes: weights cached
    detect_s: float = 0.0  # from a worker's death until its requests go elsewhere


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A worker that dies, and when it is back, empty (None: never)."""

    worker: str
    at_s: float
    back_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """A whole cluster. Without prefill workers it is colocated: decode workers do both."""

    prefill: tuple[WorkerModel, ...]
    decode: tuple[WorkerModel, ...]
    kv_bytes_per_token: float = 0.0  # of all layers; 0: the transfer costs nothing
    num_layers: int = 1
    block_size: int = 16
    max_model_len: int = UNLIMITED_TOKENS
    network: Network = field(default_factory=Network)
    transfer_mode: Literal["auto", "push", "pull"] = "auto"
    local_prefill: Literal["never", "auto", "always"] = "never"
    local_prefill_tokens: int = 0  # auto: prompts up to this length skip the hop
    prefix_cache: bool = False  # blocks of equal beginnings are shared, where a trace names them
    policy: str = "least_outstanding_tokens"  # one of engine.routing.POLICIES
    ttft_ms: float = 0.0  # the cluster's own targets: prompts are ordered and chunks cut by
    tpot_ms: float = 0.0  # them; 0: none, so arrival order and full steps
    max_wait_s: float = 10.0  # the schedulers' age bound
    max_in_flight: int = 1 << 40  # requests; more are refused
    max_failovers: int = 3
    overheads: Overheads = field(default_factory=Overheads)

    def __post_init__(self) -> None:
        assert self.decode, "somebody must decode"
        names = [worker.name for worker in (*self.prefill, *self.decode)]
        assert len(set(names)) == len(names), names
        assert self.prefill or self.local_prefill != "never", "nobody computes prompts"

    @property
    def num_devices(self) -> int:
        return sum(worker.num_devices for worker in (*self.prefill, *self.decode))


def replicas(
    role: str,
    count: int,
    latency: PhaseLatency,
    *,
    num_blocks: int,
    max_batch_size: int = 64,
    max_batch_tokens: int = 2048,
    nodes: Sequence[str] = ("",),
) -> tuple[WorkerModel, ...]:
    """`count` equal workers named role-0, role-1, …, placed on `nodes` in turn."""
    return tuple(
        WorkerModel(
            name=f"{role}-{i}",
            latency=latency,
            num_blocks=num_blocks,
            max_batch_size=max_batch_size,
            max_batch_tokens=max_batch_tokens,
            node=nodes[i % len(nodes)],
            num_devices=latency.tensor_parallel * latency.pipeline_parallel,
        )
        for i in range(count)
    )
