"""Named errors as gRPC statuses and HTTP codes, and back again in the client.

A status has a code and one sentence; the particulars that a program needs (field, delay) stand
in trailing metadata, percent-encoded, because metadata is ASCII.
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import quote, unquote

import grpc

from ..engine.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PhasewiseError,
    Unavailable,
)

_CODES: dict[type[PhasewiseError], tuple[grpc.StatusCode, int]] = {
    InvalidRequest: (grpc.StatusCode.INVALID_ARGUMENT, 400),
    Overloaded: (grpc.StatusCode.RESOURCE_EXHAUSTED, 429),
    Unavailable: (grpc.StatusCode.UNAVAILABLE, 503),
    DeadlineExceeded: (grpc.StatusCode.DEADLINE_EXCEEDED, 504),
    Cancelled: (grpc.StatusCode.CANCELLED, 499),
}
_DETAILS = ("field", "reason", "remedy")

Metadata = tuple[tuple[str, str], ...]


def grpc_code(error: PhasewiseError) -> grpc.StatusCode:
    return _CODES.get(type(error), (grpc.StatusCode.INTERNAL, 500))[0]


def http_code(error: PhasewiseError) -> int:
    return _CODES.get(type(error), (grpc.StatusCode.INTERNAL, 500))[1]


def trailing_metadata(error: PhasewiseError) -> Metadata:
    """`grpc-retry-pushback-ms` is read by gRPC's own retry policies."""
    entries = [("phasewise-error", type(error).__name__)]
    entries += [
        (f"phasewise-{name}", quote(getattr(error, name), safe=" "))
        for name in _DETAILS
        if hasattr(error, name)
    ]
    if isinstance(error, Overloaded | Unavailable):
        entries.append(("retry-after", f"{error.retry_after_s:g}"))
        entries.append(("grpc-retry-pushback-ms", f"{error.retry_after_s * 1e3:.0f}"))
    return tuple(entries)


def error_from_status(
    code: grpc.StatusCode, details: str | None, metadata: Iterable[tuple[str, str | bytes]] | None
) -> PhasewiseError:
    """The error that the server named, as the client raises it. A status that no Phasewise
    server sent (a refused connection, an unknown method) keeps its own sentence."""
    known = {key: unquote(value) for key, value in metadata or () if isinstance(value, str)}
    said = details or code.name
    reason = known.get("phasewise-reason", said)
    retry_after_s = float(known.get("retry-after", "1"))
    if code == grpc.StatusCode.INVALID_ARGUMENT and "phasewise-field" in known:
        return InvalidRequest(known["phasewise-field"], reason, known["phasewise-remedy"])
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return Overloaded(reason, retry_after_s=retry_after_s)
    if code == grpc.StatusCode.UNAVAILABLE:
        return Unavailable(reason, retry_after_s=retry_after_s)
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(said)
    if code == grpc.StatusCode.CANCELLED:
        return Cancelled(said)
    return PhasewiseError(said if "phasewise-error" in known else f"{code.name}: {said}")
