"""Runs one batch: columns in, tokens out. Blocking; lives in the compute thread.

A runner is a worker's leader: it computes rank 0's shard, tells the followers each step, samples.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .batch import Batch, StepOutput
from .cache import AllocateBuffer, KVCache
from .columns import columns_of
from .layout import KVLayout
from .rank import Rank, RankOptions, build_rank, plan_options
from .ranks import Followers, RankHost
from .request import Request, SamplingParams, TokenLogprobs
from .sampler import Sampler
from .sequence import Sequence
from .shard import LEADER, RankLinks, serve_store
from .shard_plan import Shard
from .spec import ModelSpec

JOIN_S = 120.0  # for followers to start, meet and load


class TokenSampler(Protocol):
    """What the runner asks of `sampler.Sampler`."""

    def sample(
        self, logits: Tensor, sequences: list[Sequence]
    ) -> tuple[list[int], list[TokenLogprobs | None] | None]: ...


class Runner:
    """A model, its KV pool and a sampler. One caller at a time."""

    def __init__(
        self,
        rank: Rank,
        sampler: TokenSampler,
        *,
        max_model_len: int,
        followers: Followers | None = None,
    ) -> None:
        assert rank.shard.rank == LEADER
        self.rank = rank
        self.max_model_len = max_model_len
        self._sampler = sampler
        self._followers = followers
        self._watched = 0  # steps whose layers someone watches, numbered for the followers

    @property
    def spec(self) -> ModelSpec:
        return self.rank.model.spec

    @property
    def cache(self) -> KVCache:
        """Rank 0's slice of the pool; every rank's has the same block ids."""
        return self.rank.cache

    @property
    def layout(self) -> KVLayout:
        return self.cache.layout

    @torch.inference_mode()
    def run(self, batch: Batch, layer_done: Callable[[int], None] | None = None) -> StepOutput:
        """Compute the batch's positions into their blocks and sample where rows end.

        `layer_done(layer)` is called when a layer's KV of this batch is in rank 0's pool. Raises
        RankLost when a follower is: this runner and its followers are done for then.
        """
        sampling = [row for row in range(batch.num_rows) if batch.samples(row)]
        logits = self._logits(batch, sampling, layer_done)
        tokens = [-1] * batch.num_rows
        if not sampling:
            return StepOutput(token_ids=tokens)
        assert logits is not None, "logits that are wanted come to the leader"
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
    ) -> Tensor | None:  # float32 [len(sampling), vocab]
        """Forward pass over the batch as columns, on every rank."""
        columns = columns_of(batch, sampling, self.layout.block_size)
        if self._followers is not None:
            self._followers.send(-1 if layer_done is None else self._watched, columns)
        self._watched += layer_done is not None
        return self.rank.compute(columns, layer_done)

    def check_ranks(self) -> None:
        """Raises RankLost when a follower has died or is silent. From any thread."""
        if self._followers is not None:
            self._followers.check()

    def close(self) -> None:
        """Let the followers go, and end a step that waits for one. From any thread; idempotent."""
        if self._followers is not None:
            self._followers.close()
        if self.rank.links is not None:
            self.rank.links.abort()

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


def build_runner(
    directory: str | Path,
    *,
    sampler: TokenSampler | None = None,
    allocate: AllocateBuffer | None = None,
    ranks: RankHost | None = None,
    **sizes: Any,
) -> Runner:
    """Load a checkpoint and build a runner, not yet warm.

    `sizes` are those of `rank.plan_options`; with more than one rank, followers come to `ranks`,
    which is closed then. `allocate` supplies the pool's memory (private by default; on CUDA always
    the device's). `sampler` is `Sampler` by default. Raises InvalidConfig, UnsupportedModel and
    RankLost.
    """
    options, shards = plan_options(directory, **sizes)
    vocab = [shard.vocab for shard in shards[: options.tensor_parallel]]
    followers, links = None, None
    if options.num_ranks > 1:
        assert ranks is not None, "a worker of several ranks has a door for them"
        followers, links = _meet(options, shards, ranks)
    try:
        rank = build_rank(options, shards[LEADER], vocab, links, allocate)
        if followers is not None:
            followers.wait_ready(JOIN_S)
    except BaseException:
        if followers is not None:
            followers.close()
        raise
    spec = rank.model.spec
    return Runner(
        rank,
        sampler or Sampler(spec.vocab_size, spec.eos_token_ids),
        max_model_len=options.max_model_len,
        followers=followers,
    )


def _meet(
    options: RankOptions, shards: tuple[Shard, ...], ranks: RankHost
) -> tuple[Followers, RankLinks]:
    store, port = serve_store(ranks.host, JOIN_S)
    message = {"options": options.as_dict(), "store": port}
    followers = ranks.welcome(options.num_ranks, message, JOIN_S)
    try:
        return followers, RankLinks(shards[LEADER], store, torch.device(options.device), ranks.host)
    except BaseException:
        followers.close()
        raise
