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

from .errors import InvalidConfig
from .families import family_of, unsupported, with_defaults
from .layout import ITEM_BYTES
from .mixture_spec import MixtureSpec, mixture_of
from .rope_spec import RopeSpec, rope_of

_SIZES = ("_size", "_dim", "_heads", "_hidden_layers", "_position_embeddings")  # how keys end
_MAY_BE_NULL = ("num_key_value_heads", "head_dim", "word_embed_proj_dim")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """A decoder-only model: every shape and switch that the engine computes by."""

    family: str  # of `families.FAMILIES`
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of a dense layer's MLP
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
    mixture: MixtureSpec | None  # None: every MLP is dense
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

    def layer_parameters(self, layer: int) -> int:
        """Weights of one decoder layer."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = hidden * (2 * q + 2 * kv)
        attention += self.qkv_bias * (q + 2 * kv) + self.out_bias * hidden
        norms = self.norm_affine * (4 if self.is_opt else 2) * hidden
        norms += self.qk_norm * 2 * self.head_dim
        if self.mixture is not None and layer in self.mixture.layers:
            return attention + norms + self.mixture.layer_parameters(hidden)
        mlp = (2 if self.is_opt else 3) * hidden * inner
        mlp += self.mlp_bias * ((1 if self.is_opt else 2) * inner + hidden)
        return attention + norms + mlp

    @property
    def num_parameters(self) -> int:
        """All weights, tied ones once."""
        outer = self.vocab_size * self.embed_dim * (1 if self.tied_embeddings else 2)
        outer += self.final_norm * self.norm_affine * (2 if self.is_opt else 1) * self.hidden_size
        if self.is_opt:
            outer += (self.max_positions + 2) * self.hidden_size
        if self.embed_dim != self.hidden_size:
            outer += 2 * self.embed_dim * self.hidden_size
        return outer + sum(self.layer_parameters(layer) for layer in range(self.num_layers))

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of all weights in a dtype."""
        return self.num_parameters * ITEM_BYTES[dtype]

    @property
    def max_context(self) -> int | None:
        """Positions the model has at all: learned ones end, rotary ones do not."""
        return self.max_positions if self.rope is None else None


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


def _windows(values: dict[str, Any], config: dict[str, Any], family: str, path: Path) -> list[int]:
    layers, window = values["num_hidden_layers"], values["sliding_window"] or 0
    if family in ("mistral", "mixtral"):
        return [window] * layers
    if not family.startswith("qwen"):
        return [0] * layers
    if not config.get("use_sliding_window", False):
        window = 0
    if family == "qwen3_moe":  # all layers alike; transformers reads no layer_types here
        return [window] * layers
    kinds = config.get("layer_types")
    if kinds is None:
        after = config.get("max_window_layers", 28)
        return [window if layer >= after else 0 for layer in range(layers)]
    unknown = [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]
    if unknown:
        raise unsupported(path, f"layer type {unknown[0]!r}")
    if len(kinds) != layers:
        raise InvalidConfig(
            str(path), f"layer_types has {len(kinds)} entries for {layers} layers", "mend it"
        )
    return [window if kind == "sliding_attention" else 0 for kind in kinds]


def _dtype(config: dict[str, Any], path: Path) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    name = name.removeprefix("torch.")
    if name not in ITEM_BYTES:
        raise unsupported(path, f"dtype {name}")
    return name


def _token_ids(value: Any) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset(value) if isinstance(value, list) else frozenset((value,))


def _check_shapes(values: dict[str, Any], path: Path) -> None:
    """Every size a positive integer, heads a multiple of KV heads."""
    for key, value in values.items():
        is_size = key.endswith(_SIZES) and not (value is None and key in _MAY_BE_NULL)
        if is_size and (type(value) is not int or value < 1):
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
    family = family_of(config, path)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "?")
        raise unsupported(path, f"quantization_config (quant_method {method})")
    values = with_defaults(config, family)
    _check_shapes(values, path)
    activation = values["activation_function"] if family == "opt" else values["hidden_act"]
    if activation != ("relu" if family == "opt" else "silu"):
        raise unsupported(path, f"activation {activation!r} in {family}")
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
        "mixture": mixture_of(config, values, family, path),
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
        raise unsupported(path, f"odd head_dim {head_dim} with rotary positions")
    bias = bool(values["attention_bias"]) and family in ("llama", "qwen3", "qwen3_moe")
    return ModelSpec(
        **shared,
        intermediate_size=values["intermediate_size"],
        num_kv_heads=values["num_key_value_heads"] or heads,
        head_dim=head_dim,
        norm_eps=values["rms_norm_eps"],
        rope=rope_of(config, values, path),
        qkv_bias=bias or family == "qwen2",
        out_bias=bias,
        mlp_bias=bool(values["mlp_bias"]) and family == "llama",
        qk_norm=family in ("qwen3", "qwen3_moe"),
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
