"""Which row of the device each decoding sequence has, and what must be told of it: only changes.

The device keeps every row's next token, its position, its block table and how it is drawn, and
moves token and position on by itself. Here stands what it holds, so that a step uploads what it
cannot know: rows that came or were computed elsewhere meanwhile, and new blocks. Rows in use are
always the first ones: whoever leaves, one of the last takes its place, as the device holds it, for
its next token may not be known here yet. Knows no torch.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .sequence import Sequence

NUM_FIELDS = 7  # of `kernels.cuda.decode_rows.Field`, in its order
_IDLE = (0, -1, 0, 0, 0, 0, 0)
_UNKNOWN = -2  # a position that no row has
_NO_BLOCKS: list[int] = []


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """How a row's token is chosen from its logits alone."""

    temperature: float  # 0: the largest logit
    top_k: int = 0
    top_p: float = 1.0
    floor: int = 0  # smallest sampling key that min_p leaves
    seed: int = 0

    def fields(self) -> tuple[int, int, int, int, int]:
        """In 64 bits each, as the device keeps them."""
        return (
            signed64(self.seed),
            self.top_k,
            _float_bits(self.top_p),
            self.floor,
            _float_bits(self.temperature),
        )


GREEDY = Draw(temperature=0.0)
DrawOf = Callable[[Sequence], Draw | None]  # None: the row asks for more than a draw


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """What the device must be told before a step."""

    moves: list[tuple[int, int]]  # slots from which and to which rows move, before all else
    slots: list[int]
    rows: list[tuple[int, ...]]  # one for each of `slots`
    places: np.ndarray  # int64: in the flattened block tables
    blocks: np.ndarray  # int64: what comes there

    @property
    def num_words(self) -> int:
        return (1 + NUM_FIELDS) * len(self.slots) + 2 * len(self.places)

    def pack(self, into: np.ndarray) -> None:
        """Write `num_words` int64: slots, fields, places, blocks."""
        count, entries = len(self.slots), len(self.places)
        into[:count] = self.slots
        end = (1 + NUM_FIELDS) * count
        if count:
            into[count:end].reshape(NUM_FIELDS, count)[:] = np.array(self.rows, np.int64).T
        into[end : end + entries] = self.places
        into[end + entries : end + 2 * entries] = self.blocks


