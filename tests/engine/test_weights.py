"""Weights load from single and sharded files; whatever is wrong with them is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from phasewise.engine.errors import InvalidConfig
from phasewise.engine.shard_plan import plan_shards
from phasewise.engine.spec import load_spec
from phasewise.engine.weights import ModelWeights, load_weights
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")


def _model(**changes: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 51}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes | changes)))


def _load(directory: Path, dtype: str = "float32") -> ModelWeights:
    spec = load_spec(directory)
    (whole,) = plan_shards(spec)
    return load_weights(directory, spec, dtype, CPU, whole)


def test_fused_tensors_hold_the_parts_in_order(tmp_path: Path) -> None:
    model = _model()
    model.save_pretrained(tmp_path)
    layer = _load(tmp_path).layers[1]
    theirs = model.model.layers[1]
    attention, mlp = theirs.self_attn, theirs.mlp
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert torch.equal(layer.qkv.weight, torch.cat(parts))
    assert torch.equal(layer.up.weight, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))


def test_shards_hold_the_same_weights_as_one_file(tmp_path: Path) -> None:
    model = _model()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = _load(tmp_path / "one"), _load(tmp_path / "many")
    assert torch.equal(one.head, many.head)
    for mine, other in zip(one.layers, many.layers, strict=True):
        assert torch.equal(mine.qkv.weight, other.qkv.weight)
        assert torch.equal(mine.down.weight, other.down.weight)


def test_weights_are_converted_to_the_asked_dtype(tmp_path: Path) -> None:
    _model().save_pretrained(tmp_path)
    assert _load(tmp_path, "bfloat16").layers[0].qkv.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("has_head", [True, False])
def test_a_tied_head_is_the_embedding_whether_stored_or_not(tmp_path: Path, has_head: bool) -> None:
    _model(tie_word_embeddings=True).save_pretrained(tmp_path)
    if has_head:
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, tmp_path / "model.safetensors")
    weights = _load(tmp_path)
    assert weights.head is weights.embedding


def _without(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def _misshaped(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(31)


def _unexpected(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_without, r"model\.layers\.1\.mlp\.up_proj\.weight is missing"),
        (_misshaped, r"model\.safetensors: tensor model\.norm\.weight has shape \[31\]"),
        (_unexpected, r"q_proj\.bias is unexpected"),
    ],
)
def test_wrong_tensors_are_refused_by_name(
    tmp_path: Path, damage: Callable[[dict[str, torch.Tensor]], None], named: str
) -> None:
    _model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    damage(tensors)
    path.unlink()
    save_file(tensors, path)
    with pytest.raises(InvalidConfig, match=named):
        _load(tmp_path)


def test_missing_and_truncated_files_are_named(tmp_path: Path) -> None:
    _model().save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[0].write_bytes(shards[0].read_bytes()[:-100])
    with pytest.raises(InvalidConfig, match=f"{shards[0].name}: is truncated"):
        _load(tmp_path)
    shards[0].unlink()
    with pytest.raises(InvalidConfig, match=f"{shards[0].name}: is named by the index but missing"):
        _load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(InvalidConfig, match="index.json: cannot be read"):
        _load(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(InvalidConfig, match="holds neither"):
        _load(tmp_path)


def _mixture(family: str, **changes: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 51}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3}
    sizes |= {"num_experts_per_tok": 2} | changes
    config = getattr(transformers, f"{family}Config")(**sizes)
    return getattr(transformers, f"{family}ForCausalLM")(config)


@pytest.mark.parametrize("shard_size", ["50GB", "20KB"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [("Mixtral", {}), ("Qwen3Moe", {"moe_intermediate_size": 24, "mlp_only_layers": [0]})],
)
def test_experts_are_stacked_with_gate_and_up_fused_from_one_file_or_many(
    tmp_path: Path, family: str, changes: dict[str, Any], shard_size: str
) -> None:
    model = _mixture(family, **changes)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    loaded, theirs = _load(tmp_path), model.model.layers
    experts, router = theirs[1].mlp.experts, loaded.layers[1].router
    assert torch.equal(loaded.layers[1].up.weight, experts.gate_up_proj)
    assert torch.equal(loaded.layers[1].down.weight, experts.down_proj)
    assert router is not None and torch.equal(router, theirs[1].mlp.gate.weight)
    assert (loaded.layers[0].router is None) == (family == "Qwen3Moe")


def test_tensor_ranks_hold_neighbouring_columns_of_every_expert(tmp_path: Path) -> None:
    _mixture("Mixtral").save_pretrained(tmp_path)
    spec, whole = load_spec(tmp_path), _load(tmp_path).layers[0]
    gate, up = whole.up.weight.chunk(2, dim=1)
    for rank, inner in enumerate((slice(0, 13), slice(13, 26), slice(26, 40))):
        shard = replace(plan_shards(spec)[0], expert_inner=_parts(40, 3)[rank])
        part = load_weights(tmp_path, spec, "float32", CPU, shard).layers[0]
        assert torch.equal(part.up.weight, torch.cat((gate[:, inner], up[:, inner]), dim=1))
        assert torch.equal(part.down.weight, whole.down.weight[:, :, inner])


def _parts(count: int, parts: int) -> list[range]:
    return [range(count * part // parts, count * (part + 1) // parts) for part in range(parts)]


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    _mixture("Mixtral").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    path.unlink()
    save_file(tensors, path)
    with pytest.raises(InvalidConfig, match=r"layers\.1\..*experts\.2\.w3\.weight is missing"):
        _load(tmp_path)
