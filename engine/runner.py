"""Runs one batch: columns in, tokens out. Blocking; lives in the compute thread.

A runner is a worker's leader: it computes rank 0's shard, tells the followers each step, samples.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .batch import Batch, StepOutput, StepTimes, Underway
from .cache import AllocateBuffer, KVCache
from .columns import Columns, columns_of
from .layout import KVLayout
from .rank import Rank, RankOptions, build_rank, plan_options
from .ranks import Followers, RankHost
from .request import Request, SamplingParams, TokenLogprobs
from .sampler import Sampler
from .sequence import Sequence
from .shard import LEADER, RankLinks, serve_store
from .shard_plan import Shard
from .spec import ModelSpec

if TYPE_CHECKING:
    from .decode_graph import DecodeGraphs

log = logging.getLogger(__name__)
JOIN_S = 120.0  # for followers to start, meet and load


class TokenSampler(Protocol):
    """What the runner asks of `sampler.Sampler`."""

    def sample(
        self, logits: Tensor, sequences: list[Sequence], positions: list[int], /
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
        self._graphs: DecodeGraphs | None = None

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
        begun = self.begin(batch, layer_done)
        return begun if isinstance(begun, StepOutput) else begun.output()

    @torch.inference_mode()
    def begin(
        self,
        batch: Batch,
        layer_done: Callable[[int], None] | None = None,
        former: StepOutput | Underway | None = None,
    ) -> StepOutput | Underway:
        """As `run`, but where the device does the step by itself, it is only launched.

        `former` is what the step before returned here, if the batch follows it: its tokens, or
        that they stand on the device.
        """
        if self._graphs is not None and layer_done is None and self._graphs.takes(batch):
            return self._graphs.begin(batch)
        assert former is None or isinstance(former, StepOutput), "it went the same way"
        begun_s = time.perf_counter()
        sampling = [row for row in range(batch.num_rows) if batch.samples(row)]
        columns = columns_of(batch, sampling, self.layout.block_size, former)
        prepared_s = time.perf_counter()
        logits = self._logits(columns, layer_done)
        computed_s = time.perf_counter()
        tokens, logprobs = self._sample(batch, sampling, logits)
        times = StepTimes(
            begun_s=begun_s,
            prepared_s=prepared_s,
            computed_s=computed_s,
            ended_s=time.perf_counter(),
        )
        return StepOutput(token_ids=tokens, logprobs=logprobs, times=times)

    def _logits(
        self, columns: Columns, layer_done: Callable[[int], None] | None
    ) -> Tensor | None:  # float32 [wanted, vocab]
        """Forward pass over the columns, on every rank."""
        if self._followers is not None:
            self._followers.send(-1 if layer_done is None else self._watched, columns)
        self._watched += layer_done is not None
        return self.rank.compute(columns, layer_done)

    def _sample(
        self, batch: Batch, sampling: list[int], logits: Tensor | None
    ) -> tuple[list[int], list[TokenLogprobs | None] | None]:
        """A token a row, -1 where it does not sample, and what was asked for beside them."""
        tokens = [-1] * batch.num_rows
        if not sampling:
            return tokens, None
        assert logits is not None, "logits that are wanted come to the leader"
        sequences = [batch.sequences[row] for row in sampling]
        positions = [batch.starts[row] + batch.counts[row] for row in sampling]
        chosen, logprobs = self._sampler.sample(logits, sequences, positions)
        for row, token in zip(sampling, chosen, strict=True):
            tokens[row] = token
        if logprobs is None:
            return tokens, None
        by_row: list[TokenLogprobs | None] = [None] * batch.num_rows
        for row, entry in zip(sampling, logprobs, strict=True):
            by_row[row] = entry
        return tokens, by_row

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

    def warm_up(self, max_decode_rows: int = 0) -> None:
        """Compile what is not compiled and touch the pool's first blocks, before any request.

        Runs a chunk and a single token through blocks that nobody holds yet. On a GPU, steps of up
        to `max_decode_rows` decoding rows are captured as CUDA graphs.
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
        if max_decode_rows and self.cache.pool.device.type == "cuda":
            graphs = self.keep_decode_on_device(max_decode_rows)
            if graphs is None:
                log.warning("decode steps are launched kernel by kernel: no CUDA graph holds them")
            else:
                graphs.capture(lambda done, of: log.info("decode graph %d of %d", done, of))

    def keep_decode_on_device(self, max_rows: int) -> DecodeGraphs | None:
        """Run steps of up to `max_rows` decoding rows from state that stays on the device; to be
        captured by the caller. None, and nothing changed, where the model cannot: several ranks,
        or rotary angles that depend on the prompt's length.
        """
        if not self.rank.model.is_graphable:
            return None
        from .decode_graph import DecodeGraphs  # Triton, where there is a GPU

        sampler = self._sampler
        self._graphs = DecodeGraphs(
            self.rank.model,
            self.cache,
            max_rows=max_rows,
            max_model_len=self.max_model_len,
            draw_of=sampler.draw_of if isinstance(sampler, Sampler) else _by_the_host,
            sampler=sampler,
        )
        return self._graphs


def _by_the_host(sequence: Sequence) -> None:
    """For a sampler that does not say how it draws: it is asked each time."""


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
