"""How long a prompt's KV takes from prefill to decode over one link, with nobody else on it.

Contention between transfers is the simulator's. A link is the narrowest one on the way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """One direction of a connection between two workers."""

    bytes_per_s: float
    latency_s: float = 0.0  # before the first byte, and once for the commit

    def seconds(self, num_bytes: float) -> float:
        return self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferTime:
    """`total_s` of the link is used; decode can start `visible_s` after prefill has ended."""

    total_s: float
    visible_s: float


def serialized(num_tokens: int, kv_bytes_per_token: float, link: Link) -> TransferTime:
    """All layers at once when the prompt is computed."""
    seconds = link.seconds(num_tokens * kv_bytes_per_token)
    return TransferTime(total_s=seconds, visible_s=seconds)


def layerwise(
    num_tokens: int, kv_bytes_per_token: float, num_layers: int, prefill_s: float, link: Link
) -> TransferTime:
    """Each layer sent while the next is computed (Splitwise, section IV-C).

    Layer k is ready at k·prefill/L and takes t = latency + bytes/L/bandwidth. Either compute
    leads and only the last layer's t is left at its end, or the link does and is busy from the
    first layer's end on: visible = max(t, L·t − (L − 1)·prefill/L).
    """
    layer_s = link.seconds(num_tokens * kv_bytes_per_token / num_layers)
    total_s = num_layers * layer_s
    behind_s = total_s - prefill_s * (num_layers - 1) / num_layers
    return TransferTime(total_s=total_s, visible_s=max(layer_s, behind_s))


def faster_mode(
    num_tokens: int, kv_bytes_per_token: float, num_layers: int, prefill_s: float, link: Link
) -> TransferTime:
    """The mode that lets decode start sooner: serialized for small prompts on slow-start links."""
    one = serialized(num_tokens, kv_bytes_per_token, link)
    many = layerwise(num_tokens, kv_bytes_per_token, num_layers, prefill_s, link)
    return one if one.visible_s < many.visible_s else many


def visible_s(
    num_tokens: NDArray[np.int32],
    kv_bytes_per_token: float,
    num_layers: int,
    prefill_s: NDArray[np.float64],
    link: Link,
) -> NDArray[np.float64]:
    """`faster_mode(…).visible_s` of many prompts at once."""
    num_bytes = num_tokens * kv_bytes_per_token
    whole_s = link.latency_s + num_bytes / link.bytes_per_s
    layer_s = link.latency_s + num_bytes / num_layers / link.bytes_per_s
    behind_s = num_layers * layer_s - prefill_s * (num_layers - 1) / num_layers
    return np.minimum(whole_s, np.maximum(layer_s, behind_s))
