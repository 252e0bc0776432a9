"""Which part of a model each rank of a worker holds. Pure; knows neither torch nor sockets.

A worker of `tensor_parallel` x `pipeline_parallel` ranks holds one model: each stage a range of
layers, each tensor rank of a stage a range of heads, MLP columns and vocabulary rows. Rank 0 leads.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import InvalidConfig
from .layout import KVLayout
from .spec import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One rank's part. All ranges are of the whole model's own numbers."""

    rank: int
    tensor_rank: int  # within its stage
    tensor_parallel: int
    stage: int
    pipeline_parallel: int
    layers: range
    heads: range
    kv_heads: range  # several tensor ranks hold the same one where there are more ranks than heads
    inner: range  # columns between the two halves of an MLP
    expert_inner: range  # the same of every expert: all ranks hold a part of each; empty if dense
    vocab: range

    @property
    def num_ranks(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.pipeline_parallel - 1

    def kv_layout(
        self, spec: ModelSpec, dtype: str, *, block_size: int, num_blocks: int, fingerprint: str
    ) -> KVLayout:
        """This rank's pool; `dtype` is the KV's own."""
        return KVLayout(
            num_layers=len(self.layers),
            num_blocks=num_blocks,
            num_kv_heads=len(self.kv_heads),
            block_size=block_size,
            head_dim=spec.head_dim,
            dtype=dtype,
            fingerprint=fingerprint,
        )

    def kv_block_bytes(self, spec: ModelSpec, dtype: str, block_size: int) -> int:
        """Bytes that one block takes on this rank, over all its layers, with its scales."""
        one = self.kv_layout(spec, dtype, block_size=block_size, num_blocks=1, fingerprint="")
        return one.num_bytes


def plan_shards(
    spec: ModelSpec, *, tensor_parallel: int = 1, pipeline_parallel: int = 1, section: str = "model"
) -> tuple[Shard, ...]:
    """Every rank's part, by rank: `rank = stage * tensor_parallel + tensor_rank`.

    Layers, MLP columns and vocabulary need not divide evenly. Raises InvalidConfig, naming the key
    of `section`, for a split that this model does not allow.
    """
    _check_heads(spec, tensor_parallel, f"{section}.tensor_parallel")
    if pipeline_parallel > spec.num_layers:
        raise InvalidConfig(
            f"{section}.pipeline_parallel",
            f"{pipeline_parallel} stages for {spec.num_layers} layers leave a stage empty",
            f"give {spec.num_layers} or less",
        )
    expert_inner = 0 if spec.mixture is None else spec.mixture.expert_intermediate
    return tuple(
        Shard(
            rank=stage * tensor_parallel + tensor_rank,
            tensor_rank=tensor_rank,
            tensor_parallel=tensor_parallel,
            stage=stage,
            pipeline_parallel=pipeline_parallel,
            layers=_share(spec.num_layers, stage, pipeline_parallel),
            heads=_share(spec.num_heads, tensor_rank, tensor_parallel),
            kv_heads=_kv_heads(spec.num_kv_heads, tensor_rank, tensor_parallel),
            inner=_share(spec.intermediate_size, tensor_rank, tensor_parallel),
            expert_inner=_share(expert_inner, tensor_rank, tensor_parallel),
            vocab=_share(spec.vocab_size, tensor_rank, tensor_parallel),
        )
        for stage in range(pipeline_parallel)
        for tensor_rank in range(tensor_parallel)
    )


def _check_heads(spec: ModelSpec, size: int, key: str) -> None:
    if spec.num_heads % size:
        divisors = [n for n in range(1, spec.num_heads + 1) if _is_possible(spec, n)]
        raise InvalidConfig(
            key,
            f"{spec.num_heads} attention heads do not divide among {size} ranks",
            f"this model allows {', '.join(map(str, divisors))}",
        )
    if not _is_possible(spec, size):
        raise InvalidConfig(
            key,
            f"{spec.num_kv_heads} KV heads neither divide among {size} ranks nor repeat evenly",
            f"give a divisor or a multiple of {spec.num_kv_heads}",
        )


def _is_possible(spec: ModelSpec, size: int) -> bool:
    kv_heads = spec.num_kv_heads
    return spec.num_heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)


def _share(count: int, index: int, parts: int) -> range:
    """Neighbours, as even as can be."""
    return range(count * index // parts, count * (index + 1) // parts)


def _kv_heads(count: int, index: int, parts: int) -> range:
    if count >= parts:
        return _share(count, index, parts)
    head = index * count // parts
    return range(head, head + 1)
