"""How long a prompt's KV takes from prefill to decode over one link, with nobody else on it.

Contention between transfers is the simulator's. A link is the narrowest one on the way. Byte counts
and seconds may be numbers or columns, one row a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Column = NDArray[np.float64]
Amount = float | NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """One direction of a connection between two workers."""

    bytes_per_s: float
    latency_s: float = 0.0  # before the first byte, and once for the commit

    def seconds(self, num_bytes: Amount) -> Column:
        return np.asarray(self.latency_s + num_bytes / self.bytes_per_s)


def layerwise_s(num_bytes: Amount, num_layers: int, prefill_s: Amount, link: Link) -> Column:
    """From the end of prefill until decode can start, each layer sent while the next is computed
    (Splitwise, section IV-C).

    Layer k is ready at k·prefill/L and takes t = latency + bytes/L/bandwidth. Either compute
    leads and only the last layer's t is left at its end, or the link does and is busy from the
    first layer's end on: max(t, L·t − (L − 1)·prefill/L).
    """
    layer_s = link.seconds(num_bytes / num_layers)
    behind_s = num_layers * layer_s - prefill_s * (num_layers - 1) / num_layers
    return np.maximum(layer_s, behind_s)


def visible_s(num_bytes: Amount, num_layers: int, prefill_s: Amount, link: Link) -> Column:
    """The same in the mode that lets decode start sooner: layer by layer, or all layers at once
    when the prompt is computed, for small prompts over links that are slow to start."""
    return np.minimum(link.seconds(num_bytes), layerwise_s(num_bytes, num_layers, prefill_s, link))
