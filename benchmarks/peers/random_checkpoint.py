"""Random-weight Llama checkpoints of a given shape, with the tiny model's tokenizer."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

TOKENIZER = Path(__file__).resolve().parents[2] / "models" / "tiny"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int = 2048


SHAPES = {
    "4M": Shape(hidden=256, layers=4, intermediate=704, heads=4, kv_heads=2),
    "81M": Shape(hidden=768, layers=12, intermediate=2048, heads=12, kv_heads=6),
}


def write_checkpoint(folder: Path, shape: Shape) -> Path:
    """A bfloat16 Llama in Hugging Face form; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    head_dim = shape.hidden // shape.heads
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(_weights(shape, head_dim), folder / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder / name)
    return folder


def _weights(shape: Shape, head_dim: int) -> dict[str, torch.Tensor]:
    hidden, wide = shape.hidden, shape.intermediate
    queries, keys = shape.heads * head_dim, shape.kv_heads * head_dim
    sizes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (shape.vocab, hidden),
    }
    for layer in range(shape.layers):
        sizes |= {
            f"model.layers.{layer}.{name}.weight": size
            for name, size in {
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
                "self_attn.q_proj": (queries, hidden),
                "self_attn.k_proj": (keys, hidden),
                "self_attn.v_proj": (keys, hidden),
                "self_attn.o_proj": (hidden, queries),
                "mlp.gate_proj": (wide, hidden),
                "mlp.up_proj": (wide, hidden),
                "mlp.down_proj": (hidden, wide),
            }.items()
        }
    return {
        name: (
            torch.ones(size) if len(size) == 1 else torch.randn(size) * (size[-1] ** -0.5)
        ).bfloat16()
        for name, size in sizes.items()
    }
