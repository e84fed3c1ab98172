"""A request to `/v1/messages`, Anthropic's form, as the chat request that it means."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import msgspec

from qwen3vl_disagg.core.errors import InputError, NotBuiltYet
from qwen3vl_disagg.core.grammar import Grammar
from qwen3vl_disagg.processing.messages import Placed
from qwen3vl_disagg.processing.prompt_options import Thinking
from qwen3vl_disagg.processing.request_fields import COUNT, check_fields, check_object, read_flag
from qwen3vl_disagg.serving.chat_request import ChatRequest, check_model, parse_chat_request
from qwen3vl_disagg.serving.grammar_fields import read_format

_OWN = ("system", "thinking", "output_config", "metadata")


class MessagesRequest(msgspec.Struct, frozen=True, kw_only=True, tag="messages"):
    stream: bool
    has_tools: bool


def parse_messages_request(
    raw: dict[str, Any], *, model_names: Collection[str], is_count: bool = False
) -> tuple[MessagesRequest, ChatRequest, list[dict[str, Any]], dict[str, Any]]:
    """The request, the chat request that it means, the tools that the model is shown, and a body with its messages.
    `is_count`: no answer is wanted, only the size of the prompt.

    InputError with `param`, a place in the body as it came; 404 for another model's name.
    """
    check_model(raw.get("model"), model_names)
    for name in ("messages",) if is_count else ("messages", "max_tokens"):
        if raw.get(name) is None:
            raise InputError(f"{name} is missing", param=name)
    check_fields(raw, "messages")
    turns = [*_system(raw.get("system")), *_turns(raw["messages"])]
    if turns[-1].get("tool_calls"):
        raise InputError(
            "the results of the last turn's calls are missing", param=f"messages[{len(raw['messages']) - 1}]"
        )
    effort, content = _output_config(raw.get("output_config"))
    chat_raw = {
        **{name: value for name, value in raw.items() if name not in _OWN},
        "messages": turns,
        "tools": _tools(raw.get("tools")),
        **_tool_choice(raw.get("tool_choice")),
        "response_format": content,
        # An answer goes on where the last turn ends, if that is the assistant's.
        "continue_final_message": turns[-1].get("role") == "assistant" or None,
    }
    try:
        chat, tools = parse_chat_request(chat_raw, model_names=model_names, route="messages")
    except InputError as error:  # a tool's fields stand in it, not one level deeper
        error.param = error.param and error.param.replace("].function", "]")
        raise
    thinking = _thinking(raw.get("thinking"), effort) or chat.prompt.thinking
    chat = msgspec.structs.replace(chat, prompt=msgspec.structs.replace(chat.prompt, thinking=thinking))
    return MessagesRequest(stream=chat.stream, has_tools=chat.has_tools), chat, tools, chat_raw


# ---- fields ----


def _output_config(value: Any) -> tuple[Any, Grammar | None]:
    """Effort, and what the content must be."""
    config = check_object(value, "output_config")
    for name, entry in config.items():
        if name not in ("effort", "format") and entry is not None:
            raise NotBuiltYet(f"output_config.{name[:64]}", param=f"output_config.{name[:64]}")
    form = config.get("format")
    return config.get("effort"), None if form is None else read_format(form, "output_config.format", is_flat=True)


def _thinking(value: Any, effort: Any) -> Thinking | None:
    """Whether, and how much. `budget_tokens` is a target, not a bound, as Anthropic has it."""
    given = check_object(value, "thinking")
    if given.get("display") not in (None, "summarized"):
        raise NotBuiltYet("thinking.display", param="thinking.display")
    if given.get("budget_tokens") is not None:
        COUNT(given["budget_tokens"], "thinking.budget_tokens")
    if effort is not None and effort not in ("low", "medium", "high", "xhigh", "max"):
        raise InputError("output_config.effort must be low, medium, high, xhigh or max", param="output_config.effort")
    match given.get("type"):
        case "disabled":
            return Thinking(is_wanted=False, param="thinking")
        case "enabled":
            return Thinking(is_wanted=True, param="thinking", effort=effort)
        case "adaptive" | None if "type" in given or not given:
            return None if effort is None else Thinking(is_wanted=True, param="output_config.effort", effort=effort)
        case str(kind):
            raise NotBuiltYet(f"thinking of type {kind[:64]}", param="thinking.type")
        case _:
            raise InputError("thinking.type must be enabled, disabled or adaptive", param="thinking.type")


def _tools(given: Any) -> Any:
    """In the chat's form, as far as they have one."""
    if not isinstance(given, list):
        return given
    found = []
    for i, tool in enumerate(given):
        if not isinstance(tool, dict):
            raise InputError("a tool must be an object", param=f"tools[{i}]")
        kind = tool.get("type")
        if kind not in (None, "custom"):
            raise NotBuiltYet(f"a tool of type {str(kind)[:64]}", param=f"tools[{i}].type")
        if not isinstance(tool.get("input_schema"), dict):
            raise InputError("input_schema must be an object", param=f"tools[{i}].input_schema")
        function = {name: tool[name] for name in ("name", "description") if tool.get(name) is not None}
        found.append({"type": "function", "function": {**function, "parameters": tool["input_schema"]}})
    return found


