"""One rank of a worker: its shard of the model, its slice of the KV pool, links to the others."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels.openmp import HAS_OPENMP
from ..kernels.operators import operators
from ..kernels.rows import rows_of
from .cache import TORCH_DTYPES, AllocateBuffer, KVCache, plain_buffer
from .columns import Columns
from .errors import InvalidConfig
from .layout import FP8, ITEM_BYTES
from .model import Model
from .packed_weights import pack_weights
from .shard import RankLinks
from .shard_plan import Shard, plan_shards
from .spec import ModelSpec, fingerprint, load_spec
from .weights import load_weights

# Tokens for which a stage reads its weights once. Fewer, and reading them again for each part of
# the step costs more than the stages gain by working at the same time.
PART_TOKENS = 64
PARTS_A_STAGE = 4  # with m parts in s stages, (s - 1) / (m + s - 1) of the time is idle


@dataclass(frozen=True, kw_only=True, slots=True)
class RankOptions:
    """What all ranks of a worker must agree on. Sizes are of the whole worker."""

    directory: str
    dtype: str
    kv_dtype: str  # what blocks hold
    device: str
    threads: int  # of each rank
    block_size: int
    num_blocks: int
    max_model_len: int
    tensor_parallel: int = 1
    pipeline_parallel: int = 1

    @property
    def num_ranks(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Rank:
    """Computes its part of every step. One caller at a time, in the compute thread."""

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        links: RankLinks | None,  # None: the only rank
        vocab: list[range],
        threads: int,
        dtype: torch.dtype,
    ) -> None:
        self.model = model
        self.cache = cache
        self.links = links
        self._vocab = vocab
        self._threads = threads
        self._dtype = dtype

    @property
    def shard(self) -> Shard:
        return self.model.shard

    @torch.inference_mode()
    def compute(
        self, columns: Columns, layer_done: Callable[[int], None] | None = None
    ) -> Tensor | None:  # float32 [wanted, vocab] at the leader
        """The step's KV into this rank's blocks, and its logits to the leader.

        `layer_done(layer)` is called when a layer's KV of the whole step is in this rank's pool.
        Raises RankLost.
        """
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)  # of the calling thread
        if self.links is None:
            return self._forward(columns, None, layer_done)
        parts = columns.split(self._num_parts(columns.num_tokens))
        results = []
        for part in parts:
            results.append(self._part(part, layer_done if part is parts[-1] else None))
        logits = torch.cat(results) if self.shard.is_last_stage else None
        whole = self.links.gather(logits, len(columns.wanted), self._vocab)
        self.links.flush()
        return whole

    def _part(self, part: Columns, layer_done: Callable[[int], None] | None) -> Tensor:
        """One part of a step, while the other stages work on others."""
        links = self.links
        assert links is not None
        received = None
        if not self.shard.is_first_stage:
            shape = (part.num_tokens, self.model.spec.hidden_size)
            received = links.receive(shape, self._dtype)
        result = self._forward(part, received, layer_done)
        if not self.shard.is_last_stage:
            links.hand_on(result)
        return result

    def _forward(
        self,
        columns: Columns,
        received: Tensor | None,
        layer_done: Callable[[int], None] | None,
    ) -> Tensor:
        rows = rows_of(columns.starts, columns.counts, columns.tables, self.cache.layout.block_size)
        return self.model.forward(
            columns.token_ids,
            rows,
            columns.prompts,
            columns.wanted,
            self.cache,
            layer_done,
            received,
        )

    def _num_parts(self, num_tokens: int) -> int:
        stages = self.shard.pipeline_parallel
        if stages == 1:
            return 1
        return max(1, min(PARTS_A_STAGE * stages, num_tokens // PART_TOKENS))


def plan_options(
    directory: str | Path,
    *,
    dtype: str = "auto",
    kv_dtype: str = "auto",
    device: str = "cpu",
    threads: int | None = None,
    block_size: int = 16,
    max_model_len: int = 2048,
    memory_bytes: int | None = None,
    num_blocks: int | None = None,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    section: str = "model",
) -> tuple[RankOptions, tuple[Shard, ...]]:
    """What a worker's ranks agree on, checked against the checkpoint, and each rank's part.

    The pool takes `num_blocks`, or as many as fit `memory_bytes` over all ranks. Raises
    InvalidConfig and UnsupportedModel.
    """
    spec = load_spec(directory)
    if spec.max_context is not None and max_model_len > spec.max_context:
        raise InvalidConfig(
            "model.max_model_len",
            f"{max_model_len} is more than the {spec.max_context} learned positions",
            f"give {spec.max_context} or less",
        )
    kind = resolve_dtype(spec, dtype)
    kv_kind = resolve_kv_dtype(kind, kv_dtype)
    threads = threads or len(os.sched_getaffinity(0))
    if threads > 1 and not HAS_OPENMP:
        raise InvalidConfig(
            "threads", "this build of torch brings no OpenMP threads to share", "give 1"
        )
    shards = plan_shards(
        spec,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        section=section,
    )
    if num_blocks is None:
        memory = 1 << 30 if memory_bytes is None else memory_bytes
        block_bytes = sum(shard.kv_block_bytes(spec, kv_kind, block_size) for shard in shards)
        num_blocks = _num_blocks(block_bytes, block_size, max_model_len, memory)
    options = RankOptions(
        directory=str(directory),
        dtype=kind,
        kv_dtype=kv_kind,
        device=device,
        threads=threads,
        block_size=block_size,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
    )
    return options, shards


def _num_blocks(block_bytes: int, block_size: int, max_model_len: int, memory_bytes: int) -> int:
    """Blocks that fit; at least one sequence of full length must."""
    count = memory_bytes // block_bytes
    needed = -(-max_model_len // block_size)
    if count < needed:
        raise InvalidConfig(
            "kv.memory",
            f"{memory_bytes} bytes hold {count} blocks, one sequence of max_model_len "
            f"{max_model_len} needs {needed} ({needed * block_bytes} bytes)",
            "give more memory or a smaller max_model_len",
        )
    return count


def resolve_dtype(spec: ModelSpec, dtype: str) -> str:
    """`auto` is the checkpoint's own."""
    chosen = spec.dtype if dtype == "auto" else dtype
    if chosen not in ITEM_BYTES:
        raise InvalidConfig(
            "model.dtype", f"{dtype!r} is unknown", f"give auto, {', '.join(ITEM_BYTES)}"
        )
    return chosen


