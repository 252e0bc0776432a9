"""The next token is a function of logits, tokens and (seed, position), and of nothing else."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phasewise.engine.request import Request, SamplingParams, TokenLogprobs
from phasewise.engine.sampler import BrokenLogits, Sampler
from phasewise.engine.sequence import Sequence
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

VOCAB = 101
EOS = 100


def sequence(
    prompt: list[int] | None = None, output: list[int] | None = None, **sampling: Any
) -> Sequence:
    prompt, output = prompt or [1, 2, 3], output or []
    return Sequence(
        Request(
            id="r",
            token_ids=(*prompt, *output),
            num_prompt_tokens=len(prompt),
            sampling=SamplingParams(**sampling),
        )
    )


def random_logits(rows: int, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def sample(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    return Sampler(logits.shape[1], frozenset({EOS})).sample(logits.clone(), sequences)[0]


class Operations(TorchDispatchMode):
    """Records every operator that runs, with the shape of its first tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        shape = tuple(args[0].shape) if args and isinstance(args[0], Tensor) else ()
        self.seen.append((func.overloadpacket.__name__, shape))
        return func(*args, **(kwargs or {}))


def test_a_plain_greedy_batch_is_one_argmax() -> None:
    logits = random_logits(5)
    expected = logits.argmax(dim=1).tolist()
    sampler = Sampler(VOCAB, frozenset({EOS}))
    with Operations() as operations:
        token_ids, logprobs = sampler.sample(logits, [sequence(temperature=0)] * 5)
    assert token_ids == expected
    assert logprobs is None
    over_the_vocabulary = [name for name, shape in operations.seen if shape == (5, VOCAB)]
    # NumPy's argmax reads them where they lie; torch only hands them over.
    views = {"detach", "resolve_conj", "resolve_neg", "to"}
    assert set(over_the_vocabulary) <= views


def test_in_a_mixed_batch_only_the_rows_that_draw_are_worked_on() -> None:
    sequences = [sequence(temperature=0) for _ in range(6)]
    sequences[4] = sequence(temperature=1.0, top_p=0.9)
    logits = random_logits(6)
    with Operations() as operations:
        Sampler(VOCAB, frozenset()).sample(logits, sequences)
    whole = {name for name, shape in operations.seen if shape == (6, VOCAB)}
    assert whole == {"argmax", "gather", "index_select"}
    assert ("exp_", (1, VOCAB)) in operations.seen


def test_logits_made_in_inference_mode_can_be_edited() -> None:
    with torch.inference_mode():
        logits = random_logits(1)
    seq = sequence(temperature=0, logit_bias={33: 99.0})
    assert Sampler(VOCAB, frozenset()).sample(logits, [seq])[0] == [33]


def test_no_rows_give_no_tokens() -> None:
    assert Sampler(VOCAB, frozenset()).sample(torch.empty(0, VOCAB), []) == ([], None)


@pytest.mark.parametrize("top_k", [VOCAB, VOCAB + 1, 10**6])
def test_a_top_k_of_the_whole_vocabulary_keeps_all(top_k: int) -> None:
    logits = random_logits(20)
    free = [sequence(seed=i) for i in range(20)]
    bound = [sequence(seed=i, top_k=top_k) for i in range(20)]
    assert sample(logits, free) == sample(logits, bound)


def edited(logits: Tensor, seq: Sequence, *, eos: frozenset[int] = frozenset({EOS})) -> np.ndarray:
    """The logits of one greedy row after all edits, as the sampler leaves them."""
    own = logits.clone()
    Sampler(logits.shape[1], eos).sample(own, [seq])
    return own.numpy()[0]


def test_edits_come_in_the_order_bias_then_suppression_then_penalties() -> None:
    logits = random_logits(1)
    seq = sequence(
        [1, 2, 3],
        [3, 4, 4],
        temperature=0,
        min_tokens=9,
        stop_token_ids=(7,),
        logit_bias={4: 5.0, 7: 50.0, 9: -5.0},
        repetition_penalty=1.5,
        frequency_penalty=0.25,
        presence_penalty=0.5,
    )
    expected = logits.numpy()[0].copy()
    for token, bias in {4: 5.0, 7: 50.0, 9: -5.0}.items():
        expected[token] += bias
    expected[[7, EOS]] = -np.inf
    for token in (1, 2, 3, 4):
        expected[token] *= 1.5 if expected[token] < 0 else 1 / 1.5
    expected[3] -= 0.25 + 0.5
    expected[4] -= 2 * 0.25 + 0.5
    np.testing.assert_allclose(edited(logits, seq), expected, rtol=1e-6)


def test_stops_are_impossible_until_min_tokens_are_there() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS], logits[0, 7] = 9.0, 8.0
    stops: dict[str, Any] = {"temperature": 0, "min_tokens": 2, "stop_token_ids": (7,)}
    for num_output, expected in [(0, [EOS, 7]), (1, [EOS, 7]), (2, [])]:
        row = edited(logits, sequence(output=[5] * num_output, **stops))
        assert sorted(np.flatnonzero(np.isinf(row))) == sorted(expected)


