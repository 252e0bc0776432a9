"""Jumping over steady steps has the effect of taking them one by one."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import pytest
from phasewise.decode_worker.scheduler import DecodeLimits, DecodeScheduler
from phasewise.engine.batch import StepOutput
from phasewise.engine.blocks import BlockAllocator
from phasewise.engine.request import Request, SamplingParams
from phasewise.engine.sequence import Sequence

STEP_S = 0.05


@dataclass(frozen=True)
class Arrival:
    step: int
    how: str  # "add" | "push" | "room"
    num_tokens: int
    max_tokens: int


class Twin:
    """A decode scheduler in simulated time, one step lasting `STEP_S`."""

    def __init__(self, num_blocks: int, max_batch_size: int) -> None:
        limits = DecodeLimits(
            max_batch_size=max_batch_size, max_batch_tokens=64, max_model_len=500, max_wait_s=1.0
        )
        self.decode = DecodeScheduler(BlockAllocator(num_blocks, 4), limits)
        self.sequences: dict[str, Sequence] = {}
        self.finished: dict[str, int] = {}  # the step that ended it
        self.step = 0
        self.jumped = 0
        self.draw = Random(num_blocks)  # a check tells every row its steps: not after each jump

    def arrive(self, name: str, arrival: Arrival) -> None:
        request = Request(
            id=name,
            token_ids=(0,) * arrival.num_tokens,
            num_prompt_tokens=arrival.num_tokens,
            sampling=SamplingParams(max_tokens=arrival.max_tokens),
            arrival_s=self.step * STEP_S,
        )
        sequence = self.sequences[name] = Sequence(request)
        sequence.tokens = None
        if arrival.how == "add":
            self.decode.add(sequence, self.step * STEP_S)
            return
        blocks = self.decode.lease(arrival.num_tokens) if arrival.how == "push" else None
        sequence.append(0)
        if blocks is None:
            self.decode.wait_for_room(sequence, self.step * STEP_S)
        else:
            self.decode.resume(sequence, blocks, self.step * STEP_S)

    def one_step(self) -> None:
        now_s = self.step * STEP_S
        for sequence, blocks in self.decode.next_fetches(now_s):
            self.decode.resume(sequence, blocks, now_s)
        batch = self.decode.next_batch(now_s)
        self.step += 1
        if batch is not None:
            output = StepOutput(token_ids=[0] * batch.num_rows)
            for done, _ in self.decode.advance(batch, output, self.step * STEP_S).finished:
                self.finished[done.id] = self.step
        self.decode.check()

    def run_until(self, step: int, *, jump: bool) -> None:
        while self.step < step:
            steady = min(self.decode.steady_steps(), step - self.step) if jump else 0
            if steady:
                self.step += steady
                self.jumped += steady
                self.decode.advance_steady(steady, self.step * STEP_S)
                for done in self.decode.end_steady():
                    self.finished[done.id] = self.step
                if self.draw.random() < 0.3:
                    self.decode.check()
            else:
                self.one_step()

    def state(self) -> list[tuple[str, int, int, int, int]]:
        self.decode.settle()
        return [
            (s.id, s.num_tokens, s.num_computed, len(s.blocks), s.num_preemptions)
            for s in self.sequences.values()
        ]


@pytest.mark.parametrize("num_blocks", [30, 60, 400])
@pytest.mark.parametrize("seed", range(8))
def test_jumping_equals_stepping(seed: int, num_blocks: int) -> None:
    draw = Random(seed)
    arrivals = [
        Arrival(
            step=draw.randrange(400),
            how=draw.choice(["add", "push", "room"]),
            num_tokens=draw.randint(1, 50),
            max_tokens=draw.randint(2, 60),
        )
        for _ in range(40)
    ]
    stepping, jumping = Twin(num_blocks, 6), Twin(num_blocks, 6)
    for index, arrival in enumerate(sorted(arrivals, key=lambda arrival: arrival.step)):
        for twin in (stepping, jumping):
            twin.run_until(arrival.step, jump=twin is jumping)
            twin.arrive(str(index), arrival)
        assert jumping.decode.load() == stepping.decode.load()
        if index % 3 == 0:
            assert jumping.state() == stepping.state()
    for twin in (stepping, jumping):
        twin.run_until(5000, jump=twin is jumping)
    assert len(stepping.finished) == len(arrivals)
    assert jumping.finished == stepping.finished
    assert jumping.jumped > 0


def test_a_batch_alone_is_steady_until_its_first_end() -> None:
    twin = Twin(num_blocks=100, max_batch_size=4)
    twin.arrive("short", Arrival(0, "push", 10, 20))
    twin.arrive("long", Arrival(0, "push", 10, 90))
    assert twin.decode.steady_steps() == 19, "they take their places now"
    twin.one_step()
    assert twin.decode.steady_steps() == 18
    twin.run_until(19, jump=True)
    assert list(twin.finished) == ["short"] and twin.jumped == 18
    assert twin.decode.steady_steps() == 70


def test_a_batch_is_steady_only_while_it_finds_blocks() -> None:
    twin = Twin(num_blocks=8, max_batch_size=4)
    twin.arrive("a", Arrival(0, "push", 4, 20))
    twin.arrive("b", Arrival(0, "push", 4, 20))
    twin.one_step()
    assert twin.decode.load().blocks.free == 4
    assert twin.decode.steady_steps() == 11, "then each has four blocks and both need a fifth"


def test_a_waiting_prompt_that_could_come_in_ends_the_steady_stretch() -> None:
    twin = Twin(num_blocks=100, max_batch_size=1)
    twin.arrive("running", Arrival(0, "push", 10, 50))
    twin.one_step()
    twin.arrive("queued", Arrival(1, "add", 10, 50))
    assert twin.decode.steady_steps() > 0, "there is no place for it"
    twin.arrive("parked", Arrival(1, "room", 10, 50))
    assert twin.decode.steady_steps() == 0, "it can be fetched"
