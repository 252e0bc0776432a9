"""What a client reads: pieces of a stream, the same in the gateway and in the client."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..engine.request import TokenLogprobs


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # of the prompt: its first worker had them in its prefix cache

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """Where a request's time went. Times of the last attempt, where it moved between workers."""

    queue_ms: float = 0.0  # in the worker, until the first chunk
    prefill_ms: float = 0.0  # from the first chunk to the first token
    transfer_ms: float = 0.0  # decode: from resume until the KV was there
    ttft_ms: float = 0.0  # from arrival at the gateway to the first token
    tpot_ms: float = 0.0  # mean over the tokens after the first
    e2e_ms: float = 0.0
    workers: tuple[str, ...] = ()  # in the order they served
    failovers: int = 0
    preemptions: int = 0
    local_prefill: bool = False  # the prompt was computed on the decode worker


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """Tokens of one stream since its last piece. `text` holds whole characters only and may
    trail behind `token_ids`. The last piece of a stream has a finish reason."""

    request_id: str
    index: int = 0
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = field(default=())
    finish_reason: str | None = None
    usage: Usage | None = None
    timings: Timings | None = None
