"""Tools in OpenAI form, and the calls of earlier turns, checked. The template shows all that is in them."""

from __future__ import annotations

import re
from typing import Any

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.processing.json_values import check_json, check_text

MAX_TOOLS = 128
MAX_CALLS = 1024
"""Of one earlier turn."""
_TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


def parse_tools(raw: object) -> list[dict[str, Any]]:
    """The tools as they are given, checked. The template shows all that is in them. InputError naming the place."""
    if not isinstance(raw, list):
        raise InputError("tools must be a list", param="tools")
    if len(raw) > MAX_TOOLS:
        raise InputError(f"{len(raw)} tools, the limit is {MAX_TOOLS}", param="tools")
    for i, tool in enumerate(raw):
        _check_tool(tool, f"tools[{i}]")
    return raw


def _check_tool(tool: object, where: str) -> None:
    if not isinstance(tool, dict):
        raise InputError("a tool must be an object", param=where)
    if tool.get("type") != "function":
        raise InputError("type must be function", param=f"{where}.type")
    function, place = tool.get("function"), f"{where}.function"
    if not isinstance(function, dict):
        raise InputError("function must be an object", param=place)
    name = function.get("name")
    if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
        raise InputError("name must be 1 to 64 of a-z, A-Z, 0-9, _ and -", param=f"{place}.name")
    if not isinstance(function.get("description", ""), str | None):
        raise InputError("description must be a string", param=f"{place}.description")
    if not isinstance(function.get("parameters", {}), dict | None):
        raise InputError("parameters must be an object", param=f"{place}.parameters")
    check_json(tool, where)


def read_calls(raw: object, where: str) -> list[dict[str, Any]]:
    """An assistant turn's calls: id (if given), name, and arguments as they are given: JSON, or a text.

    They have been made, well or badly: what the model wrote is what it is shown again. No arguments are an empty
    object, an empty id is none. InputError naming the place of what cannot be shown.
    """
    if not isinstance(raw, list):
        raise InputError("tool_calls must be a list", param=where)
    if len(raw) > MAX_CALLS:
        raise InputError(f"{len(raw)} tool calls, the limit is {MAX_CALLS}", param=where)
    return [_tool_call(call, f"{where}[{i}]") for i, call in enumerate(raw)]


def _tool_call(raw: object, where: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise InputError("a tool call must be an object", param=where)
    if raw.get("type") not in (None, "", "function"):
        raise InputError("type must be function", param=f"{where}.type")
    function, place = raw.get("function"), f"{where}.function"
    if not isinstance(function, dict):
        raise InputError("function must be an object", param=place)
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str):
        raise InputError("name must be a string", param=f"{place}.name")
    arguments = {} if arguments in (None, "") else arguments
    check_text(name, f"{place}.name")
    check_json(arguments, f"{place}.arguments")
    call: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return call if raw.get("id") in (None, "") else {"id": read_id(raw["id"], f"{where}.id"), **call}


def read_id(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise InputError("must be a string", param=where)
    return check_text(value, where)
