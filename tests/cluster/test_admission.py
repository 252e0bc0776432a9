"""Every bad request is refused at the border, with its field and a remedy."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
from phasewise.cluster.admission import Admission, AdmissionLimits, Admitted
from phasewise.cluster.proto import phasewise_pb2 as pb
from phasewise.cluster.served_model import ServedModel
from phasewise.engine.errors import InvalidRequest

SERVED = ServedModel(name="m", vocab_size=100, max_model_len=32)


def admit(**fields: Any) -> Admitted:
    fields = {"token_ids": [1, 2], **fields}
    admission = Admission(SERVED, AdmissionLimits(), clock=lambda: 5.0)
    return asyncio.run(admission.admit(pb.GenerateRequest(**fields)))


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("prompt", {"token_ids": []}),
        ("prompt", {"token_ids": [], "prompt": ""}),
        ("prompt", {"prompt": "both"}),
        ("prompt", {"token_ids": [], "prompt": "no tokenizer here"}),
        ("token_ids[1]", {"token_ids": [1, 100]}),
        ("token_ids[0]", {"token_ids": [-1]}),
        ("token_ids", {"token_ids": [1] * 32}),
        ("token_ids", {"token_ids": [1] * 1_000_000}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": -3}),
        ("min_tokens", {"min_tokens": -1}),
        ("min_tokens", {"min_tokens": 5, "max_tokens": 4}),
        ("min_tokens", {"min_tokens": 17}),
        ("temperature", {"temperature": -0.1}),
        ("temperature", {"temperature": math.nan}),
        ("temperature", {"temperature": math.inf}),
        ("top_p", {"top_p": 0.0}),
        ("top_p", {"top_p": 1.1}),
        ("top_p", {"top_p": math.nan}),
        ("top_k", {"top_k": -2}),
        ("min_p", {"min_p": -0.1}),
        ("min_p", {"min_p": 1.5}),
        ("repetition_penalty", {"repetition_penalty": 0.0}),
        ("repetition_penalty", {"repetition_penalty": math.inf}),
        ("presence_penalty", {"presence_penalty": 2.1}),
        ("frequency_penalty", {"frequency_penalty": -2.1}),
        ("seed", {"seed": -1}),
        ("stop", {"stop": ["a"]}),
        ("stop", {"stop": ["a"] * 17}),
        ("stop[0]", {"stop": [""]}),
        ("stop[0]", {"stop": ["a" * 2000]}),
        ("stop_token_ids[0]", {"stop_token_ids": [100]}),
        ("stop_token_ids", {"stop_token_ids": [1] * 257}),
        ("logit_bias[0]", {"logit_bias": {-5: 1.0}}),
        ("logit_bias[7]", {"logit_bias": {7: 101.0}}),
        ("logit_bias[7]", {"logit_bias": {7: math.nan}}),
        ("logprobs", {"logprobs": 21}),
        ("logprobs", {"logprobs": -1}),
        ("n", {"n": 0}),
        ("n", {"n": 17}),
        ("n", {"n": 2, "temperature": 0.0}),
        ("priority", {"priority": 2**40}),
        ("ttft_ms", {"ttft_ms": 0.0}),
        ("tpot_ms", {"tpot_ms": -1.0}),
        ("timeout_s", {"timeout_s": 0.0}),
        ("slo_class", {"slo_class": "a" * 65}),
        ("slo_class", {"slo_class": "a\nb"}),
        ("request_id", {"request_id": "a\nb"}),
        ("request_id", {"request_id": "a" * 300}),
    ],
)
def test_bad_request_is_refused_by_the_name_of_its_field(
    field: str, fields: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        admit(**fields)
    assert caught.value.field == field
    assert caught.value.reason and caught.value.remedy


def test_what_is_left_out_takes_the_defaults_of_the_field() -> None:
    admitted = admit()
    sampling = admitted.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (16, 1.0, 1.0)
    assert (sampling.top_k, sampling.logprobs, admitted.n) == (0, None, 1)
    assert admitted.id and admitted.arrival_s == 5.0
    assert admit().sampling.seed != sampling.seed


def test_bounds_themselves_are_allowed() -> None:
    admitted = admit(
        token_ids=[0, 99] + [1] * 29,
        top_p=1.0,
        top_k=-1,
        min_p=1.0,
        temperature=0.0,
        seed=0,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        logprobs=0,
        min_tokens=16,
        priority=-3,
        slo_class="of the client's own",
    )
    assert admitted.slo_class == "of the client's own"
    assert admitted.sampling.logprobs == 0 and admitted.sampling.top_k == 0
    assert admitted.priority == -3


def test_max_tokens_beyond_the_model_is_cut_to_the_room() -> None:
    assert admit(token_ids=[1] * 30, max_tokens=1000).sampling.max_tokens == 2


def test_streams_of_one_request_draw_differently_and_repeatably() -> None:
    first, again = ([r.sampling.seed for r in admit(n=4, seed=9).requests()] for _ in range(2))
    assert first == again and first[0] == 9 and len(set(first)) == 4
