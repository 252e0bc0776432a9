"""Weights from safetensors, mapped and copied once into the fused tensors the model multiplies.

A `Checkpoint` opens the files and checks every name and shape; `load_layer` fuses one layer, so
that a rank may later load only its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .cache import TORCH_DTYPES
from .errors import InvalidConfig
from .spec import ModelSpec

Shape = tuple[int, ...]
_IGNORED = ("rotary_emb.inv_freq",)  # buffers that old checkpoints carry


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    weight: Tensor  # [out, in]
    bias: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Norm:
    weight: Tensor | None  # [hidden]; None: not affine
    bias: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWeights:
    attention_norm: Norm
    qkv: Linear  # [(heads + 2 kv_heads) * head_dim, hidden]
    out: Linear
    qk_norm: tuple[Tensor, Tensor] | None  # [head_dim] each
    mlp_norm: Norm
    up: Linear  # gate and up fused; OPT: fc1
    down: Linear


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelWeights:
    embedding: Tensor  # [vocab, embed_dim]
    positions: Tensor | None  # learned: [max_positions + 2, hidden]
    project_in: Linear | None
    project_out: Linear | None
    layers: list[LayerWeights]
    final_norm: Norm | None
    head: Tensor  # [vocab, embed_dim]; the embedding itself when tied


class Checkpoint:
    """The safetensors files of a directory: where each tensor is, without reading any."""

    def __init__(self, directory: str | Path, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._files: dict[str, Path] = {}
        self._open = {}
        for path in _weight_files(Path(directory)):
            try:
                handle = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise InvalidConfig(
                    str(path), "is named by the index but missing", "restore the file"
                ) from None
            except (SafetensorError, OSError) as error:
                raise InvalidConfig(
                    str(path), f"is truncated or no safetensors file ({error})", "fetch it again"
                ) from None
            self._open[path] = handle
            self._files.update(dict.fromkeys(handle.keys(), path))

    def check_names(self, wanted: dict[str, Shape], optional: Iterable[str]) -> None:
        """Refuse missing, misshaped and unexpected tensors, by name and file."""
        for name, shape in wanted.items():
            if name not in self._files:
                where = next(iter(self._open)).parent
                raise InvalidConfig(
                    str(where), f"tensor {name} is missing", "the checkpoint is incomplete"
                )
            path = self._files[name]
            found = tuple(self._open[path].get_slice(name).get_shape())
            if found != shape:
                raise InvalidConfig(
                    str(path),
                    f"tensor {name} has shape {list(found)}, config.json says {list(shape)}",
                    "weights and config.json must be of one checkpoint",
                )
        known = wanted.keys() | set(optional)
        for name, path in self._files.items():
            if name not in known and not name.endswith(_IGNORED):
                raise InvalidConfig(
                    str(path), f"tensor {name} is unexpected", "config.json must match the weights"
                )

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def fused(self, names: list[str]) -> Tensor:
        """Tensors of these names, one above the other, in the dtype and on the device."""
        parts = [self._open[self._files[name]].get_tensor(name) for name in names]
        rows = sum(part.shape[0] for part in parts)
        result = torch.empty((rows, *parts[0].shape[1:]), dtype=self._dtype, device=self._device)
        at = 0
        for part in parts:
            result[at : at + part.shape[0]].copy_(part)
            at += part.shape[0]
        return result


def _weight_files(root: Path) -> list[Path]:
    index = root / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise InvalidConfig(
                str(index), f"cannot be read ({error!r})", "restore the file"
            ) from None
        return [root / name for name in names]
    single = root / "model.safetensors"
    if not single.exists():
        raise InvalidConfig(
            str(root),
            "holds neither model.safetensors nor model.safetensors.index.json",
            "save the checkpoint as safetensors",
        )
    return [single]


class _Names:
    """Tensor names and shapes of a family, as Hugging Face writes them."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.root = "model.decoder." if spec.is_opt else "model."

    def layer(self, layer: int) -> dict[str, list[str]]:
        """Linear or norm -> the modules fused into it, by full name without `.weight`."""
        prefix = f"{self.root}layers.{layer}."
        attention = prefix + "self_attn."
        if self.spec.is_opt:
            names = {"attention_norm": ["self_attn_layer_norm"], "mlp_norm": ["final_layer_norm"]}
            names |= {"up": ["fc1"], "down": ["fc2"]}
        else:
            names = {"attention_norm": ["input_layernorm"]}
            names |= {"mlp_norm": ["post_attention_layernorm"]}
            names |= {"up": ["mlp.gate_proj", "mlp.up_proj"], "down": ["mlp.down_proj"]}
        modules = {key: [prefix + name for name in part] for key, part in names.items()}
        modules["qkv"] = [attention + side for side in ("q_proj", "k_proj", "v_proj")]
        modules["out"] = [attention + ("out_proj" if self.spec.is_opt else "o_proj")]
        if self.spec.qk_norm:
            modules["q_norm"], modules["k_norm"] = [attention + "q_norm"], [attention + "k_norm"]
        return modules

    def _layer_shapes(self, layer: int) -> dict[str, Shape]:
        spec, names = self.spec, self.layer(layer)
        hidden, inner, dim = spec.hidden_size, spec.intermediate_size, spec.head_dim
        q, kv = spec.num_heads * dim, spec.num_kv_heads * dim
        linears = [
            ("qkv", (q, kv, kv), hidden, spec.qkv_bias),
            ("out", (hidden,), q, spec.out_bias),
            ("up", (inner,) * len(names["up"]), hidden, spec.mlp_bias),
            ("down", (hidden,), inner, spec.mlp_bias),
        ]
        shapes: dict[str, Shape] = {}
        for key, outs, width, bias in linears:
            for name, out in zip(names[key], outs, strict=True):
                shapes[name + ".weight"] = (out, width)
                if bias:
                    shapes[name + ".bias"] = (out,)
        if spec.norm_affine:
            for key in ("attention_norm", "mlp_norm"):
                shapes |= self.norm_shapes(names[key][0])
        if spec.qk_norm:
            shapes[names["q_norm"][0] + ".weight"] = (dim,)
            shapes[names["k_norm"][0] + ".weight"] = (dim,)
        return shapes

    def norm_shapes(self, name: str) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {name + ".weight": (self.spec.hidden_size,)}
        if self.spec.is_opt:
            shapes[name + ".bias"] = (self.spec.hidden_size,)
        return shapes

    @property
    def final_norm(self) -> str:
        return self.root + ("final_layer_norm" if self.spec.is_opt else "norm")

    def shapes(self) -> dict[str, Shape]:
        """Every tensor that must be there."""
        spec, root = self.spec, self.root
        shapes: dict[str, Shape] = {root + "embed_tokens.weight": (spec.vocab_size, spec.embed_dim)}
        for layer in range(spec.num_layers):
            shapes |= self._layer_shapes(layer)
        if spec.final_norm and spec.norm_affine:
            shapes |= self.norm_shapes(self.final_norm)
        if spec.is_opt:
            rows = spec.max_positions + 2
            shapes[root + "embed_positions.weight"] = (rows, spec.hidden_size)
        if spec.embed_dim != spec.hidden_size:
            shapes[root + "project_in.weight"] = (spec.hidden_size, spec.embed_dim)
            shapes[root + "project_out.weight"] = (spec.embed_dim, spec.hidden_size)
        if not spec.tied_embeddings:
            shapes["lm_head.weight"] = (spec.vocab_size, spec.embed_dim)
        return shapes


