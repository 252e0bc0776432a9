"""What the paced workers of a cluster file pretend to be: shape, step times, links.

The live cluster and its digital twin both take these from here.
"""

from __future__ import annotations

from ...configs.schema import KVConfig, ModelConfig, PacedConfig
from .hardware import read_hardware
from .model_shape import ModelShape, read_shape
from .phase_latency import LatencySource
from .roofline import RooflineLatency
from .step_profile import read_profile


def paced_shape(model: ModelConfig, kv: KVConfig, paced: PacedConfig) -> ModelShape:
    """In `model.dtype` and `kv.dtype`. Raises InvalidConfig, UnsupportedModel."""
    return read_shape(paced.model or model.path).served_as(model.dtype, kv.dtype)


def paced_source(model: ModelConfig, kv: KVConfig, paced: PacedConfig) -> LatencySource:
    """The profile where one is given, else the hardware sheet with the model's shape.

    Raises InvalidConfig for files that cannot be read and for another model's profile.
    """
    shape = paced_shape(model, kv, paced)
    if paced.profile is None:
        return RooflineLatency(
            shape=shape, hardware=read_hardware(paced.hardware, where="paced.hardware")
        )
    profile = read_profile(paced.profile)
    profile.require(model=shape.name)
    return profile


def paced_bytes_per_s(paced: PacedConfig, num_devices: int) -> float:
    """Bandwidth of a worker's links, one direction, of the pretended KV; 0: not paced."""
    if paced.link == "free":
        return 0.0
    hardware = read_hardware(paced.hardware, where="paced.hardware")
    each = hardware.link_bandwidth if paced.link == "node" else hardware.network_bandwidth
    return each * num_devices
