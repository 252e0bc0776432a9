"""Weights from safetensors, mapped and copied once into the fused tensors the model multiplies.

Each rank reads only its shard: the layers of its stage, and of each matrix the rows or columns
that are its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .cache import TORCH_DTYPES
from .checkpoint import Checkpoint, Shape
from .shard_plan import Shard
from .spec import ModelSpec


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
    """One layer's shard: qkv and up hold the rank's rows, out and down its columns.

    Of a bias that follows the sum over tensor ranks, the first of them has all and no other any. In
    a mixture's layer up and down are stacked: [experts, out, in], without biases.
    """

    attention_norm: Norm
    qkv: Linear  # [(heads + 2 kv_heads) * head_dim, hidden]
    out: Linear
    qk_norm: tuple[Tensor, Tensor] | None  # [head_dim] each
    mlp_norm: Norm
    up: Linear  # gate and up fused; OPT: fc1
    down: Linear
    router: Tensor | None  # [experts, hidden]; None: the MLP is dense


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelWeights:
    embedding: Tensor | None  # [vocab, embed_dim]; first stage only, like the two below
    positions: Tensor | None  # learned: [max_positions + 2, hidden]
    project_in: Linear | None
    layers: list[LayerWeights]  # of the stage
    final_norm: Norm | None  # last stage only, like the two below
    project_out: Linear | None
    head: Tensor | None  # [vocab, embed_dim]; the embedding itself when tied


class Tensors(Protocol):
    """Where tensors come from by name, as `checkpoint.Checkpoint` gives them."""

    def __contains__(self, name: str) -> bool: ...

    def fused(
        self,
        names: Sequence[str],
        *,
        rows: Sequence[range] | None = None,
        columns: range | None = None,
    ) -> Tensor: ...


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
            names |= self._mlp(layer)
        modules = {key: [prefix + name for name in part] for key, part in names.items()}
        modules["qkv"] = [attention + side for side in ("q_proj", "k_proj", "v_proj")]
        modules["out"] = [attention + ("out_proj" if self.spec.is_opt else "o_proj")]
        if self.spec.qk_norm:
            modules["q_norm"], modules["k_norm"] = [attention + "q_norm"], [attention + "k_norm"]
        return modules

    def _mlp(self, layer: int) -> dict[str, list[str]]:
        """A gated MLP's modules, or a mixture's: gate and up of each expert in turn."""
        if self.spec.mixture is None or layer not in self.spec.mixture.layers:
            return {"up": ["mlp.gate_proj", "mlp.up_proj"], "down": ["mlp.down_proj"]}
        is_mixtral = self.spec.family == "mixtral"
        block = "block_sparse_moe" if is_mixtral else "mlp"
        gate, up, down = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
        experts = [f"{block}.experts.{expert}." for expert in range(self.spec.mixture.experts)]
        return {
            "router": [f"{block}.gate"],
            "up": [expert + side for expert in experts for side in (gate, up)],
            "down": [expert + down for expert in experts],
        }

    def _layer_shapes(self, layer: int) -> dict[str, Shape]:
        spec, names = self.spec, self.layer(layer)
        hidden, inner, dim = spec.hidden_size, spec.intermediate_size, spec.head_dim
        q, kv = spec.num_heads * dim, spec.num_kv_heads * dim
        mixture = spec.mixture if "router" in names else None
        if mixture is not None:
            inner = mixture.expert_intermediate
        linears = [
            ("qkv", (q, kv, kv), hidden, spec.qkv_bias),
            ("out", (hidden,), q, spec.out_bias),
            ("up", (inner,) * len(names["up"]), hidden, spec.mlp_bias),
            ("down", (hidden,) * len(names["down"]), inner, spec.mlp_bias),
        ]
        if mixture is not None:
            linears.append(("router", (mixture.experts,), hidden, False))
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


def _norm(checkpoint: Tensors, name: str) -> Norm:
    return Norm(
        weight=checkpoint.fused([name + ".weight"]) if name + ".weight" in checkpoint else None,
        bias=checkpoint.fused([name + ".bias"]) if name + ".bias" in checkpoint else None,
    )


def _by_rows(checkpoint: Tensors, names: list[str], rows: list[range], bias: bool) -> Linear:
    """A rank's rows of each matrix: it computes that part of the outputs."""
    return Linear(
        weight=checkpoint.fused([name + ".weight" for name in names], rows=rows),
        bias=checkpoint.fused([name + ".bias" for name in names], rows=rows) if bias else None,
    )


