"""The decode policy, one example each."""

from __future__ import annotations

from phasewise.decode_worker.chunking import MIN_CHUNK_TOKENS
from phasewise.decode_worker.scheduler import DecodeLimits, DecodeScheduler
from phasewise.engine.batch import Batch, Progress, StepOutput
from phasewise.engine.blocks import BlockAllocator
from phasewise.engine.request import FinishReason, Request, SamplingParams
from phasewise.engine.sequence import Sequence
from phasewise.engine.step_time import StepCoefficients

EOS = 2


def sequence(
    name: str,
    num_tokens: int,
    *,
    max_tokens: int = 50,
    priority: int = 0,
    tpot_ms: float = 0.0,
    ttft_ms: float = 0.0,
    stop: tuple[int, ...] = (),
) -> Sequence:
    return Sequence(
        Request(
            id=name,
            token_ids=(7,) * num_tokens,
            num_prompt_tokens=num_tokens,
            sampling=SamplingParams(max_tokens=max_tokens, stop_token_ids=stop),
            priority=priority,
            tpot_ms=tpot_ms,
            ttft_ms=ttft_ms,
        )
    )


def scheduler(
    num_blocks: int = 100,
    *,
    max_batch_size: int = 8,
    max_batch_tokens: int = 64,
    step_time: StepCoefficients | None = None,
    tpot_ms: float = 0.0,
    max_wait_s: float = 10.0,
) -> DecodeScheduler:
    limits = DecodeLimits(
        max_batch_size=max_batch_size,
        max_batch_tokens=max_batch_tokens,
        max_model_len=1000,
        eos_token_ids=frozenset({EOS}),
        tpot_ms=tpot_ms,
        max_wait_s=max_wait_s,
    )
    return DecodeScheduler(BlockAllocator(num_blocks, 16), limits, step_time)


def hand_over(decode: DecodeScheduler, handed: Sequence) -> Sequence:
    """As after a push: blocks leased, KV written, the first token known."""
    blocks = decode.lease(handed.num_tokens)
    assert blocks is not None
    handed.append(7)
    decode.resume(handed, blocks, 0.0)
    return handed


def start(decode: DecodeScheduler, now_s: float = 0.0) -> Batch:
    batch = decode.next_batch(now_s)
    assert batch is not None
    return batch


def finish(decode: DecodeScheduler, batch: Batch, token_id: int = 7) -> Progress:
    output = StepOutput(
        token_ids=[token_id if batch.samples(row) else -1 for row in range(batch.num_rows)]
    )
    progress = decode.advance(batch, output, 0.0)
    decode.check()
    return progress


def step(decode: DecodeScheduler, now_s: float = 0.0) -> list[tuple[str, int, int]]:
    batch = start(decode, now_s)
    finish(decode, batch)
    names = [row.id for row in batch.sequences]
    return list(zip(names, batch.starts, batch.counts, strict=True))


def test_a_handed_over_sequence_goes_on_with_its_first_token() -> None:
    decode = scheduler()
    handed = hand_over(decode, sequence("a", 32))
    assert step(decode) == [("a", 32, 1)]
    assert (handed.num_tokens, handed.num_computed, len(handed.blocks)) == (34, 33, 3)
    assert handed.blocks == [0, 1, 2], "grown beside its last block"


def test_every_running_row_has_a_token_in_every_step_up_to_the_batch_size() -> None:
    decode = scheduler(max_batch_size=2)
    for name in ("a", "b", "c"):
        hand_over(decode, sequence(name, 16, max_tokens=3))
    assert step(decode) == [("a", 16, 1), ("b", 16, 1)]
    assert step(decode) == [("a", 17, 1), ("b", 17, 1)]
    assert step(decode) == [("c", 16, 1)]


def test_a_place_goes_to_the_higher_class_first() -> None:
    decode = scheduler(max_batch_size=1)
    hand_over(decode, sequence("batch", 16, priority=1))
    hand_over(decode, sequence("chat", 16, priority=0))
    assert step(decode) == [("chat", 16, 1)]


