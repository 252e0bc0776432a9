"""The lease laws under a network that loses, doubles and reorders, with crashes and jumps."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from phasewise.kv_transfer.events import Outcome, Side

from .lease_machine import Transfers, TransfersOverTcp

rounds = settings(
    max_examples=100,
    stateful_step_count=100,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestSharedMemory = Transfers.TestCase
TestSharedMemory.settings = rounds
TestTcp = TransfersOverTcp.TestCase
TestTcp.settings = rounds


def schedule(machine: Transfers, rng: random.Random, steps: int) -> None:
    """A long random life, with the probabilities of a busy day with faults."""

    def pick() -> int:
        return rng.randrange(1 << 16)

    moves = {
        lambda: machine.offer(rng.randint(1, 3), rng.random() < 0.4, rng.randrange(4)): 6,
        lambda: machine.asked and machine.answer(pick(), rng.randrange(4)): 10,
        lambda: machine.next_lease and machine.fetch(pick(), rng.randint(1, 3)): 5,
        lambda: machine.next_lease and machine.discard(pick()): 1,
        lambda: machine.push_whole(pick()): 8,
        lambda: machine.copies and machine.copy(rng.randint(1, 4)): 10,
        lambda: machine.finish(): 8,
        lambda: machine.stopping and machine.copier_obeys(pick()): 3,
        lambda: machine.wire and machine.network_in_order(rng.randint(1, 4)): 20,
        lambda: (
            machine.wire
            and machine.network_in_disorder(pick(), rng.choice(["deliver", "twice", "lose"]))
        ): 5,
        lambda: machine.next_lease and machine.abort(pick(), rng.choice(list(Side))): 1,
        lambda: machine.next_lease and machine.withdraw(pick()): 1,
        lambda: machine.time_passes(rng.choice([0.5, 0.5, 4.0, 11.0, -3.0])): 1,
        lambda: machine.beat(rng.choice(list(Side))): 2,
        lambda: rng.random() < 0.1 and machine.receiver_gives_up_the_pair(0): 1,
        lambda: rng.random() < 0.1 and machine.sender_dies(0): 1,
    }
    for move in rng.choices(list(moves), list(moves.values()), k=steps):
        move()
        machine.one_terminal_event_a_lease()
        machine.blocks_are_conserved()
        machine.nobody_may_write_a_free_block()
    machine.teardown()


def campaign(kind: type[Transfers], seeds: range) -> Counter[tuple[Side, Outcome]]:
    outcomes: Counter[tuple[Side, Outcome]] = Counter()
    for seed in seeds:
        machine = kind()
        try:
            schedule(machine, random.Random(seed), 200)
        except AssertionError as error:
            raise AssertionError(f"schedule {seed}: {error}") from error
        outcomes += machine.outcomes
    return outcomes


@pytest.mark.parametrize("kind", [Transfers, TransfersOverTcp])
def test_laws_hold_over_random_schedules_in_which_everything_happens(
    kind: type[Transfers],
) -> None:
    outcomes = campaign(kind, range(300))
    for side in Side:
        for outcome in Outcome:
            assert outcomes[side, outcome] > 20, f"hardly any {side} {outcome}: {outcomes}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Transfers, TransfersOverTcp])
def test_laws_hold_over_five_thousand_schedules_each(kind: type[Transfers]) -> None:
    campaign(kind, range(1000, 6000))
