"""The digital twin of a cluster file: its workers, with step times from a profile or a sheet."""

from __future__ import annotations

from ..configs.schema import ClusterConfig
from .deployment import Deployment, Overheads
from .latency import LatencySource
from .model_shape import ModelShape
from .network import Network


def twin_of(
    config: ClusterConfig,
    source: LatencySource,
    shape: ModelShape,
    *,
    network: Network = Network(),
    overheads: Overheads = Overheads(),
) -> Deployment:
    """What `phasewise serve` would launch. Raises NoLatency where `source` does not know a shape."""