def _tool_choice(value: Any) -> dict[str, Any]:
    given = check_object(value, "tool_choice")
    alone = given.get("disable_parallel_tool_use")
    is_alone = alone is not None and read_flag(alone, "tool_choice.disable_parallel_tool_use")
    match given.get("type"):
        case "auto" | "any" | "none" as kind:
            choice: Any = kind
        case "tool":
            choice = {"type": "function", "name": given.get("name")}
        case None if not given:
            choice = None
        case _:
            raise InputError("tool_choice.type must be auto, any, tool or none", param="tool_choice.type")
    return {"tool_choice": choice, "parallel_tool_calls": False if is_alone else None}


# ---- turns ----


def _system(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, list) and value:
        if not all(isinstance(block, dict) and block.get("type") == "text" for block in value):
            raise InputError("system must be a string, or a list of text blocks", param="system")
        value = _placed(value, "system")
    elif not isinstance(value, (str, list, type(None))):
        raise InputError("system must be a string, or a list of text blocks", param="system")
    if value:
        yield Placed("system", {"role": "system", "content": value})


def _placed(blocks: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    return [Placed(f"{where}[{j}]", block) for j, block in enumerate(blocks)]


def _turns(given: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(given, list) or not given:
        raise InputError("messages must be a list with at least one message", param="messages")
    for i, message in enumerate(given):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise InputError("a message must be an object", param=where)
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant"):
            raise InputError("role must be user or assistant", param=f"{where}.role")
        if isinstance(content, str):
            yield Placed(where, {"role": role, "content": content})
            continue
        if not isinstance(content, list):
            raise InputError("content must be a string or a list of blocks", param=f"{where}.content")
        for j, block in enumerate(content):
            if not isinstance(block, dict) or not isinstance(block.get("type"), str):
                raise InputError("a block must be an object with a type", param=f"{where}.content[{j}]")
        yield from _of_users(content, where) if role == "user" else [_of_assistants(content, where)]


def _of_users(blocks: list[dict[str, Any]], where: str) -> Iterator[dict[str, Any]]:
    """Results of tools are turns of their own."""
    parts: list[dict[str, Any]] = []
    for j, block in enumerate(blocks):
        place = f"{where}.content[{j}]"
        if block["type"] != "tool_result":
            parts.append(_part(block, place))
            continue
        if parts:
            yield Placed(where, {"role": "user", "content": parts})
            parts = []
        output = block.get("content")
        if isinstance(output, list):
            inner = [f"{place}.content[{k}]" for k in range(len(output))]
            output = [_part(one, there) for one, there in zip(output, inner, strict=True)]
        yield Placed(place, {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": output})
    if parts or not blocks:
        yield Placed(where, {"role": "user", "content": parts})


def _of_assistants(blocks: list[dict[str, Any]], where: str) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for j, block in enumerate(blocks):
        place = f"{where}.content[{j}]"
        match block["type"]:
            case "thinking":
                if not isinstance(block.get("thinking"), str):
                    raise InputError("thinking must be a string", param=f"{place}.thinking")
                thoughts.append(block["thinking"])
            case "tool_use":
                if not isinstance(block.get("name"), str) or not isinstance(block.get("input"), dict):
                    raise InputError("a tool_use block has a name and an input, an object", param=place)
                function = {"name": block["name"], "arguments": block["input"]}
                calls.append({"type": "function", "id": block.get("id"), "function": function})
            case _:
                parts.append(_part(block, place))
    turn: dict[str, Any] = {"role": "assistant", "content": parts or ""}
    if thoughts:
        turn["reasoning_content"] = "\n\n".join(thoughts)
    if calls:
        turn["tool_calls"] = calls
    return Placed(where, turn)


def _part(block: Any, where: str) -> dict[str, Any]:
    """A block of text or an image as a part of a chat's turn."""
    kind = block.get("type") if isinstance(block, dict) else None
    if kind == "text":
        return Placed(where, block)
    if kind != "image":
        if isinstance(kind, str):
            raise NotBuiltYet(f"a block of type {kind[:64]} here", param=f"{where}.type")
        raise InputError("a block must be an object with a type", param=where)
    source: Mapping[str, Any] = check_object(block.get("source"), f"{where}.source")
    match source.get("type"):
        case "base64":
            image = {"type": "image", "base64": source.get("data")}
        case "url":
            image = {"type": "image_url", "image_url": source.get("url")}
        case str(other):
            raise NotBuiltYet(f"an image's source of type {other[:64]}", param=f"{where}.source.type")
        case _:
            raise InputError("source.type must be base64 or url", param=f"{where}.source.type")
    return Placed(where, {**{name: value for name, value in block.items() if name not in ("type", "source")}, **image})
