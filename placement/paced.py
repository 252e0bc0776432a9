"""What the paced workers of a cluster file pretend to be: shape, step times, links.

The live cluster and its digital twin both take these from here.
"""

from __future__ import annotations

from dataclasses import replace

from ..configs.schema import ModelConfig, PacedConfig
from .hardware import read_hardware
from .latency import LatencySource
from .model_shape import DTYPE_BYTES, ModelShape, read_shape
from .roofline import RooflineLatency
from .step_profile import read_profile


def paced_shape(model: ModelConfig, paced: PacedConfig) -> ModelShape:
    """In `model.dtype`, unless that is auto. Raises InvalidConfig, UnsupportedModel."""
    shape = read_shape(paced.model or model.path)
    if model.dtype == "auto":
        return shape
    item = DTYPE_BYTES[model.dtype]
    return replace(shape, kv_item_bytes=item, weight_bytes=item)


def paced_source(model: ModelConfig, paced: PacedConfig) -> LatencySource:
    """The profile where one is given, else the hardware sheet with the model's shape.

    Raises InvalidConfig for files that cannot be read and for another model's profile.
    """
    shape = paced_shape(model, paced)
    if paced.profile is None:
        return RooflineLatency(shape=shape, hardware=read_hardware(paced.hardware))
    profile = read_profile(paced.profile)
    profile.require(model=shape.name)
    return profile


def paced_bytes_per_s(paced: PacedConfig, num_devices: int) -> float:
    """Bandwidth of a worker's links, one direction, of the pretended KV; 0: not paced."""
    if paced.link == "free":
        return 0.0
    hardware = read_hardware(paced.hardware)
    each = hardware.link_bandwidth if paced.link == "node" else hardware.network_bandwidth
    return each * num_devices
