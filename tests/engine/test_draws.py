"""The generator is Philox4x32-10, and its numbers are uniform and stateless."""

from __future__ import annotations

import numpy as np
import pytest
from phasewise.engine.draws import philox4x32, uniforms
from scipy import stats

# Known answers of the authors' Random123 library (tests/kat_vectors): counter, key, output.
KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_generator_gives_the_published_known_answers(counter: str, key: str, answer: str) -> None:
    output = philox4x32(
        np.array([words(counter)], dtype=np.uint32), np.array([words(key)], dtype=np.uint32)
    )
    assert output.dtype == np.uint32
    assert output[0].tolist() == words(answer)


def test_known_answers_do_not_depend_on_the_rows_beside_them() -> None:
    counters = np.array([words(c) for c, _, _ in KNOWN_ANSWERS], dtype=np.uint32)
    keys = np.array([words(k) for _, k, _ in KNOWN_ANSWERS], dtype=np.uint32)
    assert philox4x32(counters, keys).tolist() == [words(a) for _, _, a in KNOWN_ANSWERS]


def test_uniform_is_the_top_53_bits_of_the_first_two_words() -> None:
    expected = (((0x6627E8D5 << 32) | 0xE169C58D) >> 11) / 2**53
    assert uniforms([0], [0]).tolist() == [expected]


def test_a_draw_is_a_function_of_seed_and_position_alone() -> None:
    seeds, positions = [7, 2**64 - 1, 7, 123456789012345], [0, 5, 2**33, 5]
    together = uniforms(seeds, positions)
    alone = [uniforms([s], [p])[0] for s, p in zip(seeds, positions, strict=True)]
    assert together.tolist() == alone
    assert len(set(alone)) == 4


def test_every_word_of_seed_and_position_matters() -> None:
    base = uniforms([1], [1])[0]
    for seed, position in [(2, 1), (1 + 2**40, 1), (1, 2), (1, 1 + 2**40)]:
        assert uniforms([seed], [position])[0] != base


def test_a_negative_seed_counts_modulo_two_to_the_64() -> None:
    assert uniforms([-1], [3]) == uniforms([2**64 - 1], [3])


@pytest.mark.parametrize("along", ["positions", "seeds"])
def test_draws_are_uniform_along_positions_and_along_seeds(along: str) -> None:
    count = 50_000
    run, fixed = list(range(count)), [42] * count
    values = uniforms(fixed, run) if along == "positions" else uniforms(run, fixed)
    assert values.min() >= 0
    assert values.max() < 1
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / count**0.5
