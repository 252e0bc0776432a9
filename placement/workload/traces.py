"""Readers of public request traces. A trace is columns; a bad line is named, never skipped.

Formats are told apart by their header (CSV) or keys (JSON lines), compressed files (gzip) by their
first bytes. Lines without content do not count; rows are sorted by arrival, stably. Knows neither
torch nor ray, and no clock.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...engine.errors import InvalidConfig

FloatColumn = NDArray[np.float64]
IntColumn = NDArray[np.int32]
MOONCAKE_BLOCK_TOKENS = 512  # "block size is 512 tokens", README of the FAST'25 trace release
MAX_TOKENS = 2**31 - 1
GZIP = b"\x1f\x8b"


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixHashes:
    """Ids of the prompt's blocks, request by request: `ids[offsets[i]:offsets[i + 1]]`.

    Equal ids at the start of two prompts mean equal tokens, `block_tokens` an id.
    """

    offsets: NDArray[np.int64]  # [requests + 1]
    ids: NDArray[np.int64]
    block_tokens: int

    def of(self, request: int) -> NDArray[np.int64]:
        return self.ids[self.offsets[request] : self.offsets[request + 1]]

    def take(self, rows: NDArray[np.int64]) -> PrefixHashes:
        """The hashes of the given requests, in the order given."""
        counts = np.diff(self.offsets)[rows]
        offsets = np.concatenate(([0], np.cumsum(counts)))
        starts = np.repeat(self.offsets[rows] - offsets[:-1], counts)
        ids = self.ids[starts + np.arange(offsets[-1])]
        return PrefixHashes(offsets=offsets, ids=ids, block_tokens=self.block_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """What a file recorded, one row a request. `arrival_s` starts at 0; None: lengths only."""

    path: str
    format: str
    arrival_s: FloatColumn | None
    prompt_tokens: IntColumn
    output_tokens: IntColumn
    classes: tuple[str, ...] | None = None  # a name a request
    prefix: PrefixHashes | None = None

    @property
    def num_requests(self) -> int:
        return len(self.prompt_tokens)

    @property
    def class_names(self) -> tuple[str, ...]:
        """In order of appearance."""
        return ("default",) if self.classes is None else tuple(dict.fromkeys(self.classes))


Row = Mapping[str, Any]
Parsed = tuple[float | None, int, int, str | None, list[int] | None]


def read_trace(path: str | Path, format: str = "auto") -> Trace:
    """Read a trace of any known format.

    Raises InvalidConfig with file and line for a row that does not parse, and for a file that is
    missing, empty or of an unknown format.
    """
    path = Path(path)
    if format != "auto" and format not in FORMATS:
        raise InvalidConfig(
            str(path), f"unknown trace format {format!r}", f"use auto or one of {sorted(FORMATS)}"
        )
    rows: list[Parsed] = []
    found = format
    for line, row in _rows(path):
        if found == "auto":
            found = _detect(path, line, row)
        try:
            rows.append(FORMATS[found].parse(row))
        except (KeyError, ValueError, TypeError, OverflowError, AttributeError) as error:
            raise _bad_line(path, line, found, error) from error
    if not rows:
        raise InvalidConfig(str(path), "the trace holds no requests", "give a file with rows")
    return _columns(path, found, rows)


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        with open(path, "rb") as file:
            opener = gzip.open if file.read(len(GZIP)) == GZIP else open
        with opener(path, "rt", encoding="utf-8-sig", newline="") as lines:
            first = next((word for line in lines if (word := line.strip())), "")[:1]
            lines.seek(0)
            if first == "[":
                raise InvalidConfig(
                    str(path), "a JSON list, not JSON lines", "write one object a line"
                )
            yield from (_json_rows if first == "{" else _csv_rows)(path, lines)
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise InvalidConfig(
            str(path), f"cannot read the trace: {error}", "give a readable file"
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidConfig(
            str(path), f"not a text file: {error}", "give CSV or JSON lines, plain or .gz"
        ) from error


def _json_rows(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _bad_line(path, number, "JSON lines", error) from error
        if not isinstance(row, dict):
            raise _bad_line(path, number, "JSON lines", ValueError("not an object"))
        yield number, row


def _csv_rows(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, Row]]:
    reader = csv.reader(lines, skipinitialspace=True)
    header: list[str] = []
    for row in reader:
        if not any(row):
            continue
        if not header:
            header = row
            _detect(path, reader.line_num, dict.fromkeys(header))
            if twice := [name for name in header if name and header.count(name) > 1]:
                raise _bad_line(path, reader.line_num, "CSV", ValueError(f"{twice[0]!r} twice"))
            continue
        if len(row) != len(header):
            error = ValueError(f"expected {len(header)} columns")
            raise _bad_line(path, reader.line_num, "CSV", error)
        yield reader.line_num, dict(zip(header, row, strict=True))


def _bad_line(path: Path, line: int, format: str, error: Exception) -> InvalidConfig:
    reason = f"missing {error}" if isinstance(error, KeyError) else str(error)
    return InvalidConfig(
        f"{path}:{line}", f"not a row of format {format}: {reason}", "mend or remove the line"
    )


def _detect(path: Path, line: int, row: Row) -> str:
    for name, format in FORMATS.items():
        if format.keys <= row.keys():
            return name
    raise InvalidConfig(
        f"{path}:{line}",
        f"unknown trace columns {sorted(map(str, row))}",
        'use a known format or JSON lines of {"arrival_s", "prompt_tokens", "output_tokens"}',
    )


def _tokens(value: Any) -> int:
    """Of a number or its digits; 374.0, as tables with gaps write it, is 374."""
    number = float(value) if isinstance(value, str) and "." in value else value
    if isinstance(number, bool) or (isinstance(number, float) and number != int(number)):
        raise ValueError(f"token count {value!r} is not a whole number")
    tokens = int(number)
    if not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(f"token count {tokens} is not 1 to {MAX_TOKENS}")
    return tokens


def _seconds(value: Any, scale: float = 1.0) -> float:
    seconds = float(value) * scale
    if isinstance(value, bool) or not np.isfinite(seconds):
        raise ValueError(f"arrival time {value!r} is no finite number")
    return seconds


def _blocks(value: Any) -> list[int]:
    """Ids of a prompt's blocks: any whole numbers, of which 64 bits are kept."""
    if isinstance(value, str) or any(isinstance(block, bool | float) for block in value):
        raise ValueError(f"{value!r} is no list of whole numbers")
    return [(int(block) + 2**63) % 2**64 - 2**63 for block in value]


