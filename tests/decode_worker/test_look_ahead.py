"""A step that is given out before the tokens of the one before are known."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from phasewise.decode_worker.scheduler import DecodeLimits, DecodeScheduler
from phasewise.engine.batch import Batch, Progress, StepOutput
from phasewise.engine.blocks import BlockAllocator
from phasewise.engine.request import FinishReason, Request, SamplingParams
from phasewise.engine.sequence import Sequence
from phasewise.tests.engine.shadow_pool import ShadowPool

SIZE = 4  # positions a block
STOP = 3


def scheduler(
    num_blocks: int = 64, *, max_batch_size: int = 4, prefix_cache: bool = False
) -> DecodeScheduler:
    limits = DecodeLimits(max_batch_size=max_batch_size, max_batch_tokens=64, max_model_len=200)
    return DecodeScheduler(BlockAllocator(num_blocks, SIZE, prefix_cache=prefix_cache), limits)


def sequence(name: str, num_tokens: int, max_tokens: int = 50, **sampling: Any) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, stop_token_ids=(STOP,), **sampling)
    tokens = tuple(range(10, 10 + num_tokens))
    return Sequence(
        Request(id=name, token_ids=tokens, num_prompt_tokens=num_tokens, sampling=params)
    )


def take(decode: DecodeScheduler, batch: Batch, *token_ids: int) -> Progress:
    progress = decode.advance(batch, StepOutput(token_ids=list(token_ids)), 0.0)
    decode.check()
    return progress


def decoding(decode: DecodeScheduler, *sequences: Sequence) -> Batch:
    """Compute the prompts in one step; returns the first in which all decode."""
    for one in sequences:
        decode.add(one, 0.0)
    prompts = decode.next_batch(0.0)
    assert prompts is not None and prompts.num_rows == len(sequences)
    assert decode.next_batch(0.0) is None, "prompts' first tokens must be known first"
    take(decode, prompts, *[7] * len(sequences))
    batch = decode.next_batch(0.0)
    assert batch is not None and batch.counts == [1] * len(sequences)
    return batch


def ahead(decode: DecodeScheduler) -> Batch:
    batch = decode.next_batch(0.0)
    decode.check()
    assert batch is not None and batch.follows is not None
    return batch


def test_the_same_rows_a_position_on_are_given_out_once() -> None:
    decode = scheduler()
    first = decoding(decode, sequence("a", 5), sequence("b", 9))
    second = ahead(decode)
    assert [row.id for row in second.sequences] == ["a", "b"]
    assert second.starts == [6, 10] and second.follows == [0, 1]
    assert decode.next_batch(0.0) is None, "two steps are in flight"
    assert take(decode, first, 8, 9).token_ids == [8, 9]
    third = ahead(decode)
    assert third.starts == [7, 11]
    assert take(decode, second, 10, 11).token_ids == [10, 11]
    assert second.sequences[0].tokens == [10, 11, 12, 13, 14, 7, 8, 10]
    take(decode, third, 12, 13)


def test_a_stopped_row_is_told_once_and_keeps_its_blocks_until_the_surplus_step_is_back() -> None:
    decode = scheduler()
    a, b = sequence("a", 6), sequence("b", 9)
    first = decoding(decode, a, b)
    second = ahead(decode)
    assert take(decode, first, STOP, 9).finished == [(a, FinishReason.STOP)]
    assert a.blocks, "the step in flight writes to them"
    assert not decode.abort("a"), "it has ended"
    third = ahead(decode)
    assert [row.id for row in third.sequences] == ["b"] and third.follows == [1]
    progress = take(decode, second, STOP, 10)
    assert (progress.sequences, progress.token_ids, progress.rows) == ([b], [10], [1])
    assert not progress.finished and not a.blocks
    take(decode, third, 11)


def test_a_row_that_has_its_last_token_is_not_in_the_following_step() -> None:
    decode = scheduler()
    a, b = sequence("a", 6, max_tokens=2), sequence("b", 9)
    first = decoding(decode, a, b)
    second = ahead(decode)
    assert [row.id for row in second.sequences] == ["b"] and second.follows == [1]
    assert take(decode, first, 8, 9).finished == [(a, FinishReason.LENGTH)]
    assert not a.blocks, "nobody writes to them"
    take(decode, second, 10)


def test_an_aborted_row_keeps_its_blocks_until_both_steps_are_back() -> None:
    decode = scheduler()
    a, b = sequence("a", 6), sequence("b", 9)
    first = decoding(decode, a, b)
    second = ahead(decode)
    assert decode.abort("a") and not decode.abort("a")
    assert take(decode, first, STOP, 9).sequences == [b]
    assert a.blocks
    assert take(decode, second, STOP, 10).sequences == [b]
    assert not a.blocks


def test_whoever_comes_meanwhile_waits_for_one_step_more_at_most() -> None:
    decode = scheduler()
    first = decoding(decode, sequence("a", 5))
    second = ahead(decode)
    decode.add(sequence("late", 5), 0.0)
    take(decode, first, 8)
    assert decode.next_batch(0.0) is None, "the place is for who waits"
    take(decode, second, 9)
    batch = decode.next_batch(0.0)
    assert batch is not None and [row.id for row in batch.sequences] == ["a", "late"]


def test_a_step_that_has_not_begun_is_taken_back_for_whoever_comes() -> None:
    decode = scheduler()
    a = sequence("a", 7)
    first = decoding(decode, a)
    second = ahead(decode)
    assert second.starts == [8] and len(a.blocks) == 3
    decode.add(sequence("late", 5), 0.0)
    assert decode.abort("a")
    decode.in_flight.take_back()
    assert not take(decode, first, 8).sequences
    assert not a.blocks, "no step writes to them"
    batch = decode.next_batch(0.0)
    assert batch is not None and [row.id for row in batch.sequences] == ["late"]


def test_where_nobody_could_come_in_waiting_prompts_do_not_end_it() -> None:
    decode = scheduler(max_batch_size=2)
    a, b = sequence("a", 5), sequence("b", 5, max_tokens=4)
    first = decoding(decode, a, b)
    decode.add(sequence("late", 5), 0.0)
    second = ahead(decode)
    take(decode, first, 8, 8)
    third = ahead(decode)
    take(decode, second, 8, STOP)
    assert third.num_rows == 2
    assert decode.next_batch(0.0) is None, "b has left its place to who waits"
    take(decode, third, 8, 8)
    batch = decode.next_batch(0.0)
    assert batch is not None and [row.id for row in batch.sequences] == ["a", "late"]


@pytest.mark.parametrize(
    "asked",
    [
        {"min_tokens": 3},
        {"logit_bias": {5: 1.0}},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"logprobs": 0},
    ],
    ids=str,
)
def test_a_row_whose_choice_needs_the_tokens_before_holds_the_step_back(
    asked: dict[str, Any],
) -> None:
    decode = scheduler()
    batch = decoding(decode, sequence("a", 5), sequence("b", 5, **asked))
    assert decode.next_batch(0.0) is None
    take(decode, batch, 8, 8)


def test_a_step_that_would_preempt_is_not_given_out_ahead() -> None:
    decode = scheduler(num_blocks=5)
    a, b = sequence("a", 6, 9), sequence("b", 7, 9)  # two blocks each, and one is left
    first = decoding(decode, a, b)
    second = ahead(decode)
    assert second.starts == [7, 8] and len(b.blocks) == 3
    take(decode, first, 8, 8)
    assert decode.next_batch(0.0) is None, "a needs a block too"
    take(decode, second, 8, 8)
    batch = decode.next_batch(0.0)
    assert batch is not None and batch.sequences == [a] and not b.blocks


@pytest.mark.parametrize("num_tokens", [5, 6, 7, 8])
@pytest.mark.parametrize("ends", ["stop", "abort", "failure"])
def test_what_a_surplus_step_wrote_is_never_found_by_name(num_tokens: int, ends: str) -> None:
    """Wherever the stream ends in its block, exactly the blocks that were complete are found."""
    decode = scheduler(prefix_cache=True)
    one = sequence("a", num_tokens)
    first = decoding(decode, one)
    second = ahead(decode)
    if ends == "stop":
        take(decode, first, STOP)
        num_complete = num_tokens + 1
        take(decode, second, 9)
    else:
        assert decode.abort("a")
        num_complete = num_tokens
        take(decode, first, 0)
        take(decode, second, 0)
    prefixes = decode.prefix.allocator.prefixes
    assert prefixes is not None and len(prefixes) == num_complete // SIZE


@dataclass
class Stream:
    """What the worker would have sent."""

    token_ids: list[int] = field(default_factory=list)
    ends: list[FinishReason] = field(default_factory=list)
    aborted: bool = False


class Served:
    """A random life of one scheduler, whose tokens hang on (request, position) alone."""

    def __init__(self, seed: int, *, looks_ahead: bool) -> None:
        draw = random.Random(seed)
        self.draw, self.looks_ahead = draw, looks_ahead
        self.decode = scheduler(
            draw.choice([12, 20, 60]),
            max_batch_size=draw.choice([2, 5]),
            prefix_cache=draw.random() < 0.5,
        )
        self.shadow = ShadowPool(SIZE)
        self.streams: dict[str, Stream] = {}
        self.following = 0
        self.arrivals = [
            (draw.randrange(60), sequence(str(i), draw.randrange(1, 20), draw.randrange(1, 20)))
            for i in range(draw.randrange(2, 14))
        ]
        self.aborts = {draw.randrange(60): str(draw.randrange(14)) for _ in range(2)}

    def run(self) -> dict[str, Stream]:
        step: Batch | None = None
        number = 0
        while self.arrivals or step is not None or self.open:
            assert number < 2000, "someone starves"
            self.come_and_go(number)
            step = step or self.decode.next_batch(0.0)
            number += 1
            if step is None:
                continue
            following = self.decode.next_batch(0.0) if self.looks_ahead else None
            self.decode.check()
            self.compute(step)
            self.following += following is not None
            self.come_and_go(number)
            if following is not None and self.draw.random() < 0.2:
                self.decode.in_flight.take_back()
                following = None
            self.note(self.decode.advance(step, self.output(step), 0.0))
            self.decode.check()
            step = following
        assert self.decode.load().blocks.active == 0
        return self.streams

    @property
    def open(self) -> list[str]:
        return [name for name, one in self.streams.items() if not one.ends and not one.aborted]

    def compute(self, step: Batch) -> None:
        """As late as can be: when what was decided meanwhile has had its effect."""
        for row in step.sequences:
            assert row.blocks, "the step writes to blocks that are given away"
        self.shadow.compute(step)

    def come_and_go(self, number: int) -> None:
        for arrival in [arrival for arrival in self.arrivals if arrival[0] <= number]:
            self.arrivals.remove(arrival)
            self.streams[arrival[1].id] = Stream()
            self.decode.add(arrival[1], 0.0)
        name = self.aborts.pop(number, "")
        if self.decode.abort(name):
            self.streams[name].aborted = True

    def output(self, step: Batch) -> StepOutput:
        token_ids = []
        for row, one in enumerate(step.sequences):
            position = step.starts[row] + step.counts[row]
            chosen = random.Random(f"{one.id} {position}").randrange(3, 40)
            token_ids.append(chosen if step.samples(row) else -1)
        return StepOutput(token_ids=token_ids)

    def note(self, progress: Progress) -> None:
        for one, token_id in zip(progress.sequences, progress.token_ids, strict=True):
            stream = self.streams[one.id]
            assert not stream.ends and not stream.aborted, "a token after the end"
            stream.token_ids.append(token_id)
        for one, reason in progress.finished:
            assert not self.streams[one.id].aborted
            self.streams[one.id].ends.append(reason)


def test_looking_ahead_changes_no_token_and_no_end() -> None:
    """Over random lives with stops, aborts, preemptions and shared prefixes. An aborted stream is
    as far as its time allowed, so one is the other's beginning."""
    followed = 0
    for seed in range(150):
        in_turn, ahead = Served(seed, looks_ahead=False), Served(seed, looks_ahead=True)
        expected, found = in_turn.run(), ahead.run()
        followed += ahead.following
        assert found.keys() == expected.keys()
        for name, stream in found.items():
            other = expected[name]
            least = min(len(stream.token_ids), len(other.token_ids))
            assert stream.token_ids[:least] == other.token_ids[:least]
            assert len(stream.ends) == (not stream.aborted)
            if not stream.aborted and not other.aborted:
                assert stream == other
    assert followed > 500
