"""Keys and numbers of a section that a person wrote. InvalidConfig names the key's whole path."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...engine.errors import InvalidConfig


def known_keys(where: str, section: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse any other key, with the nearest of those that there are."""
    for key in section:
        if key not in known:
            raise InvalidConfig(
                f"{where}.{key}", "unknown key", f"nearest is {nearest(key, known)!r}"
            )


def nearest(word: str, known: Iterable[str]) -> str:
    """Whichever of the known words looks most like it."""
    return difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.0)[0]


def positive(where: str, value: Any, remedy: str, *, below: float = 1e12) -> float:
    """A number above 0 and below the given."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < below:
        raise InvalidConfig(where, f"{value!r} is not a positive number below {below:g}", remedy)
    return float(value)


def whole(where: str, value: Any, what: str, *, most: int = 2**31 - 1) -> int:
    """A whole number, 1 or more, of `what`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise InvalidConfig(where, f"{value!r} is not a whole number of {what}", "give 1 or more")
    return value
