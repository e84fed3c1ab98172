"""A request to `/v1/responses` as the chat request that it means, and what its answer repeats of it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import msgspec

from qwen3vl_disagg.core.errors import InputError, NotBuiltYet
from qwen3vl_disagg.processing.messages import Placed
from qwen3vl_disagg.processing.request_fields import check_fields, check_object, is_one_of
from qwen3vl_disagg.serving.chat_request import ChatRequest, check_model, parse_chat_request
from qwen3vl_disagg.serving.grammar_fields import read_format

MAX_PAIRS, MAX_KEY_CHARS, MAX_VALUE_CHARS = 16, 64, 512
"""Of `metadata`, as OpenAI's."""
_MAX_NAME = 64
_LOGPROBS = "message.output_text.logprobs"
_OWN = ("input", "instructions", "text", "include", "metadata")
_ONLY_THOUGHT = frozenset({"role", "reasoning_content"})


class ResponseRequest(msgspec.Struct, frozen=True, kw_only=True, tag="response"):
    """`repeated`: fields of the answer, each in JSON: those that repeat what was asked for. All is bounded: the model
    is shown it, or it has been checked."""

    stream: bool
    has_tools: bool
    wants_logprobs: bool
    repeated: dict[str, str]


def parse_response(
    raw: dict[str, Any], *, model_names: Collection[str]
) -> tuple[ResponseRequest, ChatRequest, list[dict[str, Any]], dict[str, Any]]:
    """The request, the chat request that it means, the tools that the model is shown, and a body with its messages.

    InputError with `param`, a place in the body as it came; 404 for another model's name.
    """
    check_model(raw.get("model"), model_names)
    if raw.get("input") is None:
        raise InputError("input is missing", param="input")
    check_fields(raw, "response")
    text = check_object(raw.get("text"), "text")
    for name, value in text.items():
        if name != "format" and not is_one_of(value, (None, "medium")):
            raise NotBuiltYet(f"text.{name[:64]}", param=f"text.{name[:64]}")
    form = text.get("format")
    content = None if form is None else read_format(form, "text.format", is_flat=True)
    chat_raw = {
        **{name: value for name, value in raw.items() if name not in _OWN},
        "messages": [*_turns(raw.get("instructions"), raw["input"])],
        "tools": _tools(raw.get("tools")),
        "response_format": content,
        "top_logprobs": _num_logprobs(raw),
    }
    try:
        chat, tools = parse_chat_request(chat_raw, model_names=model_names, route="response")
    except InputError as error:  # a tool's fields stand in it, not one level deeper
        error.param = error.param and error.param.replace("].function", "]")
        raise
    repeated = {
        "instructions": raw.get("instructions"),
        "max_output_tokens": chat.sampling.values.get("max_new_tokens"),
        "metadata": _metadata(raw.get("metadata")),
        "parallel_tool_calls": raw.get("parallel_tool_calls") is not False,
        "reasoning": {"effort": chat.prompt.thinking and chat.prompt.thinking.effort, "summary": None},
        "text": {"format": _repeated_format(form)},
        "tool_choice": _repeated_choice(raw.get("tool_choice")),
        "tools": [{"type": "function", "parameters": None, "strict": None, **tool["function"]} for tool in tools],
        "top_logprobs": chat.sampling.values.get("logprobs", 0),
    }
    request = ResponseRequest(
        stream=chat.stream,
        has_tools=chat.has_tools,
        wants_logprobs=chat.sampling.wants_logprobs,
        repeated={name: json.dumps(value) for name, value in repeated.items()},
    )
    return request, chat, tools, chat_raw


def _num_logprobs(raw: Mapping[str, Any]) -> Any:
    include = raw.get("include")
    if include is None:
        include = []
    if not isinstance(include, list) or not all(isinstance(name, str) for name in include):
        raise InputError("include must be a list of strings", param="include")
    asked = raw.get("top_logprobs")
    return (asked or 0) if _LOGPROBS in include else None if is_one_of(asked, (0,)) else asked


def _metadata(value: Any) -> dict[str, str]:
    given = check_object(value, "metadata")
    is_good = len(given) <= MAX_PAIRS and all(
        isinstance(text, str) and len(text) <= MAX_VALUE_CHARS and len(key) <= MAX_KEY_CHARS
        for key, text in given.items()
    )
    if not is_good:
        reason = f"up to {MAX_PAIRS} names of {MAX_KEY_CHARS} characters, with texts of up to {MAX_VALUE_CHARS}"
        raise InputError(f"metadata must be an object of {reason}", param="metadata")
    return given


def _repeated_format(form: dict[str, Any] | None) -> dict[str, Any]:
    if form is None or form["type"] != "json_schema":
        return {"type": "text" if form is None else form["type"]}
    name, strict = form.get("name"), form.get("strict")
    return {"type": "json_schema", "name": (name or "")[:_MAX_NAME], "schema": form["schema"], "strict": strict}


