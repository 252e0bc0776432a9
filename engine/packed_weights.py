"""A model's weights in the layout that its device multiplies fastest; done once, after loading."""

from __future__ import annotations

from dataclasses import replace

from ..kernels.linear import packed
from .weights import LayerWeights, Linear, ModelWeights


def pack_weights(weights: ModelWeights) -> ModelWeights:
    """The same weights, packed. Layer by layer and in place of the plain ones, so that no second
    copy of the model is ever in memory; only a head that is also the embedding is kept twice."""
    for index, layer in enumerate(weights.layers):
        weights.layers[index] = _pack_layer(layer)
    return replace(
        weights,
        project_in=_pack(weights.project_in),
        project_out=_pack(weights.project_out),
        head=None if weights.head is None else packed(weights.head),
    )


def _pack_layer(layer: LayerWeights) -> LayerWeights:
    sides = (layer.qkv, layer.out, layer.up, layer.down)
    qkv, out, up, down = (replace(side, weight=packed(side.weight)) for side in sides)
    return replace(layer, qkv=qkv, out=out, up=up, down=down)


def _pack(side: Linear | None) -> Linear | None:
    return None if side is None else replace(side, weight=packed(side.weight))
