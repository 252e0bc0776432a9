"""Checks a request at the border, before any work: each fault is one InvalidRequest that names
the field, the reason and the remedy. What comes through can be served as it stands.

`max_tokens` beyond `max_model_len` is cut, and such a stream ends with "length", as vLLM's engine
does; a prompt that leaves no room for one token is refused.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

from ..engine.errors import InvalidRequest
from ..engine.request import Request, SamplingParams
from .proto import phasewise_pb2 as pb
from .served_model import ServedModel

MAX_SEED = 2**63 - 1
GREEDY_BELOW = 1e-5  # a temperature this low is greedy in all but rounding
LONG_TEXT = 16384  # characters; longer prompts are encoded beside the event loop
MAX_ID_CHARS = 256

N = TypeVar("N", int, float)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdmissionLimits:
    default_max_tokens: int = 16  # as OpenAI's completions
    max_n: int = 16
    max_stop: int = 16
    max_stop_chars: int = 1024
    max_stop_token_ids: int = 256
    max_logprobs: int = 20
    max_logit_bias: int = 1024
    max_slo_class_chars: int = 64  # a name of the client's own: its targets come with each request


@dataclass(frozen=True, kw_only=True, slots=True)
class Admitted:
    """A request that can be served. `timeout_s` 0: the cluster's own."""

    id: str
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    n: int
    arrival_s: float
    timeout_s: float = 0.0
    ttft_ms: float = 0.0
    tpot_ms: float = 0.0
    slo_class: str = "default"
    priority: int = 0
    cache_salt: str = ""

    def requests(self) -> list[Request]:
        """One for each of the `n` streams; the first draws as if it were alone."""
        return [
            Request(
                id=self.id,
                token_ids=self.token_ids,
                num_prompt_tokens=len(self.token_ids),
                sampling=replace(self.sampling, seed=_derived_seed(self.sampling.seed, index)),
                arrival_s=self.arrival_s,
                ttft_ms=self.ttft_ms,
                tpot_ms=self.tpot_ms,
                slo_class=self.slo_class,
                priority=self.priority,
                cache_salt=self.cache_salt,
            )
            for index in range(self.n)
        ]


