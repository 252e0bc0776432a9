"""The named errors that cross a border. Each says what is wrong and what to do about it."""

from __future__ import annotations

from ..configs.errors import InvalidConfig, PhasewiseError


class InvalidRequest(PhasewiseError):
    """A request that can never be served as it stands (gRPC INVALID_ARGUMENT, HTTP 400)."""

    def __init__(self, field: str, reason: str, remedy: str) -> None:
        super().__init__(f"{field}: {reason}; {remedy}")
        self.field = field
        self.reason = reason
        self.remedy = remedy


class UnsupportedModel(InvalidConfig):
    """A checkpoint whose architecture, positions or quantisation the engine does not compute."""


class Overloaded(PhasewiseError):
    """No room at present (gRPC RESOURCE_EXHAUSTED, HTTP 429); worth a retry after the delay."""

    def __init__(self, reason: str, *, retry_after_s: float) -> None:
        super().__init__(f"{reason}; retry after {retry_after_s:.1f} s")
        self.reason = reason
        self.retry_after_s = retry_after_s


class Unavailable(PhasewiseError):
    """A worker was lost or the service is shutting down (gRPC UNAVAILABLE, HTTP 503)."""

    def __init__(self, reason: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(f"{reason}; retry after {retry_after_s:.1f} s")
        self.reason = reason
        self.retry_after_s = retry_after_s


class DeadlineExceeded(PhasewiseError):
    """The request's own deadline passed first (gRPC DEADLINE_EXCEEDED, HTTP 504)."""


class Cancelled(PhasewiseError):
    """The client, or an abort from another call, ended the request (gRPC CANCELLED)."""


class RankLost(PhasewiseError):
    """A rank of a worker died, hung or was cut off: the whole worker ends."""
