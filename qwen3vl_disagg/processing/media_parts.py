"""The media of messages: where their bytes come from.

A part is an image, or a clip: a file, or a list of images that are its frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.media.images import MAX_BYTES
from qwen3vl_disagg.media.video import MAX_VIDEO_BYTES
from qwen3vl_disagg.processing.data_uri import is_base64, is_data_uri, read_base64, read_data_uri, split_data_uri
from qwen3vl_disagg.processing.local_media import local_bytes
from qwen3vl_disagg.processing.media_options import NO_OPTIONS, MediaOptions
from qwen3vl_disagg.processing.request_fields import FIELDS, Place, check_fields
from qwen3vl_disagg.processing.video import MAX_LIST_FRAMES, pack_frames

IMAGE_KINDS = ("image_url", "image", "input_image")
VIDEO_KINDS = ("video_url", "video", "input_video")
MAX_FRAMES_BYTES = MAX_VIDEO_BYTES - 8 * MAX_LIST_FRAMES
"""Of a list, so that with its framing it is no larger than a file may be."""
_JPEGS = "video/jpeg"
"""Frames as still images behind one head of this type, separated by commas: the way some clients send them."""
_RAW = ("base64", "data")
"""Fields that hold bare base64."""
_IMAGE_SOURCES = ("image_url", "image", "url", *_RAW)
_VIDEO_SOURCES = ("video_url", "video", "url", *_RAW)


@dataclass(frozen=True)
class Media:
    """One image's or clip's bytes and where it stood."""

    data: bytes
    param: str
    modality: Literal["image", "video"] = "image"
    is_frame_list: bool = False
    """The bytes are those of `pack_frames`."""
    options: MediaOptions = NO_OPTIONS
    """What its part says about how it is looked at."""


def read_media(part: dict[str, Any], kind: str, where: str, allow_paths: bool) -> Media:
    """The media of an image or video part. `allow_paths`: also what `local_bytes` takes.

    InputError naming `where` if it cannot be had.
    """
    place: Place = "image part" if kind in IMAGE_KINDS else "clip part"
    check_fields(part, place, where=where, besides=(kind,))
    names = _IMAGE_SOURCES if kind in IMAGE_KINDS else _VIDEO_SOURCES
    name = _source_of(part, (kind, *names), where)
    source = part.get(name)
    if isinstance(source, dict):
        check_fields(source, place, where=f"{where}.{name}")
        said = {key: value for key, value in part.items() if value is not None}
        part = {**{key: value for key, value in source.items() if key in FIELDS[place]}, **said}
        name = _source_of(source, ("url", *_RAW), f"{where}.{name}")
        source = source.get(name)
    options = MediaOptions.of_part(part, place, where)
    is_raw = name in _RAW and isinstance(source, str) and not is_data_uri(source)
    read: Callable[..., bytes] = read_base64 if is_raw else partial(_bytes_of, allow_paths=allow_paths)
    if place == "image part":
        return Media(read(source, where=where, what="image", limit=MAX_BYTES), where, options=options)
    frames = None if is_raw else _frames(source, where, allow_paths)
    if frames is not None:
        if options.num_frames is not None or options.do_sample_frames or options.video_start or options.video_end:
            raise InputError("num_frames is for files: a list of frames is looked at as it is", param=where)
        return Media(frames, where, "video", is_frame_list=True, options=options)
    if options.fps is not None and options.num_frames is not None:
        raise InputError("fps and num_frames exclude one another", param=where)
    return Media(read(source, where=where, what="video", limit=MAX_VIDEO_BYTES), where, "video", options=options)


def _source_of(part: dict[str, Any], names: Sequence[str], where: str) -> str:
    """The field that holds the media; the first if none does. InputError for two with different things in them."""
    given = [name for name in dict.fromkeys(names) if part.get(name) is not None]
    for name in given[1:]:
        if part[name] != part[given[0]]:
            raise InputError(f"{given[0]} and {name} are two sources of one image or clip", param=f"{where}.{name}")
    return given[0] if given else names[0]


def _frames(source: object, where: str, allow_paths: bool) -> bytes | None:
    """A list of frames, packed; None for what is no list."""
    parts: Sequence[object]
    head, body = "", ""
    if isinstance(source, list):
        parts, count = source, len(source)
    elif isinstance(source, str) and is_data_uri(source) and "," in source:
        head, body = split_data_uri(source, where)
        if head.partition(";")[0].strip().lower() != _JPEGS or not is_base64(head):
            return None
        parts, count = (), body.count(",") + 1  # counted before they are taken apart
    else:
        return None
    if not 1 <= count <= MAX_LIST_FRAMES:
        raise InputError(f"a list of {count} frames, it may hold 1 to {MAX_LIST_FRAMES}", param=where)
    read: Callable[[Any], bytes] = partial(
        _bytes_of, where=where, allow_paths=allow_paths, what="frame", limit=MAX_BYTES
    )
    if head:
        parts = body.split(",")
        read = partial(read_base64, where=where, what="frame", limit=MAX_BYTES)
    frames, num_bytes = list[bytes](), 0
    for part in parts:
        frames.append(read(part))
        num_bytes += len(frames[-1])
        if num_bytes > MAX_FRAMES_BYTES:
            raise InputError(f"the frames have more than {MAX_FRAMES_BYTES} bytes", param=where, status=413)
    return pack_frames(frames)


def _bytes_of(source: object, where: str, allow_paths: bool, what: str, limit: int) -> bytes:
    if isinstance(source, str) and is_data_uri(source):
        return read_data_uri(source, where, what, limit)
    found = local_bytes(source, where, what, limit) if allow_paths else None
    if found is not None:
        return found
    if not isinstance(source, str):
        raise InputError(f"the {what}'s url must be a string", param=where)
    raise InputError("only data: URIs are supported for images and videos", param=where, code="unsupported_url")
