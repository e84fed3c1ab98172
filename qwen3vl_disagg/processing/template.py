"""The checkpoint's chat template, run in a sandbox, with the user's text kept apart from the prompt's structure.

The template sees the messages and tools as they are, save that a character that occurs nowhere else stands in for each
`|` of them. The names of special tokens have a `|`, so none comes of the texts alone, however they are cut and joined:
every one found after rendering has its `|` from the template (all of it, unless a template puts a text within a name)
and is encoded by its id. The text between two of them gets its `|` back and is tokenized as one string. So a user who
types `<|image_pad|>` gets plain text, and for messages without such names the ids are those of the reference. (A
special name without a `|` is broken by a guard character instead.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen3vl_disagg.core.errors import CheckpointError, InputError, NotBuiltYet
from qwen3vl_disagg.processing.prompt_options import Thinking

MAX_RENDERED_CHARS = 8 * 2**20
_MAX_REASON = 200
_PUBLISHED = frozenset({"add_vision_id"})
"""Variables of the published templates, beside those of thinking."""
_PRIVATE_USE = range(0xE000, 0xF900)
_BAR = "|"
_MARKS = "_marks"
"""What the template's variables call the marks of a run."""
# What a template's own code can raise: it is the checkpoint's, and so may be wrong for messages that are not.
_RENDER_ERRORS = (
    *(jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError),
)


class _Refused(jinja2.TemplateError):
    """The template itself says no."""


