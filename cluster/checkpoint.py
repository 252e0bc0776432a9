"""A cluster file against the checkpoint that it names. Reads no weights, imports no torch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from ..configs.errors import InvalidConfig
from ..configs.schema import ClusterConfig
from ..engine.shard_plan import Shard, plan_shards
from ..engine.spec import ModelSpec, load_spec
from .paced import check_paced, paced_token_bytes


def resolve(config: ClusterConfig, *, with_weights: bool = True) -> ClusterConfig:
    """The config with `model.max_model_len` filled in, checked against the checkpoint; without
    weights against its config.json alone, for a file that another machine will launch.

    Raises InvalidConfig for a checkpoint that is missing or not supported, a length that the
    model has no positions for, and a KV cache that cannot hold one sequence of full length.
    """
    path = config.model.path
    paced = config.decode.device == "paced"
    _check_files(path, with_weights=with_weights and not paced)
    for pool in (config.prefill, config.decode) if paced else ():
        check_paced(config.model, config.kv, config.paced, pool.tensor_parallel)
    spec = load_spec(path)
    _check_splits(config, spec)
    limit = position_limit(spec)
    asked = config.model.max_model_len
    if limit is not None and asked > limit:
        raise InvalidConfig(
            "model.max_model_len",
            f"{asked}, while the checkpoint has positions for {limit} tokens",
            f"set it to {limit} or less, or to 0 for all of them",
        )
    rooms = _rooms(config, spec)
    room = min(rooms)
    if asked > room or room == 0:
        tightest = rooms.index(room)
        least = asked or max(config.block_sizes)
        raise InvalidConfig(
            config.memory_keys[tightest],
            f"{config.memories[tightest]} bytes hold {room} tokens, less than one sequence of "
            f"{least}",
            f"give {_bytes_for(config, spec, least)} bytes or more, or lower model.max_model_len",
        )
    resolved = asked or (room if limit is None else min(limit, room))
    return replace(config, model=replace(config.model, max_model_len=resolved))


def position_limit(spec: ModelSpec) -> int | None:
    """Tokens that the checkpoint has positions for; None where its positions have no end.

    Learned positions are a table. Rotary ones were trained up to a length, which a scaled
    `rope_type` extends by its factor; the dynamic type rescales with every length.
    """
    rope = spec.rope
    if rope is None or rope.type == "default":
        return spec.max_positions
    if rope.type == "dynamic":
        return None
    return max(spec.max_positions, int(rope.original_max_positions * rope.factor))


def _rooms(config: ClusterConfig, spec: ModelSpec) -> list[int]:
    """Tokens that a prefill worker's KV cache holds in whole blocks, and a decode worker's."""
    return [
        memory // _block_bytes(config, spec, size) * size
        for memory, size in zip(config.memories, config.block_sizes, strict=True)
    ]


def _bytes_for(config: ClusterConfig, spec: ModelSpec, num_tokens: int) -> int:
    return max(
        -(-num_tokens // size) * _block_bytes(config, spec, size) for size in config.block_sizes
    )


def _block_bytes(config: ClusterConfig, spec: ModelSpec, size: int) -> int:
    """Bytes of a block of `size` tokens over all ranks of a worker, of the pool whose ranks take
    more."""
    if config.decode.device == "paced":
        return paced_token_bytes(config.model, config.kv, config.paced) * size
    dtype = spec.dtype if config.model.dtype == "auto" else config.model.dtype
    if config.kv.dtype != "auto":
        dtype = config.kv.dtype
    return max(
        sum(shard.kv_block_bytes(spec, dtype, size) for shard in shards)
        for shards in _check_splits(config, spec)
    )


def _check_splits(config: ClusterConfig, spec: ModelSpec) -> list[tuple[Shard, ...]]:
    """Each pool's split of the model. Raises InvalidConfig for one that it does not allow."""
    prefill = [("prefill", config.prefill)] if config.prefill.replicas else []
    return [
        plan_shards(
            spec,
            tensor_parallel=pool.tensor_parallel,
            pipeline_parallel=pool.pipeline_parallel,
            section=name,
        )
        for name, pool in (*prefill, ("decode", config.decode))
        if pool.device != "paced"
    ]


def _check_files(path: Path, *, with_weights: bool) -> None:
    if not path.is_dir():
        raise InvalidConfig(
            "model.path",
            f"{path} is no folder",
            "point it at a Hugging Face checkpoint; to check a file for another machine, validate "
            "--without-weights --set model.path=DIR, a folder with the model's config.json",
        )
    index = path / "model.safetensors.index.json"
    names = ["model.safetensors"] if with_weights else []
    if with_weights and index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise InvalidConfig(
                "model.path", f"{index} cannot be read ({error!r})", "copy the checkpoint again"
            ) from error
    missing = [name for name in ["config.json", *names] if not (path / name).exists()]
    if missing:
        raise InvalidConfig(
            "model.path",
            f"{path} lacks {', '.join(missing[:3])}",
            "a checkpoint is config.json and safetensors, single or with an index; validate "
            "--without-weights checks a file whose weights lie elsewhere",
        )
