"""What the device is told keeps it equal to the sequences, whoever comes, goes, moves or grows."""

from __future__ import annotations

import random

import numpy as np
import pytest
from phasewise.engine.decode_slots import NUM_FIELDS, Changes, DecodeSlots, Draw
from phasewise.engine.request import Request, SamplingParams
from phasewise.engine.sequence import Sequence

BLOCK_SIZE = 4
MAX_ROWS, WIDTH = 6, 8


class Device:
    """A device that believes what it is told, and moves its rows on by itself."""

    def __init__(self) -> None:
        self.columns = np.zeros((NUM_FIELDS, MAX_ROWS), np.int64)
        self.columns[1] = -1
        self.tables = np.zeros((MAX_ROWS, WIDTH), np.int64)
        self.words = 0

    def tell(self, changes: Changes) -> None:
        for origin, target in changes.moves:
            assert target < origin
            self.columns[:, target] = self.columns[:, origin]
            self.tables[target] = self.tables[origin]
        packed = np.full(changes.num_words, -9, np.int64)
        changes.pack(packed)
        self.words = len(packed)
        count, entries = len(changes.slots), len(changes.places)
        slots, *fields = packed[: (1 + NUM_FIELDS) * count].reshape(1 + NUM_FIELDS, count)
        assert len(set(slots.tolist())) == count
        self.columns[:, slots] = fields
        places, blocks = packed[(1 + NUM_FIELDS) * count :].reshape(2, entries)
        assert len(set(places.tolist())) == entries
        self.tables.reshape(-1)[places] = blocks

    def draw(self, slots: np.ndarray, tokens: list[int]) -> None:
        self.columns[0, slots] = tokens
        self.columns[1, slots] += 1