def resolve_kv_dtype(dtype: str, kv_dtype: str) -> str:
    """`auto` is the model's, resolved."""
    if kv_dtype not in ("auto", FP8):
        raise InvalidConfig("kv.dtype", f"{kv_dtype!r} is unknown", f"give auto or {FP8}")
    return dtype if kv_dtype == "auto" else kv_dtype


def build_rank(
    options: RankOptions,
    shard: Shard,
    vocab: list[range],
    links: RankLinks | None = None,
    allocate: AllocateBuffer | None = None,
) -> Rank:
    """Load one shard and build its rank, not yet warm.

    `vocab` is each tensor rank's share; `allocate` supplies the pool's memory, on the rank's device
    (private by default). Raises InvalidConfig and UnsupportedModel.
    """
    spec, place = load_spec(options.directory), torch.device(options.device)
    layout = shard.kv_layout(
        spec,
        options.kv_dtype,
        block_size=options.block_size,
        num_blocks=options.num_blocks,
        fingerprint=fingerprint(options.directory),
    )
    dtype = TORCH_DTYPES[options.dtype]
    if place.type == "cuda" and allocate is None:
        buffer = torch.empty(layout.num_bytes, dtype=torch.uint8, device=place)
    else:
        buffer = (allocate or plain_buffer)(layout.num_bytes)
    ops = operators(
        device=place,
        dtype=dtype,
        head_dim=spec.head_dim,
        block_size=options.block_size,
        threads=options.threads,
    )
    reduce = links.reduce if links is not None and shard.tensor_parallel > 1 else None
    weights = pack_weights(load_weights(options.directory, spec, options.dtype, place, shard))
    model = Model(spec, shard, weights, ops, options.max_model_len, place, reduce)
    return Rank(model, KVCache(layout, buffer), links, vocab, options.threads, dtype)
