"""A paced worker's runner: pretended hardware under a real scheduler and real transfers.

Its pool has as many blocks as `kv.memory` would hold of the pretended model's KV, but eight bytes
a position and layer. A link is scaled alike, so a prompt's KV takes the time that the pretended
bytes would.
"""

from __future__ import annotations

from collections.abc import Callable

from ..configs.errors import InvalidConfig
from ..configs.schema import KVConfig, ModelConfig, PacedConfig
from ..engine.layout import KVLayout
from ..engine.paced import PacedRunner, paced_layout
from ..engine.spec import fingerprint, load_spec
from ..placement.latency.paced import paced_bytes_per_s, paced_shape, paced_source
from .spec import WorkerSpec


def paced_token_bytes(model: ModelConfig, kv: KVConfig, paced: PacedConfig) -> int:
    """KV of one position, as the pretended model has it."""
    return round(paced_shape(model, kv, paced).kv_bytes_per_token)


def check_paced(model: ModelConfig, kv: KVConfig, paced: PacedConfig, tensor_parallel: int) -> None:
    """Raises InvalidConfig for what a paced worker cannot pretend."""
    paced_source(model, kv, paced).phase("mixed", tensor_parallel, 1)
    paced_bytes_per_s(paced, tensor_parallel)


def build_paced_runner(spec: WorkerSpec, allocate: Callable[[int], memoryview]) -> PacedRunner:
    """The pool's memory comes from `allocate`. Raises InvalidConfig, UnsupportedModel."""
    shape = paced_shape(spec.model, spec.kv, spec.paced)
    token_bytes = paced_token_bytes(spec.model, spec.kv, spec.paced)
    num_blocks = spec.kv.memory // (token_bytes * spec.kv.block_size)
    if num_blocks * spec.kv.block_size < spec.model.max_model_len:
        raise InvalidConfig(
            "kv.memory",
            f"holds {num_blocks} blocks of {shape.name}, less than one sequence of "
            f"{spec.model.max_model_len} tokens",
            "give more memory or a smaller max_model_len",
        )
    # A prefill worker only ever computes prompts; a decode worker rows, chunks, or both at once.
    phase = "prefill" if spec.role == "prefill" else "mixed"
    source = paced_source(spec.model, spec.kv, spec.paced)
    latency = source.phase(phase, spec.pool.tensor_parallel, 1)
    layout = paced_layout(
        num_layers=shape.num_layers,
        num_blocks=num_blocks,
        block_size=spec.kv.block_size,
        fingerprint=f"paced {shape.name} {fingerprint(spec.model.path)}",
    )
    return PacedRunner(
        load_spec(spec.model.path),
        layout,
        allocate(layout.num_bytes),
        latency.stages[0],
        max_model_len=spec.model.max_model_len,
    )


def pool_bytes_per_s(spec: WorkerSpec, layout: KVLayout) -> float:
    """The pretended link's speed in bytes of the paced pool; 0: not paced."""
    pool_token = layout.num_layers * layout.block_bytes / layout.block_size
    scale = pool_token / paced_token_bytes(spec.model, spec.kv, spec.paced)
    return paced_bytes_per_s(spec.paced, spec.pool.tensor_parallel) * scale
