"""One value of a file, checked against the annotation of the key it is given for."""

from __future__ import annotations

import math
import re
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from .errors import InvalidConfig
from .schema import Above, Between, Bytes, HostPort

UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    UNITS[f"{_letter}iB"] = 1024**_power
    UNITS[f"{_letter}B"] = 1000**_power
SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def check_value(
    annotation: Any, value: object, key: str, *, at: str = "", folder: Path = Path()
) -> Any:
    """`value` as its key's type. Raises InvalidConfig with the key, the reason and the remedy.

    `folder` is what relative paths start from.
    """
    origin = get_origin(annotation)
    if origin is Annotated:
        kind, *marks = get_args(annotation)
        return _check_marks(kind, marks, value, key, at)
    if origin is Literal:
        return _check_choice(get_args(annotation), value, key, at)
    if origin in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not types.NoneType]
        assert len(kinds) == 1, "a key has one type, or that and null"
        return None if value is None else check_value(kinds[0], value, key, at=at, folder=folder)
    if annotation is Path:
        text = _check_type(str, value, key, at)
        if not text:
            raise InvalidConfig(key, "is empty", "name a folder", at=at)
        return (folder / Path(text).expanduser()).resolve()
    return _check_type(annotation, value, key, at)


def parse_size(text: str) -> int:
    """Bytes of "512MiB", "1GB" or "1024". Raises ValueError."""
    match = SIZE.fullmatch(text)
    if match is None or match[2] not in UNITS:
        raise ValueError(f"{text!r} is not a size")
    return round(float(match[1]) * UNITS[match[2]])


def parse_host_port(text: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[::1]:port". Raises ValueError."""
    host, colon, port = text.rpartition(":")
    bare = host.strip("[]")
    if not colon or not bare or (":" in bare and not host.startswith("[")):
        raise ValueError(f"{text!r} is not host:port")
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{port!r} is not a port")
    return bare, int(port)


def _check_marks(kind: Any, marks: list[Any], value: object, key: str, at: str) -> Any:
    for mark in marks:
        if isinstance(mark, Bytes):
            value = _check_size(value, key, at)
        elif isinstance(mark, HostPort):
            value = _check_address(mark, value, key, at)
    number = _check_type(kind, value, key, at)
    for mark in marks:
        if isinstance(mark, Between) and not mark.low <= number <= mark.high:
            raise InvalidConfig(key, f"{number} is out of range", _range(mark, ">="), at=at)
        if isinstance(mark, Above) and not mark.low < number <= mark.high:
            raise InvalidConfig(key, f"{number} is out of range", _range(mark, ">"), at=at)
    return number


def _range(mark: Between | Above, sign: str) -> str:
    upper = "" if math.isinf(mark.high) else f" and <= {mark.high:g}"
    return f"give a value {sign} {mark.low:g}{upper}"


def _check_type(kind: Any, value: object, key: str, at: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        raise InvalidConfig(key, f"{_shown(value)} is not {NAMES[kind]}", _example(kind), at=at)
    return value


def _example(kind: Any) -> str:
    return {
        int: "write it in digits, as in 2",
        float: "write it in digits, as in 0.5",
        str: "write it in quotes",
        bool: "write true or false",
    }[kind]


def _check_choice(choices: tuple[str, ...], value: object, key: str, at: str) -> str:
    if value not in choices:
        remedy = f"choose one of {', '.join(choices)}"
        raise InvalidConfig(key, f"{_shown(value)} is not a choice", remedy, at=at)
    return str(value)


def _check_size(value: object, key: str, at: str) -> int:
    try:
        size = value if type(value) is int else parse_size(str(value))
    except ValueError:
        size = 0
    if size <= 0:
        remedy = "write a number with a unit, as in 512MiB or 1GB"
        raise InvalidConfig(key, f"{_shown(value)} is not a size", remedy, at=at)
    return size


def _check_address(mark: HostPort, value: object, key: str, at: str) -> str:
    text = value if isinstance(value, str) else ""
    if text in mark.words:
        return text
    try:
        parse_host_port(text)
    except ValueError:
        words = "".join(f"{word} or " for word in mark.words)
        remedy = f'write {words}host:port in quotes, as in "127.0.0.1:50051"'
        raise InvalidConfig(key, f"{_shown(value)} is not an address", remedy, at=at) from None
    return text


def _shown(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)