def test_an_ignored_end_of_sequence_stays_possible_under_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    seq = sequence(temperature=0, min_tokens=5, ignore_eos=True, stop_token_ids=(7,))
    assert np.flatnonzero(np.isinf(edited(logits, seq))).tolist() == [7]


def test_a_stop_id_outside_the_vocabulary_is_no_matter() -> None:
    seq = sequence(temperature=0, min_tokens=5, stop_token_ids=(VOCAB + 3,))
    assert np.isfinite(edited(torch.zeros(1, VOCAB), seq, eos=frozenset({VOCAB}))).all()


def test_penalties_follow_the_stream_as_it_grows() -> None:
    sampler, seq = Sampler(VOCAB, frozenset()), sequence(temperature=0, frequency_penalty=1.0)
    logits = torch.zeros(1, VOCAB)
    logits[0, 50], logits[0, 60] = 2.5, 1.0
    stream = []
    for _ in range(5):
        (token,), _ = sampler.sample(logits.clone(), [seq])
        seq.append(token)
        stream.append(token)
    # 50 stands at 2.5, 1.5, then 0.5; 60 at 1.0, then 0.0
    assert stream == [50, 50, 60, 50, 0]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"top_k": 8, "top_p": 0.9, "temperature": 1.5},
        {"logit_bias": {2: 2.0}, "presence_penalty": 1.0},
    ],
)
def test_tokens_come_with_their_probability(params: dict) -> None:
    vocab, rows, rounds = 12, 1000, 10
    logits = random_logits(1, vocab, seed=3)
    sampler = Sampler(vocab, frozenset())
    counts = np.zeros(vocab)
    for start in range(rounds):
        batch = [sequence(output=[2] * start, seed=i, **params) for i in range(rows)]
        token_ids, _ = sampler.sample(logits.repeat(rows, 1), batch)
        counts += np.bincount(token_ids, minlength=vocab)
        if "presence_penalty" in params:
            break  # beyond the first round the distribution is another
    expected = reference_probabilities(logits.numpy()[0].astype(np.float64), params)
    assert not counts[expected == 0].any()
    kept = expected > 0
    assert stats.chisquare(counts[kept], expected[kept] * counts.sum()).pvalue > 1e-3


def reference_probabilities(logits: np.ndarray, params: dict) -> np.ndarray:
    for token, bias in params.get("logit_bias", {}).items():
        logits[token] += bias
    weights = np.exp((logits - logits.max()) / params.get("temperature", 1.0))
    weights[weights < params.get("min_p", 0.0)] = 0
    order = np.argsort(-weights)
    weights[order[params.get("top_k") or len(order) :]] = 0
    above = np.cumsum(weights[order]) - weights[order]
    weights[order[above >= params.get("top_p", 1.0) * weights.sum()]] = 0
    return weights / weights.sum()


