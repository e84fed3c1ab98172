"""Messages in OpenAI chat form -> checked messages for the template, and the media in them, in order."""

from __future__ import annotations

from typing import Any

from qwen3vl_disagg.core.errors import InputError, NotBuiltYet
from qwen3vl_disagg.processing.media_parts import Media, image_bytes

ROLES = ("system", "user", "assistant")
MAX_IMAGES = 16
MAX_MESSAGES = 1024


def parse_messages(raw: object, *, allow_paths: bool = False) -> tuple[list[dict[str, Any]], list[Media]]:
    """Checked messages (content a string, or text and image parts) and their images.

    `allow_paths`: an image may be a local file's name. InputError names the place, e.g. `messages[1].content[0]`.
    """
    if not isinstance(raw, list) or not raw:
        raise InputError("messages must be a list with at least one message", param="messages")
    if len(raw) > MAX_MESSAGES:
        raise InputError(f"{len(raw)} messages, the limit is {MAX_MESSAGES}", param="messages")
    media: list[Media] = []
    messages = [_message(entry, f"messages[{i}]", media, allow_paths) for i, entry in enumerate(raw)]
    return messages, media


def _message(raw: object, where: str, media: list[Media], allow_paths: bool) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise InputError("a message must be an object", param=where)
    role = raw.get("role")
    if role == "tool" or raw.get("tool_calls"):
        raise NotBuiltYet("tool use", param=where)
    if role not in ROLES:
        raise InputError(f"role must be one of {', '.join(ROLES)}", param=f"{where}.role")
    content = raw.get("content")
    if isinstance(content, str):
        return {"role": role, "content": check_text(content, f"{where}.content")}
    if not isinstance(content, list) or not content:
        raise InputError("content must be a string or a list of parts", param=f"{where}.content")
    parts = []
    for j, part in enumerate(content):
        place = f"{where}.content[{j}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise InputError("text must be a string", param=f"{place}.text")
            parts.append({"type": "text", "text": check_text(part["text"], f"{place}.text")})
        elif kind in ("image_url", "image"):
            if role != "user":
                raise InputError(f"images are for user turns, not for {role} turns", param=place)
            if len(media) == MAX_IMAGES:
                raise InputError(f"more than {MAX_IMAGES} images", param=place)
            media.append(Media(image_bytes(part, place, allow_paths), place))
            parts.append({"type": "image"})
        elif kind in ("video_url", "video"):
            raise NotBuiltYet("video", param=place)
        else:
            raise InputError("type must be text or image_url", param=f"{place}.type")
    return {"role": role, "content": parts}


def check_text(text: str, where: str) -> str:
    """The text, if it is well-formed Unicode without NUL."""
    if "\0" in text:
        raise InputError("text must not contain NUL", param=where)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError("text must not contain lone surrogates", param=where) from None
    return text