def _by_columns(checkpoint: Tensors, names: list[str], columns: range, bias: bool) -> Linear:
    """A rank's columns: it computes a summand of all outputs. With `bias`, the bias too."""
    return Linear(
        weight=checkpoint.fused([name + ".weight" for name in names], columns=columns),
        bias=checkpoint.fused([name + ".bias" for name in names]) if bias else None,
    )


def load_layer(checkpoint: Tensors, spec: ModelSpec, layer: int, shard: Shard) -> LayerWeights:
    """A rank's part of one decoder layer, fused."""
    names = _Names(spec).layer(layer)
    qk_norm = None
    if spec.qk_norm:
        q, k = (checkpoint.fused([names[key][0] + ".weight"]) for key in ("q_norm", "k_norm"))
        qk_norm = (q, k)
    heads, kv_heads = (
        range(part.start * spec.head_dim, part.stop * spec.head_dim)
        for part in (shard.heads, shard.kv_heads)
    )
    adds_bias = shard.tensor_rank == 0
    up, down, router = _load_mlp(checkpoint, spec, names, shard)
    return LayerWeights(
        attention_norm=_norm(checkpoint, names["attention_norm"][0]),
        qkv=_by_rows(checkpoint, names["qkv"], [heads, kv_heads, kv_heads], spec.qkv_bias),
        out=_by_columns(checkpoint, names["out"], heads, spec.out_bias and adds_bias),
        qk_norm=qk_norm,
        mlp_norm=_norm(checkpoint, names["mlp_norm"][0]),
        up=up,
        down=down,
        router=router,
    )


def _load_mlp(
    checkpoint: Tensors, spec: ModelSpec, names: dict[str, list[str]], shard: Shard
) -> tuple[Linear, Linear, Tensor | None]:
    """A layer's `up`, `down` and `router`."""
    if "router" not in names:
        inner = [shard.inner] * len(names["up"])
        adds_bias = spec.mlp_bias and shard.tensor_rank == 0
        up = _by_rows(checkpoint, names["up"], inner, spec.mlp_bias)
        return up, _by_columns(checkpoint, names["down"], shard.inner, adds_bias), None
    inner = [shard.expert_inner] * len(names["up"])
    up = _by_rows(checkpoint, names["up"], inner, bias=False)
    down = _by_columns(checkpoint, names["down"], shard.expert_inner, bias=False)
    router = checkpoint.fused([names["router"][0] + ".weight"])
    return _stacked(up, len(router)), _stacked(down, len(router)), router


def _stacked(linear: Linear, experts: int) -> Linear:
    """Experts one above the other as [experts, out, in]."""
    rows, columns = linear.weight.shape
    return Linear(weight=linear.weight.view(experts, rows // experts, columns), bias=None)


def load_weights(
    directory: str | Path, spec: ModelSpec, dtype: str, device: torch.device, shard: Shard
) -> ModelWeights:
    """A rank's weights in `dtype` ("float32" | "bfloat16" | "float16") on a device.

    Raises InvalidConfig naming the file and tensor that is missing, misshaped or unexpected.
    """
    checkpoint = Checkpoint(directory, TORCH_DTYPES[dtype], device)
    checkpoint.check_names(tensor_shapes(spec), optional=("lm_head.weight",))
    return weights_of(checkpoint, spec, shard)


def tensor_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Every tensor that a checkpoint of the model must have."""
    return _Names(spec).shapes()


def weights_of(checkpoint: Tensors, spec: ModelSpec, shard: Shard) -> ModelWeights:
    """A rank's weights, of a checkpoint whose tensors are known to be there."""
    names = _Names(spec)
    first, last = shard.is_first_stage, shard.is_last_stage
    embedding = names.root + "embed_tokens.weight"
    tied = spec.tied_embeddings

    def vocabulary(name: str) -> Tensor:
        return checkpoint.fused([name], rows=[shard.vocab])

    def projection(name: str) -> Linear:
        return Linear(weight=checkpoint.fused([f"{names.root}{name}.weight"]), bias=None)

    projected = spec.embed_dim != spec.hidden_size
    embedded = vocabulary(embedding) if first else None
    head = None
    if last:
        shared = tied and embedded is not None
        head = embedded if shared else vocabulary(embedding if tied else "lm_head.weight")
    return ModelWeights(
        embedding=embedded,
        positions=checkpoint.fused([names.root + "embed_positions.weight"])
        if spec.is_opt and first
        else None,
        project_in=projection("project_in") if projected and first else None,
        layers=[load_layer(checkpoint, spec, layer, shard) for layer in shard.layers],
        final_norm=_norm(checkpoint, names.final_norm) if spec.final_norm and last else None,
        project_out=projection("project_out") if projected and last else None,
        head=head,
    )
