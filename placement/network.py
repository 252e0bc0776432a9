"""Links between workers, and how transfers under way share them.

Every device has a port to the devices of its node and one to other nodes; a node's ports to
others may share a narrower way out. Transfers that meet at a port share it max-min fairly.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from .transfer import Link

FREE = Link(bytes_per_s=inf)


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """Bandwidth of one device and direction; a worker has that many times its devices."""

    local: Link = FREE  # to devices of the same node
    remote: Link = FREE  # to other nodes
    node_bytes_per_s: float = inf  # what all workers of one node share towards others
