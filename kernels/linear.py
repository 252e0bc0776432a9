"""Matrix products with a model's weights, which a CPU wants laid out its own way.

oneDNN multiplies bfloat16 by blocks of weights; a plain matrix it lays out anew in every call,
which costs more than the product itself for the few rows of a decode step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def packed(weight: Tensor) -> Tensor:
    """The weight [out, in] as `linear` reads it fastest; itself where plain is as good.

    A packed weight takes as many bytes, and is good for nothing but `linear`.
    """
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    if not on_cpu or weight.dim() != 2 or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [tokens, in] times the weight, which may be `packed`, plus the bias: [tokens, out]."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
