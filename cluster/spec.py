"""What one worker process needs to know. Picklable: it travels from the launcher to an actor."""

from __future__ import annotations

from dataclasses import dataclass

from ..configs.schema import (
    DecodeConfig,
    KVConfig,
    ModelConfig,
    PacedConfig,
    PrefillConfig,
    SloConfig,
)
from ..configs.schema import TransferConfig as TransferSection
from ..engine.request import WorkerId


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSpec:
    """One worker: who it is and its slices of the cluster file.

    A prefill worker has `prefill`, a decode worker `decode`; that is its role.
    """

    worker: WorkerId
    model: ModelConfig
    kv: KVConfig
    transfer: TransferSection
    slo: SloConfig
    prefill: PrefillConfig | None = None
    decode: DecodeConfig | None = None
    paced: PacedConfig = PacedConfig()
    host: str = "127.0.0.1"  # where its servers listen, as gateway and peers reach it
    heartbeat_s: float = 0.25
    heartbeat_timeout_s: float = 1.0  # a peer silent for this long is lost

    @property
    def role(self) -> str:
        return "prefill" if self.prefill is not None else "decode"

    @property
    def num_ranks(self) -> int:
        """Processes that hold the worker's model together; a paced one only pretends."""
        return num_ranks(self.pool)

    @property
    def threads_a_rank(self) -> int:
        """0: as many as there are cores."""
        return max(1, self.pool.threads // self.num_ranks) if self.pool.threads else 0

    @property
    def pool(self) -> PrefillConfig | DecodeConfig:
        """The role's slice."""
        pool = self.prefill or self.decode
        assert pool is not None, "a worker has a role"
        return pool


def num_ranks(pool: PrefillConfig | DecodeConfig) -> int:
    """Processes of each of a pool's workers."""
    return 1 if pool.device == "paced" else pool.tensor_parallel * pool.pipeline_parallel
