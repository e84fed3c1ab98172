"""What an answer must look like, as a value that travels with its request."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from qwen3vl_disagg.core.errors import InputError

GrammarKind = Literal["text", "json", "regex", "choice", "lark", "calls"]
MAX_GRAMMAR_CHARS = 2**17
"""Of a grammar, and of the tools beside it."""


class GrammarTool(msgspec.Struct, frozen=True):
    """A function that may be called. `parameters`: a JSON Schema of an object, as JSON."""

    name: str
    parameters: str = "{}"


class Grammar(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer must be, behind its reasoning if it has some. `kind` says what `text` is:

    * `json`: a JSON Schema; `regex`: an expression for the whole of it; `choice`: a JSON list of texts, one of which it
      is; `lark`: a grammar in Lark's form (its rule `start`) or llama.cpp's GBNF (`root`).
      With `tools`, calls may stand in its place.
    * `calls`: nothing. The answer is calls of `tools`.
    * `text`: nothing. The answer is any text, and behind it calls of `tools`.

    `max_calls`: at most so many calls; 0: any number. `is_from_start`: it begins with the first token, also where the
    prompt ends within reasoning. `param`: where the caller said it.
    """

    kind: GrammarKind
    text: str = ""
    tools: tuple[GrammarTool, ...] = ()
    max_calls: int = 0
    is_from_start: bool = False
    param: str = "grammar"

    def __post_init__(self) -> None:
        size = len(self.text) + sum(len(tool.name) + len(tool.parameters) for tool in self.tools)
        if size > MAX_GRAMMAR_CHARS:
            raise InputError(f"a grammar of {size} characters; it may have {MAX_GRAMMAR_CHARS}", param=self.param)
        if self.kind in ("text", "calls") and not self.tools:
            raise InputError("calls need tools", param=self.param)

    @classmethod
    def of_schema(cls, schema: dict[str, Any], *, param: str = "grammar") -> Grammar:
        """JSON that a JSON Schema describes; `{"type": "object"}` is any object."""
        return cls(kind="json", text=json.dumps(schema, ensure_ascii=False), param=param)

    @classmethod
    def of_regex(cls, regex: str, *, param: str = "grammar") -> Grammar:
        return cls(kind="regex", text=regex, param=param)

    @classmethod
    def of_choice(cls, texts: Sequence[str], *, param: str = "grammar") -> Grammar:
        return cls(kind="choice", text=json.dumps(list(texts), ensure_ascii=False), param=param)

    @classmethod
    def of_lark(cls, grammar: str, *, param: str = "grammar") -> Grammar:
        return cls(kind="lark", text=grammar, param=param)
