"""Messages in OpenAI chat form -> checked messages for the template, and the media in them, in order."""

from __future__ import annotations

import base64
import binascii
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3vl_disagg.core.errors import InputError, NotBuiltYet
from qwen3vl_disagg.processing.images import MAX_BYTES

ROLES = ("system", "user", "assistant")
MAX_IMAGES = 16
MAX_MESSAGES = 1024
_MAX_NAME = 40


@dataclass(frozen=True)
class Media:
    """One image's bytes and where it stood."""

    data: bytes
    param: str


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
            media.append(Media(_image_bytes(part, place, allow_paths), place))
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


def _image_bytes(part: dict[str, Any], where: str, allow_paths: bool) -> bytes:
    source = part.get(part["type"])
    if isinstance(source, dict):
        source = source.get("url")
    if allow_paths and isinstance(source, bytes):
        return source
    if allow_paths and isinstance(source, Path):
        return _read_file(source, where)
    if not isinstance(source, str):
        raise InputError("image_url.url must be a string", param=where)
    if source[:5].lower() == "data:":
        return _data_uri(source, where)
    if allow_paths and "://" not in source:
        return _read_file(Path(source), where)
    raise InputError("only data: URIs are supported for images", param=where, code="unsupported_url")


def _data_uri(uri: str, where: str) -> bytes:
    """The bytes of `data:[type];base64,..`; the declared type is ignored."""
    head, comma, body = uri[5:].partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise InputError("a data: URI must be data:<type>;base64,<data>", param=where)
    if len(body) > MAX_BYTES * 4 // 3 + 4:
        raise InputError(f"the image is larger than the limit of {MAX_BYTES} bytes", param=where, status=413)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise InputError("the data: URI is not valid base64", param=where) from None


def _read_file(path: Path, where: str) -> bytes:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe or device might never end
            raise InputError(f"{str(path)[-_MAX_NAME:]}: not a file", param=where)
        if found.st_size > MAX_BYTES:
            raise InputError(f"{path} is larger than the limit of {MAX_BYTES} bytes", param=where, status=413)
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or "bad name"
        raise InputError(f"{str(path)[-_MAX_NAME:]}: {reason}", param=where) from None
