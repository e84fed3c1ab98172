"""Messages and tools in OpenAI chat form -> checked ones for the template, and the media in them, in order."""

from __future__ import annotations

import re
from typing import Any

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.processing.json_values import check_json, check_text
from qwen3vl_disagg.processing.media_parts import IMAGE_KINDS, VIDEO_KINDS, Media, read_media
from qwen3vl_disagg.processing.request_fields import check_fields

ROLES = ("system", "user", "assistant", "tool")
_OTHER_NAMES = {"developer": "system", "function": "tool"}
MEDIA_ROLES = ("user", "tool")
TEXT_KINDS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Type of a part of text -> where its text stands."""
MAX_MEDIA = 1024
"""Of one request, so that the messages about them between processes stay small. What bounds them before that is the
context, and the size of a body."""
MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_CALLS = 1024
"""Of one earlier turn."""
_TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


def parse_messages(raw: object, *, allow_paths: bool = False) -> tuple[list[dict[str, Any]], list[Media]]:
    """Checked messages (content a string, or parts of text, images and clips) and their images and clips, in order.

    `allow_paths`: an image or clip may be a local file's name. InputError names the place: `messages[1].content[0]`.
    """
    if not isinstance(raw, list) or not raw:
        raise InputError("messages must be a list with at least one message", param="messages")
    if len(raw) > MAX_MESSAGES:
        raise InputError(f"{len(raw)} messages, the limit is {MAX_MESSAGES}", param="messages")
    media: list[Media] = []
    messages = [_message(entry, f"messages[{i}]", media, allow_paths) for i, entry in enumerate(raw)]
    return messages, media


def has_clips(raw: object) -> bool:
    """Whether there are clips in what `parse_messages` takes; it need not be good."""
    turns = [turn for turn in raw if isinstance(turn, dict)] if isinstance(raw, list) else []
    contents = [turn.get("content") for turn in turns]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(isinstance(part, dict) and _kind(part) in VIDEO_KINDS for part in parts)


def _message(raw: object, where: str, media: list[Media], allow_paths: bool) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise InputError("a message must be an object", param=where)
    role = raw.get("role")
    role = _OTHER_NAMES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise InputError(f"role must be one of {', '.join(ROLES)}, developer", param=f"{where}.role")
    check_fields(raw, "message", where=where)
    message = {"role": role, **_extras(raw, role, where)}
    content = raw.get("content")
    if role in ("assistant", "tool") and content in (None, []):
        content = ""
    if isinstance(content, str):
        return {**message, "content": check_text(content, f"{where}.content")}
    if not isinstance(content, list) or not content:
        raise InputError("content must be a string or a list of parts", param=f"{where}.content")
    parts = []
    for j, part in enumerate(content):
        place = f"{where}.content[{j}]"
        kind = _kind(part)
        if isinstance(part, str):
            parts.append({"type": "text", "text": check_text(part, place)})
        elif kind in TEXT_KINDS:
            check_fields(part, "text part", where=place, besides=("refusal",))
            text = part.get(TEXT_KINDS[kind])
            if not isinstance(text, str):
                raise InputError("text must be a string", param=f"{place}.text")
            parts.append({"type": "text", "text": check_text(text, f"{place}.text")})
        elif kind in IMAGE_KINDS or kind in VIDEO_KINDS:
            if role not in MEDIA_ROLES:
                raise InputError(f"images and videos are for user and tool turns, not for {role} turns", param=place)
            if len(media) == MAX_MEDIA:
                raise InputError(f"more than {MAX_MEDIA} images and videos", param=place)
            media.append(read_media(part, kind, place, allow_paths))
            parts.append({"type": media[-1].modality})
        else:
            raise InputError("type must be text, image_url or video_url", param=f"{place}.type")
    return {**message, "content": parts}


def _kind(part: object) -> str:
    """What a part says it is, or what it has in it if it does not say."""
    if not isinstance(part, dict):
        return ""
    kind = part.get("type")
    if kind is None:
        kind = next((name for name in ("text", "image_url", "image", "video_url", "video") if name in part), "")
    return kind if isinstance(kind, str) else ""


def _extras(raw: dict[str, Any], role: str, where: str) -> dict[str, Any]:
    """What a turn may have beside its content: calls and reasoning of the assistant, the call that a tool answers."""
    found: dict[str, Any] = {}
    if role == "assistant":
        name = "reasoning_content" if raw.get("reasoning_content") is not None else "reasoning"
        if (reasoning := raw.get(name)) is not None:
            if not isinstance(reasoning, str):
                raise InputError(f"{name} must be a string", param=f"{where}.{name}")
            found["reasoning_content"] = check_text(reasoning, f"{where}.{name}")
    if role == "tool" and raw.get("tool_call_id") not in (None, ""):
        found["tool_call_id"] = _id(raw["tool_call_id"], f"{where}.tool_call_id")
    if raw.get("tool_calls"):
        if role != "assistant":
            raise InputError("tool_calls are for assistant turns", param=f"{where}.tool_calls")
        found["tool_calls"] = _tool_calls(raw["tool_calls"], f"{where}.tool_calls")
    return found


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


def _tool_calls(raw: object, where: str) -> list[dict[str, Any]]:
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
    return call if raw.get("id") in (None, "") else {"id": _id(raw["id"], f"{where}.id"), **call}


def _id(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise InputError("must be a string", param=where)
    return check_text(value, where)
