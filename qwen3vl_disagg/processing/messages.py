"""Messages in OpenAI chat form -> checked ones for the template, and the media in them, in order, with their bytes.

A part is text, an image, or a clip: a file, or a list of images that are its frames. The bytes stand in `data:` URIs,
read as the URL standard parses and the fetch standard's data: URL processor reads them. A caller of this process may
also name a file, or hold bytes or a picture of Pillow; over HTTP nobody may. What `http(s):` and `file:` URLs name is
fetched before, by who is allowed to (`urls_in`, `put_fetched`).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from urllib.parse import unquote_to_bytes

import msgspec

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.media.images import MAX_BYTES
from qwen3vl_disagg.media.video import MAX_VIDEO_BYTES
from qwen3vl_disagg.processing.clips import MAX_LIST_FRAMES, pack_frames
from qwen3vl_disagg.processing.json_values import check_text
from qwen3vl_disagg.processing.local_media import local_bytes
from qwen3vl_disagg.processing.prompt_options import NO_OPTIONS, MediaOptions
from qwen3vl_disagg.processing.request_fields import FIELDS, Place, check_fields
from qwen3vl_disagg.processing.tools import read_calls, read_id

ROLES = ("system", "user", "assistant", "tool")
_OTHER_NAMES = {"developer": "system", "function": "tool"}
MEDIA_ROLES = ("user", "tool")
TEXT_KINDS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Type of a part of text -> where its text stands."""
MAX_MEDIA = 1024
"""Of one request, so that the messages about them between processes stay small. What bounds them before that is the
context, and the size of a body."""
MAX_MESSAGES = 4096
MAX_URL_CHARS = 4096
IMAGE_KINDS = ("image_url", "image", "input_image")
VIDEO_KINDS = ("video_url", "video", "input_video")
MAX_FRAMES_BYTES = MAX_VIDEO_BYTES - 8 * MAX_LIST_FRAMES
"""Of a list, so that with its framing it is no larger than a file may be."""
MAX_LISTS_BYTES = 64 * 2**20
"""Of all lists of a request that came over HTTP: what one URL names may stand in every frame, copied for each."""
_JPEGS = "video/jpeg"
"""Frames as still images behind one head of this type, separated by commas: the way some clients send them."""
_RAW = ("base64", "data")
"""Fields that hold bare base64."""
_IMAGE_SOURCES = ("image_url", "image", "url", *_RAW)
_VIDEO_SOURCES = ("video_url", "video", "url", *_RAW)
_ALPHABET = re.compile(rb"[A-Za-z0-9+/]*")
_BLANKS = b"\t\n\f\r "
_ENDS = "".join(map(chr, range(0x21)))
_NO_BREAKS = {ord(blank): None for blank in "\t\n\r"}
_URL = re.compile(r"(?:https?|file):", re.IGNORECASE)
_MAX_HEAD = 4096
"""Characters before the comma."""


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


class Placed(dict[str, Any]):
    """A message or part that was made of something else, and where that stood."""

    def __init__(self, where: str, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)
        self.where = where


def _place(value: object, where: str) -> str:
    """`where`, unless it was made of something else."""
    return value.where if isinstance(value, Placed) else where


def parse_messages(raw: object, *, allow_paths: bool = False) -> tuple[list[dict[str, Any]], list[Media]]:
    """Checked messages (content a string, or parts of text, images and clips) and their images and clips, in order.

    `allow_paths`: an image or clip may be a local file's name. InputError names the place: `messages[1].content[0]`.
    """
    if not isinstance(raw, list) or not raw:
        raise InputError("messages must be a list with at least one message", param="messages")
    if len(raw) > MAX_MESSAGES:
        raise InputError(f"{len(raw)} messages, the limit is {MAX_MESSAGES}", param="messages")
    media: list[Media] = []
    messages = [_message(entry, _place(entry, f"messages[{i}]"), media, allow_paths) for i, entry in enumerate(raw)]
    return messages, media


def has_clips(raw: object) -> bool:
    """Whether there are clips in what `parse_messages` takes; it need not be good."""
    return any(_kind(part) in VIDEO_KINDS for _, part in _parts(raw))


