"""The paced runner: the schedule it keeps, the tokens it draws, the KV it insists on."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from phasewise.engine.batch import Batch
from phasewise.engine.paced import LATE_S, MOST_LAYERS, PacedRunner, continuation, paced_layout
from phasewise.engine.request import Request, SamplingParams
from phasewise.engine.sequence import Sequence
from phasewise.engine.spec import ModelSpec, load_spec
from phasewise.engine.step_time import StepCoefficients

TINY = Path(__file__).parents[2] / "models" / "tiny"
STEP_TIME = StepCoefficients(
    base_s=0.010, new_token_s=1e-4, decode_row_s=1e-3, decode_context_s=1e-6
)


class Clock:
    """A clock that only sleeping moves, and that oversleeps."""

    def __init__(self, late_s: float = 0.0) -> None:
        self.now_s = 100.0
        self.late_s = late_s

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now_s += seconds + self.late_s


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return load_spec(TINY)


def runner_of(
    spec: ModelSpec, clock: Clock, num_blocks: int = 64, pool: bytearray | None = None
) -> PacedRunner:
    layout = paced_layout(num_layers=80, num_blocks=num_blocks, block_size=16, fingerprint="")
    return PacedRunner(
        spec,
        layout,
        bytearray(layout.num_bytes) if pool is None else pool,
        STEP_TIME,
        max_model_len=512,
        clock=clock,
        sleep=clock.sleep,
    )


def sequence_of(prompt: list[int], blocks: list[int], arrival_s: float = 0.0) -> Sequence:
    request = Request(
        id="r",
        token_ids=tuple(prompt),
        num_prompt_tokens=len(prompt),
        sampling=SamplingParams(max_tokens=400),
        arrival_s=arrival_s,
    )
    sequence = Sequence(request)
    sequence.blocks = blocks
    return sequence


def step(runner: PacedRunner, sequence: Sequence, count: int) -> int:
    batch = Batch(sequences=[sequence], starts=[sequence.num_computed], counts=[count])
    token = runner.run(batch).token_ids[0]
    sequence.num_computed += count
    if token >= 0:
        sequence.append(token)
    return token


def test_a_step_takes_the_time_of_its_batch(spec: ModelSpec) -> None:
    clock = Clock()
    runner = runner_of(spec, clock)
    sequence = sequence_of([7] * 100, list(range(30)))
    step(runner, sequence, 100)
    assert clock.now_s == pytest.approx(100 + 0.010 + 100 * 1e-4)
    step(runner, sequence, 1)
    assert clock.now_s == pytest.approx(100.020 + 0.010 + 1e-3 + 100 * 1e-6)


def test_layers_are_done_in_equal_parts_of_the_step(spec: ModelSpec) -> None:
    clock = Clock()
    runner = runner_of(spec, clock)
    sequence = sequence_of([7] * 100, list(range(30)))
    done: list[tuple[int, float]] = []
    batch = Batch(sequences=[sequence], starts=[0], counts=[100])
    runner.run(batch, lambda layer: done.append((layer, clock.now_s)))
    assert runner.layout.num_layers == MOST_LAYERS
    assert done == [
        (layer, pytest.approx(100 + 0.020 * (layer + 1) / MOST_LAYERS))
        for layer in range(MOST_LAYERS)
    ]


def test_late_wake_ups_and_work_between_steps_do_not_add_up(spec: ModelSpec) -> None:
    clock = Clock(late_s=0.0007)
    runner = runner_of(spec, clock)
    sequence = sequence_of([7] * 10, list(range(30)))
    step(runner, sequence, 10)
    wanted_s = 100 + 0.011
    for context in range(10, 310):
        clock.now_s += 0.001  # the worker's own work
        step(runner, sequence, 1)
        wanted_s += 0.011 + context * 1e-6
    assert 0 <= clock.now_s - wanted_s <= 0.001


def test_a_step_after_a_pause_takes_its_whole_time(spec: ModelSpec) -> None:
    clock = Clock()
    runner = runner_of(spec, clock)
    sequence = sequence_of([7] * 10, list(range(30)))
    step(runner, sequence, 10)
    clock.now_s += LATE_S * 1.01
    before_s = clock.now_s
    step(runner, sequence, 1)
    assert clock.now_s - before_s == pytest.approx(0.011 + 10 * 1e-6)


@pytest.mark.parametrize("late_s", (0.001, 0.02, LATE_S * 0.99))
def test_a_prompt_that_waited_begins_when_the_step_before_ended(
    spec: ModelSpec, late_s: float
) -> None:
    clock = Clock()
    runner = runner_of(spec, clock)
    step(runner, sequence_of([7] * 100, list(range(10))), 100)
    clock.now_s += late_s  # the host had other work
    step(runner, sequence_of([7] * 50, list(range(10, 20)), arrival_s=100.019), 50)
    assert clock.now_s == pytest.approx(max(100.020 + 0.015, 100.020 + late_s))


@pytest.mark.parametrize("after_s", (0.001, 0.02))
def test_a_prompt_that_came_after_the_step_before_begins_when_it_is_asked_for(
    spec: ModelSpec, after_s: float
) -> None:
    clock = Clock()
    runner = runner_of(spec, clock)
    step(runner, sequence_of([7] * 100, list(range(10))), 100)
    clock.now_s += after_s
    step(runner, sequence_of([7] * 50, list(range(10, 20)), arrival_s=clock.now_s), 50)
    assert clock.now_s == pytest.approx(100.020 + after_s + 0.015)


def test_a_row_from_elsewhere_does_not_begin_before_it_came(spec: ModelSpec) -> None:
    clock = Clock()
    pool = bytearray(1 << 20)
    there, here = runner_of(spec, clock, pool=pool), runner_of(spec, clock, pool=pool)
    moved = sequence_of([7] * 10, list(range(30)))
    step(here, sequence_of([3] * 10, list(range(30, 40))), 10)
    step(there, moved, 10)  # meanwhile nobody computes here
    before_s = clock.now_s
    step(here, moved, 1)
    assert clock.now_s - before_s == pytest.approx(0.011 + 10 * 1e-6)


def test_tokens_are_the_references_whatever_the_chunks_and_the_neighbours(spec: ModelSpec) -> None:
    draw = random.Random(1)
    runner = runner_of(spec, Clock())
    prompts = [[draw.randrange(spec.vocab_size) for _ in range(n)] for n in (1, 15, 16, 17, 90)]
    sequences = [sequence_of(p, list(range(10 * i, 10 * i + 10))) for i, p in enumerate(prompts)]
    for sequence, chunk in zip(sequences, (1, 4, 16, 5, 33), strict=True):
        while sequence.num_uncomputed > 1 or sequence.num_computed == 0:
            step(runner, sequence, min(chunk, sequence.num_uncomputed))
    for _ in range(40):
        batch = Batch(
            sequences=sequences, starts=[s.num_computed for s in sequences], counts=[1] * 5
        )
        for sequence, token in zip(sequences, runner.run(batch).token_ids, strict=True):
            sequence.num_computed += 1
            sequence.append(token)
    for sequence, prompt in zip(sequences, prompts, strict=True):
        assert sequence.tokens is not None
        expected = continuation(
            prompt, 41, vocab_size=spec.vocab_size, eos_token_ids=spec.eos_token_ids
        )
        assert sequence.tokens[len(prompt) :] == expected
        assert not spec.eos_token_ids & set(expected)


def test_the_next_token_hangs_on_every_token_before_it(spec: ModelSpec) -> None:
    one = continuation([3, 4, 5], 1, vocab_size=1 << 40, eos_token_ids=frozenset())
    two = continuation([4, 3, 5], 1, vocab_size=1 << 40, eos_token_ids=frozenset())
    assert one != two


def test_kv_of_another_sequence_is_refused(spec: ModelSpec) -> None:
    runner = runner_of(spec, Clock())
    mine, other = sequence_of([1] * 40, [0, 1, 2, 3]), sequence_of([2] * 40, [4, 5, 6, 7])
    step(runner, mine, 40)
    step(runner, other, 40)
    assert mine.tokens is not None
    moved = sequence_of([*mine.tokens], [0, 5, 2, 3])  # its second block is not its own
    moved.num_computed = 40
    with pytest.raises(AssertionError, match="not its own"):
        step(runner, moved, 1)


def test_a_layer_that_did_not_arrive_is_refused(spec: ModelSpec) -> None:
    layout = paced_layout(num_layers=4, num_blocks=8, block_size=16, fingerprint="")
    buffer = bytearray(layout.num_bytes)
    clock = Clock()
    runner = PacedRunner(
        spec, layout, buffer, STEP_TIME, max_model_len=128, clock=clock, sleep=clock.sleep
    )
    sequence = sequence_of([1] * 40, [0, 1, 2, 3])
    step(runner, sequence, 40)
    third = layout.offset(2, 0)
    buffer[third : third + layout.layer_bytes] = bytes(layout.layer_bytes)
    with pytest.raises(AssertionError, match="every layer"):
        step(runner, sequence, 1)