class Admission:
    """The one way in, for gRPC and HTTP alike."""

    def __init__(
        self, served: ServedModel, limits: AdmissionLimits, clock: Callable[[], float]
    ) -> None:
        self.served = served
        self.limits = limits
        self._clock = clock

    async def admit(
        self, message: pb.GenerateRequest, *, add_special_tokens: bool = True
    ) -> Admitted:
        """Raises InvalidRequest."""
        arrival_s = self._clock()
        sampling = self._sampling(message)
        n = message.n if message.HasField("n") else 1
        _between("n", n, 1, self.limits.max_n)
        if n > 1 and sampling.temperature == 0:
            raise InvalidRequest(
                "n", f"{n} greedy streams would be equal", "set n to 1, or a temperature above 0"
            )
        token_ids = await self._prompt(message, add_special_tokens)
        room = self.served.max_model_len - len(token_ids)
        return Admitted(
            id=_request_id(message.request_id),
            token_ids=token_ids,
            sampling=replace(sampling, max_tokens=min(sampling.max_tokens, room)),
            n=n,
            arrival_s=arrival_s,
            timeout_s=_positive(message, "timeout_s"),
            ttft_ms=_positive(message, "ttft_ms"),
            tpot_ms=_positive(message, "tpot_ms"),
            slo_class=self._slo_class(message.slo_class),
            priority=_between("priority", message.priority, -(2**31), 2**31 - 1),
            cache_salt=_cache_salt(message.cache_salt),
        )

    async def _prompt(
        self, message: pb.GenerateRequest, add_special_tokens: bool
    ) -> tuple[int, ...]:
        if message.HasField("prompt") == bool(message.token_ids):
            both = bool(message.token_ids)
            raise InvalidRequest(
                "prompt",
                "both prompt and token_ids are given" if both else "the prompt is missing or empty",
                "give exactly one of prompt and token_ids",
            )
        field = "token_ids" if message.token_ids else "prompt"
        if message.token_ids:
            token_ids = tuple(message.token_ids)
        else:
            token_ids = await self._encode(message.prompt, add_special_tokens)
        room = self.served.max_model_len - 1
        if len(token_ids) > room:
            raise InvalidRequest(
                field,
                f"{len(token_ids)} tokens, and max_model_len is {self.served.max_model_len}",
                f"shorten it to {room} tokens, which leaves room for one",
            )
        self._check_token_ids(field, token_ids)
        return token_ids

    async def _encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        if not text:
            raise InvalidRequest("prompt", "the prompt is empty", "give at least one character")
        if len(text) < LONG_TEXT:
            token_ids = self.served.encode(text, add_special_tokens=add_special_tokens)
        else:
            token_ids = await asyncio.to_thread(
                self.served.encode, text, add_special_tokens=add_special_tokens
            )
        if not token_ids:
            raise InvalidRequest(
                "prompt", "the tokenizer makes no token of it", "give text that the model knows"
            )
        return token_ids

    def _check_token_ids(self, field: str, token_ids: Iterable[int]) -> None:
        size = self.served.vocab_size
        for at, token_id in enumerate(token_ids):
            if not 0 <= token_id < size:
                raise InvalidRequest(
                    f"{field}[{at}]",
                    f"token id {token_id} is not in the vocabulary",
                    f"use ids from 0 to {size - 1}",
                )

    def _slo_class(self, name: str) -> str:
        most = self.limits.max_slo_class_chars
        if len(name) > most or not name.isprintable():
            raise InvalidRequest(
                "slo_class",
                f"{name[:most]!r} is no name",
                f"give up to {most} printable characters",
            )
        return name or "default"

    def _sampling(self, message: pb.GenerateRequest) -> SamplingParams:
        limits = self.limits
        max_tokens = _given(message, "max_tokens", limits.default_max_tokens)
        min_tokens = _given(message, "min_tokens", 0)
        _between("max_tokens", max_tokens, 1, 2**31 - 1)
        _between("min_tokens", min_tokens, 0, 2**31 - 1)
        if min_tokens > max_tokens:
            raise InvalidRequest(
                "min_tokens",
                f"{min_tokens} is more than max_tokens, {max_tokens}",
                "lower min_tokens or raise max_tokens",
            )
        temperature = _between("temperature", _given(message, "temperature", 1.0), 0, math.inf)
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            temperature=0.0 if temperature < GREEDY_BELOW else temperature,
            top_k=max(0, _between("top_k", _given(message, "top_k", 0), -1, 2**31 - 1)),
            top_p=_between("top_p", _above(message, "top_p", 1.0), 0, 1),
            min_p=_between("min_p", _given(message, "min_p", 0.0), 0, 1),
            repetition_penalty=_above(message, "repetition_penalty", 1.0),
            presence_penalty=_between(
                "presence_penalty", _given(message, "presence_penalty", 0.0), -2, 2
            ),
            frequency_penalty=_between(
                "frequency_penalty", _given(message, "frequency_penalty", 0.0), -2, 2
            ),
            logit_bias=self._logit_bias(message),
            seed=self._seed(message),
            stop=self._stop(message),
            stop_token_ids=self._stop_token_ids(message),
            ignore_eos=message.ignore_eos,
            logprobs=_between("logprobs", message.logprobs, 0, limits.max_logprobs)
            if message.HasField("logprobs")
            else None,
        )

    def _seed(self, message: pb.GenerateRequest) -> int:
        if message.HasField("seed"):
            return _between("seed", message.seed, 0, MAX_SEED)
        return secrets.randbits(63)

    def _stop(self, message: pb.GenerateRequest) -> tuple[str, ...]:
        stop = tuple(message.stop)
        _at_most("stop", len(stop), self.limits.max_stop)
        for at, text in enumerate(stop):
            if not text:
                raise InvalidRequest(f"stop[{at}]", "the string is empty", "take it out")
            _at_most(f"stop[{at}]", len(text), self.limits.max_stop_chars, "characters")
        if stop and self.served.tokenizer is None:
            raise InvalidRequest(
                "stop",
                f"model {self.served.name!r} has no tokenizer.json to make text with",
                "use stop_token_ids",
            )
        return stop

    def _stop_token_ids(self, message: pb.GenerateRequest) -> tuple[int, ...]:
        token_ids = tuple(message.stop_token_ids)
        _at_most("stop_token_ids", len(token_ids), self.limits.max_stop_token_ids)
        self._check_token_ids("stop_token_ids", token_ids)
        return token_ids

    def _logit_bias(self, message: pb.GenerateRequest) -> dict[int, float]:
        bias = dict(message.logit_bias)
        _at_most("logit_bias", len(bias), self.limits.max_logit_bias)
        self._check_token_ids("logit_bias", bias)
        for token_id, value in bias.items():
            _between(f"logit_bias[{token_id}]", value, -100, 100)
        return bias


def _given(message: pb.GenerateRequest, field: str, default: N) -> N:
    return getattr(message, field) if message.HasField(field) else default


def _above(message: pb.GenerateRequest, field: str, default: float) -> float:
    """A finite number above 0."""
    value = _given(message, field, default)
    if not (math.isfinite(value) and value > 0):
        raise InvalidRequest(field, f"{value} is not above 0", "give a finite number above 0")
    return value


def _positive(message: pb.GenerateRequest, field: str) -> float:
    """As `_above`, or 0 where the field is left out."""
    return _above(message, field, 1.0) if message.HasField(field) else 0.0


def _between(field: str, value: N, low: float, high: float) -> N:
    if not low <= value <= high or math.isinf(value):  # NaN is between nothing
        bounds = f"from {low} to {high}" if math.isfinite(high) else f"of at least {low}"
        raise InvalidRequest(field, f"{value} is out of range", f"give a number {bounds}")
    return value


def _at_most(field: str, size: int, limit: int, unit: str = "entries") -> None:
    if size > limit:
        raise InvalidRequest(field, f"{size} {unit}", f"give at most {limit} {unit}")


def _cache_salt(given: str) -> str:
    _at_most("cache_salt", len(given), MAX_ID_CHARS, "characters")
    return given


def _request_id(given: str) -> str:
    if not given:
        return uuid.uuid4().hex
    if len(given) > MAX_ID_CHARS or not given.isprintable():
        raise InvalidRequest(
            "request_id",
            f"{len(given)} characters, or some that do not print",
            f"give at most {MAX_ID_CHARS} printable characters, or leave it out",
        )
    return given


def _derived_seed(seed: int, index: int) -> int:
    """Splitmix64 (Steele, Lea, Flood 2014) over (seed, index); index 0 keeps the seed."""
    if index == 0:
        return seed
    mixed = (seed + index * 0x9E3779B97F4A7C15) % 2**64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % 2**64
    return (mixed ^ (mixed >> 31)) >> 1