def _parts(raw: object) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each part is, and the part, as far as they have the form of one."""
    for i, turn in enumerate(raw if isinstance(raw, list) else []):
        content = turn.get("content") if isinstance(turn, dict) else None
        for j, part in enumerate(content if isinstance(content, list) else []):
            if isinstance(part, dict):
                yield _place(part, f"{_place(turn, f'messages[{i}]')}.content[{j}]"), part


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
        place = _place(part, f"{where}.content[{j}]")
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
            room = MAX_FRAMES_BYTES
            if kind in VIDEO_KINDS and not allow_paths:
                room = MAX_LISTS_BYTES - sum(len(entry.data) for entry in media if entry.is_frame_list)
            media.append(read_media(part, kind, place, allow_paths, room))
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
        found["tool_call_id"] = read_id(raw["tool_call_id"], f"{where}.tool_call_id")
    if raw.get("tool_calls"):
        if role != "assistant":
            raise InputError("tool_calls are for assistant turns", param=f"{where}.tool_calls")
        found["tool_calls"] = read_calls(raw["tool_calls"], f"{where}.tool_calls")
    return found


# -- images and clips


def read_media(part: dict[str, Any], kind: str, where: str, allow_paths: bool, room: int) -> Media:
    """The media of an image or video part. `allow_paths`: also what `local_bytes` takes. `room`: bytes that a list of
    frames may have.

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
    frames = None if is_raw else _frames(source, where, allow_paths, room)
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


def _frames(source: object, where: str, allow_paths: bool, room: int) -> bytes | None:
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
        if num_bytes > room:
            reason = f"the frames of all lists up to here have more than {MAX_LISTS_BYTES} bytes"
            raise InputError(reason, param=where, status=413)
    return pack_frames(frames)


def _bytes_of(source: object, where: str, allow_paths: bool, what: str, limit: int) -> bytes:
    if isinstance(source, str) and is_data_uri(source):
        return read_data_uri(source, where, what, limit)
    if isinstance(source, FetchedBytes):
        if len(source.data) > limit:
            raise _too_large(what, limit, where)
        return source.data
    found = local_bytes(source, where, what, limit) if allow_paths else None
    if found is not None:
        return found
    if not isinstance(source, str):
        raise InputError(f"the {what}'s url must be a string", param=where)
    raise InputError("only data: URIs are supported for images and videos", param=where, code="unsupported_url")


# -- URLs


class MediaUrl(msgspec.Struct, frozen=True):
    """A URL in place of the bytes of an image, clip or frame, where it stands, and how many bytes it may name."""

    url: str
    where: str
    what: str
    limit: int


@dataclass(frozen=True)
class FetchedBytes:
    """Stands where a URL stood."""

    data: bytes


def urls_in(raw: object) -> list[MediaUrl]:
    """All of them in what `parse_messages` takes (it need not be good), each once, at its first place.

    InputError for one that is too long, and for too many.
    """
    found: dict[str, MediaUrl] = {}
    for holder, key, where, what, limit in _places_of(raw, _is_url):
        url = holder[key]
        if len(url) > MAX_URL_CHARS:
            message = f"a URL of {len(url)} characters, the limit is {MAX_URL_CHARS}"
            raise InputError(message, param=where, code="unsupported_url")
        if url not in found and len(found) == MAX_MEDIA:
            raise InputError(f"more than {MAX_MEDIA} URLs", param=where)
        if url not in found or found[url].limit < limit:
            found[url] = MediaUrl(url, where, what, limit)
    return list(found.values())


def put_fetched(raw: object, fetched: Mapping[str, bytes]) -> None:
    """Put the bytes of each URL in its place. A part may stand at several places."""
    for holder, key, *_ in list(_places_of(raw, _is_url)):
        if isinstance(url := holder[key], str):
            holder[key] = FetchedBytes(fetched[url])


