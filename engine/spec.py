"""What a checkpoint's config.json says about the model, read by hand. Knows no torch.

Missing keys take the family's defaults in transformers 5; both its `rope_parameters` and the older
`rope_theta` with `rope_scaling` are read. What the engine does not compute is refused by name.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InvalidConfig, UnsupportedModel
from .layout import ITEM_BYTES

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "OPTForCausalLM": "opt",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
_ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
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
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_QWEN = {"vocab_size": 151936, "sliding_window": 4096}
_DEFAULTS: dict[str, dict[str, Any]] = {
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
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
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


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeSpec:
    """Rotary positions. Fields that a type does not use keep their neutral values."""

    type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """A decoder-only model: every shape and switch that the engine computes by."""

    family: str  # "llama" | "mistral" | "qwen2" | "qwen3" | "opt"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    dtype: str  # of the checkpoint: "float32" | "bfloat16" | "float16"
    tied_embeddings: bool
    norm_eps: float
    rope: RopeSpec | None  # None: learned positions
    windows: tuple[int, ...]  # per layer; 0: the whole context
    qkv_bias: bool
    out_bias: bool  # attention's output projection
    mlp_bias: bool
    qk_norm: bool
    embed_dim: int  # of the token embedding; differs from hidden_size in some OPT
    norm_first: bool  # False: OPT-350m's order, norms after the residual sums
    final_norm: bool
    norm_affine: bool
    bos_token_id: int | None
    pad_token_id: int | None
    eos_token_ids: frozenset[int]

    @property
    def is_opt(self) -> bool:
        return self.family == "opt"

    @property
    def layer_parameters(self) -> int:
        """Weights of one decoder layer."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        matrices = hidden * (2 * q + 2 * kv) + (2 if self.is_opt else 3) * hidden * inner
        biases = self.qkv_bias * (q + 2 * kv) + self.out_bias * hidden
        biases += self.mlp_bias * ((1 if self.is_opt else 2) * inner + hidden)
        norms = self.norm_affine * (4 if self.is_opt else 2) * hidden
        return matrices + biases + norms + self.qk_norm * 2 * self.head_dim

    @property
    def num_parameters(self) -> int:
        """All weights, tied ones once."""
        outer = self.vocab_size * self.embed_dim * (1 if self.tied_embeddings else 2)
        outer += self.final_norm * self.norm_affine * (2 if self.is_opt else 1) * self.hidden_size
        if self.is_opt:
            outer += (self.max_positions + 2) * self.hidden_size
        if self.embed_dim != self.hidden_size:
            outer += 2 * self.embed_dim * self.hidden_size
        return outer + self.num_layers * self.layer_parameters

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of all weights in a dtype."""
        return self.num_parameters * ITEM_BYTES[dtype]

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of KV that one position takes over all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * ITEM_BYTES[dtype]

    @property
    def max_context(self) -> int | None:
        """Positions the model has at all: learned ones end, rotary ones do not."""
        return self.max_positions if self.rope is None else None


def _unsupported(path: Path, what: str) -> UnsupportedModel:
    return UnsupportedModel(
        str(path),
        f"{what} is not supported",
        f"supported are {', '.join(FAMILIES)} with rope_type {', '.join(ROPE_TYPES)}, "
        "unquantised in float32, bfloat16 or float16",
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidConfig(
            str(path), "no such file", "give a Hugging Face checkpoint directory"
        ) from None
    except (OSError, ValueError) as error:
        raise InvalidConfig(str(path), f"cannot be read ({error})", "restore the file") from None
    if not isinstance(content, dict):
        raise InvalidConfig(str(path), "is not a JSON object", "restore the file")
    return content


def _family(config: dict[str, Any], path: Path) -> str:
    names = config.get("architectures") or []
    name = names[0] if names else f"model_type {config.get('model_type')!r} without architectures"
    if name not in FAMILIES:
        by_type = config.get("model_type")
        if not names and by_type in FAMILIES.values():
            return str(by_type)
        raise _unsupported(path, f"architecture {name}")
    return FAMILIES[name]


def _rope(config: dict[str, Any], max_positions: int, path: Path) -> RopeSpec:
    given = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ROPE_TYPES or any(isinstance(value, dict) for value in given.values()):
        raise _unsupported(path, f"rope_type {kind!r}")
    partial = given.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1.0):
        raise _unsupported(path, f"partial_rotary_factor {partial}")
    missing = [key for key in _ROPE_NEEDS[kind] if not isinstance(given.get(key), int | float)]
    if missing:
        raise InvalidConfig(
            str(path), f"rope_type {kind!r} lacks a number for {missing[0]}", "add it"
        )
    original = config.get(
        "original_max_position_embeddings", given.get("original_max_position_embeddings")
    )
    return RopeSpec(
        type=kind,
        theta=float(given.get("rope_theta") or config.get("rope_theta") or 10000.0),
        factor=given.get("factor") or 1.0,
        original_max_positions=original or max_positions,
        low_freq_factor=given.get("low_freq_factor", 1.0),
        high_freq_factor=given.get("high_freq_factor", 4.0),
        beta_fast=given.get("beta_fast") or 32,
        beta_slow=given.get("beta_slow") or 1,
        attention_factor=given.get("attention_factor"),
        mscale=given.get("mscale"),
        mscale_all_dim=given.get("mscale_all_dim"),
        truncate=given.get("truncate", True),
    )


def _windows(values: dict[str, Any], config: dict[str, Any], family: str, path: Path) -> list[int]:
    layers, window = values["num_hidden_layers"], values["sliding_window"] or 0
    if family == "mistral":
        return [window] * layers
    if family not in ("qwen2", "qwen3"):
        return [0] * layers
    if not config.get("use_sliding_window", False):
        window = 0
    kinds = config.get("layer_types")
    if kinds is None:
        after = config.get("max_window_layers", 28)
        return [window if layer >= after else 0 for layer in range(layers)]
    unknown = [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]
    if unknown:
        raise _unsupported(path, f"layer type {unknown[0]!r}")
    if len(kinds) != layers:
        raise InvalidConfig(
            str(path), f"layer_types has {len(kinds)} entries for {layers} layers", "mend it"
        )
    return [window if kind == "sliding_attention" else 0 for kind in kinds]


def _dtype(config: dict[str, Any], path: Path) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    name = name.removeprefix("torch.")
    if name not in ITEM_BYTES:
        raise _unsupported(path, f"dtype {name}")
    return name


def _token_ids(value: Any) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset(value) if isinstance(value, list) else frozenset((value,))


def _check_shapes(values: dict[str, Any], path: Path) -> None:
    """Every size a positive integer, heads a multiple of KV heads."""
    for key, value in values.items():
        is_size = key.endswith(("_size", "_dim", "_heads", "_layers", "_position_embeddings"))
        if is_size and value is not None and (type(value) is not int or value < 1):
            raise InvalidConfig(str(path), f"{key} is {value!r}", "give a positive integer")
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"] or 1
    if heads % kv_heads:
        raise InvalidConfig(
            str(path),
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}",
            "mend the config",
        )


def load_spec(directory: str | Path) -> ModelSpec:
    """Read a checkpoint directory's config.json and generation_config.json.

    Raises InvalidConfig for what is missing or malformed, UnsupportedModel for what the engine
    does not compute.
    """
    path = Path(directory) / "config.json"
    config = _read_json(path)
    family = _family(config, path)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "?")
        raise _unsupported(path, f"quantization_config (quant_method {method})")
    values = {
        key: config.get(key, default) for key, default in (_COMMON | _DEFAULTS[family]).items()
    }
    _check_shapes(values, path)
    activation = values["activation_function"] if family == "opt" else values["hidden_act"]
    if activation != ("relu" if family == "opt" else "silu"):
        raise _unsupported(path, f"activation {activation!r} in {family}")
    generation = Path(directory) / "generation_config.json"
    eos = _read_json(generation).get("eos_token_id") if generation.exists() else None
    eos_token_ids = _token_ids(values["eos_token_id"] if eos is None else eos)
    shared = {
        "family": family,
        "vocab_size": values["vocab_size"],
        "hidden_size": values["hidden_size"],
        "num_layers": values["num_hidden_layers"],
        "num_heads": values["num_attention_heads"],
        "max_positions": values["max_position_embeddings"],
        "dtype": _dtype(config, path),
        "tied_embeddings": bool(values["tie_word_embeddings"]),
        "windows": tuple(_windows(values, config, family, path)),
        "bos_token_id": values["bos_token_id"],
        "pad_token_id": values["pad_token_id"],
        "eos_token_ids": eos_token_ids,
    }
    return _opt(values, shared) if family == "opt" else _rotary(values, config, shared, path)


def _opt(values: dict[str, Any], shared: dict[str, Any]) -> ModelSpec:
    bias = bool(values["enable_bias"])
    return ModelSpec(
        **shared,
        intermediate_size=values["ffn_dim"],
        num_kv_heads=values["num_attention_heads"],
        head_dim=values["hidden_size"] // values["num_attention_heads"],
        norm_eps=1e-5,
        rope=None,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        qk_norm=False,
        embed_dim=values["word_embed_proj_dim"] or values["hidden_size"],
        norm_first=bool(values["do_layer_norm_before"]),
        final_norm=bool(values["do_layer_norm_before"] and not values["_remove_final_layer_norm"]),
        norm_affine=bool(values["layer_norm_elementwise_affine"]),
    )


def _rotary(
    values: dict[str, Any], config: dict[str, Any], shared: dict[str, Any], path: Path
) -> ModelSpec:
    family = shared["family"]
    heads = values["num_attention_heads"]
    head_dim = values["head_dim"] or values["hidden_size"] // heads
    if head_dim % 2:
        raise _unsupported(path, f"odd head_dim {head_dim} with rotary positions")
    bias = bool(values["attention_bias"]) and family in ("llama", "qwen3")
    return ModelSpec(
        **shared,
        intermediate_size=values["intermediate_size"],
        num_kv_heads=values["num_key_value_heads"] or heads,
        head_dim=head_dim,
        norm_eps=values["rms_norm_eps"],
        rope=_rope(config, values["max_position_embeddings"], path),
        qkv_bias=bias or family == "qwen2",
        out_bias=bias,
        mlp_bias=bool(values["mlp_bias"]) and family == "llama",
        qk_norm=family == "qwen3",
        embed_dim=values["hidden_size"],
        norm_first=True,
        final_norm=True,
        norm_affine=True,
    )


def fingerprint(directory: str | Path) -> str:
    """Short hash of a checkpoint: config, weight files' names and sizes, and sampled bytes.

    Two workers exchange KV only under equal fingerprints; reading all weights would take longer
    than a start may.
    """
    digest = hashlib.sha256()
    root = Path(directory)
    digest.update((root / "config.json").read_bytes())
    for path in sorted(root.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            for eighth in range(8):
                file.seek(size * eighth // 8)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]
