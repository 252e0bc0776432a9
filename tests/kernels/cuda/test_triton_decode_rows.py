"""Rows that live on the device: told of changes, located in their blocks, moved on."""

from __future__ import annotations

from typing import Any

import torch
from phasewise.engine.decode_slots import NUM_FIELDS as HOST_FIELDS
from phasewise.kernels.cuda import decode_rows, reference
from phasewise.kernels.cuda.decode_rows import NUM_FIELDS, Field

MAX_ROWS, WIDTH, BLOCK_SIZE = 300, 16, 4  # more rows than a program takes


def random_rows(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randint(0, 2**40, (NUM_FIELDS, MAX_ROWS), generator=generator)
    columns[Field.POSITION] = torch.randint(
        -1, WIDTH * BLOCK_SIZE, (MAX_ROWS,), generator=generator
    )
    columns[Field.POSITION, ::7] = -1
    tables = torch.randint(0, 900, (MAX_ROWS, WIDTH), generator=generator, dtype=torch.int32)
    return columns, tables


def test_host_and_device_count_the_same_fields() -> None:
    assert HOST_FIELDS == NUM_FIELDS


def test_changes_reach_their_rows_and_places_and_no_other(interpreted: Any) -> None:
    for num_rows, num_entries in ((3, 0), (0, 5), (290, 7), (4, 700)):
        columns, tables = (tensor.share_memory_() for tensor in random_rows())
        expected = columns.clone(), tables.clone()
        changes = torch.cat(
            (
                torch.randperm(MAX_ROWS)[:num_rows],
                torch.randint(-(2**62), 2**62, (NUM_FIELDS * num_rows,)),
                torch.randperm(MAX_ROWS * WIDTH)[:num_entries],
                torch.randint(0, 900, (num_entries,)),
            )
        )
        counts = {"num_rows": num_rows, "num_entries": num_entries}
        reference.apply_changes(*expected, changes, **counts)
        interpreted(decode_rows.apply_changes, columns, tables, changes, **counts)
        assert torch.equal(columns, expected[0])
        assert torch.equal(tables, expected[1])


def test_a_rows_token_goes_where_its_table_says_and_paddings_nowhere(interpreted: Any) -> None:
    columns, tables = random_rows(1)
    for rows in (1, 257):
        out = (
            torch.full((rows,), 77),
            torch.full((rows,), 77, dtype=torch.int32),
            torch.full((rows,), 77),
        )
        shared = [tensor.share_memory_() for tensor in out]
        interpreted(decode_rows.locate, columns, tables, *shared, block_size=BLOCK_SIZE)
        positions = columns[Field.POSITION, :rows]
        expected = reference.locate(positions, tables, block_size=BLOCK_SIZE)
        for mine, theirs in zip(shared, expected, strict=True):
            assert torch.equal(mine, theirs)
        assert (shared[0][positions < 0] == -1).all()
        assert (shared[1][positions < 0] == 0).all()


def test_live_rows_move_on_and_broken_ones_are_reported(interpreted: Any) -> None:
    columns, _ = random_rows(2)
    before = columns.clone()
    columns.share_memory_()
    rows = 260
    chosen = torch.randint(0, 1000, (rows,))
    maxima = torch.randn(rows)
    broken = torch.tensor([1, 2, 3])
    maxima[broken] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    columns[Field.POSITION, broken] = before[Field.POSITION, broken] = 5
    reported = torch.full((MAX_ROWS,), 77).share_memory_()
    interpreted(decode_rows.advance, columns, reported, chosen, maxima)
    positions, tokens = before[Field.POSITION], before[Field.TOKEN]
    moved = reference.advance(positions[:rows], tokens[:rows], chosen)
    assert torch.equal(columns[Field.POSITION], torch.cat((moved[0], positions[rows:])))
    assert torch.equal(columns[Field.TOKEN], torch.cat((moved[1], tokens[rows:])))
    assert torch.equal(columns[2:], before[2:])
    is_live = positions[:rows] >= 0
    expected = torch.where(is_live, chosen, 77)
    expected[broken] = -1
    assert torch.equal(reported, torch.cat((expected, torch.full((MAX_ROWS - rows,), 77))))
