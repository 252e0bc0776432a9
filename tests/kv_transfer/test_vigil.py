"""Looking out for an answer: only while that pays, and never for long."""

from __future__ import annotations

from phasewise.kv_transfer.vigil import LOOK_S, Vigil


def answered(vigil: Vigil, at_s: float, after_s: float) -> bool:
    """One question and its answer; whether the answer was looked out for."""
    until_s = vigil.begin(at_s)
    assert until_s is None or until_s == at_s + LOOK_S
    vigil.heard(at_s + after_s)
    return until_s is not None


def test_a_new_pair_sleeps_until_an_answer_came_soon() -> None:
    vigil = Vigil()
    assert not answered(vigil, 1.0, LOOK_S * 0.9)
    assert answered(vigil, 2.0, LOOK_S * 0.5)


def test_answers_that_take_long_are_soon_slept_for() -> None:
    vigil = Vigil()
    for number in range(10):
        answered(vigil, number, LOOK_S * 0.5)
    looked = [answered(vigil, 20.0 + number, LOOK_S * 1.1) for number in range(10)]
    assert looked[0] and not any(looked[3:])


def test_a_slow_pair_is_looked_out_for_again_once_it_is_fast() -> None:
    vigil = Vigil()
    assert not any(answered(vigil, number, 1.0) for number in range(5))
    answered(vigil, 10.0, LOOK_S * 0.5)
    assert answered(vigil, 11.0, LOOK_S * 0.5)


def test_what_the_peer_says_unasked_is_no_answer() -> None:
    vigil = Vigil()
    for number in range(5):
        vigil.heard(float(number))
    assert vigil.begin(9.0) is None
