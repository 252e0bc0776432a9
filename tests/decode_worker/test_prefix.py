"""The decode policy with a prefix cache, one example each."""

from __future__ import annotations

from phasewise.decode_worker.scheduler import DecodeLimits, DecodeScheduler
from phasewise.engine.batch import Batch, StepOutput
from phasewise.engine.blocks import BlockAllocator
from phasewise.engine.request import Request, SamplingParams
from phasewise.engine.sequence import Sequence

SHARED = list(range(100, 132))  # two blocks


def sequence(name: str, tokens: list[int], max_tokens: int = 40) -> Sequence:
    return Sequence(
        Request(
            id=name,
            token_ids=tuple(tokens),
            num_prompt_tokens=len(tokens),
            sampling=SamplingParams(max_tokens=max_tokens),
        )
    )


def scheduler(num_blocks: int = 50) -> DecodeScheduler:
    limits = DecodeLimits(max_batch_size=8, max_batch_tokens=128, max_model_len=500)
    return DecodeScheduler(BlockAllocator(num_blocks, 16, prefix_cache=True), limits)


def step(decode: DecodeScheduler, token_id: int = 7) -> Batch:
    batch = decode.next_batch(0.0)
    assert batch is not None
    token_ids = [token_id if batch.samples(row) else -1 for row in range(batch.num_rows)]
    decode.advance(batch, StepOutput(token_ids=token_ids), 0.0)
    decode.check()
    return batch


def pushed(decode: DecodeScheduler, handed: Sequence) -> tuple[int, int]:
    """As after a push; how many blocks were here, and how many were granted."""
    hashes = decode.prefix.shareable(handed, handed.num_tokens)
    room = decode.lease_behind(decode._allocator.blocks_for(handed.num_tokens), hashes)
    assert room is not None
    here, blocks = room
    decode.check()
    handed.append(7)
    handed.blocks = here
    decode.resume(handed, blocks, 0.0)
    decode.check()
    return len(here), len(blocks)


def test_an_answers_blocks_are_found_by_the_next_turn() -> None:
    decode = scheduler()
    first = sequence("first", [*SHARED, 1, 2], max_tokens=31)
    assert pushed(decode, first) == (0, 3)
    while first.blocks:
        step(decode)
    assert first.tokens is not None and decode.load().blocks.cached == 4
    again = sequence("again", [*first.tokens, 3, 4])
    assert pushed(decode, again) == (4, 1)


def test_only_the_missing_blocks_are_granted_and_at_least_one() -> None:
    decode = scheduler()
    assert pushed(decode, sequence("a", [*SHARED, 1])) == (0, 3)
    assert pushed(decode, sequence("b", [*SHARED, 2])) == (2, 1)
    assert pushed(decode, sequence("c", list(SHARED))) == (1, 1)
    assert decode.load().blocks.active == 4, "what came twice stands in one place"


def test_a_grant_that_fails_lets_go_of_what_it_found() -> None:
    decode = scheduler()
    done = sequence("a", [*SHARED, 1])
    pushed(decode, done)
    decode.abort("a")
    hashes = decode.prefix.shareable(sequence("b", [*SHARED, 2]), 33)
    room = decode.lease_behind(3, hashes)
    assert room is not None and decode.load().blocks.active == 2
    decode.unlease(room[1])
    decode.unhold(room[0])
    decode.check()
    assert decode.load().blocks.active == 0 and decode.load().blocks.cached == 2


def test_parked_kv_is_fetched_without_what_is_here() -> None:
    decode = scheduler()
    pushed(decode, sequence("a", [*SHARED, 1]))
    parked = sequence("b", [*SHARED, 2])
    parked.append(7)
    decode.wait_for_room(parked, 0.0)
    ((found, blocks),) = decode.next_fetches(0.0)
    assert found is parked and len(parked.blocks) == 2 and len(blocks) == 1
    decode.check()
    assert decode.abort("b")
    decode.unlease(blocks)
    decode.check()


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    decode = scheduler(num_blocks=8)
    for name in "ab":
        decode.add(sequence(name, [ord(name)] * 40, max_tokens=60), 0.0)
    while not decode.load().preemptions:
        step(decode)
    while decode.load().waiting or decode.load().running:
        batch = step(decode)
        if any(count > 1 for count in batch.counts):
            assert min(batch.starts) >= 16, "it goes on behind what is still cached"
    assert decode.load().hit_tokens > 0


def test_prompts_computed_here_share_a_prefix_once() -> None:
    decode = scheduler()
    for name in "abc":
        decode.add(sequence(name, [*SHARED, ord(name)]), 0.0)
    assert [s.id for s in step(decode).sequences] == ["a"]
    batch = step(decode)
    assert [s.id for s in batch.sequences] == ["a", "b", "c"]
    assert batch.starts == [33, 32, 32]
