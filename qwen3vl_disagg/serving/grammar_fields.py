"""What a request's body says of the form of its answer: OpenAI's fields, vLLM's, SGLang's, llama.cpp's and ollama's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from msgspec import structs

from qwen3vl_disagg.core.errors import InputError, NotBuiltYet
from qwen3vl_disagg.core.grammar import Grammar, GrammarTool
from qwen3vl_disagg.core.json_text import parse_json
from qwen3vl_disagg.processing.request_fields import is_one_of, read_flag

ToolChoice = Literal["none", "auto", "required"]
_ANY_OBJECT = {"type": "object"}
_Reader = Callable[[Any, str], Grammar | None]


def _schema(value: Any, param: str) -> Grammar:
    """A JSON Schema, or a text of one."""
    if isinstance(value, str):
        try:
            value = parse_json(value.encode(), is_strict=True)
        except ValueError:
            raise InputError(f"{param} is no JSON", param=param) from None
    if not isinstance(value, dict):
        raise InputError(f"{param} must be a JSON Schema, an object", param=param)
    return Grammar.of_schema(value, param=param)


def _regex(value: Any, param: str) -> Grammar:
    return Grammar.of_regex(_text(value, param), param=param)


def _lark(value: Any, param: str) -> Grammar:
    return Grammar.of_lark(_text(value, param), param=param)


def _choice(value: Any, param: str) -> Grammar:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise InputError(f"{param} must be a list of strings, at least one", param=param)
    return Grammar.of_choice(value, param=param)


def _any_object(value: Any, param: str) -> Grammar | None:
    return Grammar.of_schema(_ANY_OBJECT, param=param) if read_flag(value, param) else None


def _text(value: Any, param: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{param} must be a string", param=param)
    return value


def _response_format(value: Any, param: str) -> Grammar | None:
    """A Grammar, on a route where it stands elsewhere, has been read already."""
    return value if isinstance(value, Grammar) else read_format(value, param)


def read_format(value: Any, param: str, *, is_flat: bool = False) -> Grammar | None:
    """`is_flat`: a schema and its name stand beside the type. InputError naming the place below `param`."""
    if not isinstance(value, dict):
        raise InputError(f"{param} must be an object", param=param)
    match value.get("type"):
        case "text":
            return None
        case "json_object":
            return _schema(value.get("schema") or _ANY_OBJECT, param)
        case "json_schema":
            if is_flat:
                return _named_schema(value, param)
            return _named_schema(value.get("json_schema"), f"{param}.json_schema")
        case "structural_tag":
            raise NotBuiltYet(f"{param} structural_tag", param=f"{param}.type")
        case _:
            raise InputError(f"{param}.type must be text, json_object or json_schema", param=f"{param}.type")


def _named_schema(value: Any, param: str) -> Grammar:
    """`name`, `description` and `strict` change nothing: what is asked for is kept to."""
    if not isinstance(value, dict):
        raise InputError(f"{param} must be an object", param=param)
    if not isinstance(value.get("name", ""), str):
        raise InputError(f"{param}.name must be a string", param=f"{param}.name")
    if value.get("strict") is not None:
        read_flag(value["strict"], f"{param}.strict")
    return _schema(value.get("schema"), f"{param}.schema")


def _format(value: Any, param: str) -> Grammar:
    """ollama's: `json`, or a schema."""
    return _schema(_ANY_OBJECT if value == "json" else value, param)


def _structured_outputs(value: Any, param: str) -> Grammar | None:
    if not isinstance(value, dict):
        raise InputError(f"{param} must be an object", param=param)
    for name, entry in value.items():
        if name not in _WITHIN and not is_one_of(entry, (None, False, "")):
            raise NotBuiltYet(f"{param}.{name[:64]}", param=f"{param}.{name[:64]}")
    return _only_one(value, _WITHIN, f"{param}.")


_WITHIN: dict[str, _Reader] = {
    "json": _schema,
    "regex": _regex,
    "choice": _choice,
    "grammar": _lark,
    "json_object": _any_object,
}
GRAMMAR_FIELDS: dict[str, _Reader] = {
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    **{f"guided_{name}": reader for name, reader in _WITHIN.items()},
    "json_schema": _schema,
    "regex": _regex,
    "choice": _choice,
    "grammar": _lark,
    "ebnf": _lark,
    "format": _format,
}
"""Each says what the content must be; one of them may."""


def _only_one(given: Mapping[str, Any], readers: Mapping[str, _Reader], where: str = "") -> Grammar | None:
    found: Grammar | None = None
    name_of_found = ""
    for name, reader in readers.items():
        value = given.get(name)
        if value is None or (name != "response_format" and is_one_of(value, ("", {}))):
            continue
        grammar = reader(value, where + name)
        if grammar is not None and found is not None:
            problem = f"{where}{name_of_found} and {where}{name}: an answer has one grammar"
            raise InputError(problem, param=where + name)
        if grammar is not None:
            found, name_of_found = grammar, name
    return found


def read_tool_choice(value: Any, tools: Sequence[Mapping[str, Any]]) -> tuple[ToolChoice, str]:
    """Whether calls are demanded, and of which tool; empty: of any."""
    match value:
        case None | "auto":
            return "auto", ""
        case "none":
            return "none", ""
        case "required" | "any":
            if not tools:
                raise InputError("tool_choice demands a call, and there are no tools", param="tool_choice")
            return "required", ""
        case {"type": "function"}:
            function = value.get("function")
            name = function.get("name") if isinstance(function, dict) else value.get("name")
            if name not in [tool["function"]["name"] for tool in tools]:
                raise InputError("tool_choice names none of the tools", param="tool_choice")
            return "required", str(name)
        case {"type": str(kind)}:
            raise NotBuiltYet(f"tool_choice {kind[:64]}", param="tool_choice")
        case _:
            raise InputError("tool_choice must be none, auto, required, or name a function", param="tool_choice")


def read_grammar(
    raw: Mapping[str, Any], shown: Sequence[Mapping[str, Any]], choice: ToolChoice, name: str
) -> Grammar | None:
    """The grammar of an answer; None where it is free. `shown`: the tools that the model is shown.

    A call that is demanded stands in place of any content; where it is not, content in the form that is asked for, or
    calls. With `parallel_tool_calls` false there is one call at most.
    """
    content = _only_one(raw, GRAMMAR_FIELDS)
    parallel = raw.get("parallel_tool_calls")
    at_most_one = parallel is not None and not read_flag(parallel, "parallel_tool_calls")
    if not shown:
        return content
    wanted = [tool["function"] for tool in shown if name in ("", tool["function"]["name"])]
    tools = tuple(GrammarTool(tool["name"], json.dumps(tool.get("parameters") or {})) for tool in wanted)
    max_calls = int(at_most_one or bool(name))
    if choice == "required":
        return Grammar(kind="calls", tools=tools, max_calls=max_calls, param="tools")
    if content is not None:
        return structs.replace(content, tools=tools, max_calls=max_calls)
    return Grammar(kind="text", tools=tools, max_calls=1, param="tools") if at_most_one else None