def _repeated_choice(choice: Any) -> Any:
    """It has been read."""
    if isinstance(choice, dict):
        return {"type": "function", "name": choice["name"] if "name" in choice else choice["function"]["name"]}
    return choice or "auto"


def _tools(given: Any) -> Any:
    """In the chat's form, as far as they have one."""
    if not isinstance(given, list):
        return given
    found = []
    for i, tool in enumerate(given):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if isinstance(kind, str) and kind != "function":
            raise NotBuiltYet(f"a tool of type {kind[:64]}", param=f"tools[{i}].type")
        if isinstance(tool, dict):
            function = {
                name: tool[name] for name in ("name", "description", "parameters") if tool.get(name) is not None
            }
            tool = {"type": kind, "function": function}
        found.append(tool)
    return found


# ---- input ----


def _turns(instructions: Any, given: Any) -> Iterator[dict[str, Any]]:
    """Messages of a chat. An answer's items, which came apart, are one turn again."""
    if instructions is not None and not isinstance(instructions, str):
        raise InputError("instructions must be a string", param="instructions")
    items: list[Any] = given if isinstance(given, list) else [{"role": "user", "content": given}]
    if not isinstance(given, (str, list)) or not items:
        raise InputError("input must be a string, or a list with at least one item", param="input")
    turns = _of_items(items)
    if instructions:
        first = next(turns)
        if first.get("role") in ("system", "developer"):  # many templates show one such turn only
            content = first.get("content")
            if isinstance(content, str):
                yield Placed("input[0]", {**first, "content": f"{instructions}\n\n{content}"})
            else:
                behind = _placed(content, "input[0].content")
                yield Placed("input[0]", {**first, "content": [{"type": "text", "text": instructions}, *behind]})
        else:
            yield Placed("instructions", {"role": "system", "content": instructions})
            yield first
    yield from turns


def _of_items(items: list[Any]) -> Iterator[dict[str, Any]]:
    turn: Placed | None = None
    """The assistant's, while there may be more of it."""
    for i, item in enumerate(items):
        where = f"input[{i}]"
        if not isinstance(item, dict):
            raise InputError("an item must be an object", param=where)
        kind = item.get("type")
        kind = "message" if kind is None and "role" in item else kind
        is_assistants = kind in ("reasoning", "function_call") or (
            kind == "message" and item.get("role") == "assistant"
        )
        joins = is_assistants and (kind == "function_call" or (turn or {}).keys() <= _ONLY_THOUGHT)
        if turn is not None and not joins:
            yield turn
            turn = None
        if is_assistants:
            turn = turn if turn is not None else Placed(where, {"role": "assistant"})
            _join(turn, kind, item, where)
        elif kind == "message":
            yield Placed(where, {name: value for name, value in item.items() if name not in ("type", "status")})
        elif kind == "function_call_output":
            yield _tool_turn(item, where)
        else:
            name = kind[:64] if isinstance(kind, str) else "unknown"
            raise NotBuiltYet(f"an input item of type {name}", param=f"{where}.type")
    if turn is not None:
        yield turn


def _join(turn: dict[str, Any], kind: Any, item: Mapping[str, Any], where: str) -> None:
    """Put an item of the assistant's into its turn."""
    match kind:
        case "message":
            turn |= {name: value for name, value in item.items() if name not in ("type", "status")}
        case "reasoning":
            texts = _reasoning(item, "content", where) or _reasoning(item, "summary", where)
            turn["reasoning_content"] = "\n\n".join([*filter(None, [turn.get("reasoning_content")]), *texts])
        case _:
            for name in ("call_id", "name", "arguments"):
                if not isinstance(item.get(name), str):
                    raise InputError(f"{name} must be a string", param=f"{where}.{name}")
            function = {"name": item["name"], "arguments": item["arguments"]}
            turn.setdefault("tool_calls", []).append({"id": item["call_id"], "type": "function", "function": function})


def _reasoning(item: Mapping[str, Any], name: str, where: str) -> list[str]:
    parts = item.get(name)
    parts = [] if parts is None else parts
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise InputError(f"{name} must be a list of parts", param=f"{where}.{name}")
    texts = [part.get("text") for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise InputError("a part of reasoning must have a text", param=f"{where}.{name}")
    return [str(text) for text in texts]


def _tool_turn(item: Mapping[str, Any], where: str) -> Placed:
    output = item.get("output")
    if isinstance(output, list):
        output = _placed(output, f"{where}.output")
    elif not isinstance(output, str):
        raise InputError("output must be a string or a list of parts", param=f"{where}.output")
    return Placed(where, {"role": "tool", "tool_call_id": item.get("call_id"), "content": output})


def _placed(parts: Any, where: str) -> list[Any]:
    if not isinstance(parts, list):
        raise InputError("content must be a string or a list of parts", param=where)
    return [Placed(f"{where}[{j}]", part) if isinstance(part, dict) else part for j, part in enumerate(parts)]