def _raise_exception(message: str) -> None:
    raise _Refused(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


@jinja2.pass_context
def _to_json(
    context: jinja2.runtime.Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja's own filter would escape <, > and & for HTML. The marks stay as they are."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    if not ensure_ascii or text.isascii():
        return text
    marks = context[_MARKS]
    return "".join(char if char.isascii() or char in marks else json.dumps(char)[1:-1] for char in text)


class _Generation(Extension):
    """`{% generation %}` marks for trainers what the assistant said; it renders as what is in it."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _rest_or_end(rest: str) -> str:
    """Pattern of `rest`, or of as much of it as stands before the end of the text."""
    return f"(?:{re.escape(rest[0])}{_rest_or_end(rest[1:])}|\\Z)" if rest else ""


class PromptPiece(NamedTuple):
    """A stretch of the rendered prompt: plain text, or one special token that the template wrote."""

    text: str
    is_special: bool


@dataclass(frozen=True)
class _Disguise:
    """Changes texts so that no special name is found in what a template makes of them, and back.

    `starts` finds the first character of each special name without a `|`, also where names overlap, and also of one
    that is cut off at the end: the next part of the message might complete it. The guard goes behind it.
    """

    stand_in: str
    guard: str = ""
    starts: re.Pattern[str] | None = None
    end: str = ""
    """Stands behind the text that the answer continues."""

    def put_on(self, text: str) -> str:
        text = text.replace(_BAR, self.stand_in)
        return self.starts.sub(lambda match: match[0] + self.guard, text) if self.starts else text

    def take_off(self, text: str) -> str:
        text = text.replace(self.stand_in, _BAR)
        return text.replace(self.guard, "") if self.guard else text


class ChatTemplate:
    """A compiled template and the names of the special tokens it may write."""

    def __init__(self, source: str, special_tokens: Sequence[str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._source = source
        self._names = meta.find_undeclared_variables(environment.parse(source))
        self._template = environment.from_string(source)
        names = sorted(special_tokens, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, names)) + ")")
        odd = [name for name in names if _BAR not in name]
        starts = "|".join(f"{re.escape(name[0])}(?={_rest_or_end(name[1:])})" for name in odd)
        self._starts = re.compile(starts) if odd else None

    @classmethod
    def from_folder(cls, folder: Path, special_tokens: Sequence[str]) -> ChatTemplate:
        """chat_template.jinja, else chat_template.json, else tokenizer_config.json. CheckpointError if none has one."""
        source = None
        for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
            if source is not None or not (folder / name).is_file():
                continue
            try:
                text = (folder / name).read_text(encoding="utf-8")
                source = text if name.endswith(".jinja") else _default(json.loads(text).get("chat_template"))
            except (ValueError, AttributeError, RecursionError) as error:
                raise CheckpointError(folder, [f"{name} cannot be read: {error}"]) from error
        if not isinstance(source, str):
            raise CheckpointError(folder, ["there is no chat template"])
        try:
            return cls(source, special_tokens)
        except (jinja2.TemplateError, RecursionError) as error:
            raise CheckpointError(folder, [f"the chat template does not compile: {error}"]) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        thinking: Thinking | None = None,
    ) -> list[PromptPiece]:
        """The prompt as pieces: special tokens (each a piece of its own) and the texts between them, in order.

        `continue_final_message`: it ends where the last message's text does. `variables`: more for the template.
        InputError if the template refuses the messages or writes too much, or cannot do what it is told: think, leave
        it, count pictures.
        """
        given = self._given(variables or {}, thinking)
        disguise = self._disguise([messages, tools, given], continue_final_message)
        shown = _map_strings(messages, disguise.put_on)
        if continue_final_message:
            _mark_end(shown, disguise.end)
        values = {
            **_map_strings(given, disguise.put_on),
            "messages": shown,
            "tools": _map_strings(tools, disguise.put_on) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            _MARKS: disguise.stand_in + disguise.end + disguise.guard,
        }
        rendered: list[str] = []
        num_chars = 0
        try:
            for part in self._template.generate(values):
                rendered.append(part)
                num_chars += len(part)
                if num_chars > MAX_RENDERED_CHARS:
                    break
        except _RENDER_ERRORS as error:
            reason = f": {disguise.take_off(str(error))[:_MAX_REASON]}" if isinstance(error, _Refused) else ""
            raise InputError(f"the chat template refuses these messages{reason}", param="messages") from error
        if num_chars > MAX_RENDERED_CHARS:
            message = f"the prompt has more than the limit of {MAX_RENDERED_CHARS} characters"
            raise InputError(message, param="messages", code="context_length_exceeded")
        text = "".join(rendered)
        if continue_final_message:
            text, end, _ = text.partition(disguise.end)
            if not end:
                raise InputError("the chat template does not show the last message", param="continue_final_message")
        elif thinking is not None and add_generation_prompt:
            self._check_thinking(text, thinking)
        # Splitting by a pattern with one group puts what it matched at odd indexes.
        pieces = enumerate(self._split.split(text))
        return [PromptPiece(text if i % 2 else disguise.take_off(text), i % 2 == 1) for i, text in pieces if text]

    def _check_thinking(self, text: str, thinking: Thinking) -> None:
        """InputError if the template goes its own way and that is not the wanted one."""
        thinks = text.rstrip().endswith("<think>")
        if not {"enable_thinking", "thinking"} & self._names and thinks != thinking.is_wanted:
            how = "always thinks" if thinks else "does not think"
            raise InputError(f"the model's chat template {how} before it answers", param=thinking.param)

    def _given(self, variables: Mapping[str, Any], thinking: Thinking | None) -> dict[str, Any]:
        """What a request may tell the template, which need not use it. InputError for a name that the published ones
        use, and this one does not."""
        for name in _PUBLISHED - self._names:
            if variables.get(name):
                where = f"chat_template_kwargs.{name}"
                raise NotBuiltYet(f"{where} (the chat template does not know it)", param=where)
        given = dict(variables)
        if thinking is not None:
            given |= {name: thinking.is_wanted for name in ("enable_thinking", "thinking") if name in self._names}
            if thinking.effort is not None and "reasoning_effort" in self._names:
                given["reasoning_effort"] = thinking.effort
            elif thinking.effort not in (None, "none", "medium"):
                raise NotBuiltYet(f"{thinking.param} {thinking.effort}", param=thinking.param)
        return given

    def _disguise(self, values: Any, has_end: bool) -> _Disguise:
        """One whose characters occur neither in the values nor in the template."""
        used = set(self._source)
        for text in strings_of(values):
            used.update(text)
        unused = (char for char in map(chr, _PRIVATE_USE) if char not in used)
        stand_in, guard = next(unused, None), next(unused, "") if self._starts else ""
        end = next(unused, "") if has_end else ""
        if stand_in is None or (self._starts and not guard) or (has_end and not end):
            raise InputError("the text uses every private-use character; one must be left", param="messages")
        return _Disguise(stand_in, guard, self._starts, end)


def _default(found: Any) -> Any:
    """Some files hold several named templates in place of one."""
    if not isinstance(found, list):
        return found
    return next((entry.get("template") for entry in found if entry.get("name") == "default"), None)


def _mark_end(messages: Any, end: str) -> None:
    """Puts `end` behind the text of the last message. InputError if that is not the assistant's."""
    last = messages[-1]
    if last["role"] != "assistant" or last.get("tool_calls"):
        raise InputError("the last message must be the assistant's, without tool calls", param="continue_final_message")
    if isinstance(last["content"], str):
        last["content"] += end
    else:
        last["content"].append({"type": "text", "text": end})


def strings_of(value: Any) -> Iterator[str]:
    """Every string in a value of JSON, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from strings_of(key)
            yield from strings_of(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from strings_of(entry)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """The same value with every string changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_strings(key, change): _map_strings(entry, change) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_strings(entry, change) for entry in value]
    return value