def _linear(checkpoint: Checkpoint, names: list[str], bias: bool) -> Linear:
    return Linear(
        weight=checkpoint.fused([name + ".weight" for name in names]),
        bias=checkpoint.fused([name + ".bias" for name in names]) if bias else None,
    )


def _norm(checkpoint: Checkpoint, name: str) -> Norm:
    return Norm(
        weight=checkpoint.fused([name + ".weight"]) if name + ".weight" in checkpoint else None,
        bias=checkpoint.fused([name + ".bias"]) if name + ".bias" in checkpoint else None,
    )


def load_layer(checkpoint: Checkpoint, spec: ModelSpec, layer: int) -> LayerWeights:
    """One decoder layer, fused."""
    names = _Names(spec).layer(layer)
    qk_norm = None
    if spec.qk_norm:
        q, k = (checkpoint.fused([names[key][0] + ".weight"]) for key in ("q_norm", "k_norm"))
        qk_norm = (q, k)
    return LayerWeights(
        attention_norm=_norm(checkpoint, names["attention_norm"][0]),
        qkv=_linear(checkpoint, names["qkv"], spec.qkv_bias),
        out=_linear(checkpoint, names["out"], spec.out_bias),
        qk_norm=qk_norm,
        mlp_norm=_norm(checkpoint, names["mlp_norm"][0]),
        up=_linear(checkpoint, names["up"], spec.mlp_bias),
        down=_linear(checkpoint, names["down"], spec.mlp_bias),
    )


def load_weights(
    directory: str | Path, spec: ModelSpec, dtype: str, device: torch.device
) -> ModelWeights:
    """All weights in `dtype` ("float32" | "bfloat16" | "float16") on a device.

    Raises InvalidConfig naming the file and tensor that is missing, misshaped or unexpected.
    """
    checkpoint = Checkpoint(directory, TORCH_DTYPES[dtype], device)
    names = _Names(spec)
    checkpoint.check_names(names.shapes(), optional=("lm_head.weight",))
    embedding = checkpoint.fused([names.root + "embed_tokens.weight"])
    projected = spec.embed_dim != spec.hidden_size
    return ModelWeights(
        embedding=embedding,
        positions=checkpoint.fused([names.root + "embed_positions.weight"])
        if spec.is_opt
        else None,
        project_in=_linear(checkpoint, [names.root + "project_in"], False) if projected else None,
        project_out=_linear(checkpoint, [names.root + "project_out"], False) if projected else None,
        layers=[load_layer(checkpoint, spec, layer) for layer in range(spec.num_layers)],
        final_norm=_norm(checkpoint, names.final_norm) if spec.final_norm else None,
        head=embedding if spec.tied_embeddings else checkpoint.fused(["lm_head.weight"]),
    )
