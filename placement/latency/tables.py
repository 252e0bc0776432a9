"""Published tables of step times, read as profiles: Splitwise, Helix, Vidur.

None was measured by us. Times are the authors' engines of their day (vLLM 2023/24), so they say
what that stack took, not what the hardware can do.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path

from ...engine.errors import InvalidConfig
from ...engine.step_time import StepFeatures
from .model_shape import ModelShape
from .step_profile import ProfilePoint, StepProfile

SPLITWISE = "published: Splitwise (ISCA '24), Mutinifni/splitwise-sim, vLLM on DGX; MIT"
HELIX = "published: Helix (ASPLOS '25) artifact, times of one layer; Apache-2.0"
VIDUR = "published: Vidur (MLSys '24), microsoft/vidur; MIT"
VIDUR_OPS = (
    "input_layernorm",
    "attn_pre_proj",
    "attn_rope",
    "attn_post_proj",
    "post_attention_layernorm",
    "mlp_up_proj",
    "mlp_act",
    "mlp_down_proj",
    "add",
)


def _rows(path: str | Path, columns: set[str]) -> list[dict[str, str]]:
    path = Path(path)
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        raise InvalidConfig(str(path), f"cannot read: {error}", "give a CSV file") from error
    missing = columns - (rows[0].keys() if rows else set())
    if missing:
        raise InvalidConfig(
            str(path), f"empty, or without {sorted(missing)}", "give the published table"
        )
    return rows


def read_splitwise(path: str | Path) -> Mapping[tuple[str, str], StepProfile]:
    """By (model, hardware). Decode times are means over the outputs, so context is the mean too.

    Rows of `h100-80gb-pcap` are not measured (prompt time × 1.3 of h100's) and left out.
    """
    points: dict[tuple[str, str], list[ProfilePoint]] = {}
    columns = {"model", "hardware", "prompt_size", "batch_size", "token_size", "tensor_parallel"}
    rows = _rows(path, columns | {"prompt_time", "token_time"})
    for line, row in enumerate(rows, start=2):
        if (row["hardware"] or "").endswith("-pcap"):
            continue
        try:
            found = _splitwise_points(row)
        except (TypeError, ValueError) as error:
            raise InvalidConfig(
                f"{path}:{line}", f"not a row of the table: {error}", "mend or remove the line"
            ) from error
        points.setdefault((row["model"], row["hardware"]), []).extend(found)
    return {
        (model, hardware): StepProfile(
            hardware=hardware, model=model, dtype="float16", origin=SPLITWISE, points=tuple(found)
        )
        for (model, hardware), found in points.items()
    }


def _splitwise_points(row: Mapping[str, str]) -> tuple[ProfilePoint, ProfilePoint]:
    """Of prefill and decode. Raises ValueError for what is no number above 0."""
    keys = ("prompt_size", "batch_size", "token_size", "tensor_parallel")
    prompt, batch, output, tp = (int(row[key]) for key in keys)
    times = float(row["prompt_time"]), float(row["token_time"])
    if min(prompt, batch, output, tp) < 1 or not all(0 < ms < inf for ms in times):
        raise ValueError("a size or a time is not above 0")
    return (
        _point("prefill", tp, prompt, 0, batch, times[0]),
        _point("decode", tp, 1, prompt + output // 2, batch, times[1]),
    )


def _point(
    phase: str, tp: int, new_tokens: int, context: int, batch: int, milliseconds: float
) -> ProfilePoint:
    return ProfilePoint(
        phase=phase,
        tp=tp,
        pp=1,
        new_tokens=new_tokens,
        context=context,
        batch=batch,
        seconds=milliseconds / 1000,
    )


def read_helix(
    prompt: str | Path, decode: str | Path, *, model: str, hardware: str, tp: int, num_layers: int
) -> StepProfile:
    """Two headerless files of (tokens in the batch, milliseconds a layer), as a whole model.

    Its tables know no context length. Prompt times are rounded to milliseconds, decode times to
    a tenth and, from some point on, to milliseconds too.
    """
    points = []
    for phase, path in (("prefill", prompt), ("decode", decode)):
        for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
            try:
                tokens, milliseconds = map(float, line.split(","))
            except ValueError as error:
                raise InvalidConfig(
                    f"{path}:{number}", f"{line!r} is not tokens,ms", "give a bs2time table"
                ) from error
            if tokens > 0 and milliseconds > 0:
                count = int(tokens)
                rows, new = (count, 1) if phase == "decode" else (1, count)
                points.append(_point(phase, tp, new, 0, rows, milliseconds * num_layers))
    return StepProfile(
        hardware=hardware, model=model, dtype="float16", origin=HELIX, points=tuple(points)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRow:
    """One layer without attention's own products and all-reduces, on one device."""

    shape: ModelShape
    tp: int
    tokens: int
    seconds: float


def read_vidur_layers(path: str | Path) -> list[LayerRow]:
    """The sum of the median times of a layer's operators (`mlp.csv`)."""
    rows = []
    for row in _rows(path, {"num_tokens", "n_embd", "n_head", "use_gated_mlp"}):
        tp = int(row.get("num_tensor_parallel_workers") or row["num_tensor_parallel_work"])
        milliseconds = sum(float(row.get(f"time_stats.{op}.median") or 0) for op in VIDUR_OPS)
        rows.append(
            LayerRow(
                shape=_vidur_shape(row),
                tp=tp,
                tokens=int(row["num_tokens"]),
                seconds=milliseconds / 1000,
            )
        )
    return rows


def _vidur_shape(row: Mapping[str, str]) -> ModelShape:
    hidden, heads = int(row["n_embd"]), int(row["n_head"])
    kv_heads, intermediate = int(row["n_kv_head"]), int(row["n_expanded_embd"])
    return ModelShape(
        name=f"{hidden}-{intermediate}-{kv_heads}",
        num_layers=1,
        hidden=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        intermediate=intermediate,
        mlp_matrices=3 if row["use_gated_mlp"] == "True" else 2,
        vocab=int(row["vocab_size"]),
        tied=False,
        max_positions=4096,
        weight_bytes=2.0,
        kv_item_bytes=2.0,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class AllReduceRow:
    """`devices` sum `num_bytes`, `a_node` of them on each node."""

    machine: str
    devices: int
    a_node: int
    num_bytes: int
    seconds: float


def read_vidur_all_reduce(path: str | Path) -> list[AllReduceRow]:
    """NCCL's times by machine (`all_reduce.csv`)."""
    median = "time_stats.all_reduce.median"
    columns = {"machine", "num_workers", "devices_per_node", "size", median}
    return [
        AllReduceRow(
            machine=row["machine"],
            devices=int(row["num_workers"]),
            a_node=int(row["devices_per_node"]),
            num_bytes=int(row["size"]),
            seconds=float(row[median]) / 1000,
        )
        for row in _rows(path, columns)
    ]


def read_vidur_attention(path: str | Path, *, model: str, hardware: str) -> StepProfile:
    """Attention's own kernels of one layer (`attention.csv`), prompt chunks and decode rows."""
    points = []
    for row in _rows(path, {"is_prefill", "batch_size", "kv_cache_size", "prefill_chunk_size"}):
        tp = int(row["num_tensor_parallel_workers"])
        batch, context = int(row["batch_size"]), int(row["kv_cache_size"])
        phase = "prefill" if row["is_prefill"] == "True" else "decode"
        name = (
            "time_stats.attn_prefill.median"
            if phase == "prefill"
            else "time_stats.attn_decode.median"
        )
        new = int(float(row["prefill_chunk_size"])) if phase == "prefill" else 1
        points.append(_point(phase, tp, new, context, batch, float(row[name])))
    return StepProfile(
        hardware=hardware, model=model, dtype="float16", origin=VIDUR, points=tuple(points)
    )


def layer_features(row: LayerRow) -> StepFeatures:
    """Of a layer without attention: tokens alone."""
    return StepFeatures(new_tokens=row.tokens)