params_strategy = st.fixed_dictionaries(
    {"seed": st.integers(0, 2**64 - 1), "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0])},
    optional={
        "top_k": st.integers(1, VOCAB + 5),
        "top_p": st.floats(0.01, 1),
        "min_p": st.floats(0, 1),
        "repetition_penalty": st.floats(0.5, 2),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=4),
        "min_tokens": st.integers(0, 6),
        "stop_token_ids": st.lists(st.integers(0, VOCAB - 1), max_size=3).map(tuple),
        "ignore_eos": st.booleans(),
        "logprobs": st.integers(0, 5),
    },
)
rows_strategy = st.lists(
    st.tuples(params_strategy, st.lists(st.integers(0, VOCAB - 1), max_size=8)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(rows_strategy, st.integers(0, 1000))
def test_a_row_gives_the_same_token_alone_and_in_any_batch(rows: list, seed: int) -> None:
    logits = random_logits(len(rows), seed=seed)
    sequences = [sequence(output=output, **params) for params, output in rows]
    together, told = Sampler(VOCAB, frozenset({EOS})).sample(logits.clone(), sequences)
    backwards = sample(logits.flip(0), sequences[::-1])[::-1]
    assert backwards == together
    for i, seq in enumerate(sequences):
        own = Sampler(VOCAB, frozenset({EOS}))
        (alone,), told_alone = own.sample(logits[i : i + 1].clone(), [seq])
        assert alone == together[i]
        assert (told[i] if told else None) == (told_alone[0] if told_alone else None)


@settings(max_examples=40, deadline=None)
@given(params_strategy, st.integers(0, 1000), st.integers(1, 9))
def test_a_stream_continued_elsewhere_is_the_same_stream(
    params: dict, seed: int, moved_at: int
) -> None:
    steps = [random_logits(1, seed=seed * 16 + i) for i in range(10)]
    home, stream = Sampler(VOCAB, frozenset({EOS})), sequence([5, 6], **params)
    output = []
    for logits in steps:
        (token,), _ = home.sample(logits.clone(), [stream])
        stream.append(token)
        output.append(token)

    elsewhere = Sampler(VOCAB, frozenset({EOS}))
    moved = sequence([5, 6], output[:moved_at], **params)
    for logits, expected in zip(steps[moved_at:], output[moved_at:], strict=True):
        (token,), _ = elsewhere.sample(logits.clone(), [moved])
        assert token == expected
        moved.append(token)


def test_the_number_of_threads_does_not_change_a_token() -> None:
    logits = random_logits(16, 32_003, seed=1)
    batch = [sequence(seed=i, top_p=0.95 if i % 2 else 1.0) for i in range(16)]
    before = torch.get_num_threads()
    try:
        tokens = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            tokens.append(sample(logits, batch))
    finally:
        torch.set_num_threads(before)
    assert tokens[0] == tokens[1]


def test_large_batches_worked_on_in_parts_give_the_rows_their_own_tokens() -> None:
    vocab = 1 << 16  # four rows a part
    logits = random_logits(11, vocab, seed=2)
    batch = [sequence(seed=i, top_k=40 if i % 3 else 0) for i in range(11)]
    alone = [sample(logits[i : i + 1], [seq])[0] for i, seq in enumerate(batch)]
    assert sample(logits, batch) == alone


def test_logprobs_are_those_of_the_model_whatever_the_sampling() -> None:
    logits = random_logits(3)
    raw = logits.double().log_softmax(dim=1)
    batch = [
        sequence(temperature=0),
        sequence(logprobs=4, temperature=0.5, top_k=3, logit_bias={8: 9.0}, repetition_penalty=2),
        sequence(logprobs=0, seed=5),
    ]
    token_ids, told = Sampler(VOCAB, frozenset({EOS})).sample(logits, batch)
    assert told is not None
    assert told[0] is None
    full, bare = told[1], told[2]
    assert isinstance(full, TokenLogprobs)
    assert isinstance(bare, TokenLogprobs)
    assert full.sampled == pytest.approx(raw[1, token_ids[1]].item(), abs=1e-5)
    assert full.top_ids == tuple(raw[1].topk(4).indices.tolist())
    assert full.top == pytest.approx(raw[1].topk(4).values.tolist(), abs=1e-5)
    assert bare == TokenLogprobs(sampled=pytest.approx(raw[2, token_ids[2]].item(), abs=1e-5))


def test_more_alternatives_than_tokens_are_all_tokens() -> None:
    _, told = Sampler(4, frozenset()).sample(random_logits(1, 4), [sequence(logprobs=20)])
    assert told is not None
    assert told[0] is not None
    assert sorted(told[0].top_ids) == [0, 1, 2, 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "all -inf"])
@pytest.mark.parametrize(
    "params",
    [{"temperature": 0}, {}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.5}],
)
def test_logits_without_a_finite_maximum_are_an_error_that_names_the_stream(
    value: float | str, params: dict
) -> None:
    logits = random_logits(3)
    if isinstance(value, str):
        logits[1] = -torch.inf
    else:
        logits[1, 17] = value
    batch = [sequence(temperature=0), sequence(**params), sequence()]
    batch[1].id = "the broken one"
    with pytest.raises(BrokenLogits, match="the broken one at position 3.*checkpoint") as caught:
        sample(logits, batch)
    assert caught.value.sequence_ids == ["the broken one"]


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((200, VOCAB), -torch.inf)
    logits[:, 11] = 0.0
    logits[:, 12] = 0.0
    assert set(sample(logits, [sequence(seed=i, temperature=5.0) for i in range(200)])) == {11, 12}


def test_a_sequence_that_ended_leaves_nothing_behind() -> None:
    sampler = Sampler(VOCAB, frozenset({EOS}))
    seq = sequence(repetition_penalty=1.2)
    sampler.sample(random_logits(1), [seq])
    gone = weakref.ref(seq)
    del seq
    gc.collect()
    assert gone() is None
    assert not sampler._plans


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
        {"logit_bias": {3: 1.0}},
        {"min_tokens": 2},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"logprobs": 0},
    ],
    ids=str,
)
def test_a_plain_draw_is_what_a_device_can_make_without_the_host(asked: dict[str, Any]) -> None:
    one = sequence(**asked)
    drawn = Sampler(VOCAB, frozenset({EOS})).draw_of(one)
    assert one.request.sampling.is_plain_draw == (drawn is not None)


def test_a_token_is_drawn_for_the_position_that_is_given() -> None:
    """A step may run before its sequence was told the token before."""
    logits, known = random_logits(1), sequence(temperature=1.0, seed=3)
    for _ in range(20):
        (expected,), _ = Sampler(VOCAB, frozenset()).sample(logits.clone(), [known])
        (token,), _ = Sampler(VOCAB, frozenset()).sample(
            logits.clone(), [sequence(temperature=1.0, seed=3)], [known.num_tokens]
        )
        assert token == expected
        known.append(7)
