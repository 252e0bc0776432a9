"""The prefill policy, one example each."""

from __future__ import annotations

from phasewise.engine.batch import Batch, Progress, StepOutput
from phasewise.engine.blocks import BlockAllocator
from phasewise.engine.request import FinishReason, Request, SamplingParams
from phasewise.engine.sequence import Sequence
from phasewise.engine.step_time import StepCoefficients
from phasewise.engine.step_time_online import OnlineStepTime
from phasewise.prefill_worker.scheduler import PrefillLimits, PrefillScheduler

EOS = 2


def sequence(
    name: str,
    num_tokens: int,
    *,
    arrival_s: float = 0.0,
    ttft_ms: float = 0.0,
    priority: int = 0,
    max_tokens: int = 8,
) -> Sequence:
    return Sequence(
        Request(
            id=name,
            token_ids=(7,) * num_tokens,
            num_prompt_tokens=num_tokens,
            sampling=SamplingParams(max_tokens=max_tokens),
            arrival_s=arrival_s,
            ttft_ms=ttft_ms,
            priority=priority,
        )
    )


def scheduler(
    num_blocks: int = 100,
    max_batch_tokens: int = 64,
    step_time: StepCoefficients | OnlineStepTime | None = None,
    max_wait_s: float = 10.0,
) -> PrefillScheduler:
    limits = PrefillLimits(
        max_batch_tokens=max_batch_tokens,
        max_model_len=10_000,
        eos_token_ids=frozenset({EOS}),
        max_wait_s=max_wait_s,
    )
    return PrefillScheduler(BlockAllocator(num_blocks, 16), limits, step_time)


def batch_of(prefill: PrefillScheduler, now_s: float = 0.0) -> Batch:
    batch = prefill.next_batch(now_s)
    assert batch is not None
    return batch


def rows(batch: Batch) -> list[tuple[str, int, int]]:
    names = [row.id for row in batch.sequences]
    return list(zip(names, batch.starts, batch.counts, strict=True))


def finish(
    prefill: PrefillScheduler, batch: Batch, now_s: float = 0.0, token_id: int = 7
) -> Progress:
    output = StepOutput(
        token_ids=[token_id if batch.samples(row) else -1 for row in range(batch.num_rows)]
    )
    progress = prefill.advance(batch, output, now_s)
    prefill.check()
    return progress


def step(prefill: PrefillScheduler, now_s: float = 0.0) -> list[tuple[str, int, int]]:
    batch = batch_of(prefill, now_s)
    finish(prefill, batch, now_s)
    return rows(batch)


def test_several_prompts_share_a_step_and_the_last_is_cut_to_fill_it() -> None:
    prefill = scheduler()
    for name, length in (("a", 20), ("b", 30), ("c", 100)):
        prefill.add(sequence(name, length), 0.0)
    assert step(prefill) == [("a", 0, 20), ("b", 0, 30), ("c", 0, 14)]
    assert step(prefill) == [("c", 14, 64)]
    assert step(prefill) == [("c", 78, 22)]
    assert prefill.next_batch(0.0) is None


def test_a_done_prompt_has_its_first_token_and_keeps_its_blocks_until_released() -> None:
    prefill = scheduler()
    prompt = sequence("a", 40)
    prefill.add(prompt, 0.0)
    progress = finish(prefill, batch_of(prefill, 1.5), token_id=9)
    assert progress.sequences == [prompt] and progress.token_ids == [9] and progress.rows == [0]
    assert prompt.tokens is not None and prompt.tokens[-1] == 9
    assert (prompt.num_computed, prompt.num_tokens) == (40, 41)
    assert prompt.first_scheduled_s == 1.5
    assert prefill.load().blocks.active == 3
    prefill.release("a")
    assert prefill.load().blocks.free == 100


def test_a_first_token_that_ends_the_stream_frees_the_blocks_at_once() -> None:
    prefill = scheduler()
    prefill.add(sequence("one", 20, max_tokens=1), 0.0)
    progress = finish(prefill, batch_of(prefill))
    assert [(s.id, why) for s, why in progress.finished] == [("one", FinishReason.LENGTH)]
    prefill.add(sequence("stop", 20), 0.0)
    progress = finish(prefill, batch_of(prefill), token_id=EOS)
    assert [(s.id, why) for s, why in progress.finished] == [("stop", FinishReason.STOP)]
    assert progress.token_ids == [EOS]
    assert prefill.load().blocks.free == 100


def test_the_earliest_deadline_goes_first_and_overtakes_a_long_prompt_at_a_chunk() -> None:
    prefill = scheduler()
    prefill.add(sequence("slow", 200, ttft_ms=9000), 0.0)
    assert step(prefill) == [("slow", 0, 64)]
    prefill.add(sequence("soon", 40, ttft_ms=500), 0.0)
    assert step(prefill) == [("soon", 0, 40), ("slow", 64, 24)]


def test_a_request_that_is_late_already_goes_last() -> None:
    prefill = scheduler()
    prefill.add(sequence("late", 64, arrival_s=0.0, ttft_ms=100), 1.0)
    prefill.add(sequence("fine", 64, arrival_s=1.0, ttft_ms=5000), 1.0)
    assert step(prefill, 1.0) == [("fine", 0, 64)]
    assert step(prefill, 1.0) == [("late", 0, 64)]


