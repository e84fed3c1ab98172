"""A request's grammar as llguidance reads it: grammars in JSON, one for what is around and one for each thing in it.

    reasoning </think> CONTENT          or, in its place,
    <tool_call>
    {"name": "NAME", "arguments": ARGUMENTS}
    </tool_call>

What a caller sends is looked at here first: size, depth, numbers of repetitions. What is left for the library has its
own bounds (`engine/llguidance_matcher.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.grammar import Grammar, GrammarTool
from qwen3vl_disagg.core.json_text import parse_json
from qwen3vl_disagg.processing.answer_parts import opens_reasoning
from qwen3vl_disagg.processing.tokenizer import Tokenizer

MAX_DEPTH, MAX_SCHEMA_VALUES, MAX_CHOICES, MAX_REPEATS = 64, 2**14, 2**12, 2000
_REPEATS = re.compile(r"[{,~.]\s*([0-9]+)")
"""Numbers of `{3}`, `{2,30}`, and Lark's `~ 2..30`."""
_SPACE = r"( |\r?\n[ \t]{0,48})"
"""Between two tokens of JSON, if anything: a blank, or a line break and what indents the next line. A model that is not
sure could fill its answer with any number of them."""
_FORMATS = frozenset(["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"])
"""Those that are held. Any other says nothing, as JSON Schema has it."""
_LITERAL = ("enum", "const", "default", "example", "examples")
"""In a schema: what holds values, not schemas."""
_NAMED = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
"""What holds schemas by names, which may be any word."""
_REASONING = 'reasoning[suffix="</think>"]: /(.|\\n)*/\n'
_BREAKS = "/\\n{0,2}/ "
"""What templates and models put between reasoning and what follows it, which is no part of the content."""
_HEAD = 'head[suffix="<tool_call>"]: /(.|\\n)*/\n'
_ANY_TEXT = "ANY_TEXT: /(.|\\n)*/\n"

ToLark = Callable[[str, str], str]
"""(`regex` or `lark`, its text) -> a grammar in Lark's form."""


