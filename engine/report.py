"""What a worker tells the gateway after a step. Columns for tokens, objects for the rare rest."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from .request import FinishReason, Handoff, TokenLogprobs


class FailureCode(enum.StrEnum):
    """Why a worker gave a request up; what the router may do about it."""

    INVALID = "invalid"  # never served as it stands: tell the client
    OVERLOADED = "overloaded"  # elsewhere, or later
    UNAVAILABLE = "unavailable"  # draining, or the KV was lost: compute again elsewhere
    CANCELLED = "cancelled"  # answers an abort
    DEADLINE = "deadline"
    INTERNAL = "internal"  # a step failed: a bug or a broken device


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A stream's good end; its last token stands in this report or an earlier one."""

    id: str
    reason: FinishReason
    queue_s: float = 0.0  # until the first step on this worker
    prefill_s: float = 0.0  # prompt computed here: first step to first token
    transfer_s: float = 0.0  # prompt computed elsewhere: from resume until the KV was here
    preemptions: int = 0
    cached_tokens: int = 0  # prompt computed here: found in the prefix cache


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """A stream's other end."""

    id: str
    code: FailureCode
    reason: str
    retry_after_s: float = 0.0


@dataclass(kw_only=True, slots=True)
class Report:
    """One step's news. `ids`, `token_ids` and, where asked for, `logprobs` are columns."""

    ids: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] | None = None
    handoffs: list[Handoff] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.ids or self.handoffs or self.finished or self.failed)

    def add_token(self, request_id: str, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """One more row of the columns."""
        if logprobs is not None and self.logprobs is None:
            self.logprobs = [*(None for _ in self.ids)]
        self.ids.append(request_id)
        self.token_ids.append(token_id)
        if self.logprobs is not None:
            self.logprobs.append(logprobs)
