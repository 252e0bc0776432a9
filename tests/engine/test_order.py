"""Lines of waiting sequences: order, lateness and age."""

from __future__ import annotations

from random import Random

import hypothesis.strategies as st
from hypothesis import given
from phasewise.engine.order import AgeLine, DeadlineLine, Line, Waiter
from phasewise.engine.request import Request, SamplingParams
from phasewise.engine.sequence import Sequence


def waiter(serial: int, *, arrival_s: float = 0.0, priority: int = 0) -> Waiter:
    request = Request(
        id=str(serial),
        token_ids=(1,),
        num_prompt_tokens=1,
        sampling=SamplingParams(),
        arrival_s=arrival_s,
        priority=priority,
    )
    return Waiter(Sequence(request), serial, arrival_s)


def serials(line: Line) -> list[int]:
    return [item.serial for item in line]


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=200), st.randoms())
def test_a_line_equals_a_sorted_list_whatever_leaves_from_where(
    operations: list[tuple[int, bool]], draw: Random
) -> None:
    line, expected = Line(), []
    for serial, (key, leaves) in enumerate(operations):
        joining = waiter(serial)
        line.push(joining, (key, serial))
        expected.append(joining)
        expected.sort(key=lambda item: item.key)
        while leaves and expected and draw.random() < 0.7:
            leaving = expected.pop(0 if draw.random() < 0.5 else draw.randrange(len(expected)))
            line.remove(leaving)
        assert list(line) == expected and len(line) == len(expected)


def test_earliest_deadline_comes_first_and_late_ones_last_in_order_of_arrival() -> None:
    line = DeadlineLine()
    for serial, deadline_s in enumerate([5.0, 3.0, 4.0, 1.0, 0.5]):
        line.join(waiter(serial), deadline_s=deadline_s, predicted_s=0.2, now_s=0.0)
    assert serials(line) == [4, 3, 1, 2, 0]
    line.turn_late(2.0)
    assert serials(line) == [1, 2, 0, 3, 4]


def test_a_long_prompt_turns_late_before_a_short_one_with_the_same_deadline() -> None:
    line = DeadlineLine()
    line.join(waiter(0), deadline_s=3.0, predicted_s=2.0, now_s=0.0)
    line.join(waiter(1), deadline_s=3.0, predicted_s=0.1, now_s=0.0)
    line.turn_late(1.5)
    assert serials(line) == [1, 0]


def test_a_late_request_of_a_higher_class_still_precedes_a_lower_class() -> None:
    line = DeadlineLine()
    line.join(waiter(0, priority=1), deadline_s=9.0, predicted_s=0.0, now_s=0.0)
    line.join(waiter(1, priority=0), deadline_s=1.0, predicted_s=0.0, now_s=0.0)
    line.turn_late(5.0)
    assert serials(line) == [1, 0]


def test_a_waiter_that_left_or_came_back_does_not_turn_late_by_its_old_prediction() -> None:
    line = DeadlineLine()
    gone, back = waiter(0), waiter(1)
    for item in (gone, back):
        line.join(item, deadline_s=3.0, predicted_s=2.0, now_s=0.0)
        line.remove(item)
    line.join(back, deadline_s=3.0, predicted_s=0.1, now_s=0.5)
    line.join(waiter(2), deadline_s=9.0, predicted_s=0.0, now_s=0.5)
    line.turn_late(1.5)
    assert serials(line) == [1, 2]


def test_the_age_line_knows_the_longest_wait_and_forgets_who_left() -> None:
    ages = AgeLine()
    first, second = waiter(0), waiter(1)
    ages.push(first, 1.0)
    ages.push(second, 2.0)
    assert ages.overdue(1.0) is None
    assert ages.overdue(1.5) is first
    ages.leave(first)
    assert ages.overdue(1.5) is None
    ages.push(first, 3.0)
    assert ages.overdue(9.0) is second
    ages.leave(second)
    assert ages.overdue(9.0) is first