def test_a_stream_ends_by_length_by_end_token_and_by_its_own_stop_token() -> None:
    decode = scheduler()
    hand_over(decode, sequence("length", 16, max_tokens=2))
    progress = finish(decode, start(decode))
    assert [(s.id, why) for s, why in progress.finished] == [("length", FinishReason.LENGTH)]
    hand_over(decode, sequence("eos", 16))
    hand_over(decode, sequence("stop", 16, stop=(9,)))
    assert [s.id for s, _ in finish(decode, start(decode), 9).finished] == ["stop"]
    assert [s.id for s, _ in finish(decode, start(decode), EOS).finished] == ["eos"]
    assert decode.load().blocks.free == 100 and decode.next_batch(0.0) is None


def test_a_stream_never_exceeds_the_model_length() -> None:
    decode = scheduler()
    hand_over(decode, sequence("a", 998, max_tokens=500))
    assert [why for _, why in finish(decode, start(decode)).finished] == [FinishReason.LENGTH]


def test_a_local_prompt_is_computed_in_chunks_behind_the_running_rows() -> None:
    decode = scheduler(max_batch_tokens=40)
    hand_over(decode, sequence("running", 16))
    prompt = sequence("prompt", 60)
    decode.add(prompt, 2.0)
    assert step(decode, 3.0) == [("running", 16, 1), ("prompt", 0, 39)]
    batch = start(decode)
    progress = finish(decode, batch)
    assert batch.counts == [1, 21]
    assert [s.id for s in progress.sequences] == ["running", "prompt"], "its first token"
    assert progress.rows == [0, 1]
    assert prompt.first_scheduled_s == 3.0
    assert step(decode) == [("running", 18, 1), ("prompt", 60, 1)]


def test_chunks_are_as_large_as_the_strictest_time_per_token_allows() -> None:
    step_time = StepCoefficients(base_s=0.010, new_token_s=0.001, decode_row_s=0.001)
    decode = scheduler(max_batch_tokens=500, step_time=step_time, tpot_ms=100)
    hand_over(decode, sequence("relaxed", 16))
    hand_over(decode, sequence("strict", 16, tpot_ms=50))
    decode.add(sequence("prompt", 400), 0.0)
    assert step(decode)[2] == ("prompt", 0, 38), "10 ms + 2 rows + 38 tokens make 50 ms"


def test_without_running_decodes_a_chunk_fills_the_step() -> None:
    step_time = StepCoefficients(base_s=0.010, new_token_s=0.001)
    decode = scheduler(max_batch_tokens=500, step_time=step_time, tpot_ms=50)
    decode.add(sequence("prompt", 400), 0.0)
    assert step(decode) == [("prompt", 0, 400)]


def test_a_prompt_makes_some_progress_when_there_is_no_slack_at_all() -> None:
    step_time = StepCoefficients(base_s=1.0, new_token_s=1.0)
    decode = scheduler(max_batch_tokens=500, step_time=step_time, tpot_ms=50)
    hand_over(decode, sequence("running", 16))
    decode.add(sequence("first", 40), 0.0)
    decode.add(sequence("second", 40), 0.0)
    assert step(decode)[1:] == [("first", 0, MIN_CHUNK_TOKENS)]
    assert decode.load().running == 2, "the second was not let in for nothing"


def test_a_prompt_that_uses_up_the_slack_lets_no_other_in() -> None:
    step_time = StepCoefficients(base_s=0.010, new_token_s=0.001, decode_row_s=0.001)
    decode = scheduler(max_batch_tokens=500, step_time=step_time, tpot_ms=50.5)
    hand_over(decode, sequence("running", 16))
    decode.add(sequence("first", 39), 0.0)
    decode.add(sequence("second", 39), 0.0)
    assert step(decode)[1:] == [("first", 0, 39)]
    assert decode.load().waiting == 1


