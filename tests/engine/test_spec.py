"""config.json is read as transformers reads it, and what is not supported is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from phasewise.engine.errors import InvalidConfig, UnsupportedModel
from phasewise.engine.families import FAMILIES
from phasewise.engine.spec import fingerprint, load_spec
from phasewise.placement.latency.model_shape import read_shape

transformers = pytest.importorskip("transformers")


def _write(directory: Path, config: dict[str, Any], name: str = "config.json") -> Path:
    (directory / name).write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_missing_keys_take_the_defaults_of_transformers(tmp_path: Path, architecture: str) -> None:
    spec = load_spec(_write(tmp_path, {"architectures": [architecture]}))
    theirs = getattr(transformers, architecture.replace("ForCausalLM", "Config"))()
    assert spec.vocab_size == theirs.vocab_size
    assert spec.hidden_size == theirs.hidden_size
    assert spec.num_layers == theirs.num_hidden_layers
    assert spec.num_heads == theirs.num_attention_heads
    assert spec.num_kv_heads == getattr(theirs, "num_key_value_heads", theirs.num_attention_heads)
    assert spec.max_positions == theirs.max_position_embeddings
    assert spec.tied_embeddings == theirs.tie_word_embeddings
    inner = theirs.ffn_dim if spec.is_opt else theirs.intermediate_size
    assert spec.intermediate_size == inner
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert spec.head_dim == head_dim
    window = getattr(theirs, "sliding_window", None)
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * spec.num_layers
    assert spec.windows == tuple(
        (window or 0) if kind == "sliding_attention" else 0 for kind in kinds
    )
    eos = theirs.eos_token_id
    assert spec.eos_token_ids == (frozenset() if eos is None else frozenset([eos]))
    assert (spec.bos_token_id, spec.pad_token_id) == (theirs.bos_token_id, theirs.pad_token_id)
    if spec.rope is not None:
        assert spec.rope.theta == theirs.rope_parameters["rope_theta"]
        assert spec.norm_eps == theirs.rms_norm_eps


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_old_and_new_rope_keys_mean_the_same(tmp_path: Path, key: str) -> None:
    llama = {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    old = llama | {"rope_theta": 5e5, "rope_scaling": {key: "linear", "factor": 2.0}}
    new = llama | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}}
    old |= {"torch_dtype": "bfloat16"}
    new |= {"dtype": "bfloat16"}
    assert load_spec(_write(tmp_path / "old", old)) == load_spec(_write(tmp_path / "new", new))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["Qwen2MoeForCausalLM"]}, "Qwen2MoeForCausalLM"),
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM"),
        ({"architectures": [], "model_type": "bert"}, "bert"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_is_not_supported_is_refused_by_name_with_what_is(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedModel, match=named) as caught:
        load_spec(_write(tmp_path, {"architectures": ["LlamaForCausalLM"]} | change))
    assert all(name in str(caught.value) for name in (*FAMILIES, "yarn"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": "big"}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"rope_theta": None}, "rope_theta"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "num_key_value_heads"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ],
)
def test_a_malformed_value_is_refused_with_its_key(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidConfig, match=named):
        load_spec(_write(tmp_path, {"architectures": ["LlamaForCausalLM"]} | change))


QWEN_MOE = {"architectures": ["Qwen3MoeForCausalLM"]}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_experts_per_tok": 200}, "num_experts_per_tok is 200 of 128 experts"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"num_experts": "many"}, "num_experts is 'many'"),
        ({"num_experts": 8, "num_local_experts": 4}, "num_local_experts"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ({"mlp_only_layers": 3}, "mlp_only_layers"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size"),
    ],
)
def test_a_malformed_mixture_is_refused_with_its_key(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidConfig, match=named):
        load_spec(_write(tmp_path, QWEN_MOE | change))


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("dense", [None, [], [1, 5]])
@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_the_layers_that_have_experts_are_those_of_transformers(
    tmp_path: Path, step: int, dense: list[int] | None, name: str
) -> None:
    sizes = {"num_hidden_layers": 7, name: 4, "num_experts_per_tok": 2, "hidden_size": 16}
    sizes |= {"vocab_size": 9, "intermediate_size": 8, "moe_intermediate_size": 4}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    changes = sizes | {"decoder_sparse_step": step, "mlp_only_layers": dense}
    mixture = load_spec(_write(tmp_path, QWEN_MOE | changes)).mixture
    assert mixture is not None and mixture.experts == 4
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**changes))
    theirs = [hasattr(layer.mlp, "experts") for layer in model.model.layers]
    assert [layer in mixture.layers for layer in range(7)] == theirs


def test_a_mixture_is_described_in_the_words_the_planner_uses(tmp_path: Path) -> None:
    for architecture, changes in (
        ("MixtralForCausalLM", {"num_local_experts": 8}),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": [0], "num_experts": 16}),
    ):
        theirs = getattr(transformers, architecture.replace("ForCausalLM", "Config"))(**changes)
        config = theirs.to_dict() | {"architectures": [architecture]}
        mixture = load_spec(_write(tmp_path, config)).mixture
        shape = read_shape(tmp_path)
        assert mixture is not None
        assert mixture.experts == shape.experts
        assert mixture.experts_per_token == shape.experts_per_token
        assert mixture.expert_intermediate == shape.expert_intermediate
        assert len(mixture.layers) == shape.moe_layers


def test_a_missing_or_broken_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"config\.json: no such file"):
        load_spec(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InvalidConfig, match="cannot be read"):
        load_spec(tmp_path)


def test_generation_config_names_the_end_tokens_before_config(tmp_path: Path) -> None:
    _write(tmp_path, {"architectures": ["Qwen2ForCausalLM"], "eos_token_id": 3})
    assert load_spec(tmp_path).eos_token_ids == {3}
    _write(tmp_path, {"eos_token_id": [5, 6]}, "generation_config.json")
    assert load_spec(tmp_path).eos_token_ids == {5, 6}


def test_parameter_counts_equal_those_of_transformers(tmp_path: Path) -> None:
    for name in ("Llama", "Mixtral", "Qwen2", "Qwen3", "Qwen3Moe", "OPT"):
        sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"vocab_size": 99, "word_embed_proj_dim": 20, "intermediate_size": 70}
        sizes |= {"moe_intermediate_size": 24, "mlp_only_layers": [1], "num_local_experts": 3}
        sizes |= {"num_experts_per_tok": 2}
        sizes |= {"ffn_dim": 70, "num_key_value_heads": 2, "max_position_embeddings": 33}
        config = getattr(transformers, f"{name}Config")(**sizes)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        model.save_pretrained(tmp_path / name)
        spec = load_spec(tmp_path / name)
        assert spec.num_parameters == sum(p.numel() for p in model.parameters())
        assert spec.weight_bytes("bfloat16") == 2 * spec.num_parameters


def test_fingerprints_differ_when_weights_or_config_do(tmp_path: Path) -> None:
    _write(tmp_path, {"architectures": ["LlamaForCausalLM"]})
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(100_000))
    first = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == first
    weights.write_bytes(bytes(50_000) + b"x" + bytes(49_999))
    second = fingerprint(tmp_path)
    _write(tmp_path, {"architectures": ["LlamaForCausalLM"], "rope_theta": 1e6})
    assert len({first, second, fingerprint(tmp_path)}) == 3
