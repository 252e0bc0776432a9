"""What the gateway knows of the model it serves: its limits, its tokenizer, its chat template.

Text needs a `tokenizer.json`. Without one, requests bring token ids and get token ids, and
whatever needs text is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..engine.detokenizer import TokenText
from ..engine.errors import InvalidConfig, InvalidRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """`chat_template` is the checkpoint's jinja2 source, None where it has none."""

    name: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int] = frozenset()
    tokenizer: Tokenizer | None = None
    special_ids: frozenset[int] = frozenset()
    chat_template: str | None = None
    template_tokens: Mapping[str, str] | None = None  # bos_token, eos_token, … for the template

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Raises InvalidRequest where there is no tokenizer."""
        if self.tokenizer is None:
            raise InvalidRequest(
                "prompt",
                f"model {self.name!r} has no tokenizer.json to read text with",
                "send token_ids, or put the tokenizer.json into the checkpoint's directory",
            )
        return tuple(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def token_text(self, prompt: Sequence[int]) -> TokenText | None:
        """A detokenizer for one stream behind `prompt`; None where there is no tokenizer."""
        if self.tokenizer is None:
            return None
        return TokenText(self.tokenizer, self.special_ids, prompt)

    def text(self, token_id: int) -> str:
        """One token by itself, as log-probabilities show it; its number without a tokenizer."""
        if self.tokenizer is None:
            return str(token_id)
        return self.tokenizer.decode([token_id], skip_special_tokens=False)


def load_served_model(path: Path, *, name: str, max_model_len: int) -> ServedModel:
    """Read a Hugging Face directory. Raises InvalidConfig for files that cannot be read."""
    config = _json(path / "config.json", required=True)
    settings = _json(path / "tokenizer_config.json")
    generation = _json(path / "generation_config.json")
    tokenizer = _tokenizer(path / "tokenizer.json")
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    added = {} if tokenizer is None else tokenizer.get_added_tokens_decoder()
    return ServedModel(
        name=name,
        vocab_size=config["vocab_size"],
        max_model_len=max_model_len,
        eos_token_ids=frozenset([] if eos is None else [eos] if isinstance(eos, int) else eos),
        tokenizer=tokenizer,
        special_ids=frozenset(i for i, token in added.items() if token.special),
        chat_template=_chat_template(path, settings),
        template_tokens={
            key: token if isinstance(token, str) else token["content"]
            for key, token in settings.items()
            if key.endswith("_token") and isinstance(token, str | dict)
        },
    )


def _tokenizer(path: Path) -> Tokenizer | None:
    if not path.exists():
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for a file it cannot read
        raise InvalidConfig(
            str(path), f"not a tokenizer ({error})", "copy the file again, or take it away"
        ) from error


def _chat_template(path: Path, settings: Mapping[str, Any]) -> str | None:
    """A file of its own in newer checkpoints, a key of tokenizer_config.json in older ones."""
    beside = path / "chat_template.jinja"
    if beside.exists():
        return beside.read_text()
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, told apart by name
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template


def _json(path: Path, *, required: bool = False) -> dict[str, Any]:
    if not path.exists() and not required:
        return {}
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidConfig(
            str(path), f"cannot be read ({error})", "point model.path at a Hugging Face directory"
        ) from error
