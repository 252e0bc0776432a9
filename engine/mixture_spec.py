"""What a config.json says about a mixture of experts: how many, which layers, how tokens choose.

Knows no torch. Both names of the number of experts are read: transformers writes either.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InvalidConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureSpec:
    """Layers whose MLP is a choice of experts, each a gated MLP of its own."""

    experts: int
    experts_per_token: int
    expert_intermediate: int
    renormalised: bool  # the chosen experts' weights are scaled to add up to 1
    layers: frozenset[int]  # the others have one dense MLP

    def layer_parameters(self, hidden_size: int) -> int:
        """Weights of one such layer's router and experts."""
        return self.experts * hidden_size * (1 + 3 * self.expert_intermediate)


def mixture_of(
    config: dict[str, Any], values: dict[str, Any], family: str, path: Path
) -> MixtureSpec | None:
    """From a config and its values with defaults; None for a dense model. Raises InvalidConfig."""
    if family not in ("mixtral", "qwen3_moe"):
        return None
    experts = _num_experts(config, values, path)
    layers = frozenset(range(values["num_hidden_layers"]))
    if family == "qwen3_moe":
        layers = _sparse_layers(values, path)
    if not experts or not layers:
        return None
    chosen = values["num_experts_per_tok"]
    if type(chosen) is not int or not 1 <= chosen <= experts:
        raise InvalidConfig(
            str(path), f"num_experts_per_tok is {chosen!r} of {experts} experts", "mend it"
        )
    is_mixtral = family == "mixtral"
    return MixtureSpec(
        experts=experts,
        experts_per_token=chosen,
        expert_intermediate=values["intermediate_size" if is_mixtral else "moe_intermediate_size"],
        renormalised=is_mixtral or bool(values["norm_topk_prob"]),
        layers=layers,
    )


def _num_experts(config: dict[str, Any], values: dict[str, Any], path: Path) -> int:
    """0 is a Qwen3-MoE without experts, which transformers computes as a dense model."""
    given = {key: config[key] for key in ("num_experts", "num_local_experts") if key in config}
    if len(set(given.values())) > 1:
        raise InvalidConfig(str(path), f"{given} contradict each other", "keep one")
    name, experts = next(iter(given.items()), ("num_experts", values["num_experts"]))
    if type(experts) is not int or experts < 0:
        raise InvalidConfig(str(path), f"{name} is {experts!r}", "give a positive integer")
    return experts


def _sparse_layers(values: dict[str, Any], path: Path) -> frozenset[int]:
    """Every `decoder_sparse_step`-th layer, counted from 1, but for `mlp_only_layers`."""
    step, dense = values["decoder_sparse_step"], values["mlp_only_layers"] or []
    if type(step) is not int or step < 1:
        raise InvalidConfig(
            str(path), f"decoder_sparse_step is {step!r}", "give a positive integer"
        )
    if not isinstance(dense, list) or any(type(layer) is not int for layer in dense):
        raise InvalidConfig(
            str(path), f"mlp_only_layers is {dense!r}", "give a list of layer numbers"
        )
    layers = range(step - 1, values["num_hidden_layers"], step)
    return frozenset(layers) - frozenset(dense)