class DecodeSlots:
    """What the device holds of `max_rows` rows, each with up to `width` blocks."""

    def __init__(self, max_rows: int, width: int) -> None:
        self.max_rows = max_rows
        self._width = width
        self._here: list[Sequence] = []  # by slot
        self._lists: list[list[int]] = [_NO_BLOCKS] * max_rows  # by slot, grown in place
        self._num_blocks = np.zeros(max_rows, np.int64)  # of its list, that the device has
        self._positions = np.full(max_rows, _UNKNOWN, np.int64)
        self._is_drawn = np.zeros(max_rows, bool)
        self._is_edited = np.zeros(max_rows, bool)
        self._order: list[Sequence] = []  # of the latest step's rows
        self._slots = np.empty(0, np.int64)  # their slots

    @property
    def any_drawn(self) -> bool:
        """Whether a row of the latest step is not greedy."""
        return bool(self._is_drawn[: len(self._here)].any())

    def edited(self) -> np.ndarray:
        """Rows int64 of the latest step that ask for more than a draw."""
        return np.flatnonzero(self._is_edited[self._slots])

    def place(
        self, sequences: list[Sequence], starts: list[int], draw_of: DrawOf
    ) -> tuple[np.ndarray, Changes]:
        """Slots int64 [rows] of a step's rows, row i computing position `starts[i]`, and what
        changed since the step before. The device must be told all of it before the step."""
        vacated, moves = range(0), list[tuple[int, int]]()
        if sequences != self._order:
            vacated, moves = self._seat(sequences)
        slots, positions = self._slots, np.array(starts, np.int64)
        changed = list(vacated)
        rows: list[tuple[int, ...]] = [_IDLE] * len(changed)
        for row in np.flatnonzero(positions != self._positions[slots]).tolist():
            changed.append(int(slots[row]))
            rows.append(self._row(sequences[row], starts[row], changed[-1], draw_of))
        self._positions[slots] = positions
        places, blocks = self._new_blocks(sequences)
        return slots, Changes(moves=moves, slots=changed, rows=rows, places=places, blocks=blocks)

    def advanced(self) -> None:
        """The device has drawn the step's tokens and moved its rows on."""
        self._positions[self._slots] += 1

    def chose_otherwise(self, rows: np.ndarray) -> None:
        """These rows' tokens are not those that the device drew."""
        self._positions[self._slots[rows]] = _UNKNOWN

    def forget(self) -> None:
        """The device holds padding alone."""
        self._seat([])

    def _seat(self, sequences: list[Sequence]) -> tuple[range, list[tuple[int, int]]]:
        """Give each sequence one of the first slots; returns those that fell empty, and who moved
        from where to where."""
        count, old = len(sequences), self._here
        assert count <= self.max_rows, "the scheduler keeps to max_batch_size"
        coming, seated = set(sequences), set(old)
        free = [slot for slot in range(count) if slot >= len(old) or old[slot] not in coming]
        leaving = [slot for slot in range(count, len(old)) if old[slot] in coming]
        moves, free = list(zip(leaving, free, strict=False)), free[len(leaving) :]
        new = [sequence for sequence in sequences if sequence not in seated]
        self._here = old[:count] + [sequences[0]] * (count - len(old)) if count else []
        for origin, target in moves:
            self._here[target] = old[origin]
            self._move(origin, target)
        for slot, sequence in zip(free, new, strict=True):
            self._here[slot] = sequence
        self._forget([*free, *range(count, len(old))])
        slot_of = {sequence: slot for slot, sequence in enumerate(self._here)}
        self._order = list(sequences)
        self._slots = np.array([slot_of[sequence] for sequence in sequences], np.int64)
        return range(count, len(old)), moves

    def _move(self, origin: int, target: int) -> None:
        self._lists[target] = self._lists[origin]
        for column in (self._positions, self._num_blocks, self._is_drawn, self._is_edited):
            column[target] = column[origin]

    def _forget(self, slots: list[int]) -> None:
        self._positions[slots], self._num_blocks[slots] = _UNKNOWN, 0
        self._is_drawn[slots] = self._is_edited[slots] = False

    def _row(self, sequence: Sequence, start: int, slot: int, draw_of: DrawOf) -> tuple[int, ...]:
        assert sequence.tokens is not None, "a simulated sequence has no tokens to compute"
        assert start < len(sequence.tokens), "the token is known, here or on the device"
        draw = draw_of(sequence)
        self._is_edited[slot] = draw is None
        draw = draw or GREEDY
        self._is_drawn[slot] = draw.temperature > 0
        return (sequence.tokens[start], start, *draw.fields())

    def _new_blocks(self, sequences: list[Sequence]) -> tuple[np.ndarray, np.ndarray]:
        """Places in the flattened tables and block ids that the device does not have yet."""
        slots, lists = self._slots, [sequence.blocks for sequence in sequences]
        for row, slot in enumerate(slots.tolist()):
            if lists[row] is not self._lists[slot]:  # another sequence, or computed anew
                self._lists[slot], self._num_blocks[slot] = lists[row], 0
        counts = np.array([len(blocks) for blocks in lists], np.int64)
        places: list[np.ndarray] = []
        blocks: list[int] = []
        for row in np.flatnonzero(counts > self._num_blocks[slots]).tolist():
            slot, known, count = int(slots[row]), int(self._num_blocks[slots[row]]), counts[row]
            assert count <= self._width, "a sequence keeps to max_model_len"
            places.append(slot * self._width + np.arange(known, count))
            blocks += lists[row][known:count]  # it may grow for the next step meanwhile
        self._num_blocks[slots] = counts
        merged = np.concatenate(places) if places else np.empty(0, np.int64)
        return merged, np.array(blocks, np.int64)


def _float_bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


def signed64(value: int) -> int:
    """The low 64 bits, as a signed number."""
    return struct.unpack("<q", struct.pack("<Q", value & 0xFFFFFFFFFFFFFFFF))[0]