def test_a_prompt_too_long_to_be_on_time_counts_as_late_before_its_deadline() -> None:
    prefill = scheduler(step_time=StepCoefficients(base_s=0.0, new_token_s=0.01))
    prefill.add(sequence("hopeless", 128, ttft_ms=1000), 0.0)
    prefill.add(sequence("fine", 64, ttft_ms=2000), 0.0)
    assert step(prefill) == [("fine", 0, 64)]


def test_a_higher_class_goes_before_an_earlier_deadline() -> None:
    prefill = scheduler()
    prefill.add(sequence("batch", 64, ttft_ms=100, priority=1), 0.0)
    prefill.add(sequence("chat", 64, ttft_ms=900, priority=0), 0.0)
    assert step(prefill) == [("chat", 0, 64)]


def test_a_prompt_that_waits_for_blocks_is_passed_by_those_that_fit() -> None:
    prefill = scheduler(num_blocks=10)
    prefill.add(sequence("parked", 64), 0.0)
    step(prefill)
    prefill.add(sequence("big", 150, ttft_ms=100), 0.0)
    prefill.add(sequence("small", 50, ttft_ms=900), 0.0)
    assert step(prefill) == [("small", 0, 50)]
    prefill.release("parked")
    prefill.release("small")
    assert step(prefill) == [("big", 0, 64)]


def test_an_overdue_prompt_is_passed_no_more_and_gets_a_share_of_every_step() -> None:
    prefill = scheduler(num_blocks=10, max_wait_s=5.0)
    prefill.add(sequence("parked", 64), 0.0)
    step(prefill)
    prefill.add(sequence("big", 150, ttft_ms=100), 0.0)
    prefill.add(sequence("small", 50, arrival_s=6.0, ttft_ms=9000), 6.0)
    assert prefill.next_batch(6.0) is None
    prefill.release("parked")
    # Blocks for both are not there, so the share is not all that it gets.
    assert step(prefill, 6.0) == [("big", 0, 64)]


def test_a_late_prompt_makes_progress_under_a_flood_of_urgent_ones() -> None:
    prefill = scheduler(num_blocks=1000, max_wait_s=2.0)
    prefill.add(sequence("late", 64, ttft_ms=1), 0.0)
    done_at = None
    for index in range(40):
        now_s = 1.0 + index * 0.5
        prefill.add(sequence(f"urgent-{index}", 64, arrival_s=now_s, ttft_ms=9000), now_s)
        batch = batch_of(prefill, now_s)
        progress = finish(prefill, batch, now_s)
        if any(done.id == "late" for done in progress.sequences):
            done_at = index
            break
    assert done_at == 3 + 3, "from 2 s on, a quarter of each step"


def test_started_prompts_go_on_when_many_that_do_not_fit_are_more_urgent() -> None:
    prefill = scheduler(num_blocks=10)
    prefill.add(sequence("started", 130, ttft_ms=100), 0.0)
    step(prefill, 0.0)
    for index in range(200):
        prefill.add(sequence(f"urgent-{index}", 150, arrival_s=1.0, ttft_ms=9000), 1.0)
    assert step(prefill, 1.0) == [("started", 64, 64)]


def test_an_abort_frees_blocks_at_once_except_of_a_step_in_flight() -> None:
    prefill = scheduler()
    for name in ("flying", "waiting"):
        prefill.add(sequence(name, 100, max_tokens=1), 0.0)
    batch = batch_of(prefill)
    assert rows(batch) == [("flying", 0, 64)]
    assert prefill.abort("waiting") and not prefill.abort("waiting")
    assert prefill.abort("flying") and not prefill.abort("flying")
    assert prefill.load().blocks.active == 7
    progress = finish(prefill, batch)
    assert not progress.sequences and not progress.finished
    assert prefill.load().blocks.free == 100
    assert prefill.next_batch(0.0) is None
    assert not prefill.abort("unknown")


def test_a_prompt_between_two_chunks_can_be_aborted() -> None:
    prefill = scheduler()
    prefill.add(sequence("a", 100), 0.0)
    step(prefill)
    assert prefill.abort("a")
    prefill.check()
    assert prefill.load().blocks.free == 100 and prefill.load().queued_tokens == 0


def test_a_parked_sequence_is_given_up_by_release_not_by_abort() -> None:
    prefill = scheduler()
    prefill.add(sequence("a", 10), 0.0)
    step(prefill)
    assert not prefill.abort("a")
    prefill.release("a")
    assert prefill.load().blocks.free == 100


def test_what_can_never_fit_is_known_before_it_is_added() -> None:
    prefill = scheduler(num_blocks=4)
    assert prefill.fits(64) and not prefill.fits(65) and not prefill.fits(0)


def test_load_counts_what_waits_and_what_runs() -> None:
    prefill = scheduler()
    prefill.add(sequence("a", 100), 0.0)
    prefill.add(sequence("b", 50), 0.0)
    step(prefill)
    load = prefill.load()
    assert (load.running, load.waiting) == (1, 1)
    assert (load.queued_tokens, load.context_tokens) == (86, 64)


def test_a_scheduler_that_learns_step_times_recognises_late_prompts() -> None:
    prefill = scheduler(step_time=OnlineStepTime())
    for index in range(40):
        prefill.add(sequence(str(index), 1 + 37 * index % 60), 0.0)
        batch = batch_of(prefill)
        prefill.observe(batch, 0.01 * batch.num_tokens)
        finish(prefill, batch)
    prefill.add(sequence("hopeless", 60, ttft_ms=300), 0.0)
    prefill.add(sequence("fine", 60, ttft_ms=900), 0.0)
    assert step(prefill)[0][0] == "fine"
