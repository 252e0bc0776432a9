"""Sizes read from config.json against published ones."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from phasewise.engine.errors import InvalidConfig, UnsupportedModel
from phasewise.placement.latency.model_shape import read_shape, shape_of

DATA = Path(__file__).parent / "data"


def llama(
    hidden: int, layers: int, heads: int, kv: int, inner: int, vocab: int, **more: Any
) -> Any:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "torch_dtype": "bfloat16",
        **more,
    }


LLAMA_8B = llama(4096, 32, 32, 8, 14336, 128256)
MIXTRAL = llama(
    4096, 32, 32, 8, 14336, 32000, model_type="mixtral", num_local_experts=8, num_experts_per_tok=2
)
QWEN3_30B_A3B = llama(
    2048,
    48,
    32,
    4,
    6144,
    151936,
    model_type="qwen3_moe",
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
)
OPT_13B, OPT_66B = (
    {
        "model_type": "opt",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": 4 * hidden,
        "vocab_size": 50272,
        "torch_dtype": "float16",
        "max_position_embeddings": 2048,
    }
    for hidden, layers, heads in ((5120, 40, 40), (9216, 64, 72))
)


@pytest.mark.parametrize(
    ("config", "billions", "active"),
    [
        (LLAMA_8B, 8.03, 7.50),
        (llama(8192, 80, 64, 8, 28672, 128256), 70.6, 69.5),
        (llama(5120, 64, 64, 8, 25600, 151936, model_type="qwen3", head_dim=128), 32.8, 32.0),
        (MIXTRAL, 46.7, 12.8),
        (QWEN3_30B_A3B, 30.5, 3.0),
        (OPT_13B, 12.85, 12.84),
        (OPT_66B, 65.7, 65.7),
        (llama(4096, 32, 32, 32, 11008, 32000), 6.74, 6.61),
    ],
)
def test_parameters_are_those_published(config: Any, billions: float, active: float) -> None:
    shape = shape_of(config, name="m")
    assert shape.params / 1e9 == pytest.approx(billions, rel=0.01)
    assert shape.active_params / 1e9 == pytest.approx(active, rel=0.02)


def test_kv_of_a_token_counts_kv_heads_only() -> None:
    assert shape_of(LLAMA_8B, name="m").kv_bytes_per_token == 131072
    assert shape_of(OPT_13B, name="m").kv_bytes_per_token == 2 * 40 * 5120 * 2


def test_few_tokens_touch_few_experts() -> None:
    shape = shape_of(QWEN3_30B_A3B, name="m")
    assert shape.touched_experts(1) == pytest.approx(8)
    assert shape.touched_experts(10_000) == pytest.approx(128)
    assert shape_of(LLAMA_8B, name="m").touched_experts(5) == 0


def test_capacity_agrees_with_distserves_table_on_80_gib() -> None:
    """It takes 94% of memory and no activations, and counts 16-token blocks."""
    shapes = {"facebook/opt-13b": OPT_13B, "facebook/opt-66b": OPT_66B}
    with open(DATA / "distserve_max_num_tokens.csv", newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["model"] in shapes]
    for row in rows:
        tp, pp, published = (int(row[key]) for key in ("tp", "pp", "max_num_tokens"))
        shape = shape_of(shapes[row["model"]], name="m")
        tokens = shape.kv_capacity_tokens(80 * 2**30, tp, pp, usable=0.94, max_batch_tokens=0)
        # Weights of a gigabyte more or less move a capacity that is small beside them.
        assert tokens == pytest.approx(published, rel=0.05, abs=1500 * tp * pp), row


def test_a_model_that_does_not_fit_has_no_capacity() -> None:
    assert shape_of(OPT_66B, name="m").kv_capacity_tokens(80 * 2**30, 1, 1) == 0


def test_splits_must_divide_heads_and_layers() -> None:
    shape = shape_of(OPT_66B, name="m")
    assert shape.divides(8, 4) and shape.divides(3, 1)
    assert not shape.divides(5, 1) and not shape.divides(1, 5)
    assert shape_of(LLAMA_8B, name="m").divides(16, 1)  # eight KV heads, each held twice


def test_quantised_weights_are_smaller_and_unknown_kinds_are_refused() -> None:
    fp8 = shape_of(LLAMA_8B | {"quantization_config": {"quant_method": "fp8"}}, name="m")
    assert fp8.num_bytes == pytest.approx(8.03e9, rel=0.01)
    with pytest.raises(UnsupportedModel, match="mystery"):
        shape_of(LLAMA_8B | {"quantization_config": {"quant_method": "mystery"}}, name="m")
    with pytest.raises(UnsupportedModel, match="latent"):
        shape_of(LLAMA_8B | {"kv_lora_rank": 512}, name="m")


def test_a_checkpoint_directory_is_read_and_a_broken_config_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": LLAMA_8B}))
    assert read_shape(tmp_path).num_layers == 32
    broken = {key: value for key, value in LLAMA_8B.items() if key != "vocab_size"}
    (tmp_path / "config.json").write_text(json.dumps(broken))
    with pytest.raises(InvalidConfig, match="vocab_size"):
        read_shape(tmp_path)
    with pytest.raises(InvalidConfig, match="cannot read"):
        read_shape(tmp_path / "nowhere")
