"""Which architectures the engine computes, and what their config.json may leave out.

Knows no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import UnsupportedModel

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "OPTForCausalLM": "opt",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
_COMMON: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "head_dim": None,
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "rope_theta": 10000.0,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_QWEN = {"vocab_size": 151936, "sliding_window": 4096}
_OWN: dict[str, dict[str, Any]] = {
    "llama": {
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mistral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mixtral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
    "qwen3_moe": _QWEN
    | {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
    },
    "opt": {
        "vocab_size": 50272,
        "hidden_size": 768,
        "ffn_dim": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": None,
        "activation_function": "relu",
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
        "word_embed_proj_dim": None,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "_remove_final_layer_norm": False,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
    },
}


def unsupported(path: Path, what: str) -> UnsupportedModel:
    """The error for `what`, with all that is supported."""
    return UnsupportedModel(
        str(path),
        f"{what} is not supported",
        f"supported are {', '.join(FAMILIES)} with rope_type {', '.join(ROPE_TYPES)}, "
        "unquantised in float32, bfloat16 or float16",
    )


def family_of(config: dict[str, Any], path: Path) -> str:
    """The family of a config.json. Raises UnsupportedModel."""
    names = config.get("architectures") or []
    name = names[0] if names else f"model_type {config.get('model_type')!r} without architectures"
    if name not in FAMILIES:
        by_type = config.get("model_type")
        if not names and by_type in FAMILIES.values():
            return str(by_type)
        raise unsupported(path, f"architecture {name}")
    return FAMILIES[name]


def with_defaults(config: dict[str, Any], family: str) -> dict[str, Any]:
    """The family's keys, as given or as transformers defaults them."""
    return {key: config.get(key, default) for key, default in (_COMMON | _OWN[family]).items()}