def put_decoded(raw: object) -> None:
    """Put the bytes of each `data:` URI of an image in its place: of equal ones the same. InputError naming the place
    of the first that is none."""
    found: dict[str, FetchedBytes] = {}
    for holder, key, where, what, limit in list(_places_of(raw, is_data_uri)):
        uri = holder[key]
        if what == "image" and isinstance(uri, str):  # a part may stand at several places
            if uri not in found:
                found[uri] = FetchedBytes(read_data_uri(uri, where, what, limit))
            holder[key] = found[uri]


def _places_of(raw: object, is_one: Callable[[str], bool]) -> Iterator[tuple[Any, Any, str, str, int]]:
    """Where media are named by texts of a kind: (what holds it, its key there, place, what it is, its limit)."""
    for where, part in _parts(raw):
        is_clip = _kind(part) in VIDEO_KINDS
        if not is_clip and _kind(part) not in IMAGE_KINDS:
            continue
        what, limit = ("video", MAX_VIDEO_BYTES) if is_clip else ("image", MAX_BYTES)
        for name in dict.fromkeys((_kind(part), *(_VIDEO_SOURCES if is_clip else _IMAGE_SOURCES))):
            holder, key = (part[name], "url") if isinstance(part.get(name), dict) else (part, name)
            if isinstance(source := holder.get(key), list):
                texts = [(k, frame) for k, frame in enumerate(source) if isinstance(frame, str)] if is_clip else []
                places = [(source, k) for k, frame in texts if is_one(frame)]
                yield from ((*place, where, "frame", MAX_BYTES) for place in places)
            elif isinstance(source, str) and is_one(source):
                yield holder, key, where, what, limit


def _is_url(source: str) -> bool:
    return _URL.match(source) is not None


# -- data: URIs


def is_data_uri(text: str) -> bool:
    return text[:64].translate(_NO_BREAKS).lstrip(_ENDS)[:5].lower() == "data:"


def read_data_uri(uri: str, where: str, what: str, limit: int) -> bytes:
    """The bytes of one; the declared type is ignored. InputError if it is none, or they are more than `limit`."""
    head, body = split_data_uri(uri, where)
    if is_base64(head):
        return read_base64(body, where, what, limit)
    if len(body) > 3 * limit:  # each byte may take three characters
        raise _too_large(what, limit, where)
    data = unquote_to_bytes(body.translate(_NO_BREAKS).encode("utf-8", "replace"))
    if len(data) > limit:
        raise _too_large(what, limit, where)
    return data


def split_data_uri(uri: str, where: str) -> tuple[str, str]:
    """What is before the comma, without `data:`, and what is behind it, without a fragment.

    Blanks around a URL, and tabs and line breaks anywhere in it, do not count.
    """
    comma = uri.find(",", 0, _MAX_HEAD)
    if comma < 0:
        raise InputError("a data: URI must be data:<type>;base64,<data>", param=where)
    head = uri[:comma].lstrip(_ENDS).translate(_NO_BREAKS)
    return head[len("data:") :], uri[comma + 1 :].partition("#")[0].rstrip(_ENDS)


def is_base64(head: str) -> bool:
    """Whether the head ends with `;base64`, in any case and with blanks around the word."""
    _, semicolon, last = head.rpartition(";")
    return bool(semicolon) and last.strip(" ").lower() == "base64"


def read_base64(body: str, where: str, what: str, limit: int) -> bytes:
    """Forgiving base64 in a URL: percent-encoded, with blanks, with or without padding. InputError if it is none."""
    if len(body) > 8 * limit:  # a third more, three characters for each, and blanks
        raise _too_large(what, limit, where)
    data = body.encode("utf-8", "replace")  # a lone surrogate is no base64 either
    data = (unquote_to_bytes(data) if "%" in body else data).translate(None, _BLANKS)
    if len(data) > limit * 4 // 3 + 4:
        raise _too_large(what, limit, where)
    if len(data) % 4 == 0:
        data = data.removesuffix(b"=").removesuffix(b"=")
    if len(data) % 4 == 1 or not _ALPHABET.fullmatch(data):
        raise InputError("the data: URI is not valid base64", param=where)
    return base64.b64decode(data + b"=" * (-len(data) % 4))


def _too_large(what: str, limit: int, where: str) -> InputError:
    return InputError(f"the {what} is larger than the limit of {limit} bytes", param=where, status=413)