def sequence_of(name: str, prompt: int, **sampling: float) -> Sequence:
    sequence = Sequence(
        Request(
            id=name,
            token_ids=tuple(range(100, 100 + prompt)),
            num_prompt_tokens=prompt,
            sampling=SamplingParams(max_tokens=99, **sampling),  # type: ignore[arg-type]
        )
    )
    sequence.num_computed = prompt - 1
    sequence.blocks = [hash((name, i)) % 1000 for i in range(-(-prompt // BLOCK_SIZE))]
    return sequence


def draw_of(sequence: Sequence) -> Draw | None:
    sampling = sequence.request.sampling
    if sampling.logprobs is not None:
        return None
    return Draw(temperature=sampling.temperature, top_p=sampling.top_p, seed=sampling.seed)


def place(slots: DecodeSlots, device: Device, rows: list[Sequence]) -> np.ndarray:
    """A step's rows seated; the device holds exactly them."""
    seated, changes = slots.place(rows, [row.num_computed for row in rows], draw_of)
    device.tell(changes)
    assert sorted(seated.tolist()) == list(range(len(rows)))
    for row, slot in zip(rows, seated, strict=True):
        assert row.tokens is not None
        assert device.columns[:2, slot].tolist() == [row.tokens[-1], row.num_computed]
        assert device.tables[slot, : len(row.blocks)].tolist() == row.blocks
    assert (device.columns[1, len(rows) :] == -1).all()
    return seated


def take(rows: list[Sequence], tokens: list[int]) -> None:
    for row, token in zip(rows, tokens, strict=True):
        row.num_computed += 1
        row.append(token)
        if row.num_computed == len(row.blocks) * BLOCK_SIZE:
            row.blocks.append(random.randrange(1000))


def test_a_steady_step_tells_nothing_but_new_blocks() -> None:
    slots, device = DecodeSlots(MAX_ROWS, WIDTH), Device()
    rows = [sequence_of(str(i), 5) for i in range(3)]
    told = []
    for step in range(8):
        seated = place(slots, device, rows)
        told.append(device.words)
        tokens = [step * 10 + i for i in range(3)]
        device.draw(seated, tokens)
        slots.advanced()
        take(rows, tokens)
    assert told[0] == 3 * (1 + NUM_FIELDS) + 3 * 2 * 2
    # Positions 8 and 12 begin a block: one place and one id a row, and nothing else ever.
    assert told[1:] == [0, 0, 0, 6, 0, 0, 0]


def test_rows_that_close_up_move_on_the_device_whose_tokens_the_host_does_not_know() -> None:
    slots, device = DecodeSlots(MAX_ROWS, WIDTH), Device()
    rows = [sequence_of(str(i), 5 + i) for i in range(5)]
    seated = place(slots, device, rows)
    device.draw(seated, [50, 51, 52, 53, 54])
    slots.advanced()
    left = [rows[2], rows[4], rows[3]]
    for row in left:
        row.blocks.append(77)
    seated, changes = slots.place(left, [row.num_computed + 1 for row in left], draw_of)
    device.tell(changes)
    assert changes.rows == [(0, -1, 0, 0, 0, 0, 0)] * 2, "what falls empty, and nothing else"
    assert device.columns[:2, seated].tolist() == [[52, 54, 53], [7, 9, 8]]
    assert [
        device.tables[slot, : len(row.blocks)].tolist()
        for row, slot in zip(left, seated, strict=True)
    ] == [row.blocks for row in left]
    assert (device.columns[1, 3:] == -1).all()


@pytest.mark.parametrize("seed", range(20))
def test_the_device_follows_every_coming_going_and_recomputing(seed: int) -> None:
    rng = random.Random(seed)
    slots, device = DecodeSlots(MAX_ROWS, WIDTH), Device()
    rows: list[Sequence] = []
    for step in range(60):
        rows = [row for row in rows if rng.random() > 0.2 and row.num_tokens < 28]
        while len(rows) < MAX_ROWS and rng.random() < 0.6:
            rows.append(sequence_of(f"{step}.{len(rows)}", rng.randrange(2, 12)))
        if rng.random() < 0.2:
            rng.shuffle(rows)
        for row in rows:
            if rng.random() < 0.1:  # preempted and computed again, or its blocks exchanged
                row.blocks = [rng.randrange(1000) for _ in row.blocks]
        if not rows:
            continue
        tokens = [rng.randrange(1000) for _ in rows]
        kind = rng.random()
        if kind > 0.2:
            seated = place(slots, device, rows)
            if kind > 0.3:  # else the host chose all tokens
                otherwise = np.array([i for i in range(len(rows)) if rng.random() < 0.2], np.int64)
                drawn = [-7 if i in otherwise else token for i, token in enumerate(tokens)]
                device.draw(seated, drawn)
                slots.advanced()
                slots.chose_otherwise(otherwise)
        take(rows, tokens)  # below 0.2: a step with chunks, of which the device knows nothing


def test_recomputed_blocks_of_equal_length_are_told_again() -> None:
    slots, device = DecodeSlots(MAX_ROWS, WIDTH), Device()
    row = sequence_of("a", 6)
    place(slots, device, [row])
    row.blocks = [7, 8]
    place(slots, device, [row])
    assert device.words == 2 * 2


def test_how_rows_are_drawn_travels_in_64_bits() -> None:
    slots, device = DecodeSlots(MAX_ROWS, WIDTH), Device()
    drawn = sequence_of("a", 3, temperature=0.7, top_p=0.9, seed=2**63 + 1)
    greedy = sequence_of("b", 3, temperature=0.0)
    place(slots, device, [drawn, greedy])
    assert slots.any_drawn and not len(slots.edited())
    assert device.columns[2, 0] == -(2**63) + 1
    assert device.columns.view(np.float64)[[4, 6], 0].tolist() == [0.9, 0.7]
    assert device.columns[6, 1] == 0
    place(slots, device, [greedy])
    assert not slots.any_drawn
    place(slots, device, [sequence_of("c", 3, logprobs=2), greedy])
    assert slots.edited().tolist() == [0]
    place(slots, device, [greedy])
    assert not len(slots.edited())


def test_after_forgetting_every_row_is_told_anew() -> None:
    slots, device = DecodeSlots(MAX_ROWS, WIDTH), Device()
    rows = [sequence_of(str(i), 5) for i in range(2)]
    place(slots, device, rows)
    slots.forget()
    device = Device()
    place(slots, device, rows)
    assert device.words == 2 * (1 + NUM_FIELDS) + 2 * 2 * 2
