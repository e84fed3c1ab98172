"""The checkpoint's chat template, run in a sandbox, with the user's text kept apart from the prompt's structure.

The template sees the messages as they are, save that a special token's name inside them is broken by a guard character
that occurs nowhere else. After rendering, every special token found whole was written by the template and is encoded
by its id; the text between two of them is freed of guards and tokenized as one string. So a user who types
`<|image_pad|>` gets plain text, and for messages without such names the ids are those of the reference.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen3vl_disagg.core.errors import CheckpointError, InputError

MAX_RENDERED_CHARS = 8 * 2**20
_PRIVATE_USE = range(0xE000, 0xF900)
# What a template's own code can raise: it is the checkpoint's, and so may be wrong for messages that are not.
_RENDER_ERRORS = (
    *(jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError),
)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja's own filter would escape <, > and & for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _rest_or_end(rest: str) -> str:
    """Pattern of `rest`, or of as much of it as stands before the end of the text."""
    return f"(?:{re.escape(rest[0])}{_rest_or_end(rest[1:])}|\\Z)" if rest else ""


class Piece(NamedTuple):
    """A stretch of the rendered prompt: plain text, or one special token that the template wrote."""

    text: str
    is_special: bool


class ChatTemplate:
    """A compiled template and the names of the special tokens it may write."""

    def __init__(self, source: str, special_tokens: Sequence[str]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        self._source = source
        self._template = environment.from_string(source)
        names = sorted(special_tokens, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, names)) + ")")
        self._starts = re.compile("|".join(f"{re.escape(name[0])}(?={_rest_or_end(name[1:])})" for name in names))

    @classmethod
    def from_folder(cls, folder: Path, special_tokens: Sequence[str]) -> ChatTemplate:
        """chat_template.jinja, else chat_template.json, else tokenizer_config.json. CheckpointError if none has one."""
        source = None
        for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
            if source is not None or not (folder / name).is_file():
                continue
            try:
                text = (folder / name).read_text(encoding="utf-8")
                source = text if name.endswith(".jinja") else json.loads(text).get("chat_template")
            except (ValueError, AttributeError) as error:
                raise CheckpointError(folder, [f"{name} cannot be read: {error}"]) from error
        if not isinstance(source, str):
            raise CheckpointError(folder, ["there is no chat template"])
        try:
            return cls(source, special_tokens)
        except jinja2.TemplateError as error:
            raise CheckpointError(folder, [f"the chat template does not compile: {error}"]) from error

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> list[Piece]:
        """The prompt as pieces: special tokens (each a piece of its own) and the texts between them, in order.

        InputError if the template refuses the messages or writes too much.
        """
        guard = self._guard(messages)
        guarded = self._map_strings(list(messages), lambda text: self._break_specials(text, guard))
        rendered: list[str] = []
        num_chars = 0
        try:
            for part in self._template.generate(
                messages=guarded, tools=None, add_generation_prompt=add_generation_prompt
            ):
                rendered.append(part)
                num_chars += len(part)
                if num_chars > MAX_RENDERED_CHARS:
                    break
        except _RENDER_ERRORS as error:
            raise InputError("the chat template refuses these messages", param="messages") from error
        if num_chars > MAX_RENDERED_CHARS:
            raise InputError(f"the prompt has more than the limit of {MAX_RENDERED_CHARS} characters", param="messages")
        # Splitting by a pattern with one group puts what it matched at odd indexes.
        pieces = enumerate(self._split.split("".join(rendered)))
        return [Piece(text.replace(guard, ""), i % 2 == 1) for i, text in pieces if text]

    def _guard(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """A character that occurs neither in the messages nor in the template."""
        used = set(self._source)
        self._map_strings(list(messages), used.update)
        for code in _PRIVATE_USE:
            if chr(code) not in used:
                return chr(code)
        raise InputError("the text uses every private-use character; one must be left", param="messages")

    def _break_specials(self, text: str, guard: str) -> str:
        """Put the guard behind the first character of each special token, also where names overlap, and also of one
        that is cut off at the end: the next part of the message might complete it."""
        return self._starts.sub(lambda match: match[0] + guard, text)

    def _map_strings(self, value: Any, change: Any) -> Any:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, Mapping):
            return {self._map_strings(key, change): self._map_strings(item, change) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._map_strings(item, change) for item in value]
        return value
