"""Whether a clip's file ends before its container says: pure Python, bounded work, nothing decoded."""

from __future__ import annotations

import struct

_MAX_BOXES = 10_000
_EBML, _SEGMENT = b"\x1aE\xdf\xa3", b"\x18S\x80g"


def end_note(data: bytes, container: str) -> str:
    """What to say of a file that lacks its end; empty for a whole one, and for one that does not tell its size."""
    try:
        match container:
            case "mp4" | "mov":
                declared = _end_of_boxes(data)
            case "mkv" | "webm":
                declared = _end_of_segment(data)
            case "avi":
                declared = 8 + struct.unpack_from("<I", data, 4)[0]
            case _:  # a GIF has no size, but a last byte
                declared = len(data) + (not data.rstrip(b"\0").endswith(b";"))
    except (struct.error, IndexError):
        return ""
    if declared <= len(data):
        return ""
    missing = max(1, round(100 * (1 - len(data) / declared)))
    return f"the clip's file ends early, {missing} % of its bytes are missing: frames behind its end were not looked at"


def _end_of_boxes(data: bytes) -> int:
    """Where the last box ends by its own account. One of size 0 goes on to the end of the file."""
    at = 0
    for _ in range(_MAX_BOXES):
        if at + 8 > len(data):
            break
        (size,) = struct.unpack_from(">I", data, at)
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, at + 8)
        if size < 8:
            break
        at += size
    return at


def _end_of_segment(data: bytes) -> int:
    """Where the segment behind the head ends by its own account; 0 where it does not say."""
    if not data.startswith(_EBML):
        return 0
    size, at = _ebml_size(data, 4)
    at += size or 0
    if not data.startswith(_SEGMENT, at):
        return 0
    size, at = _ebml_size(data, at + 4)
    return 0 if size is None else at + size


def _ebml_size(data: bytes, at: int) -> tuple[int | None, int]:
    """(size, None for an unknown one; where what it is about begins)."""
    length = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + length], "big") - (1 << 7 * length)
    return None if value == (1 << 7 * length) - 1 else value, at + length