def test_new_prompts_are_computed_by_earliest_deadline() -> None:
    decode = scheduler()
    decode.add(sequence("later", 64, ttft_ms=900), 0.0)
    decode.add(sequence("sooner", 64, ttft_ms=300), 0.0)
    assert step(decode) == [("sooner", 0, 64)]


def test_without_a_block_the_newest_is_preempted_and_computed_again_before_new_prompts() -> None:
    decode = scheduler(num_blocks=4)
    old = hand_over(decode, sequence("old", 16, max_tokens=20))
    new = hand_over(decode, sequence("new", 16, max_tokens=20))
    for _ in range(16):
        step(decode)
    assert decode.load().blocks.free == 0
    decode.add(sequence("later", 5, max_tokens=2), 0.0)
    assert step(decode) == [("old", 32, 1)]
    assert (new.num_preemptions, new.num_computed, new.blocks) == (1, 0, [])
    assert decode.load().preemptions == 1
    finished = []
    order = []
    while decode.load().running + decode.load().waiting:
        batch = start(decode)
        order += [row.id for row in batch.sequences if row.id not in order]
        finished += [s.id for s, _ in finish(decode, batch).finished]
    assert order == ["old", "new", "later"]
    assert sorted(finished) == ["later", "new", "old"]
    assert old.num_preemptions == 0


def test_a_lower_class_is_preempted_before_a_newer_sequence() -> None:
    decode = scheduler(num_blocks=6)
    hand_over(decode, sequence("old", 16))
    low = hand_over(decode, sequence("low", 16, priority=1))
    high = hand_over(decode, sequence("high", 16))
    for _ in range(17):
        step(decode)
    assert (low.num_preemptions, high.num_preemptions) == (1, 0)


def test_the_oldest_is_never_preempted_even_in_the_lowest_class() -> None:
    decode = scheduler(num_blocks=4)
    old = hand_over(decode, sequence("old", 16, priority=5, max_tokens=48))
    hand_over(decode, sequence("new", 16, max_tokens=48))
    for _ in range(30):
        step(decode)
    assert old.num_preemptions == 0 and old.num_output_tokens == 31


def test_leases_leave_a_block_for_each_running_row() -> None:
    decode = scheduler(num_blocks=10)
    for name in ("a", "b"):
        hand_over(decode, sequence(name, 32))
    assert decode.lease(16 * 5) is None
    assert decode.lease(16 * 4) is not None


def test_leased_blocks_are_nobodys_until_the_lease_ends() -> None:
    decode = scheduler(num_blocks=4)
    leased = decode.lease(48)
    assert leased is not None
    handed = hand_over(decode, sequence("a", 16, max_tokens=48))
    assert decode.next_batch(0.0) is None, "it needs a block and all others may be written to"
    decode.unlease(leased)
    assert step(decode) == [("a", 16, 1)]
    assert handed.num_preemptions == 0


def wait_for_room(decode: DecodeScheduler, waiting: Sequence, now_s: float = 0.0) -> Sequence:
    waiting.append(7)
    decode.wait_for_room(waiting, now_s)
    return waiting


def test_a_parked_sequence_is_given_out_with_leased_blocks_when_there_is_room() -> None:
    decode = scheduler(num_blocks=5)
    hand_over(decode, sequence("running", 48, max_tokens=3))
    waiting = wait_for_room(decode, sequence("parked", 33, max_tokens=40))
    assert decode.next_fetches(0.0) == []
    step(decode)
    step(decode)
    [(fetched, blocks)] = decode.next_fetches(0.0)
    assert fetched is waiting and len(blocks) == 3
    assert decode.next_fetches(0.0) == []
    decode.check()
    assert decode.load().blocks.leased == 3
    decode.resume(fetched, blocks, 0.0)
    assert step(decode) == [("parked", 33, 1)]


