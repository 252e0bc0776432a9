"""Token ids to text, one token at a time. Knows no sockets; `tokenizers` comes in by argument.

Promises: what `TokenText` gave out, joined, is the tokenizer's decoding of all ids together
(special tokens left out), and no character is ever given out in parts. `StopStrings` never gives
out a character of a stop string, wherever the borders between pieces fall.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
MAX_PARTS = 3  # a UTF-8 character misses at most its last three bytes
MAX_PENDING = 64  # ids without a clean border; beyond it the text is given out as it stands
PROMPT_TAIL = 6  # ids of the prompt that decide how the first word is joined


class Decoder(Protocol):
    """The one method of `tokenizers.Tokenizer` that is used here."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...


class TokenText:
    """Text of one stream.

    Tokenizers join words by what stands before them, so ids are decoded behind a context that
    starts at a clean border; the context's own text is then cut off. A run of bytes that is not
    UTF-8 becomes replacement characters, as in `str.decode(errors="replace")`; their number can
    differ from the whole decoding where a byte-fallback decoder turns a valid neighbour invalid.
    """

    __slots__ = ("_context", "_context_text", "_decoder", "_given", "_pending", "_special_ids")

    def __init__(
        self, decoder: Decoder, special_ids: frozenset[int], prompt: Sequence[int] = ()
    ) -> None:
        self._decoder = decoder
        self._special_ids = special_ids
        self._pending: list[int] = []
        self._given = 0  # characters of the pending text that were given out
        self._set_context([i for i in prompt[-PROMPT_TAIL:] if i not in special_ids])

    def push(self, token_id: int) -> str:
        """The text that is certain now that `token_id` is known; often "" inside a character."""
        if token_id in self._special_ids:
            return ""
        self._pending.append(token_id)
        text = self._pending_text()
        clean = not text.endswith(REPLACEMENT)
        certain = len(text) if clean else len(text) - _trailing_parts(text)
        piece = text[self._given : certain]
        if (clean and text) or len(self._pending) >= MAX_PENDING:
            piece = text[self._given :]
            self._set_context(self._pending)
            self._pending = []
            self._given = 0
        else:
            self._given = max(self._given, certain)
        return piece

    def flush(self) -> str:
        """What was held back, when no more tokens come."""
        return self._pending_text()[self._given :] if self._pending else ""

    def _set_context(self, ids: list[int]) -> None:
        self._context = ids
        self._context_text = self._decoder.decode(ids, skip_special_tokens=True) if ids else ""

    def _pending_text(self) -> str:
        text = self._decoder.decode(self._context + self._pending, skip_special_tokens=True)
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        return self._decoder.decode(self._pending, skip_special_tokens=True)


def _trailing_parts(text: str) -> int:
    """How many replacement characters at the end may yet become one character."""
    return min(len(text) - len(text.rstrip(REPLACEMENT)), MAX_PARTS)


class StopStrings:
    """Finds the first stop string in text that arrives in pieces."""

    __slots__ = ("_held", "_stops", "found")

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """The text before a stop string, or before what may be the start of one."""
        if self.found is not None:
            return ""
        text = self._held + piece
        hits = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            at, self.found = min(hits, key=lambda hit: hit[0])
            self._held = ""
            return text[:at]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, shorter than `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
