"""The device draws the token that the host draws, and edits logits to the bit as it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from phasewise.engine import draws, logits
from phasewise.kernels.cuda import logits as edits
from phasewise.kernels.cuda import philox, sampling
from torch import Tensor


def random_logits(rows: int, vocab: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def test_uniforms_are_those_of_the_host_bit_for_bit(interpreted: Any) -> None:
    seeds = [0, 1, 2**31, 2**32, 2**63 - 1, -1, -(2**63), 12345678901234567]
    positions = [0, 1, 7, 2**31, 2**32 + 5, 131071, 1, 4096]
    columns = torch.tensor(seeds), torch.tensor(positions)
    expected = torch.from_numpy(draws.uniforms(seeds, positions))
    assert torch.equal(interpreted(philox.uniforms, *columns), expected)
    assert interpreted(philox.uniforms, *(c[:0] for c in columns)).shape == (0,)


def test_the_argmax_of_equal_logits_is_the_first_and_nan_is_seen(interpreted: Any) -> None:
    rows = random_logits(5, 5000)
    rows[1, [4999, 77, 3000, 77 + 4096]] = 50.0
    rows[2, 4500] = torch.nan
    rows[3] = -torch.inf
    rows[4, 4097] = torch.inf
    token_ids, maxima = interpreted(sampling.argmax, rows)
    assert token_ids[:2].tolist() == [int(rows[0].argmax()), 77]
    assert maxima[:2].tolist() == [rows[0].max(), 50]
    assert not maxima[2:].isfinite().any()
    assert ((token_ids >= 0) & (token_ids < 5000)).all()


def test_keys_are_those_of_the_host_up_to_the_last_places_of_exp(interpreted: Any) -> None:
    vocab = 300
    rows, temperatures = random_logits(4, vocab), torch.tensor([1.0, 0.7, 1.3, 1e-45])
    rows[1, 5] = -torch.inf
    maxima, form = rows.amax(dim=1), logits.KeyFormat(vocab)
    actual = interpreted(sampling.keys, rows, maxima, temperatures)
    expected = form.keys(rows.clone(), maxima, temperatures)
    assert torch.equal(form.token_ids(actual), torch.arange(vocab).expand(4, -1))
    torch.testing.assert_close(
        form.weights(actual).double(), form.weights(expected).double(), rtol=3e-7, atol=1.0
    )


# top_k, top_p, min_p
FILTERS = [
    (0, 1.0, 0.0),
    (7, 1.0, 0.0),
    (0, 0.8, 0.0),
    (0, 1.0, 0.2),
    (20, 0.5, 0.05),
    (1, 0.1, 0.0),
    (0, 1e-9, 0.0),
    (999, 0.999, 0.0),
]


def host_tokens(keys: Tensor, form: logits.KeyFormat, filters: list, uniforms: Tensor) -> list[int]:
    tokens = []
    for row, (top_k, top_p, min_p) in enumerate(filters):
        kept, floor = keys[row : row + 1], torch.tensor([form.min_p_floor(min_p)])
        if 0 < top_k < keys.shape[1]:
            kept = form.top_k(kept, torch.tensor([top_k]), top_k)
        if top_p < 1:
            floor = form.top_p_floor(kept, floor, torch.tensor([top_p], dtype=torch.float64))
        tokens += form.draw(kept, floor, uniforms[row : row + 1]).tolist()
    return tokens


@pytest.mark.parametrize("flat", [False, True])
def test_every_filter_leaves_the_token_that_the_host_draws(interpreted: Any, flat: bool) -> None:
    vocab, rows = 200, len(FILTERS)
    values = random_logits(rows, vocab, seed=int(flat))
    if flat:  # ties everywhere: weights say nothing, ids decide
        values = values.sign()
    form = logits.KeyFormat(vocab)
    keys = form.keys(values, values.amax(dim=1), torch.ones(rows))
    seeds, positions = torch.arange(rows) * 977 - 3, torch.arange(rows) + 40
    columns = (
        torch.tensor([form.min_p_floor(min_p) for _, _, min_p in FILTERS]),
        torch.tensor([top_k for top_k, _, _ in FILTERS]),
        torch.tensor([top_p for _, top_p, _ in FILTERS], dtype=torch.float64),
    )
    actual = interpreted(sampling.draw, keys, *columns, seeds, positions)
    uniforms = torch.from_numpy(draws.uniforms(seeds.tolist(), positions.tolist()))
    assert actual.tolist() == host_tokens(keys, form, FILTERS, uniforms)


def test_a_draw_finds_its_token_in_any_tile_of_the_vocabulary(interpreted: Any) -> None:
    vocab, rows = 9000, 6
    values = random_logits(rows, vocab)
    values[0, 8999] = values[1, 0] = values[2, 4096] = 60.0  # certain: last, first, second tile
    form = logits.KeyFormat(vocab)
    keys = form.keys(values, values.amax(dim=1), torch.ones(rows))
    seeds, positions = torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
    off = (seeds * 0, seeds * 0, torch.ones(rows, dtype=torch.float64))
    actual = interpreted(sampling.draw, keys, *off, seeds, positions).tolist()
    uniforms = torch.from_numpy(draws.uniforms(seeds.tolist(), positions.tolist()))
    assert actual == host_tokens(keys, form, [(0, 1.0, 0.0)] * rows, uniforms)
    assert actual[:3] == [8999, 0, 4096]


def test_greedy_rows_keep_their_token_and_the_coldest_draw_is_no_greedy_row(
    interpreted: Any,
) -> None:
    vocab, rows = 300, 4
    values = random_logits(rows, vocab)
    form, maxima = logits.KeyFormat(vocab), values.amax(dim=1)
    # 1e-50 is 0 in float32, and still a draw: from a row's largest logits alone.
    temperatures = torch.tensor([0.0, 1.0, 1e-50, 0.0], dtype=torch.float64)
    keys = interpreted(sampling.keys, values, maxima, temperatures)
    drawn = torch.tensor([1, 2])
    expected = form.keys(values[drawn].clone(), maxima[drawn], temperatures[drawn].float())
    torch.testing.assert_close(
        form.weights(keys[drawn]).double(), form.weights(expected).double(), rtol=3e-7, atol=1.0
    )
    off = torch.zeros(rows, dtype=torch.int64)
    columns = (off, off, torch.ones(rows, dtype=torch.float64), torch.arange(rows), off.int())
    token_ids = interpreted(
        sampling.draw,
        keys,
        *columns,
        temperatures=temperatures,
        token_ids=torch.full((rows,), 77),
    )
    alone = interpreted(sampling.draw, keys[1:2].contiguous(), *(c[1:2] for c in columns))
    assert token_ids.tolist() == [77, int(alone[0]), int(values[2].argmax()), 77]


def test_filters_and_draw_are_exact_to_the_last_unit_of_weight(interpreted: Any) -> None:
    vocab, rows = 3000, 8
    form = logits.KeyFormat(vocab)
    weights = torch.zeros(rows, vocab, dtype=torch.int64)
    weights[:4, 2500] = 1  # the whole row, in its second tile
    weights[4:, [5, 6, 2700]] = 1  # half of three is two: the smallest ids
    keys = (weights << form.id_bits) + form.id_mask - torch.arange(vocab)
    top_p = [1.0, 0.5, 1e-9, 0.999, 0.5, 0.5, 0.5, 0.5]
    seeds, positions = torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
    off = torch.zeros_like(seeds)
    shares = torch.tensor(top_p, dtype=torch.float64)
    actual = interpreted(sampling.draw, keys, off, off, shares, seeds, positions).tolist()
    uniforms = torch.from_numpy(draws.uniforms(seeds.tolist(), positions.tolist()))
    assert actual == host_tokens(keys, form, [(0, share, 0.0) for share in top_p], uniforms)
    assert actual[:4] == [2500] * 4
    assert set(actual[4:]) == {5, 6}


def test_edits_of_logits_are_those_of_the_host_bit_for_bit(interpreted: Any) -> None:
    actual = random_logits(3, 1000)
    expected = actual.clone()
    rows = torch.arange(600) % 3
    ids = torch.randperm(1000, generator=torch.Generator().manual_seed(1))[:600]
    columns = random_logits(4, 600, seed=2).abs() + 0.1
    columns[3] = columns[3].floor()
    for kernel, truth, values in (
        (edits.add_bias, logits.add_bias, (columns[0],)),
        (edits.suppress, logits.suppress, ()),
    ):
        cells = (rows[:100], ids[:100]) if truth is logits.suppress else (rows, ids)
        interpreted(kernel, actual, *cells, *values)
        truth(expected, *cells, *values)
        assert torch.equal(actual, expected)
    options = dict(zip(("repetition", "frequency", "presence"), columns, strict=False))
    interpreted(edits.penalise, actual, rows, ids, output_counts=columns[3], **options)
    logits.penalise(expected, rows, ids, logits.Penalties(output_counts=columns[3], **options))
    assert torch.equal(actual, expected)
