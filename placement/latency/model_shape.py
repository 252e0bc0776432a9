"""What a checkpoint's `config.json` says about size: parameters, KV a token, work a token.

Tolerant where the engine is strict: a shape can be planned for without its code being here.
Knows dense Llama-like models (Llama, Qwen, Mistral, …), OPT, BLOOM, GPT-2, and mixtures of
experts of the Mixtral and Qwen-MoE kinds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...engine.errors import InvalidConfig, UnsupportedModel
from ...engine.layout import SCALE_BYTES

DTYPE_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
UNGATED = ("opt", "bloom", "gpt2", "gpt_neox", "phi", "falcon")  # two MLP matrices, not three


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes of a decoder. `experts` 0 is a dense model."""

    name: str
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int  # of a dense layer's MLP
    mlp_matrices: int  # 3 gated, 2 not
    vocab: int
    tied: bool  # output embedding is the input embedding
    max_positions: int
    weight_bytes: float  # a parameter
    kv_item_bytes: float
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    shared_intermediate: int = 0  # of experts that every token passes
    moe_layers: int = 0

    @property
    def attention_params(self) -> int:
        """Of one layer: q, k, v and output projections."""
        return 2 * self.hidden * self.head_dim * (self.num_heads + self.num_kv_heads)

    @property
    def expert_params(self) -> int:
        """Of one expert."""
        return self.mlp_matrices * self.hidden * self.expert_intermediate

    @property
    def dense_params(self) -> int:
        """Weights of all layers that every token passes, without embeddings."""
        dense_mlp = self.mlp_matrices * self.hidden * self.intermediate
        shared = self.mlp_matrices * self.hidden * self.shared_intermediate
        router = self.hidden * self.experts
        return (
            self.num_layers * self.attention_params
            + (self.num_layers - self.moe_layers) * dense_mlp
            + self.moe_layers * (shared + router)
        )

    @property
    def embedding_params(self) -> int:
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def params(self) -> int:
        """All weights; biases and norms are left out (under 0.1%)."""
        experts = self.moe_layers * self.experts * self.expert_params
        return self.dense_params + experts + self.embedding_params

    @property
    def active_params(self) -> int:
        """Weights that one token is multiplied with, output embedding included."""
        experts = self.moe_layers * self.experts_per_token * self.expert_params
        return self.dense_params + experts + self.vocab * self.hidden

    @property
    def num_bytes(self) -> float:
        """Of the weights in memory."""
        return self.params * self.weight_bytes

    @property
    def kv_bytes_per_token(self) -> float:
        """Keys and values of all layers, of the KV heads only."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.kv_item_bytes

    def served_as(self, dtype: str, kv_dtype: str) -> ModelShape:
        """In the dtypes of a cluster file; auto leaves the checkpoint's. FP8 has a byte of scale
        for each position and head."""
        shape = self
        if dtype != "auto":
            item = DTYPE_BYTES[dtype]
            shape = replace(shape, weight_bytes=item, kv_item_bytes=item)
        if kv_dtype != "auto":
            shape = replace(shape, kv_item_bytes=1 + SCALE_BYTES / self.head_dim)
        return shape

    def touched_experts(self, num_tokens: float) -> float:
        """Experts a layer reads for so many tokens, each choosing at random."""
        if not self.experts:
            return 0.0
        untouched = (1 - self.experts_per_token / self.experts) ** num_tokens
        return self.experts * (1 - untouched)

    def divides(self, tensor_parallel: int, pipeline_parallel: int) -> bool:
        """Whether heads and layers can be split so. KV heads may be repeated, not cut."""
        kv = self.num_kv_heads
        return (
            self.num_heads % tensor_parallel == 0
            and (kv % tensor_parallel == 0 or tensor_parallel % kv == 0)
            and self.num_layers % pipeline_parallel == 0
        )

    def kv_capacity_tokens(
        self,
        memory_bytes: float,
        tensor_parallel: int,
        pipeline_parallel: int,
        *,
        usable: float = 0.9,
        max_batch_tokens: int = 2048,
    ) -> int:
        """Positions that an instance's GPUs hold beside weights and activations; 0: does not fit.

        Activations are taken as two widest MLP rows and two hidden rows for each batched token.
        """
        gpus = tensor_parallel * pipeline_parallel
        row = 2 * self.hidden + 2 * max(
            self.intermediate, self.expert_intermediate * self.experts_per_token
        )
        activations = max_batch_tokens * row * self.kv_item_bytes / tensor_parallel
        left = memory_bytes * usable - self.num_bytes / gpus - activations
        copies = max(1, tensor_parallel // self.num_kv_heads)
        per_token = self.kv_bytes_per_token * copies / gpus
        return max(0, int(left / per_token))


def read_shape(path: str | Path) -> ModelShape:
    """Of a checkpoint directory or its config.json. Raises InvalidConfig, UnsupportedModel."""
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidConfig(
            str(file), f"cannot read the model's config: {error}", "give a checkpoint directory"
        ) from error
    if not isinstance(config, dict):
        raise InvalidConfig(str(file), "is no JSON object", "give a checkpoint directory")
    name = file.parent.name if file.name == "config.json" else file.stem
    return shape_of(config, name=name, where=str(file))


def shape_of(config: Mapping[str, Any], *, name: str, where: str = "config.json") -> ModelShape:
    """The shape that a parsed config.json describes."""
    config = config.get("text_config", config)
    kind = str(config.get("model_type", "llama"))
    if config.get("kv_lora_rank"):
        raise UnsupportedModel(
            where, f"{kind} keeps a latent instead of keys and values", "plan for another model"
        )
    hidden = _size(config, where, "hidden_size", "n_embd", "n_embed")
    heads = _size(config, where, "num_attention_heads", "n_head")
    layers = _size(config, where, "num_hidden_layers", "n_layer")
    matrices = 2 if kind.startswith(UNGATED) else 3
    moe = _experts(config, where, layers)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float16")
    item = DTYPE_BYTES.get(dtype.removeprefix("torch."), 2.0)
    fallback = 4 * hidden if matrices == 2 else None
    return ModelShape(
        name=name,
        num_layers=layers,
        hidden=hidden,
        num_heads=heads,
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        intermediate=_size(
            config, where, "intermediate_size", "ffn_dim", "n_inner", default=fallback
        ),
        mlp_matrices=matrices,
        vocab=_size(config, where, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings", kind in ("opt", "bloom", "gpt2"))),
        max_positions=int(
            config.get("max_position_embeddings")
            or config.get("seq_length")
            or config.get("n_positions")
            or 2048
        ),
        weight_bytes=_weight_bytes(config, where, item),
        kv_item_bytes=item,
        **moe,
    )


def _experts(config: Mapping[str, Any], where: str, layers: int) -> dict[str, int]:
    experts = int(config.get("num_local_experts") or config.get("num_experts") or 0)
    if not experts:
        return {}
    step = int(config.get("decoder_sparse_step") or 1)
    dense = set(config.get("mlp_only_layers") or ())
    sparse = sum((i + 1) % step == 0 and i not in dense for i in range(layers))
    return {
        "experts": experts,
        "experts_per_token": _size(config, where, "num_experts_per_tok"),
        "expert_intermediate": _size(config, where, "moe_intermediate_size", "intermediate_size"),
        "shared_intermediate": int(config.get("shared_expert_intermediate_size") or 0),
        "moe_layers": sparse,
    }


def _weight_bytes(config: Mapping[str, Any], where: str, item: float) -> float:
    quantization = config.get("quantization_config")
    if not quantization:
        return item
    method = str(quantization.get("quant_method"))
    if method == "fp8":
        return 1.0
    if method in ("awq", "gptq"):  # 4.25 to 4.5 bits: scales and zeros of groups of 64 to 128
        return (float(quantization.get("bits", 4)) + 0.5) / 8
    raise UnsupportedModel(
        where, f"quantisation {method!r} has no known size", "use fp8, awq, gptq or none"
    )


def _size(config: Mapping[str, Any], where: str, *keys: str, default: int | None = None) -> int:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    if default is not None:
        return default
    raise InvalidConfig(
        f"{where}: {keys[0]}", "missing or not a positive number", "give a complete config.json"
    )
