"""Edits and filters equal transformers' processors, or a plain reference where it has none."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phasewise.engine.logits import (
    KeyFormat,
    Penalties,
    TokenCounts,
    add_bias,
    penalise,
    suppress,
)
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

VOCAB = 1003
IDS = torch.zeros(1, 1, dtype=torch.long)  # the warpers do not look at the tokens


def random_logits(rows: int = 6, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator) * 3


def distribution(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    min_p: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """What a draw would choose from: probabilities [rows, vocab], float64."""
    rows, vocab = logits.shape
    form = KeyFormat(vocab)
    maxima = logits.amax(dim=1)
    keys = form.keys(logits.clone(), maxima, torch.full((rows,), temperature))
    floors = torch.full((rows,), form.min_p_floor(min_p))
    if top_k:
        keys = form.top_k(keys, torch.full((rows,), top_k), top_k)
    if top_p < 1:
        top_ps = torch.full((rows,), top_p, dtype=torch.float64)
        floors = form.top_p_floor(keys, floors, top_ps)
    weights = form.weights(keys).masked_fill(keys < floors[:, None], 0).double()
    dense = torch.zeros(rows, vocab, dtype=torch.float64)
    dense.scatter_add_(1, form.token_ids(keys).clamp(max=vocab - 1), weights)
    return dense / dense.sum(dim=1, keepdim=True)


def assert_same(ours: Tensor, reference_logits: Tensor) -> None:
    theirs = reference_logits.double().softmax(dim=1)
    assert torch.equal(ours > 0, theirs > 0)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.5])
def test_temperature_equals_transformers(temperature: float) -> None:
    logits = random_logits()
    reference = TemperatureLogitsWarper(temperature)(IDS, logits)
    ours = distribution(logits, temperature=temperature)
    # A token less likely than the fixed point resolves is never drawn.
    torch.testing.assert_close(ours, reference.double().softmax(dim=1), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("top_k", [1, 2, 50, VOCAB - 1])
def test_top_k_equals_transformers(top_k: int) -> None:
    logits = random_logits(seed=1)
    assert_same(distribution(logits, top_k=top_k), TopKLogitsWarper(top_k)(IDS, logits))


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.99])
def test_top_p_equals_transformers(top_p: float) -> None:
    logits = random_logits(seed=2)
    assert_same(distribution(logits, top_p=top_p), TopPLogitsWarper(top_p)(IDS, logits))


@pytest.mark.parametrize("min_p", [1e-4, 0.05, 0.5, 1.0])
def test_min_p_equals_transformers(min_p: float) -> None:
    logits = random_logits(seed=3)
    assert_same(distribution(logits, min_p=min_p), MinPLogitsWarper(min_p)(IDS, logits))


def test_all_filters_together_equal_transformers_in_our_order() -> None:
    logits = random_logits(seed=4)
    chain: list[Callable[..., Tensor]] = [
        TemperatureLogitsWarper(1.7),
        MinPLogitsWarper(0.01),
        TopKLogitsWarper(40),
        TopPLogitsWarper(0.8),
    ]
    reference = logits
    for warp in chain:
        reference = warp(IDS, reference)
    ours = distribution(logits, temperature=1.7, min_p=0.01, top_k=40, top_p=0.8)
    assert_same(ours, reference)


@pytest.mark.parametrize("filters", [{"top_k": 2}, {"top_p": 0.5}, {"top_p": 0.26}])
def test_tied_tokens_are_kept_by_the_smaller_id(filters: dict) -> None:
    assert distribution(torch.zeros(1, 4), **filters).tolist() == [[0.5, 0.5, 0, 0]]


@pytest.mark.parametrize("filters", [{"top_p": 1e-9}, {"min_p": 1.0}, {"top_k": 1}, {"top_p": 0.0}])
def test_the_likeliest_token_always_stays(filters: dict) -> None:
    logits = random_logits(seed=5)
    kept = distribution(logits, **filters) > 0
    assert kept.sum(dim=1).tolist() == [1] * len(logits)
    assert kept.int().argmax(dim=1).tolist() == logits.argmax(dim=1).tolist()


@pytest.mark.parametrize("temperature", [1e-5, 1e-30, 1e-46])
def test_a_tiny_temperature_is_the_argmax(temperature: float) -> None:
    logits = random_logits(seed=6)
    assert distribution(logits, temperature=temperature).argmax(dim=1).equal(logits.argmax(dim=1))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-60, 20), min_size=1, max_size=40),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1),
)
def test_nucleus_equals_a_plain_walk_down_the_sorted_weights(
    tenths: list[int], top_p: float, min_p: float
) -> None:
    logits = torch.tensor([tenths]) / 10
    form = KeyFormat(len(tenths))
    keys = form.keys(logits.clone(), logits.amax(dim=1), torch.ones(1))
    floor = form.min_p_floor(min_p)
    found = form.top_p_floor(
        keys, torch.tensor([floor]), torch.tensor([top_p], dtype=torch.float64)
    )

    ordered = sorted((k for k in keys[0].tolist() if k >= floor), reverse=True)
    needed = top_p * sum(k >> form.id_bits for k in ordered)
    kept, reached = [], 0
    for key in ordered:
        kept.append(key)
        reached += key >> form.id_bits
        if reached >= needed:
            break
    assert [k for k in keys[0].tolist() if k >= found.item()] == sorted(
        kept, key=keys[0].tolist().index
    )


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("min_p", [0.0, 0.02])
def test_leaving_out_light_keys_before_the_sort_changes_nothing(top_p: float, min_p: float) -> None:
    logits = random_logits(8, 2049, seed=8) * torch.linspace(0, 2, 8)[:, None]
    form = KeyFormat(2049)
    keys = form.keys(logits, logits.amax(dim=1), torch.ones(8))
    floors = torch.full((8,), form.min_p_floor(min_p))
    totals = form.weights(keys).masked_fill(keys < floors[:, None], 0).sum(dim=1)
    needed = (totals.double() * top_p).ceil().long()
    found = form.top_p_floor(keys, floors, torch.full((8,), top_p, dtype=torch.float64))
    assert found.equal(form.nucleus_floor(keys, floors, needed))


@pytest.mark.parametrize("vocab", [1, 2, 2048, 128_256, 262_208])
def test_keys_and_their_sums_fit_in_63_bits(vocab: int) -> None:
    form = KeyFormat(vocab)
    keys = form.keys(torch.zeros(1, vocab), torch.zeros(1), torch.ones(1))
    assert keys.min() > 0
    assert form.weights(keys).unique().tolist() == [form.one]
    assert form.one * vocab < 2**63
    assert form.token_ids(keys)[0].tolist() == list(range(vocab))


def test_the_draw_walks_the_vocabulary_in_order() -> None:
    form = KeyFormat(4)
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().repeat(6, 1)
    keys = form.keys(logits, torch.full((6,), 0.4).log(), torch.ones(6))
    numbers = torch.tensor([0.0, 0.0999, 0.1001, 0.5999, 0.6001, 1 - 2**-53], dtype=torch.float64)
    assert form.draw(keys, torch.zeros(6).long(), numbers).tolist() == [0, 0, 1, 2, 3, 3]


@pytest.mark.parametrize("vocab", [1, 255, 256, 257, 512, 1000])
def test_the_draw_equals_a_plain_running_sum(vocab: int) -> None:
    form, rows = KeyFormat(vocab), 300
    logits = random_logits(rows, vocab, seed=7)
    keys = form.keys(logits, logits.amax(dim=1), torch.ones(rows))
    floors = torch.full((rows,), form.min_p_floor(0.001))
    numbers = np.random.default_rng(0).random(rows)
    numbers[:2] = 0.0, 1 - 2**-53
    drawn = form.draw(keys, floors, torch.from_numpy(numbers)).tolist()
    for row, number in enumerate(numbers):
        weights = [k >> form.id_bits if k >= floors[0] else 0 for k in keys[row].tolist()]
        reached = np.cumsum(np.array(weights, dtype=np.int64))
        target = min(int(number * reached[-1]), int(reached[-1]) - 1)
        assert drawn[row] == int(np.searchsorted(reached, target, side="right"))


def cells(*pairs: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return torch.tensor([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs])


def test_bias_is_added_to_its_cells_only() -> None:
    logits = random_logits(3, 7)
    expected = logits.numpy().copy()
    expected[0, 2] += 5
    expected[2, 6] -= 100
    add_bias(logits, *cells((0, 2), (2, 6)), torch.tensor([5.0, -100.0]))
    assert np.array_equal(logits.numpy(), expected)


def test_suppressed_cells_are_minus_infinity() -> None:
    logits = random_logits(2, 5)
    suppress(logits, *cells((1, 0), (1, 4)))
    assert logits.isinf().nonzero().tolist() == [[1, 0], [1, 4]]
    assert distribution(logits)[1, [0, 4]].tolist() == [0, 0]


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    logits = random_logits(1, 50)
    tokens = [3, 4, 3, 49, 0, 7, 7, 7]
    reference = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([tokens]), logits.clone())
    apply_penalties(logits, tokens, num_prompt_tokens=4, repetition=penalty)
    assert torch.equal(logits, reference)


def test_frequency_and_presence_count_output_tokens_only() -> None:
    logits = random_logits(1, 20)
    expected = logits.numpy().copy()
    for token, count in {5: 3, 6: 1}.items():
        expected[0, token] = expected[0, token] - np.float32(0.7) * count - np.float32(0.4)
    apply_penalties(logits, [1, 5, 9, 5, 6, 5, 5], 3, frequency=0.7, presence=0.4)
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-6)
    assert logits[0, [1, 9]].tolist() == expected[0, [1, 9]].tolist()


def apply_penalties(
    logits: Tensor,
    tokens: list[int],
    num_prompt_tokens: int,
    *,
    repetition: float = 1.0,
    frequency: float = 0.0,
    presence: float = 0.0,
) -> None:
    ids, counts = TokenCounts(num_prompt_tokens, with_prompt=True).update(tokens)
    penalties = Penalties(
        repetition=torch.full((len(ids),), repetition),
        frequency=torch.full((len(ids),), frequency),
        presence=torch.full((len(ids),), presence),
        output_counts=torch.from_numpy(counts),
    )
    penalise(logits, torch.zeros(len(ids)).long(), torch.from_numpy(ids), penalties)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 150), max_size=300),
    st.integers(0, 300),
    st.lists(st.integers(0, 300), max_size=5),
    st.booleans(),
)
def test_counts_kept_up_step_by_step_equal_counts_made_at_once(
    tokens: list[int], num_prompt: int, stops: list[int], with_prompt: bool
) -> None:
    num_prompt = min(num_prompt, len(tokens))
    counts = TokenCounts(num_prompt, with_prompt=with_prompt)
    for stop in sorted(stops):
        counts.update(tokens[: max(stop, num_prompt)])
    ids, times = counts.update(tokens)
    output = tokens[num_prompt:]
    known = tokens if with_prompt else output
    assert dict(zip(ids.tolist(), times.tolist(), strict=True)) == {
        token: output.count(token) for token in known
    }