def begins_in_reasoning(grammar: Grammar, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> bool:
    """Whether an answer to this prompt does, so that the grammar begins behind it."""
    return not grammar.is_from_start and opens_reasoning(tokenizer, prompt_ids)


def answer_grammar(grammar: Grammar, *, in_reasoning: bool, to_lark: ToLark) -> str:
    """InputError for what is malformed, or more than is taken. `in_reasoning`: the answer begins within it."""
    try:
        return _written(grammar, in_reasoning, to_lark)
    except InputError as error:
        raise error.at(grammar.param) from None


def _written(grammar: Grammar, in_reasoning: bool, to_lark: ToLark) -> str:
    parts: list[dict[str, Any]] = []
    rules, ways = "", list[str]()
    if grammar.kind not in ("text", "calls"):
        parts.append({"name": "content", **_content(grammar, to_lark)})
        ways.append("@content")
    if grammar.tools:
        parts += [{"name": f"arguments{i}", "json_schema": _arguments(t)} for i, t in enumerate(grammar.tools)]
        rules += f"calls: {_calls('<tool_call>', grammar)}\n" + _call_rule(grammar.tools)
        if grammar.kind == "text":
            rules += f"{_HEAD}{_ANY_TEXT}last: {_calls('', grammar)}\n"
            ways += ["ANY_TEXT", "head last"]
        else:
            ways.append("calls")
    before = "reasoning " + _BREAKS if in_reasoning else ""
    top = f"start: {before}({' | '.join(ways)})\n{rules}{_REASONING if in_reasoning else ''}"
    return json.dumps({"grammars": [{"lark_grammar": top}, *parts]}, ensure_ascii=False)


def _calls(opening: str, grammar: Grammar) -> str:
    """Calls one after another; of the first one's tag only `opening` is still to come."""
    first = f'"{opening}" call' if opening else "call"
    if grammar.max_calls:
        return first + ' ("\\n<tool_call>" call)?' * (grammar.max_calls - 1)
    return first + ' ("\\n<tool_call>" call)*'


def _call_rule(tools: tuple[GrammarTool, ...]) -> str:
    """What follows the tag."""
    ways = []
    for number, tool in enumerate(tools):
        opening = '{"name": ' + json.dumps(tool.name, ensure_ascii=False) + ', "arguments": '
        ways.append(f'{_literal(opening)} @arguments{number} "}}"')
    return f'call: "\\n" ({" | ".join(ways)}) "\\n</tool_call>"\n'


def _literal(text: str) -> str:
    """A text in Lark."""
    return json.dumps(text, ensure_ascii=False)


def _content(grammar: Grammar, to_lark: ToLark) -> dict[str, Any]:
    match grammar.kind:
        case "json":
            return {"json_schema": _schema(grammar.text)}
        case "choice":
            return {"lark_grammar": "start: " + " | ".join(map(_literal, _choices(grammar.text)))}
        case kind:
            check_repeats(grammar.text)
            return {"lark_grammar": to_lark(kind, grammar.text)}


def _choices(text: str) -> list[str]:
    choices = _json(text)
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise InputError("a choice needs a list of texts, at least one")
    if len(choices) > MAX_CHOICES:
        raise InputError(f"a choice of {len(choices)} texts; it may have {MAX_CHOICES}")
    return choices


def _arguments(tool: GrammarTool) -> dict[str, Any]:
    """The schema of a call's arguments, which are an object."""
    schema = _schema(tool.parameters)
    kind = schema.get("type", "object")
    if "object" not in (kind if isinstance(kind, list) else [kind]):
        raise InputError(f"the parameters of {tool.name} are no object")
    return {**schema, "type": "object"} if "$ref" not in schema else schema


def _schema(text: str) -> dict[str, Any]:
    """As the library is given it: without formats that it does not know."""
    schema = _json(text)
    if not isinstance(schema, dict):
        raise InputError("a JSON Schema must be an object")
    num_values = sum(len(node) for node in _nodes(schema, 1))
    if num_values > MAX_SCHEMA_VALUES:
        raise InputError(f"a JSON Schema of {num_values} entries; it may have {MAX_SCHEMA_VALUES}")
    for node in _nodes(schema, 1):
        if isinstance(node, dict):
            patterns = [node.get("pattern"), *(node["patternProperties"] if _has_patterns(node) else ())]
            for pattern in patterns:
                if isinstance(pattern, str):
                    check_repeats(pattern)
    known = _without_formats(schema)
    known.pop("$schema", None)
    return {**known, "x-guidance": {"whitespace_flexible": True, "whitespace_pattern": _SPACE}}


def _has_patterns(node: dict[str, Any]) -> bool:
    return isinstance(node.get("patternProperties"), dict)


def _nodes(value: Any, depth: int) -> Iterator[dict[str, Any] | list[Any]]:
    """All objects and lists of a value. InputError for one that lies too deep."""
    if not isinstance(value, (dict, list)):
        return
    if depth > MAX_DEPTH:
        raise InputError(f"a JSON Schema deeper than {MAX_DEPTH} levels")
    yield value
    for entry in value.values() if isinstance(value, dict) else value:
        yield from _nodes(entry, depth + 1)


def _without_formats(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_formats(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    known = dict(value)
    for key, entry in value.items():
        if key == "format" and isinstance(entry, str) and entry not in _FORMATS:
            del known[key]
        elif key in _NAMED and isinstance(entry, dict):
            known[key] = {name: _without_formats(schema) for name, schema in entry.items()}
        elif key not in _LITERAL:
            known[key] = _without_formats(entry)
    return known


def _json(text: str) -> Any:
    try:
        return parse_json(text.encode(), is_strict=True)
    except ValueError as error:
        raise InputError(f"not JSON: {error}") from None


def check_repeats(pattern: str) -> None:
    """InputError for more repetitions than are taken: their cost comes with the first tokens, not before."""
    for found in _REPEATS.finditer(pattern):
        if len(found[1]) > 9 or int(found[1]) > MAX_REPEATS:
            raise InputError(f"a repetition of {found[1][:32]}; at most {MAX_REPEATS} are taken")
