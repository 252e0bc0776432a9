"""The prefill policy with a prefix cache, one example each."""

from __future__ import annotations

from phasewise.engine.batch import Batch, StepOutput
from phasewise.engine.blocks import BlockAllocator
from phasewise.engine.request import Request, SamplingParams
from phasewise.engine.sequence import Sequence
from phasewise.engine.step_time import StepCoefficients
from phasewise.prefill_worker.scheduler import PrefillLimits, PrefillScheduler

SHARED = tuple(range(100, 132))  # two blocks


def prompt(name: str, token_ids: tuple[int, ...], ttft_ms: float = 0.0) -> Sequence:
    return Sequence(
        Request(
            id=name,
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            sampling=SamplingParams(max_tokens=4),
            ttft_ms=ttft_ms,
        )
    )


def scheduler(num_blocks: int = 50, step_time: StepCoefficients | None = None) -> PrefillScheduler:
    limits = PrefillLimits(max_batch_tokens=256, max_model_len=1000, max_wait_s=5.0)
    allocator = BlockAllocator(num_blocks, 16, prefix_cache=True)
    return PrefillScheduler(allocator, limits, step_time)


def names(batch: Batch | None) -> list[str]:
    return [] if batch is None else [sequence.id for sequence in batch.sequences]


def finish(prefill: PrefillScheduler, batch: Batch, now_s: float = 0.0) -> None:
    prefill.advance(batch, StepOutput(token_ids=[7] * batch.num_rows), now_s)
    prefill.check()


def test_prompts_that_share_a_prefix_wait_until_one_has_computed_it() -> None:
    prefill = scheduler()
    for name in "abc":
        prefill.add(prompt(name, (*SHARED, ord(name))), 0.0)
    prefill.add(prompt("other", (1, 2, 3)), 0.0)
    batch = prefill.next_batch(0.0)
    assert batch is not None and names(batch) == ["a", "other"]
    finish(prefill, batch)
    batch = prefill.next_batch(0.0)
    assert batch is not None and names(batch) == ["b", "c"]
    assert batch.starts == [32, 32] and batch.counts == [1, 1]
    finish(prefill, batch)
    assert prefill.load().hit_tokens == 64


def test_an_urgent_prompt_does_not_wait_for_one_that_is_not() -> None:
    prefill = scheduler(num_blocks=200)
    prefill.add(prompt("patient", SHARED * 20, ttft_ms=9000), 0.0)
    batch = prefill.next_batch(0.0)
    assert batch is not None
    prefill.add(prompt("urgent", (*SHARED * 20, 1), ttft_ms=1000), 0.0)
    prefill.add(prompt("more", tuple(range(300)), ttft_ms=900), 0.0)
    finish(prefill, batch)
    batch = prefill.next_batch(0.0)
    assert batch is not None and names(batch) == ["more"]
    finish(prefill, batch)
    batch = prefill.next_batch(0.0)
    assert batch is not None and names(batch) == ["more", "urgent"]
    assert batch.starts == [256, 256], "what patient has computed is found all the same"


def test_a_prompt_goes_on_behind_what_an_aborted_one_had_computed_for_it() -> None:
    prefill = scheduler()
    prefill.add(prompt("a", SHARED * 20), 0.0)
    batch = prefill.next_batch(0.0)
    assert batch is not None
    prefill.add(prompt("b", (*SHARED * 20, 5)), 0.0)
    finish(prefill, batch)
    batch = prefill.next_batch(0.0)
    assert names(batch) == ["a"], "b waits"
    assert batch is not None
    finish(prefill, batch)
    prefill.abort("a")
    batch = prefill.next_batch(0.0)
    assert batch is not None and names(batch) == ["b"] and batch.starts == [512]


def test_a_broken_steps_blocks_are_never_found() -> None:
    prefill = scheduler()
    prefill.add(prompt("a", (*SHARED, 1)), 0.0)
    batch = prefill.next_batch(0.0)
    assert batch is not None
    assert prefill.abort("a")  # as a worker does when the step raised
    finish(prefill, batch)
    assert prefill.load().blocks.cached == 0
    prefill.add(prompt("b", (*SHARED, 1)), 0.0)
    batch = prefill.next_batch(0.0)
    assert batch is not None and batch.starts == [0]


def test_a_hit_shortens_the_predicted_time_and_so_keeps_a_request_from_being_late() -> None:
    prefill = scheduler(step_time=StepCoefficients(base_s=0.0, new_token_s=0.001))
    prefill.add(prompt("first", (*SHARED * 3, 1)), 0.0)
    batch = prefill.next_batch(0.0)
    assert batch is not None
    finish(prefill, batch)
    prefill.add(prompt("miss", tuple(range(300, 397)), ttft_ms=50), 0.0)
    prefill.add(prompt("hit", (*SHARED * 3, 2), ttft_ms=50), 0.0)
    assert names(prefill.next_batch(0.0)) == ["hit", "miss"], "97 ms are too late, 1 ms is not"


def test_prompts_that_fit_only_because_they_share_are_admitted_together() -> None:
    prefill = scheduler(num_blocks=5)
    prefill.add(prompt("a", (*SHARED, 1)), 0.0)
    batch = prefill.next_batch(0.0)
    assert batch is not None
    finish(prefill, batch)
    for name in "bc":
        prefill.add(prompt(name, (*SHARED, ord(name))), 0.0)
    assert names(prefill.next_batch(0.0)) == ["b", "c"]
    assert prefill.load().blocks.active == 5
