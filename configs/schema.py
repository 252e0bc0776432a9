"""The cluster file: every key, its meaning, its unit and its default.

Promises: frozen values, already checked one by one when they come from `configs.load`. What no
key alone can tell (contradictions between keys) is in `configs.rules`; what needs the checkpoint
or the machines is checked where those are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal


@dataclass(frozen=True, slots=True)
class Between:
    """A number's valid range, both ends included."""

    low: float
    high: float = float("inf")


@dataclass(frozen=True, slots=True)
class Above:
    """A number greater than `low`, up to `high`."""

    low: float
    high: float = float("inf")


@dataclass(frozen=True, slots=True)
class Bytes:
    """A size: a number of bytes, or text such as 512MiB or 1GB."""


@dataclass(frozen=True, slots=True)
class HostPort:
    """An address "host:port"; port 0 lets the system choose. `words` are accepted beside it."""

    words: tuple[str, ...] = ()


Count = Annotated[int, Between(1)]
CountOrZero = Annotated[int, Between(0)]
Milliseconds = Annotated[float, Above(0.0)]
Seconds = Annotated[float, Above(0.0)]
Size = Annotated[int, Bytes()]
Address = Annotated[str, HostPort()]

Device = Literal["cpu", "cuda", "paced"]
LocalPrefill = Literal["never", "auto", "always"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """What is served."""

    path: Path
    """Folder of a Hugging Face checkpoint. Relative to the file that names it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What weights, activations and KV are held in; auto is the checkpoint's own."""
    max_model_len: CountOrZero = 0
    """Longest sequence, prompt and output together, in tokens. 0: the checkpoint's own limit,
    as far as `kv.memory` holds one such sequence."""
    served_name: str = ""
    """What the model is called in the OpenAI API. "": the checkpoint folder's name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillConfig:
    """The pool that computes prompts. With `replicas: 0` decode workers do it (colocated)."""

    replicas: CountOrZero = 1
    """Workers in the pool."""
    tensor_parallel: Count = 1
    """Devices that share each layer of one worker."""
    pipeline_parallel: Count = 1
    """Devices that hold a stage of layers each."""
    device: Device = "cpu"
    """What a worker computes on."""
    accelerator: str = ""
    """The GPUs that a worker takes, where Ray has several kinds, by its name for them as in H100
    (what follows accelerator_type: among a node's resources). "": any."""
    threads: CountOrZero = 0
    """CPU threads of a worker. 0: the machine's cores divided by its workers."""
    max_batch_tokens: Count = 2048
    """Prompt tokens in one step; longer prompts are computed in chunks of this size."""
    block_size: Annotated[int, Between(0, 1024)] = 0
    """Tokens in a block of these workers' KV cache; decode's is a multiple or a part of it.
    0: `kv.block_size`."""
    memory: Size | None = None
    """Bytes of KV blocks on each of these workers. null: `kv.memory`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeConfig:
    """The pool that generates tokens."""

    replicas: Count = 1
    """Workers in the pool."""
    tensor_parallel: Count = 1
    """Devices that share each layer of one worker."""
    pipeline_parallel: Count = 1
    """Devices that hold a stage of layers each."""
    device: Device = "cpu"
    """What a worker computes on."""
    accelerator: str = ""
    """The GPUs that a worker takes, where Ray has several kinds, by its name for them as in H100
    (what follows accelerator_type: among a node's resources). "": any."""
    threads: CountOrZero = 0
    """CPU threads of a worker. 0: the machine's cores divided by its workers."""
    max_batch_size: Count = 64
    """Sequences in one step."""
    max_batch_tokens: Count = 512
    """Tokens in one step, running rows and chunks of locally computed prompts together."""
    local_prefill: LocalPrefill = "auto"
    """Whether decode workers compute prompts themselves. auto: short ones, and all of them
    while no prefill worker is ready."""
    local_prefill_tokens: CountOrZero = 32
    """Under auto, prompts of up to this many tokens skip the prefill pool."""
    block_size: Annotated[int, Between(0, 1024)] = 0
    """Tokens in a block of these workers' KV cache; prefill's is a multiple or a part of it.
    0: `kv.block_size`."""
    memory: Size | None = None
    """Bytes of KV blocks on each of these workers. null: `kv.memory`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KVConfig:
    """Each worker's KV cache."""

    block_size: Annotated[int, Between(1, 1024)] = 16
    """Tokens in a block."""
    memory: Size = 1 << 30
    """Bytes of blocks on each worker, where its pool gives no `memory` of its own."""
    dtype: Literal["auto", "fp8_e4m3"] = "auto"
    """What keys and values are stored and sent in; auto is the model's. fp8_e4m3: one byte a
    value, and one a position and head for the scale, so a half of bfloat16's memory and transfers
    and a quarter of float32's. It rounds each value to 4 bits of precision."""
    prefix_cache: bool = True
    """Keep the KV of served prompts and answers in blocks that nobody needs, for later prompts
    that begin with the same tokens. Stays off for models whose rotary angles depend on the
    prompt's length (rope_type dynamic, beyond max_position_embeddings)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferConfig:
    """How KV travels from prefill to decode."""

    transport: Literal["auto", "shm", "tcp", "gloo", "nccl", "cuda_ipc"] = "auto"
    """auto: shared memory where two workers are on one host, TCP elsewhere; between GPUs cuda_ipc
    and nccl. gloo is nccl's code path on CPUs."""
    mode: Literal["auto", "push", "pull"] = "auto"
    """push: decode grants blocks before prefill computes. pull: decode fetches when it has
    room. auto: push while decode has room, else pull."""
    lease_s: Seconds = 10.0
    """How long a transfer may go without progress before its blocks are taken back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SloConfig:
    """The latency targets of requests that name none. The prefill order is by deadline."""

    ttft_ms: Milliseconds = 250.0
    """Time to first token."""
    tpot_ms: Milliseconds = 100.0
    """Time per output token after the first."""
    attainment: Annotated[float, Above(0.0, 1.0)] = 0.9
    """Share of requests that shall meet both."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayConfig:
    """The front door, and how it deals with requests and workers."""

    grpc: Address = "127.0.0.1:50051"
    """Where gRPC clients connect."""
    http: Address | None = "127.0.0.1:8000"
    """Where the OpenAI-compatible API, health and metrics are; null turns it off."""
    policy: Literal["prefix_aware", "least_outstanding_tokens", "round_robin"] = "prefix_aware"
    """How a worker is chosen within each pool. prefix_aware: by what is queued there and what of
    the prompt is not in its cache."""
    max_in_flight: Count = 1024
    """Streams at once; more are answered RESOURCE_EXHAUSTED."""
    max_failovers: CountOrZero = 3
    """Times a stream goes on elsewhere after its worker was lost. 0: it ends UNAVAILABLE."""
    request_timeout_s: Seconds = 600.0
    """Deadline of a request whose client sets none."""
    heartbeat_timeout_s: Seconds = 1.0
    """A worker silent for this long is lost."""
    step_timeout_s: Seconds = 120.0
    """A worker whose model step takes longer than this hangs: it is lost, killed and started anew.
    Far above the longest step that is honest work."""
    drain_s: Annotated[float, Between(0.0)] = 30.0
    """How long a stop waits for the requests in flight."""
    max_restarts: CountOrZero = 3
    """Restarts of one worker within a minute before it is given up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PacedConfig:
    """What workers of `device: paced` pretend to be. They compute nothing: their steps take the
    time that the latency model gives, their tokens follow from the prompt."""

    hardware: str = ""
    """A hardware sheet, by name as in h100 or the path of one's own: step times from it and the
    model's shape, where no profile is given, and the links' speed."""
    profile: Path | None = None
    """Step times from a profile that `phasewise profile` wrote."""
    model: Path | None = None
    """The model pretended: a checkpoint's folder, of which config.json alone is read.
    null: `model.path`."""
    link: Literal["free", "node", "network"] = "free"
    """How fast KV travels. node: as inside a machine of the hardware, network: as between two of
    them, free: as this machine does it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RayConfig:
    """What places and watches the worker processes."""

    address: Annotated[str, HostPort(words=("auto",))] | None = None
    """null: a Ray of our own on this machine. auto or host:port: join one that runs."""
    nodes: Mapping[str, Mapping[str, Count]] = field(default_factory=dict)
    """Which devices of which workers lie on one node, by a name of the file's own for each node:
    {a: {prefill-0: 2, decode-0: 4}, b: {prefill-0: 2, decode-0: 4}}. Each is another node of Ray.
    A worker's pipeline stages go to its nodes in the order that these have here. All workers are
    named, or none: then each lies on one node, whichever has room."""
    tensor_parallel_across_nodes: bool = False
    """Whether `nodes` may cut a tensor-parallel group, whose sums then cross the network."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """A whole cluster file. Only `model.path` has no default."""

    model: ModelConfig
    prefill: PrefillConfig = field(default_factory=PrefillConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    kv: KVConfig = field(default_factory=KVConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    slo: SloConfig = field(default_factory=SloConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    paced: PacedConfig = field(default_factory=PacedConfig)

    @property
    def workers(self) -> dict[str, PrefillConfig | DecodeConfig]:
        """Each worker's name and pool, prefill first."""
        return {
            f"{role}-{index}": pool
            for role, pool in (("prefill", self.prefill), ("decode", self.decode))
            for index in range(pool.replicas)
        }

    @property
    def block_sizes(self) -> tuple[int, int]:
        """Tokens in a block of prefill workers, and of decode workers."""
        decode = self.decode.block_size or self.kv.block_size
        if self.prefill.replicas == 0:
            return decode, decode
        return self.prefill.block_size or self.kv.block_size, decode

    @property
    def memories(self) -> tuple[int, int]:
        """Bytes of KV blocks on each prefill worker, and on each decode worker."""
        decode = self.decode.memory or self.kv.memory
        if self.prefill.replicas == 0:
            return decode, decode
        return self.prefill.memory or self.kv.memory, decode

    @property
    def memory_keys(self) -> tuple[str, str]:
        """The keys that say so."""
        decode = "decode.memory" if self.decode.memory else "kv.memory"
        if self.prefill.replicas == 0:
            return decode, decode
        return "prefill.memory" if self.prefill.memory else "kv.memory", decode
