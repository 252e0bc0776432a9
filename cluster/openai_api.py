"""OpenAI's JSON and this project's messages: bodies in, choices and errors out.

A key that is not known is refused rather than ignored, with the nearest known one: a misspelt
`temprature` must not silently sample at 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..engine.errors import InvalidRequest, Overloaded, PhasewiseError, Unavailable
from ..engine.request import TokenLogprobs
from .error_status import http_code
from .output import Output, Timings, Usage
from .proto import phasewise_pb2 as pb
from .served_model import ServedModel

SCALARS: dict[str, type] = {
    **dict.fromkeys(("max_tokens", "min_tokens", "top_k", "seed", "n", "priority"), int),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), float),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), float),
    **dict.fromkeys(("ttft_ms", "tpot_ms", "timeout_s"), float),
    **dict.fromkeys(("slo_class", "request_id", "cache_salt"), str),
    "ignore_eos": bool,
}
BOTH = {*SCALARS, "stop", "stop_token_ids", "logit_bias", "logprobs", "model", "return_token_ids"}
BOTH |= {"stream", "stream_options"}
COMPLETION = BOTH | {"prompt"}
CHAT = BOTH | {"messages", "max_completion_tokens", "top_logprobs"}
# Sent by common clients with the value that means "off", or without any effect on tokens.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
}
IGNORED = {"user", "metadata", "store"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A body that was understood, up to its prompt."""

    message: pb.GenerateRequest
    body: Mapping[str, Any]
    chat: bool
    stream: bool
    include_usage: bool
    return_token_ids: bool


def parse(body: Any, served: ServedModel, *, chat: bool) -> Call:
    """Everything but the prompt. Raises InvalidRequest."""
    if not isinstance(body, dict):
        raise InvalidRequest("body", "not a JSON object", "send one")
    body = {key: value for key, value in body.items() if value is not None}
    _check_keys(body, CHAT if chat else COMPLETION)
    if body.get("model", served.name) != served.name:
        raise InvalidRequest(
            "model", f"{body['model']!r} is not served here", f"use {served.name!r}"
        )
    message = pb.GenerateRequest()
    for field, kind in SCALARS.items():
        if field in body:
            _put(message, field, body[field], kind)
    if "max_completion_tokens" in body:
        _put(message, "max_tokens", body["max_completion_tokens"], int, "max_completion_tokens")
    _put_lists(message, body)
    _put_logprobs(message, body, chat)
    options = body.get("stream_options", {})
    if not isinstance(options, dict) or not isinstance(options.get("include_usage", False), bool):
        raise InvalidRequest("stream_options", "not understood", 'give {"include_usage": true}')
    return Call(
        message=message,
        body=body,
        chat=chat,
        stream=_flag(body, "stream"),
        include_usage=options.get("include_usage", False),
        return_token_ids=_flag(body, "return_token_ids"),
    )


def put_prompt(message: pb.GenerateRequest, prompt: Any) -> None:
    """Text, token ids, or a list of one of them. Raises InvalidRequest."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        message.prompt = prompt
    elif isinstance(prompt, list) and all(_is_int64(i) for i in prompt):
        message.token_ids.extend(prompt)
    elif prompt is not None:
        raise InvalidRequest(
            "prompt", "neither text nor token ids", "send one prompt a request, or n above 1"
        )


def choice(output: Output, call: Call, served: ServedModel, *, first: bool) -> dict[str, Any]:
    """A piece of a stream, or all of it, as one entry of `choices`."""
    entry: dict[str, Any] = {"index": output.index, "finish_reason": output.finish_reason}
    entry["logprobs"] = _logprobs(output, served, call.chat) if output.logprobs else None
    if call.return_token_ids:
        entry["token_ids"] = output.token_ids
    if not call.chat:
        entry["text"] = output.text
    elif call.stream:
        entry["delta"] = {"role": "assistant"} if first else {}
        entry["delta"]["content"] = output.text
    else:
        entry["message"] = {"role": "assistant", "content": output.text}
    return entry


def usage(usages: list[Usage]) -> dict[str, Any]:
    """Of all streams of one request; the prompt counts once."""
    prompt = usages[0].prompt_tokens if usages else 0
    completion = sum(u.completion_tokens for u in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": usages[0].cached_tokens if usages else 0},
    }


def timings(value: Timings) -> dict[str, Any]:
    return asdict(value)


def error_body(error: PhasewiseError) -> dict[str, Any]:
    """OpenAI's form; `code` is the HTTP code, also where a stream has begun with 200."""
    return {
        "error": {
            "message": str(error),
            "type": type(error).__name__,
            "param": error.field if isinstance(error, InvalidRequest) else None,
            "code": http_code(error),
        }
    }


