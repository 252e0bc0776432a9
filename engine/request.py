"""What a request is, from the front door to the last token. Knows neither torch nor ray.

Everything here is frozen: it crosses process borders. What changes while a request is served
lives in `engine.sequence.Sequence`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


class FinishReason(enum.StrEnum):
    """Why a stream ended well. Every other end is a typed error (`engine.errors`)."""

    STOP = "stop"  # end-of-sequence token, a stop token id or a stop string
    LENGTH = "length"  # max_tokens or max_model_len reached


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the next token is chosen. Names and defaults are those of the OpenAI API and vLLM.

    `temperature` 0 is greedy. `seed` is always set by the front door, so that a stream that
    moves to another worker goes on with the same draws: the generator is keyed by
    (seed, position). `stop` strings are matched where text is made, in the front door.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; k: the sampled token's and the k most likely

    @property
    def is_plain_draw(self) -> bool:
        """Whether a token hangs on its own logits alone, and nothing is asked for beside it:
        then a device goes on by itself, and nobody needs the token before to prepare the step."""
        return (
            self.logprobs is None
            and not self.min_tokens
            and not self.logit_bias
            and self.repetition_penalty == 1
            and not self.presence_penalty
            and not self.frequency_penalty
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerId:
    """Who a worker is. A restarted worker has a new incarnation and is a new peer (law 5)."""

    name: str  # "prefill-0"
    incarnation: int

    def __str__(self) -> str:
        return f"{self.name}#{self.incarnation}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One stream of tokens to produce.

    `token_ids` is the prompt, followed by what was already delivered when the request comes
    back after a failover or preemption; the first `num_prompt_tokens` are the client's own.
    Positions, penalties, `max_tokens` and the sampling generator count from there, so a
    continued stream is the same stream. Times are seconds on the receiving process's clock.
    """

    id: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    sampling: SamplingParams
    arrival_s: float = 0.0
    ttft_ms: float = 0.0  # target for the first token, 0: the cluster's own
    tpot_ms: float = 0.0  # target per output token, 0: the cluster's own
    slo_class: str = "default"
    priority: int = 0  # smaller is served first, as in vLLM
    cache_salt: str = ""  # KV is shared only among requests with the same one

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens already delivered before this worker saw the request."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def max_total_tokens(self) -> int:
        """Length at which the stream ends for `length`."""
        return self.num_prompt_tokens + self.sampling.max_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """Natural log-probabilities of one position, as the model itself gave them.

    That is before logit_bias, penalties, temperature and filters, which is what OpenAI's API and
    vLLM (`raw_logprobs`) answer with. `top_ids` are the most likely tokens in falling order.
    """

    sampled: float
    top_ids: tuple[int, ...] = ()
    top: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferAddress:
    """Where a worker's KV endpoint listens; `kv_transfer` chooses a way to it."""

    worker: WorkerId
    host_id: str  # equal on two workers that can share memory (boot id)
    shm: str  # abstract unix socket name, "" where shared memory is off
    tcp: str  # "host:port"
    ranks: tuple[TransferAddress, ...] = ()  # of the worker's ranks above 0, each its own endpoint
    holds: tuple[int, ...] = ()  # layers from, up to, KV heads from, up to: what this rank holds


@dataclass(frozen=True, kw_only=True, slots=True)
class Handoff:
    """All that decode needs to go on where prefill stopped.

    `lease` names the transfer of this request's KV. With `granted`, decode gave blocks before
    prefill finished and the KV is on its way or there; without, it waits in the prefill pool
    and decode fetches it under the same lease when it has room.
    """

    request: Request
    first_token: int
    first_logprobs: TokenLogprobs | None
    lease: int
    granted: bool
    source: TransferAddress
    queue_s: float  # waiting for the first chunk to be scheduled
    prefill_s: float  # from the first chunk to the first token
    cached_tokens: int = 0  # of the prompt, found in the prefix cache
