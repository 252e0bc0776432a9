"""Models of known shapes with random weights, made on the device: nothing is read but config.json.

A tensor's values depend on its name and shape alone, so two processes hold the same model.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from phasewise.engine.cache import TORCH_DTYPES, AllocateBuffer, KVCache, plain_buffer
from phasewise.engine.layout import KVLayout
from phasewise.engine.model import Model
from phasewise.engine.rank import Rank
from phasewise.engine.runner import Runner
from phasewise.engine.sampler import Sampler
from phasewise.engine.shard_plan import plan_shards
from phasewise.engine.spec import ModelSpec, load_spec
from phasewise.engine.weights import Tensors, tensor_shapes, weights_of
from phasewise.kernels.cuda.operators import CudaOperators
from torch import Tensor

from .case import BLOCK_SIZE, Device

_LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Of the configurations that the models' owners published.
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": _LLAMA_3_ROPE,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "Qwen3-1.7B": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    },
}
_TINY = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "torch_dtype": "float32",
}


def config_of(name: str, *, tiny: bool) -> dict[str, Any]:
    """A published configuration, or its family's at a size that an interpreter runs."""
    config = CONFIGS[name] | {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
    return config | _TINY | {"rope_scaling": None} if tiny else config


@dataclass(frozen=True, kw_only=True)
class RandomTensors:
    """A checkpoint's tensors, drawn where they are used: norms near 1, matrices so that what they
    give is about as large as what they get."""

    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    device: torch.device

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def fused(
        self,
        names: Sequence[str],
        *,
        rows: Sequence[range] | None = None,
        columns: range | None = None,
    ) -> Tensor:
        """The named tensors, one above the other. Whole ones: these models have one rank."""
        height = sum(self.shapes[name][0] for name in names)
        result = torch.empty(
            (height, *self.shapes[names[0]][1:]), dtype=self.dtype, device=self.device
        )
        at = 0
        for name in names:
            shape = self.shapes[name]
            generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
            part = result[at : at + shape[0]]
            part.normal_(generator=generator)
            part.mul_(shape[-1] ** -0.5 if len(shape) > 1 else 0.1)
            if len(shape) == 1:
                part.add_(1)
            at += shape[0]
        return result


def spec_of(config: dict[str, Any], folder: Path) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(config))
    return load_spec(folder)


def random_runner(
    spec: ModelSpec,
    device: torch.device,
    *,
    num_blocks: int,
    max_model_len: int,
    allocate: AllocateBuffer | None = None,
) -> Runner:
    """A runner of random weights on the GPU's operators, not yet warm."""
    dtype = TORCH_DTYPES[spec.dtype]
    tensors = RandomTensors(shapes=tensor_shapes(spec), dtype=dtype, device=device)
    return runner_of(
        spec, tensors, device, num_blocks=num_blocks, max_model_len=max_model_len, allocate=allocate
    )


def runner_of(
    spec: ModelSpec,
    tensors: Tensors,
    device: torch.device,
    *,
    num_blocks: int,
    max_model_len: int,
    allocate: AllocateBuffer | None = None,
) -> Runner:
    """A runner on the GPU's operators (interpreted, on a CPU), not yet warm."""
    (shard,) = plan_shards(spec, tensor_parallel=1, pipeline_parallel=1, section="model")
    layout = KVLayout(
        num_layers=spec.num_layers,
        num_blocks=num_blocks,
        num_kv_heads=spec.num_kv_heads,
        block_size=BLOCK_SIZE,
        head_dim=spec.head_dim,
        dtype=spec.dtype,
    )
    if allocate is None and device.type == "cuda":
        buffer = torch.empty(layout.num_bytes, dtype=torch.uint8, device=device)
    else:
        buffer = (allocate or plain_buffer)(layout.num_bytes)
    dtype = TORCH_DTYPES[spec.dtype]
    operators = CudaOperators(Device.of(device, dtype).multiprocessors)
    weights = weights_of(tensors, spec, shard)
    model = Model(spec, shard, weights, operators, max_model_len, device)
    rank = Rank(model, KVCache(layout, buffer), None, [shard.vocab], 1, dtype)
    return Runner(rank, Sampler(spec.vocab_size, spec.eos_token_ids), max_model_len=max_model_len)


def matrix_parameters(spec: ModelSpec) -> int:
    """Parameters that a step multiplies by: all matrices but the embedding's lookup."""
    shapes = tensor_shapes(spec)
    matrices = sum(a[0] * a[1] for a in shapes.values() if len(a) == 2)
    return matrices if spec.tied_embeddings else matrices - spec.vocab_size * spec.embed_dim


def kv_bytes_per_token(spec: ModelSpec) -> int:
    item = TORCH_DTYPES[spec.dtype].itemsize
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * item