def error_headers(error: PhasewiseError) -> dict[str, str]:
    if isinstance(error, Overloaded | Unavailable):
        return {"Retry-After": f"{max(1.0, error.retry_after_s):.0f}"}
    return {}


def _check_keys(body: dict[str, Any], known: set[str]) -> None:
    for key, value in body.items():
        if key in known or key in IGNORED or value in NEUTRAL.get(key, ()):
            continue
        if key in NEUTRAL:
            raise InvalidRequest(key, f"{value!r} is not supported", "leave it out")
        nearest = difflib.get_close_matches(key, known, n=1)
        remedy = f"did you mean {nearest[0]}?" if nearest else "leave it out"
        raise InvalidRequest(key, "no such parameter", remedy)


def _put(
    message: pb.GenerateRequest, field: str, value: Any, kind: type, said: str | None = None
) -> None:
    """JSON has one kind of number: 1 is a float too, and true is none."""
    fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if kind is int:
        fits = _is_int64(value)
    if not fits or (isinstance(value, bool) and kind is not bool):
        name = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
        raise InvalidRequest(said or field, f"{value!r} is of the wrong type", f"give {name[kind]}")
    try:
        setattr(message, field, value)
    except OverflowError as error:
        raise InvalidRequest(said or field, "beyond all numbers", "give a smaller one") from error


def _put_lists(message: pb.GenerateRequest, body: dict[str, Any]) -> None:
    stop = body.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(s, str) for s in stop):
        raise InvalidRequest("stop", "neither a string nor a list of strings", "give one of them")
    message.stop.extend(stop)
    ids = body.get("stop_token_ids", [])
    if not isinstance(ids, list) or not all(_is_int64(i) for i in ids):
        raise InvalidRequest("stop_token_ids", "not a list of token ids", "give whole numbers")
    message.stop_token_ids.extend(ids)
    try:
        for key, value in dict(body.get("logit_bias", {})).items():
            message.logit_bias[int(key)] = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(
            "logit_bias", f"not understood ({error})", 'give {"token id": bias}'
        ) from error


def _put_logprobs(message: pb.GenerateRequest, body: dict[str, Any], chat: bool) -> None:
    """Completions take a number; chat takes true and, beside it, `top_logprobs`."""
    if not chat:
        if "logprobs" in body:
            _put(message, "logprobs", body["logprobs"], int)
    elif _flag(body, "logprobs"):
        _put(message, "logprobs", body.get("top_logprobs", 0), int, "top_logprobs")
    elif body.get("top_logprobs"):
        raise InvalidRequest("top_logprobs", "given without logprobs", "set logprobs to true")


def _flag(body: Mapping[str, Any], key: str) -> bool:
    value = body.get(key, False)
    if not isinstance(value, bool):
        raise InvalidRequest(key, f"{value!r} is of the wrong type", "give true or false")
    return value


def _is_int64(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _logprobs(output: Output, served: ServedModel, chat: bool) -> dict[str, Any]:
    rows = list(zip(output.token_ids, output.logprobs, strict=True))
    tokens = [served.text(token_id) for token_id, _ in rows]
    if chat:
        return {
            "content": [
                {**_token(token, row.sampled), "top_logprobs": _top(row, served)}
                for token, (_, row) in zip(tokens, rows, strict=True)
            ]
        }
    return {
        "tokens": tokens,
        "token_logprobs": [row.sampled for _, row in rows],
        "top_logprobs": [
            {entry["token"]: entry["logprob"] for entry in _top(row, served)} for _, row in rows
        ],
    }


def _top(row: TokenLogprobs, served: ServedModel) -> list[dict[str, Any]]:
    return [
        _token(served.text(token_id), value)
        for token_id, value in zip(row.top_ids, row.top, strict=True)
    ]


def _token(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}
