"""The media of messages: where their bytes come from."""

from __future__ import annotations

import base64
import binascii
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.processing.images import MAX_BYTES

_MAX_NAME = 40


@dataclass(frozen=True)
class Media:
    """One image's bytes and where it stood."""

    data: bytes
    param: str


def image_bytes(part: dict[str, Any], where: str, allow_paths: bool) -> bytes:
    """The bytes of an image part. InputError naming `where` if they cannot be had."""
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
