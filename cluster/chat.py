"""Chat messages to a prompt, by the checkpoint's own jinja2 template, in a sandbox."""

from __future__ import annotations

import datetime
import json
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..engine.errors import InvalidRequest
from .served_model import ServedModel

# Whatever a template's own expressions raise on some messages.
_TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
)


class ChatTemplate:
    """Compiled once. The names a template may use are those that transformers gives it."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served
        self._template = None
        if served.chat_template is not None:
            environment = ImmutableSandboxedEnvironment(
                trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
            )
            environment.filters["tojson"] = _to_json
            environment.globals["raise_exception"] = _raise
            environment.globals["strftime_now"] = _strftime_now
            self._template = environment.from_string(served.chat_template)

    def render(self, messages: list[dict[str, Any]]) -> str:
        """The prompt, up to where the assistant speaks. Raises InvalidRequest."""
        if self._template is None:
            raise InvalidRequest(
                "messages",
                f"model {self._served.name!r} has no chat template",
                "use /v1/completions, or a checkpoint with a chat_template",
            )
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **(self._served.template_tokens or {}),
            )
        except _TEMPLATE_ERRORS as error:
            raise InvalidRequest(
                "messages", f"the chat template refuses them ({error})", "change the messages"
            ) from error


def check_messages(value: Any) -> list[dict[str, Any]]:
    """Messages with a role and text; parts of type text are joined. Raises InvalidRequest."""
    if not isinstance(value, list) or not value:
        raise InvalidRequest("messages", "missing or empty", "give a list of messages")
    return [_check_message(f"messages[{at}]", message) for at, message in enumerate(value)]


def _check_message(field: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InvalidRequest(field, "not an object with a role", 'give {"role", "content"}')
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise InvalidRequest(f"{field}.content", "has parts without text", "send text only")
        content = "".join(part for part in parts if part is not None)
    if not isinstance(content, str):
        raise InvalidRequest(f"{field}.content", "not text", "give a string")
    return {**message, "content": content}


def _to_json(value: Any, **options: Any) -> str:
    """Without jinja2's escaping for HTML, which a prompt is not."""
    return json.dumps(value, ensure_ascii=False, **options)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
