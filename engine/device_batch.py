"""A decoding batch that lives on the device: what `decode_slots.DecodeSlots` keeps books of.

All buffers are made once, so that a CUDA graph may hold them, and the host reads one thing of a
step: the chosen tokens. Two steps may be launched: a step's tokens are read before the changes of
the second one after it are told, so two pinned buffers each way, in turn, are enough.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..kernels.cuda import decode_rows, sampling
from ..kernels.cuda.decode_rows import NUM_FIELDS, Field
from ..kernels.cuda.operators import CudaPlan, Singles
from .decode_slots import Changes
from .upload import upload

_IN_TURN = 2  # steps that may be launched and not read
BROKEN = -1  # instead of a token: the row's logits had no finite maximum


class Answer:
    """A step's chosen tokens on their way to the host."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows  # int64 [max_rows], pinned where there is a GPU
        self._ready = torch.cuda.Event() if rows.is_pinned() else None

    def take(self, reported: Tensor) -> None:
        """Copy the tokens [rows], behind the work that makes them."""
        self._rows[: len(reported)].copy_(reported, non_blocking=True)
        if self._ready is not None:
            self._ready.record(torch.cuda.current_stream(reported.device))

    def wait(self) -> np.ndarray:
        """The chosen tokens int64 [max_rows], or `BROKEN`: the one wait of a step. Good until
        the second step after this one is launched."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._rows.numpy()


class DeviceBatch:
    """Rows of up to `width` blocks, and the buffers of a step over the first of them.

    A row without a sequence is padding: it sees nothing and writes no KV.
    """

    def __init__(
        self, *, max_rows: int, width: int, block_size: int, vocab_size: int, device: torch.device
    ) -> None:
        def column(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros((max_rows, *shape), dtype=dtype, device=device)

        self._block_size = block_size
        self._longest = width * block_size
        self._columns = torch.zeros((NUM_FIELDS, max_rows), dtype=torch.int64, device=device)
        self._tables = column(torch.int32, width)
        self._kv_slots, self._angles = column(torch.int64), column(torch.int64)
        self._lengths = column(torch.int32)
        self.logits = column(torch.float32, vocab_size)
        self._token_ids, self._reported = column(torch.int64), column(torch.int64)
        self._maxima = column(torch.float32)
        self._told = [self._pinned(NUM_FIELDS * max_rows) for _ in range(_IN_TURN)]
        self._answers = [Answer(self._pinned(max_rows)) for _ in range(_IN_TURN)]
        self._turn = 0
        self.clear()

    def clear(self) -> None:
        """Make all rows padding."""
        self._columns[Field.POSITION].fill_(-1)

    def tell(self, changes: Changes) -> None:
        """Bring the rows up to date, without waiting."""
        if changes.moves:
            self._move(changes.moves)
        words = changes.num_words
        if words == 0:
            return
        if words > len(self._told[self._turn]):
            self._told[self._turn] = self._pinned(2 * words)
        told = self._told[self._turn][:words]
        changes.pack(told.numpy())
        decode_rows.apply_changes(
            self._columns,
            self._tables,
            told.to(self._columns.device, non_blocking=True),
            num_rows=len(changes.slots),
            num_entries=len(changes.places),
        )

    def _move(self, moves: list[tuple[int, int]]) -> None:
        origins, targets = upload(np.array(moves, np.int64).T.copy(), self._columns.device)
        self._columns.index_copy_(1, targets, self._columns.index_select(1, origins))
        self._tables.index_copy_(0, targets, self._tables.index_select(0, origins))

    def locate(self, rows: int) -> tuple[Tensor, Tensor, CudaPlan]:
        """Tokens and positions int64 [rows] that a step over the first rows computes (0 where
        padding is), and its plan."""
        kv_slots, lengths = self._kv_slots[:rows], self._lengths[:rows]
        angles, tables = self._angles[:rows], self._tables[:rows]
        decode_rows.locate(
            self._columns, tables, kv_slots, lengths, angles, block_size=self._block_size
        )
        singles = Singles(tables=tables, lengths=lengths, longest=self._longest)
        plan = CudaPlan(slots=kv_slots, angles=angles, singles=singles, chunks=None)
        return self._columns[Field.TOKEN, :rows], angles, plan

    def take_logits(self, logits: Tensor) -> None:
        """Keep the step's logits [rows, vocab] in float32, and each row's largest."""
        rows = len(logits)
        self.logits[:rows].copy_(logits)
        sampling.argmax(self.logits[:rows], (self._token_ids[:rows], self._maxima[:rows]))

    def draw(self, rows: int) -> None:
        """Let rows that are not greedy draw their token, by (seed, position) alone."""

        def field(name: Field, dtype: torch.dtype = torch.int64) -> Tensor:
            return self._columns[name, :rows].view(dtype)

        temperatures = field(Field.TEMPERATURE, torch.float64)
        keys = sampling.keys(self.logits[:rows], self._maxima[:rows], temperatures)
        sampling.draw(
            keys,
            field(Field.FLOOR),
            field(Field.TOP_K),
            field(Field.TOP_P, torch.float64),
            field(Field.SEED),
            self._lengths[:rows],  # the position of the token that is drawn
            temperatures=temperatures,
            token_ids=self._token_ids[:rows],
        )

    def advance(self, rows: int) -> Answer:
        """The chosen tokens are the rows' next ones, and on their way to the host."""
        decode_rows.advance(
            self._columns, self._reported, self._token_ids[:rows], self._maxima[:rows]
        )
        answer = self._answers[self._turn]
        answer.take(self._reported[:rows])
        self._turn = (self._turn + 1) % _IN_TURN
        return answer

    def _pinned(self, words: int) -> Tensor:
        pinned = self.logits.device.type == "cuda"
        return torch.zeros(words, dtype=torch.int64, pin_memory=pinned)
