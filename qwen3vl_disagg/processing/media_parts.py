"""The media of messages: where their bytes come from.

A part is an image, or a clip: a file, or a list of images that are its frames.
"""

from __future__ import annotations

import base64
import binascii
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.media.video import MAX_VIDEO_BYTES
from qwen3vl_disagg.processing.images import MAX_BYTES
from qwen3vl_disagg.processing.video import MAX_LIST_FRAMES, pack_frames

IMAGE_KINDS = ("image_url", "image")
VIDEO_KINDS = ("video_url", "video")
MAX_FPS = 240.0
MAX_FRAMES_BYTES = MAX_VIDEO_BYTES - 8 * MAX_LIST_FRAMES
"""Of a list, so that with its framing it is no larger than a file may be."""
_JPEGS = "data:video/jpeg;base64,"
"""Frames as still images behind one head, separated by commas: the way some clients send them."""
_MAX_NAME = 40


@dataclass(frozen=True)
class Media:
    """One image's or clip's bytes and where it stood."""

    data: bytes
    param: str
    modality: Literal["image", "video"] = "image"
    is_frame_list: bool = False
    """The bytes are those of `pack_frames`."""
    fps: float | None = None
    """Of a file: how many frames a second to look at. Of a list: how many a second it holds."""
    num_frames: int | None = None
    """Of a file: how many frames to look at, whatever its length."""


def read_media(part: dict[str, Any], where: str, allow_paths: bool) -> Media:
    """The media of an image or video part. `allow_paths`: also a local file's name, its Path, or bytes.

    InputError naming `where` if it cannot be had.
    """
    source = part.get(part["type"])
    if isinstance(source, dict):
        source = source.get("url")
    if part["type"] in IMAGE_KINDS:
        return Media(_bytes_of(source, where, allow_paths, "image", MAX_BYTES), where)
    fps, num_frames = _number(part, "fps", where), _number(part, "num_frames", where)
    frames = _frames(source, where, allow_paths)
    if frames is not None:
        if num_frames is not None:
            raise InputError("num_frames is for files: a list of frames is looked at as it is", param=where)
        return Media(frames, where, "video", is_frame_list=True, fps=fps)
    if fps is not None and num_frames is not None:
        raise InputError("fps and num_frames exclude one another", param=where)
    data = _bytes_of(source, where, allow_paths, "video", MAX_VIDEO_BYTES)
    return Media(data, where, "video", fps=fps, num_frames=None if num_frames is None else int(num_frames))


def _frames(source: object, where: str, allow_paths: bool) -> bytes | None:
    """A list of frames, packed; None for what is no list."""
    parts: Sequence[object]
    if isinstance(source, list):
        parts, count = source, len(source)
    elif isinstance(source, str) and source[: len(_JPEGS)].lower() == _JPEGS:
        parts, count = (), source.count(",")  # counted before they are taken apart
    else:
        return None
    if not 1 <= count <= MAX_LIST_FRAMES:
        raise InputError(f"a list of {count} frames, it may hold 1 to {MAX_LIST_FRAMES}", param=where)
    read: Callable[[Any], bytes] = partial(
        _bytes_of, where=where, allow_paths=allow_paths, what="frame", limit=MAX_BYTES
    )
    if isinstance(source, str):
        parts = source[len(_JPEGS) :].split(",")
        read = partial(_base64, where=where, what="frame", limit=MAX_BYTES)
    frames, num_bytes = list[bytes](), 0
    for part in parts:
        frames.append(read(part))
        num_bytes += len(frames[-1])
        if num_bytes > MAX_FRAMES_BYTES:
            raise InputError(f"the frames have more than {MAX_FRAMES_BYTES} bytes", param=where, status=413)
    return pack_frames(frames)


def _number(part: dict[str, Any], name: str, where: str) -> float | None:
    value = part.get(name)
    if value is None:
        return None
    limit, low = (MAX_FPS, 0.01) if name == "fps" else (MAX_LIST_FRAMES, 2)
    good = isinstance(value, int if name == "num_frames" else int | float) and not isinstance(value, bool)
    if not good or not low <= value <= limit:
        raise InputError(f"{name} must be a number from {low} to {limit:g}", param=f"{where}.{name}")
    return value


def _bytes_of(source: object, where: str, allow_paths: bool, what: str, limit: int) -> bytes:
    if allow_paths and isinstance(source, bytes):
        return source
    if allow_paths and isinstance(source, Path):
        return _read_file(source, where, limit)
    if not isinstance(source, str):
        raise InputError(f"the {what}'s url must be a string", param=where)
    if source[:5].lower() == "data:":
        return _data_uri(source, where, what, limit)
    if allow_paths and "://" not in source:
        return _read_file(Path(source), where, limit)
    raise InputError("only data: URIs are supported for images and videos", param=where, code="unsupported_url")


def _data_uri(uri: str, where: str, what: str, limit: int) -> bytes:
    """The bytes of `data:[type];base64,..`; the declared type is ignored."""
    head, comma, body = uri[5:].partition(",")
    if not comma or not head[-7:].lower() == ";base64":
        raise InputError("a data: URI must be data:<type>;base64,<data>", param=where)
    return _base64(body, where, what, limit)


def _base64(body: str, where: str, what: str, limit: int) -> bytes:
    if len(body) > limit * 4 // 3 + 4:
        raise InputError(f"the {what} is larger than the limit of {limit} bytes", param=where, status=413)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise InputError("the data: URI is not valid base64", param=where) from None


def _read_file(path: Path, where: str, limit: int) -> bytes:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe or device might never end
            raise InputError(f"{str(path)[-_MAX_NAME:]}: not a file", param=where)
        if found.st_size > limit:
            raise InputError(f"{path} is larger than the limit of {limit} bytes", param=where, status=413)
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or "bad name"
        raise InputError(f"{str(path)[-_MAX_NAME:]}: {reason}", param=where) from None