def test_a_failed_fetch_frees_nothing_before_its_blocks_are_unleased() -> None:
    decode = scheduler(num_blocks=5)
    wait_for_room(decode, sequence("parked", 33, max_tokens=40))
    [(fetched, blocks)] = decode.next_fetches(0.0)
    assert decode.abort(fetched.id) and not decode.abort(fetched.id)
    assert decode.load().blocks.leased == 3 and decode.load().waiting == 0
    decode.unlease(blocks)
    assert decode.load().blocks.free == 5


def test_a_sequence_that_waits_for_room_is_passed_by_one_that_fits_but_not_for_ever() -> None:
    decode = scheduler(num_blocks=10, max_wait_s=5.0)
    hand_over(decode, sequence("running", 64))
    wait_for_room(decode, sequence("big", 96), 0.0)
    wait_for_room(decode, sequence("small", 16), 1.0)
    [(fetched, blocks)] = decode.next_fetches(1.0)
    assert fetched.id == "small"
    decode.resume(fetched, blocks, 1.0)
    wait_for_room(decode, sequence("small too", 16), 2.0)
    decode.add(sequence("prompt", 16), 2.0)
    assert decode.next_fetches(6.0) == []
    assert [name for name, _, _ in step(decode, 6.0)] == ["running", "small"]
    decode.abort("running")
    assert [waiting.id for waiting, _ in decode.next_fetches(6.0)] == ["big"]


def test_nothing_comes_in_while_a_preempted_sequence_waits() -> None:
    decode = scheduler(num_blocks=6)
    hand_over(decode, sequence("old", 16, max_tokens=70))
    new = hand_over(decode, sequence("new", 32, max_tokens=60))
    while not new.num_preemptions:
        step(decode)
    assert decode.load().blocks.free >= 2
    wait_for_room(decode, sequence("parked", 8))
    assert decode.next_fetches(0.0) == [] and decode.lease(8) is None
    decode.abort("new")
    assert [waiting.id for waiting, _ in decode.next_fetches(0.0)] == ["parked"]


def test_nothing_is_leased_past_a_sequence_that_waits_for_room() -> None:
    decode = scheduler(num_blocks=10)
    hand_over(decode, sequence("running", 64))
    assert decode.lease(16) is not None
    wait_for_room(decode, sequence("big", 96))
    assert decode.lease(16) is None


def test_abort_works_wherever_a_sequence_stands() -> None:
    decode = scheduler(num_blocks=30, max_batch_size=2)
    for name in ("running", "flying", "ready"):
        hand_over(decode, sequence(name, 20))
    wait_for_room(decode, sequence("parked", 400, max_tokens=80))
    decode.add(sequence("prompt", 30), 0.0)
    step(decode)
    assert decode.abort("running")
    batch = start(decode)
    assert "flying" in [row.id for row in batch.sequences]
    for name in ("flying", "parked", "ready", "prompt"):
        assert decode.abort(name) and not decode.abort(name)
    progress = finish(decode, batch)
    assert not progress.sequences and not progress.finished
    load = decode.load()
    assert (load.running, load.waiting, load.blocks.free) == (0, 0, 30)
    assert not decode.abort("unknown")


def test_what_can_never_be_held_is_known_before_it_comes() -> None:
    decode = scheduler(num_blocks=4)
    assert decode.fits(64) and not decode.fits(65)
    roomy = scheduler(num_blocks=63)
    assert roomy.fits(100_000), "no sequence gets longer than the model length, 1000"


def test_load_counts_tokens_to_compute_and_context_held() -> None:
    decode = scheduler(max_batch_tokens=40)
    hand_over(decode, sequence("a", 20))
    decode.add(sequence("b", 60), 0.0)
    decode.add(sequence("c", 10), 0.0)
    step(decode)
    load = decode.load()
    assert (load.running, load.waiting) == (2, 1)
    assert (load.queued_tokens, load.context_tokens) == (21 + 10, 21 + 39)
