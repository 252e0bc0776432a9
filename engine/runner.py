"""Runs one batch on one device: columns in, tokens out. Blocking; lives in the compute thread."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..kernels.openmp import HAS_OPENMP
from ..kernels.operators import operators
from ..kernels.rows import rows_of
from .batch import Batch, StepOutput
from .cache import TORCH_DTYPES, AllocateBuffer, KVCache, plain_buffer
from .errors import InvalidConfig
from .layout import ITEM_BYTES, KVLayout
from .model import Model
from .request import Request, SamplingParams, TokenLogprobs
from .sampler import Sampler
from .sequence import Sequence
from .spec import ModelSpec, fingerprint, load_spec
from .weights import load_weights


class TokenSampler(Protocol):
    """What the runner asks of `sampler.Sampler`."""

    def sample(
        self, logits: Tensor, sequences: list[Sequence]
    ) -> tuple[list[int], list[TokenLogprobs | None] | None]: ...


class Runner:
    """A model, its KV pool and a sampler. One caller at a time."""

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        sampler: TokenSampler,
        *,
        threads: int,
        max_model_len: int,
    ) -> None:
        self.model = model
        self.cache = cache
        self.max_model_len = max_model_len
        self._sampler = sampler
        self._threads = threads

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    @property
    def layout(self) -> KVLayout:
        return self.cache.layout

    @torch.inference_mode()
    def run(self, batch: Batch, layer_done: Callable[[int], None] | None = None) -> StepOutput:
        """Compute the batch's positions into their blocks and sample where rows end.

        `layer_done(layer)` is called when a layer's KV of this batch is in the pool.
        """
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)  # of the calling thread
        sampling = [row for row in range(batch.num_rows) if batch.samples(row)]
        logits = self._logits(batch, sampling, layer_done)
        tokens = [-1] * batch.num_rows
        if not sampling:
            return StepOutput(token_ids=tokens)
        chosen, logprobs = self._sampler.sample(logits, [batch.sequences[row] for row in sampling])
        for row, token in zip(sampling, chosen, strict=True):
            tokens[row] = token
        if logprobs is None:
            return StepOutput(token_ids=tokens)
        by_row: list[TokenLogprobs | None] = [None] * batch.num_rows
        for row, entry in zip(sampling, logprobs, strict=True):
            by_row[row] = entry
        return StepOutput(token_ids=tokens, logprobs=by_row)

    def _logits(
        self, batch: Batch, sampling: list[int], layer_done: Callable[[int], None] | None
    ) -> Tensor:  # float32 [len(sampling), vocab]
        """Forward pass over the batch as columns."""
        token_ids: list[int] = []
        for sequence, start, count in zip(batch.sequences, batch.starts, batch.counts, strict=True):
            assert sequence.tokens is not None, "a simulated sequence has no tokens to compute"
            if count == 1:
                token_ids.append(sequence.tokens[start])
            else:
                token_ids += sequence.tokens[start : start + count]
        rows = rows_of(
            np.array(batch.starts, dtype=np.int64),
            np.array(batch.counts, dtype=np.int64),
            self._tables(batch),
            self.layout.block_size,
        )
        ends = rows.firsts + rows.counts - 1
        prompts = [sequence.num_prompt_tokens for sequence in batch.sequences]
        return self.model.forward(
            np.array(token_ids, dtype=np.int64),
            rows,
            np.array(prompts, dtype=np.int64),
            ends[sampling],
            self.cache,
            layer_done,
        )

    def _tables(self, batch: Batch) -> np.ndarray:  # int32 [rows, width]
        """Block tables as one array; entries past a row's context are 0 and never read."""
        layout = self.layout
        needed = [
            layout.blocks_for(start + count)
            for start, count in zip(batch.starts, batch.counts, strict=True)
        ]
        tables = np.zeros((batch.num_rows, max(needed)), dtype=np.int32)
        for row, (sequence, blocks) in enumerate(zip(batch.sequences, needed, strict=True)):
            assert len(sequence.blocks) >= blocks, "a row's blocks are allocated before it runs"
            tables[row, :blocks] = sequence.blocks[:blocks]
        return tables

    def warm_up(self) -> None:
        """Compile what is not compiled and touch the pool's first blocks, before any request.

        Runs a chunk and a single token through blocks that nobody holds yet.
        """
        length = min(self.max_model_len, 40, self.layout.num_blocks * self.layout.block_size)
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
        prompt = Request(
            id="warm-up", token_ids=(0,) * length, num_prompt_tokens=length, sampling=sampling
        )
        sequence = Sequence(prompt)
        sequence.blocks = list(range(self.layout.blocks_for(length)))
        for start in (0, length - 1):
            batch = Batch(sequences=[sequence], starts=[start], counts=[length - start])
            self.run(batch)


def _num_blocks(
    spec: ModelSpec, dtype: str, block_size: int, max_model_len: int, memory_bytes: int
) -> int:
    """Blocks that fit; at least one sequence of full length must."""
    block_bytes = spec.kv_bytes_per_token(dtype) * block_size
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


def build_runner(
    directory: str | Path,
    *,
    sampler: TokenSampler | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    threads: int | None = None,
    block_size: int = 16,
    max_model_len: int = 2048,
    memory_bytes: int | None = None,
    num_blocks: int | None = None,
    allocate: AllocateBuffer | None = None,
) -> Runner:
    """Load a checkpoint and build a runner, not yet warm.

    The pool takes `num_blocks`, or as many as fit `memory_bytes`; `allocate` supplies its memory
    (private by default; on CUDA always the device's). `sampler` is `Sampler` by default.
    Raises InvalidConfig and UnsupportedModel.
    """
    spec = load_spec(directory)
    if spec.max_context is not None and max_model_len > spec.max_context:
        raise InvalidConfig(
            "model.max_model_len",
            f"{max_model_len} is more than the {spec.max_context} learned positions",
            f"give {spec.max_context} or less",
        )
    kind = resolve_dtype(spec, dtype)
    place = torch.device(device)
    threads = threads or len(os.sched_getaffinity(0))
    if threads > 1 and not HAS_OPENMP:
        raise InvalidConfig(
            "threads", "this build of torch brings no OpenMP threads to share", "give 1"
        )
    if num_blocks is None:
        memory = 1 << 30 if memory_bytes is None else memory_bytes
        num_blocks = _num_blocks(spec, kind, block_size, max_model_len, memory)
    layout = KVLayout(
        num_layers=spec.num_layers,
        num_blocks=num_blocks,
        num_kv_heads=spec.num_kv_heads,
        block_size=block_size,
        head_dim=spec.head_dim,
        dtype=kind,
        fingerprint=fingerprint(directory),
    )
    if place.type == "cuda":
        buffer = torch.empty(layout.num_bytes, dtype=torch.uint8, device=place)
    else:
        buffer = (allocate or plain_buffer)(layout.num_bytes)
    weights = load_weights(directory, spec, kind, place)
    ops = operators(
        device=place,
        dtype=TORCH_DTYPES[kind],
        head_dim=spec.head_dim,
        block_size=block_size,
        threads=threads,
    )
    model = Model(spec, weights, ops, max_model_len, place)
    return Runner(
        model,
        KVCache(layout, buffer),
        sampler or Sampler(spec.vocab_size, spec.eos_token_ids),
        threads=threads,
        max_model_len=max_model_len,
    )
