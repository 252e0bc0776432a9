"""The forward pass over a flat batch of tokens: embedding, layers, head. No sampling, no blocks.

The order of operations is transformers', so that float32 greedy tokens agree. A model is one rank's
shard: `reduce` adds up what the tensor ranks of its stage computed, and stages hand on the hidden
state between them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.experts import route
from ..kernels.linear import linear
from ..kernels.rows import Rows
from .cache import KVCache
from .rope import RopeTable
from .shard_plan import Shard
from .spec import ModelSpec
from .upload import upload
from .weights import LayerWeights, Linear, ModelWeights, Norm

if TYPE_CHECKING:
    from ..kernels.operators import Operators, Plan

LayerDone = Callable[[int], None]
Reduce = Callable[[Tensor], None]  # sums a tensor over the stage's ranks, in place


def _linear(x: Tensor, side: Linear) -> Tensor:
    return linear(x, side.weight, side.bias)


class Model:
    """Weights and operators of one device; `forward` fills the cache and returns logits.

    `reduce` is None where the shard's stage has one rank.
    """

    def __init__(
        self,
        spec: ModelSpec,
        shard: Shard,
        weights: ModelWeights,
        operators: Operators,
        max_model_len: int,
        device: torch.device,
        reduce: Reduce | None = None,
    ) -> None:
        assert (reduce is None) == (shard.tensor_parallel == 1)
        self.spec = spec
        self.shard = shard
        self._reduce = reduce
        self._weights = weights
        self._operators = operators
        self._device = device
        self._scale = spec.head_dim**-0.5
        self._rope = None
        if spec.rope is not None:
            self._rope = RopeTable(
                spec.rope, spec.head_dim, spec.max_positions, max_model_len, device
            )

    def forward(
        self,
        token_ids: np.ndarray,  # int64 [tokens]
        rows: Rows,
        prompt_lengths: np.ndarray,  # int64 [rows]: the client's own prompts, for dynamic rope
        last: np.ndarray,  # int64: tokens whose logits are wanted
        cache: KVCache,
        layer_done: LayerDone | None,
        received: Tensor | None = None,  # [tokens, hidden]: from the stage before
    ) -> Tensor:
        """Compute a step. `layer_done(i)` follows the last write into the stage's layer i.

        Returns float32 logits [len(last), the shard's vocab], or before the last stage the hidden
        state [tokens, hidden].
        """
        positions = upload(rows.positions, self._device)
        cos_sin, angles = None, positions
        if self._rope is not None:
            cos_sin, angles = self._rope.angles(rows.positions, prompt_lengths[rows.row_of])
        plan = self._operators.plan(rows, angles, self._device)
        hidden = received
        if hidden is None:
            hidden = self._embed(upload(token_ids, self._device), positions)
        wanted = upload(last, self._device)
        hidden = self._layers(hidden, plan, cos_sin, wanted, cache, layer_done)
        return hidden if self._weights.head is None else self._head(hidden).float()

    def step(
        self,
        token_ids: Tensor,  # int64 [rows]
        positions: Tensor,  # int64 [rows]
        plan: Plan,
        cache: KVCache,
    ) -> Tensor:
        """A token of every row, from what is on the device alone: a CUDA graph may hold it.

        Returns logits [rows, vocab] in the model's dtype. The model `is_graphable`.
        """
        cos_sin = None if self._rope is None else self._rope.whole
        hidden = self._embed(token_ids, positions)
        return self._head(self._layers(hidden, plan, cos_sin, None, cache, None))

    @property
    def is_graphable(self) -> bool:
        """Whether `step` may be used: a whole model whose angles depend on positions alone."""
        whole = self.shard.tensor_parallel == self.shard.pipeline_parallel == 1
        return whole and (self._rope is None or self._rope.whole is not None)

    def _layers(
        self,
        hidden: Tensor,
        plan: Plan,
        cos_sin: Tensor | None,
        wanted: Tensor | None,  # None: all tokens go on to the head
        cache: KVCache,
        layer_done: LayerDone | None,
    ) -> Tensor:
        layers = self._opt_layers if self.spec.is_opt else self._rotary_layers
        return layers(hidden, plan, cos_sin, wanted, cache, layer_done)

    def _head(self, hidden: Tensor) -> Tensor:
        assert self._weights.head is not None
        if self._weights.project_out is not None:
            hidden = _linear(hidden, self._weights.project_out)
        return linear(hidden, self._weights.head, None)

    def _embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        weights = self._weights
        assert weights.embedding is not None, "the first stage embeds"
        if self._reduce is None:
            hidden = F.embedding(token_ids, weights.embedding)
        else:
            hidden = self._embed_own(token_ids, weights.embedding)
            self._reduce(hidden)
        if weights.project_in is not None:
            hidden = _linear(hidden, weights.project_in)
        if weights.positions is not None:
            hidden = hidden + F.embedding(positions + 2, weights.positions)  # OPT keeps 2 rows free
        return hidden

    def _embed_own(self, token_ids: Tensor, embedding: Tensor) -> Tensor:
        """Embeddings of the shard's part of the vocabulary, zeros for other tokens."""
        own = token_ids - self.shard.vocab.start
        other = (own < 0) | (own >= len(self.shard.vocab))
        return F.embedding(own.masked_fill(other, 0), embedding).masked_fill_(other[:, None], 0)

    def _sum_of(self, x: Tensor, side: Linear) -> Tensor:
        """`side` of what every rank of the stage has a part of."""
        out = _linear(x, side)
        if self._reduce is not None:
            self._reduce(out)
        return out

    def _window(self, index: int) -> int:
        return self.spec.windows[self.shard.layers.start + index]

    def _is_last(self, index: int) -> bool:
        return self._weights.head is not None and index == len(self._weights.layers) - 1

    def _attend(
        self,
        qkv: Tensor,
        index: int,
        plan: Plan,
        cos_sin: Tensor | None,
        cache: KVCache,
        layer_done: LayerDone | None,
        scale: float,
    ) -> Tensor:
        """Append the layer's KV, tell that it is there, attend."""
        ops, kv, layer = self._operators, cache.layers[index], self._weights.layers[index]
        ops.rope_append(qkv, kv, plan, cos_sin, layer.qk_norm, self.spec.norm_eps)  # type: ignore
        if layer_done is not None:
            layer_done(index)
        return ops.attention(qkv, kv, plan, window=self._window(index), scale=scale)  # type: ignore

    def _rotary_layers(
        self,
        residual: Tensor,
        plan: Plan,
        cos_sin: Tensor | None,
        wanted: Tensor | None,
        cache: KVCache,
        layer_done: LayerDone | None,
    ) -> Tensor:
        """Llama, Mistral, Mixtral, Qwen: RMSNorm first, SiLU-gated MLP or a mixture of such."""
        delta = None
        for index, layer in enumerate(self._weights.layers):
            x = self._rms(residual, layer.attention_norm, delta)
            qkv = _linear(x, layer.qkv)
            attended = self._attend(qkv, index, plan, cos_sin, cache, layer_done, self._scale)
            if wanted is not None and self._is_last(index):  # only these go on to the head
                attended, residual = attended[wanted], residual[wanted]
            x = self._rms(residual, layer.mlp_norm, self._sum_of(attended, layer.out))
            delta = self._mlp(x, layer)
        if self._weights.final_norm is None:
            assert delta is not None, "a stage has a layer"
            return residual.add_(delta)
        return self._rms(residual, self._weights.final_norm, delta)

    def _mlp(self, x: Tensor, layer: LayerWeights) -> Tensor:
        ops = self._operators
        if layer.router is None:
            return self._sum_of(ops.silu_mul(_linear(x, layer.up)), layer.down)
        mixture = self.spec.mixture
        assert mixture is not None, "a layer with a router has experts"
        # Every tensor rank chooses for itself, and alike: a sum over ranks is the same bits on all.
        routing = route(
            F.linear(x, layer.router),
            mixture.experts_per_token,
            renormalised=mixture.renormalised,
        )
        out = ops.experts(x, layer.up.weight, layer.down.weight, routing)
        if self._reduce is not None:
            self._reduce(out)
        return out

    def _rms(self, residual: Tensor, norm: Norm, delta: Tensor | None) -> Tensor:
        """Norm of the residual, after `delta` was added to it in place."""
        assert norm.weight is not None
        if delta is None:
            return self._operators.rms_norm(residual, norm.weight, self.spec.norm_eps)
        return self._operators.rms_norm(delta, norm.weight, self.spec.norm_eps, residual)

    def _layer_norm(self, x: Tensor, norm: Norm) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, self.spec.norm_eps)

    def _opt_layers(
        self,
        hidden: Tensor,
        plan: Plan,
        cos_sin: Tensor | None,
        wanted: Tensor | None,
        cache: KVCache,
        layer_done: LayerDone | None,
    ) -> Tensor:
        """OPT: LayerNorm before (or, in 350m, after) each half, ReLU, learned positions."""
        first = self.spec.norm_first
        for index, layer in enumerate(self._weights.layers):
            x = self._layer_norm(hidden, layer.attention_norm) if first else hidden
            qkv = _linear(x, layer.qkv)
            qkv[:, : len(self.shard.heads) * self.spec.head_dim] *= self._scale  # q, as OPT does
            attended = self._attend(qkv, index, plan, cos_sin, cache, layer_done, 1.0)
            if wanted is not None and self._is_last(index):
                attended, hidden = attended[wanted], hidden[wanted]
            hidden = hidden + self._sum_of(attended, layer.out)
            hidden = hidden if first else self._layer_norm(hidden, layer.attention_norm)
            hidden = self._opt_mlp(hidden, layer)
        norm = self._weights.final_norm
        return hidden if norm is None else self._layer_norm(hidden, norm)

    def _opt_mlp(self, hidden: Tensor, layer: LayerWeights) -> Tensor:
        first = self.spec.norm_first
        x = self._layer_norm(hidden, layer.mlp_norm) if first else hidden
        hidden = hidden + self._sum_of(F.relu(_linear(x, layer.up)), layer.down)
        return hidden if first else self._layer_norm(hidden, layer.mlp_norm)
