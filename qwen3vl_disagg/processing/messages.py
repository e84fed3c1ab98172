"""Messages in OpenAI chat form -> checked messages for the template, and the media in them, in order."""

from __future__ import annotations

from typing import Any

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.processing.json_values import check_text
from qwen3vl_disagg.processing.media_parts import IMAGE_KINDS, VIDEO_KINDS, Media, read_media
from qwen3vl_disagg.processing.request_fields import check_fields
from qwen3vl_disagg.processing.tool_use import check_id, parse_tool_calls

ROLES = ("system", "user", "assistant", "tool")
_OTHER_NAMES = {"developer": "system", "function": "tool"}
MEDIA_ROLES = ("user", "tool")
TEXT_KINDS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Type of a part of text -> where its text stands."""
MAX_MEDIA = 1024
"""Of one request, so that the messages about them between processes stay small. What bounds them before that is the
context, and the size of a body."""
MAX_MESSAGES = 4096


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
        found["tool_call_id"] = check_id(raw["tool_call_id"], f"{where}.tool_call_id")
    if raw.get("tool_calls"):
        if role != "assistant":
            raise InputError("tool_calls are for assistant turns", param=f"{where}.tool_calls")
        found["tool_calls"] = parse_tool_calls(raw["tool_calls"], f"{where}.tool_calls")
    return found
