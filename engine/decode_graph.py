"""Decode steps as CUDA graphs, one a bucket of batch sizes, over a batch that lives on the device.

A step replays the graph of the smallest bucket that holds its rows; the rest of the bucket is
padding, which sees nothing and writes nothing. The host uploads what changed, launches the graph
and the draw, and reads the chosen tokens, before or after it has launched the step that follows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from .batch import Batch, StepOutput
from .cache import KVCache
from .decode_slots import DecodeSlots, DrawOf
from .device_batch import BROKEN, Answer, DeviceBatch
from .model import Model
from .request import TokenLogprobs
from .sampler import BrokenLogits
from .upload import upload

if TYPE_CHECKING:
    from .runner import TokenSampler

_WIDTH = 16  # block tables are multiples of so many entries wide
Progress = Callable[[int, int], None]  # graphs captured, of how many


def buckets_up_to(max_rows: int) -> tuple[int, ...]:
    """Batch sizes to capture, ascending, the last one `max_rows`.

    Multiples of 8 (what a matrix product takes anyway) up to 64, then ever larger steps: from 33
    rows on less than a fifth of a step is padding.
    """
    sizes = {1, 2, 4, max_rows}
    size, step = 8, 8
    while size < max_rows:
        sizes.add(size)
        if size >= 8 * step:
            step *= 2
        size += step
    return tuple(sorted(size for size in sizes if size <= max_rows))


class GraphStep:
    """A step that was launched (`batch.Underway`)."""

    def __init__(
        self,
        graphs: DecodeGraphs,
        batch: Batch,
        slots: np.ndarray,
        edited: np.ndarray,
        answer: Answer,
    ) -> None:
        self._graphs, self._batch, self._answer = graphs, batch, answer
        self._slots = slots  # int64 [rows]
        self._edited = edited  # rows int64 whose token the sampler chooses

    @torch.inference_mode()
    def output(self) -> StepOutput:
        """The chosen tokens, once they are there. Raises BrokenLogits as the sampler does."""
        batch, slots = self._batch, self._slots
        token_ids = self._answer.wait()[slots].tolist()
        logprobs = None
        if len(self._edited):
            logprobs = self._graphs.choose(batch, slots, self._edited, token_ids)
        if BROKEN in token_ids:
            broken = [row for row, token_id in enumerate(token_ids) if token_id == BROKEN]
            sequences = [batch.sequences[row] for row in broken]
            raise BrokenLogits(sequences, [batch.starts[row] + 1 for row in broken])
        return StepOutput(token_ids=token_ids, logprobs=logprobs)


class DecodeGraphs:
    """Runs batches whose every row computes one token and samples. One caller at a time.

    `draw_of` says how the device draws a row's token by itself; of a row that asks for more,
    `sampler` chooses it from the logits.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        *,
        max_rows: int,
        max_model_len: int,
        draw_of: DrawOf,
        sampler: TokenSampler,
    ) -> None:
        assert model.is_graphable
        layout = cache.layout
        self.buckets = buckets_up_to(max_rows)
        self._model, self._cache = model, cache
        self._draw_of, self._sampler = draw_of, sampler
        width = -(-layout.blocks_for(max_model_len) // _WIDTH) * _WIDTH
        self._slots = DecodeSlots(max_rows, width)
        self._batch = DeviceBatch(
            max_rows=max_rows,
            width=width,
            block_size=layout.block_size,
            vocab_size=model.spec.vocab_size,
            device=cache.pool.device,
        )
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def takes(self, batch: Batch) -> bool:
        """Whether every row of the batch decodes, and there is a row for each."""
        if batch.num_rows > self.buckets[-1] or max(batch.counts) > 1:
            return False
        return all(batch.samples(row) for row in range(batch.num_rows))

    @torch.inference_mode()
    def capture(self, progress: Progress) -> None:
        """Compile and capture every bucket, largest first, so that all share its memory.

        To be called before any batch is run: all rows are padding, and the pool stays as it is.
        """
        device, pool = self._cache.pool.device, None
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        for done, rows in enumerate(reversed(self.buckets)):
            with torch.cuda.stream(stream):
                self._compute(rows)  # compiles, and sets up what libraries set up once
                self._batch.draw(rows)
            graph = torch.cuda.CUDAGraph()
            # Other threads may talk to the device meanwhile.
            with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                self._compute(rows)
            pool, self._graphs[rows] = graph.pool(), graph
            progress(done + 1, len(self.buckets))
        torch.cuda.current_stream(device).wait_stream(stream)
        self._batch.clear()

    @torch.inference_mode()
    def begin(self, batch: Batch) -> GraphStep:
        """Launch the step behind those that were launched before, and wait for nothing.

        A batch that follows another comes before that one's tokens are asked for; all its rows
        are drawn by the device.
        """
        try:
            slots, changes = self._slots.place(batch.sequences, batch.starts, self._draw_of)
            self._batch.tell(changes)
        except BaseException:  # what the device was told is not known: nothing may run on it
            self._slots.forget()
            self._batch.clear()
            raise
        rows = batch.num_rows
        self._replay(self._bucket(rows))
        if self._slots.any_drawn:
            self._batch.draw(rows)
        answer = self._batch.advance(rows)
        self._slots.advanced()
        edited = self._slots.edited()
        assert batch.follows is None or not len(edited), "the sampler needs the tokens before"
        return GraphStep(self, batch, slots, edited, answer)

    def choose(
        self, batch: Batch, slots: np.ndarray, rows: np.ndarray, token_ids: list[int]
    ) -> list[TokenLogprobs | None] | None:
        """Let the sampler choose for `rows`, in place of the device; what it says of all rows."""
        self._slots.chose_otherwise(rows)
        logits = self._batch.logits
        logits = logits.index_select(0, upload(slots[rows], logits.device))
        sequences = [batch.sequences[row] for row in rows.tolist()]
        positions = [batch.starts[row] + 1 for row in rows.tolist()]
        chosen, logprobs = self._sampler.sample(logits, sequences, positions)
        for row, token_id in zip(rows.tolist(), chosen, strict=True):
            token_ids[row] = token_id
        if logprobs is None:
            return None
        by_row: list[TokenLogprobs | None] = [None] * batch.num_rows
        for row, entry in zip(rows.tolist(), logprobs, strict=True):
            by_row[row] = entry
        return by_row

    def graph_of(self, rows: int) -> torch.cuda.CUDAGraph:
        """The captured graph that a batch of so many rows takes."""
        return self._graphs[self._bucket(rows)]

    def _bucket(self, rows: int) -> int:
        return self.buckets[bisect_left(self.buckets, rows)]

    def _replay(self, rows: int) -> None:
        graph = self._graphs.get(rows)
        if graph is None:  # not captured: the same work, launch by launch
            self._compute(rows)
        else:
            graph.replay()

    def _compute(self, rows: int) -> None:
        """What a graph holds: the forward pass over the first rows, and each row's likeliest."""
        token_ids, positions, plan = self._batch.locate(rows)
        self._batch.take_logits(self._model.step(token_ids, positions, plan, self._cache))
