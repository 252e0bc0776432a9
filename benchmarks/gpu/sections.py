"""The sections of the GPU benchmark, in order, and how long each may take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from .bench import Bench


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    name: str
    module: str  # of this folder; its `run(bench)`
    budget_s: float
    about: str

    def load(self) -> Callable[[Bench], None]:
        return import_module(f"{__package__}.{self.module}").run


SECTIONS = (
    Section(name="ceilings", module="ceilings", budget_s=25, about="a large copy, a large product"),
    Section(
        name="kernels", module="kernels_right", budget_s=60, about="every kernel against float64"
    ),
    Section(
        name="models",
        module="models_right",
        budget_s=60,
        about="greedy tokens and logits against transformers",
    ),
    Section(
        name="kernel speed",
        module="kernels_fast",
        budget_s=75,
        about="each kernel over the ceilings, beside torch's own",
    ),
    Section(
        name="decode", module="decode_speed", budget_s=80, about="steps of Llama-3.1-8B's shape"
    ),
    Section(name="prefill", module="prefill_speed", budget_s=45, about="prompts of the same shape"),
    Section(
        name="pair",
        module="pair",
        budget_s=80,
        about="a prefill and a decode process on one GPU, over cuda_ipc",
    ),
    Section(
        name="generate",
        module="generate_speed",
        budget_s=105,
        about="Qwen3-1.7B's shape beside transformers' generate",
    ),
)