def _azure(row: Row) -> Parsed:
    """Azure 2023 and 2024 (and, with TIMESTAMP XXX, NanoFlow's length lists).

    Times without a zone are UTC. Of Azure's seven digits of a second's fraction six are kept.
    """
    arrival_s = None
    if row["TIMESTAMP"] != "XXX":
        moment = datetime.fromisoformat(row["TIMESTAMP"])
        arrival_s = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return arrival_s, _tokens(row["ContextTokens"]), _tokens(row["GeneratedTokens"]), None, None


def _mooncake(row: Row) -> Parsed:
    arrival_s = _seconds(row["timestamp"], 1e-3)
    lengths = _tokens(row["input_length"]), _tokens(row["output_length"])
    return arrival_s, *lengths, None, _blocks(row["hash_ids"])


def _vidur(row: Row) -> Parsed:
    arrival_s = _seconds(row["arrived_at"]) if "arrived_at" in row else None
    prompt, output = _tokens(row["num_prefill_tokens"]), _tokens(row["num_decode_tokens"])
    return arrival_s, prompt, output, None, None


def _splitwise(row: Row) -> Parsed:
    arrival_s = _seconds(row["arrival_timestamp"])
    return arrival_s, _tokens(row["prompt_size"]), _tokens(row["token_size"]), None, None


def _burstgpt(row: Row) -> Parsed:
    """BurstGPT; its failed requests, which have no response tokens, are lines to be removed."""
    lengths = _tokens(row["Request tokens"]), _tokens(row["Response tokens"])
    return _seconds(row["Timestamp"]), *lengths, None, None


def _own(row: Row) -> Parsed:
    """Our own; null is as good as missing where a key may be missing."""
    arrival, name, hashes = (row.get(key) for key in ("arrival_s", "class", "prefix_ids"))
    return (
        None if arrival is None else _seconds(arrival),
        _tokens(row["prompt_tokens"]),
        _tokens(row["output_tokens"]),
        None if name is None else str(name),
        None if hashes is None else _blocks(hashes),
    )


@dataclass(frozen=True, slots=True)
class _Format:
    keys: frozenset[str]
    parse: Callable[[Row], Parsed]
    block_tokens: int = 0


FORMATS: Mapping[str, _Format] = {
    "azure": _Format(frozenset({"TIMESTAMP", "ContextTokens", "GeneratedTokens"}), _azure),
    "mooncake": _Format(
        frozenset({"timestamp", "input_length", "output_length", "hash_ids"}),
        _mooncake,
        MOONCAKE_BLOCK_TOKENS,
    ),
    "vidur": _Format(frozenset({"num_prefill_tokens", "num_decode_tokens"}), _vidur),
    "splitwise": _Format(frozenset({"arrival_timestamp", "prompt_size", "token_size"}), _splitwise),
    "burstgpt": _Format(frozenset({"Timestamp", "Request tokens", "Response tokens"}), _burstgpt),
    "jsonl": _Format(frozenset({"prompt_tokens", "output_tokens"}), _own, MOONCAKE_BLOCK_TOKENS),
}


def _columns(path: Path, format: str, rows: list[Parsed]) -> Trace:
    arrivals, prompts, outputs, classes, hashes = zip(*rows, strict=True)
    timed = sum(a is not None for a in arrivals)
    if timed not in (0, len(rows)):
        raise InvalidConfig(
            str(path), f"only {timed} of {len(rows)} rows have an arrival time", "give all or none"
        )
    arrival_s, order = None, np.arange(len(rows))
    if timed:
        raw = np.array(arrivals, dtype=np.float64)
        order = np.argsort(raw, kind="stable")
        arrival_s = raw[order] - raw[order[0]]
    prefix = _prefix(hashes, FORMATS[format].block_tokens)
    return Trace(
        path=str(path),
        format=format,
        arrival_s=arrival_s,
        prompt_tokens=np.array(prompts, dtype=np.int32)[order],
        output_tokens=np.array(outputs, dtype=np.int32)[order],
        classes=tuple(classes[i] or "default" for i in order) if any(classes) else None,
        prefix=None if prefix is None else prefix.take(order),
    )


def _prefix(hashes: tuple[list[int] | None, ...], block_tokens: int) -> PrefixHashes | None:
    if all(h is None for h in hashes):
        return None
    lists = [h or [] for h in hashes]
    offsets = np.concatenate(([0], np.cumsum([len(h) for h in lists]))).astype(np.int64)
    ids = np.array([block for h in lists for block in h], dtype=np.int64)
    return PrefixHashes(offsets=offsets, ids=ids, block_tokens=block_tokens)
