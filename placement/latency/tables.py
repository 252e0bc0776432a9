"""Published tables of step times, read as profiles: Splitwise, Helix, Vidur.

None was measured by us. Times are the authors' engines of their day (vLLM 2023/24), so they say
what that stack took, not what the hardware can do. Every reader takes a file as it was published,
gzipped or not, and raises InvalidConfig with the line of a row that is none.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from statistics import median
from typing import Literal, TypeVar

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
Row = Mapping[str, str]
Parsed = TypeVar("Parsed")


def _table(path: str | Path, columns: set[str], parse: Callable[[Row], Parsed]) -> list[Parsed]:
    """What `parse` makes of every row; it raises ValueError or KeyError for one that is none."""
    lines = _lines(path)
    reader = csv.DictReader(lines)
    rows = [(reader.line_num, row) for row in reader]
    missing = sorted(columns - set(reader.fieldnames or ()))
    if missing or not rows:
        raise InvalidConfig(str(path), f"empty, or without {missing}", "give the published table")
    parsed = []
    for line, row in rows:
        try:
            if None in row or None in row.values():
                raise ValueError(f"expected {len(reader.fieldnames or ())} columns")
            parsed.append(parse(row))
        except (KeyError, ValueError) as error:
            raise _bad_row(path, line, error) from error
    return parsed


def _lines(path: str | Path) -> list[str]:
    path = Path(path)
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            return file.read().splitlines()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InvalidConfig(str(path), f"cannot read: {error}", "give a CSV file") from error


def _bad_row(path: str | Path, line: int, error: Exception) -> InvalidConfig:
    return InvalidConfig(
        f"{path}:{line}", f"not a row of the table: {error}", "mend or remove the line"
    )


def _seconds(milliseconds: str) -> float:
    """Of what a table says. Raises ValueError for what is no time above 0."""
    if not 0 < float(milliseconds) < inf:
        raise ValueError(f"{milliseconds} ms is no time above 0")
    return float(milliseconds) / 1000


def _sizes(row: Row, *keys: str) -> tuple[int, ...]:
    """Raises ValueError for one that is not 1 or more."""
    sizes = tuple(int(row[key]) for key in keys)
    if min(sizes) < 1:
        raise ValueError(f"{keys[sizes.index(min(sizes))]} is below 1")
    return sizes


def read_splitwise(path: str | Path) -> Mapping[tuple[str, str], StepProfile]:
    """`perf_model.csv` by (model, hardware).

    Decode times are means over the outputs, so a point's context is the mean too. Rows of
    `h100-80gb-pcap` were not measured (prompt time × 1.3 of h100's) and are left out.
    """
    columns = {"model", "hardware", "prompt_size", "batch_size", "token_size", "tensor_parallel"}
    points: dict[tuple[str, str], list[ProfilePoint]] = {}
    for key, found in _table(path, columns | {"prompt_time", "token_time"}, _splitwise_row):
        if not key[1].endswith("-pcap"):
            points.setdefault(key, []).extend(found)
    return {
        (model, hardware): StepProfile(
            hardware=hardware, model=model, dtype="float16", origin=SPLITWISE, points=tuple(found)
        )
        for (model, hardware), found in points.items()
    }


def _splitwise_row(row: Row) -> tuple[tuple[str, str], tuple[ProfilePoint, ProfilePoint]]:
    """(model, hardware), and the points of prefill and decode."""
    prompt, batch, output, tp = _sizes(
        row, "prompt_size", "batch_size", "token_size", "tensor_parallel"
    )
    prompt_s, token_s = _seconds(row["prompt_time"]), _seconds(row["token_time"])
    return (row["model"], row["hardware"]), (
        _point("prefill", tp, prompt, 0, batch, prompt_s),
        _point("decode", tp, 1, prompt + output // 2, batch, token_s),
    )


def _point(
    phase: str, tp: int, new_tokens: int, context: int, batch: int, seconds: float
) -> ProfilePoint:
    return ProfilePoint(
        phase=phase,
        tp=tp,
        pp=1,
        new_tokens=new_tokens,
        context=context,
        batch=batch,
        seconds=seconds,
    )


def read_helix(
    prompt: str | Path, decode: str | Path, *, model: str, hardware: str, tp: int, num_layers: int
) -> StepProfile:
    """Two headerless files of (tokens in the batch, milliseconds a layer), as a whole model.

    Its tables know no context length. Prompt times are rounded to milliseconds, decode times to
    a tenth and, from some point on, to milliseconds too. The row of no tokens that each begins
    with says nothing.
    """
    points = []
    for phase, path in (("prefill", prompt), ("decode", decode)):
        for number, line in enumerate(_lines(path), start=1):
            try:
                tokens, milliseconds = line.split(",")
                count = int(float(tokens))
                if count:
                    rows, new = (count, 1) if phase == "decode" else (1, count)
                    seconds = _seconds(milliseconds) * num_layers
                    points.append(_point(phase, tp, new, 0, rows, seconds))
            except ValueError as error:
                raise _bad_row(path, number, error) from error
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

    @property
    def features(self) -> StepFeatures:
        """Tokens alone, as attention is not in it."""
        return StepFeatures(new_tokens=self.tokens)


def read_vidur_layers(path: str | Path) -> list[LayerRow]:
    """`mlp.csv`: of each row the sum of the median times of the layer's operators."""
    columns = {"num_tokens", "n_embd", "n_head", "use_gated_mlp", "num_tensor_parallel_workers"}
    return _table(path, columns, _layer_row)


def _layer_row(row: Row) -> LayerRow:
    tokens, tp = _sizes(row, "num_tokens", "num_tensor_parallel_workers")
    # An operator that a model does not have is an empty field.
    times = (row.get(f"time_stats.{op}.median") for op in VIDUR_OPS)
    seconds = sum(_seconds(ms) for ms in times if ms)
    return LayerRow(shape=_vidur_shape(row), tp=tp, tokens=tokens, seconds=seconds)


def _vidur_shape(row: Row) -> ModelShape:
    hidden, heads, kv_heads, intermediate, vocab = _sizes(
        row, "n_embd", "n_head", "n_kv_head", "n_expanded_embd", "vocab_size"
    )
    return ModelShape(
        name=f"{hidden}-{intermediate}-{kv_heads}",
        num_layers=1,
        hidden=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        intermediate=intermediate,
        mlp_matrices=3 if row["use_gated_mlp"] == "True" else 2,
        vocab=vocab,
        tied=False,
        max_positions=4096,
        weight_bytes=2.0,
        kv_item_bytes=2.0,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectiveRow:
    """`devices` sum `num_bytes`, or one sends them to another; `a_node` of them on each node."""

    machine: str
    devices: int
    a_node: int
    num_bytes: int
    seconds: float


def read_vidur_collective(
    path: str | Path, collective: Literal["all_reduce", "send_recv"] = "all_reduce"
) -> list[CollectiveRow]:
    """NCCL's times, `network/<machine>/<collective>.csv`: the median over ranks.

    The machine is the folder's name where no column `machine` says it.
    """
    column = f"time_stats.{collective}.median"
    ranks: dict[tuple[str, int, int, int], list[float]] = {}
    parse = partial(_collective_row, column, Path(path).resolve().parent.name)
    for key, seconds in _table(path, {"num_workers", "devices_per_node", "size", column}, parse):
        ranks.setdefault(key, []).append(seconds)
    return [
        CollectiveRow(
            machine=machine,
            devices=devices,
            a_node=a_node,
            num_bytes=num_bytes,
            seconds=median(seconds),
        )
        for (machine, devices, a_node, num_bytes), seconds in ranks.items()
    ]


def _collective_row(column: str, folder: str, row: Row) -> tuple[tuple[str, int, int, int], float]:
    devices, a_node, num_bytes = _sizes(row, "num_workers", "devices_per_node", "size")
    return (row.get("machine") or folder, devices, a_node, num_bytes), _seconds(row[column])


def read_vidur_attention(path: str | Path, *, model: str, hardware: str) -> StepProfile:
    """Attention's own kernels of one layer (`attention.csv`), prompt chunks and decode rows."""
    columns = {"is_prefill", "batch_size", "kv_cache_size", "prefill_chunk_size"}
    points = _table(path, columns | {"num_tensor_parallel_workers"}, _attention_row)
    return StepProfile(
        hardware=hardware, model=model, dtype="float16", origin=VIDUR, points=tuple(points)
    )


def _attention_row(row: Row) -> ProfilePoint:
    tp, batch = _sizes(row, "num_tensor_parallel_workers", "batch_size")
    phase = "prefill" if row["is_prefill"] == "True" else "decode"
    new = int(float(row["prefill_chunk_size"])) if phase == "prefill" else 1
    seconds = _seconds(row[f"time_stats.attn_{phase}.median"])
    return _point(phase, tp, new, int(row["kv_cache_size"]), batch, seconds)
