"""Headers of TIFF and AVIF: size and orientation, from tags and boxes. Pure Python, bounded work, no pixels.

Both give the size before the orientation is applied. Errors: struct.error, IndexError and ValueError for what is no
such file or ends early.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

MAX_STEPS = 10_000
"""Tags or boxes that are walked over."""
_WIDTH, _HEIGHT, _ORIENTATION = 256, 257, 274
_TIFF_HEADS = {b"II*\0": "<", b"MM\0*": ">"}
_TAG_FORMS = {1: "B", 3: "H", 4: "I"}

_TURNED = {
    (0, None): 1, (1, None): 8, (2, None): 3, (3, None): 6,
    (0, 0): 4, (1, 0): 5, (2, 0): 2, (3, 0): 7,
    (0, 1): 2, (1, 1): 7, (2, 1): 4, (3, 1): 5,
}  # fmt: skip
"""(quarter turns against the clock, axis of the mirror that follows: 0 top to bottom, 1 left to right) -> EXIF's."""


def is_tiff(data: bytes) -> bool:
    return data[:4] in _TIFF_HEADS


def read_tiff(data: bytes) -> tuple[int, int, int]:
    """The first page. Its size is that after the orientation, which the library applies itself."""
    order = _TIFF_HEADS[data[:4]]
    (at,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, at)
    found: dict[int, int] = {}
    for entry in range(at + 2, at + 2 + 12 * min(count, MAX_STEPS), 12):
        tag, kind, number = struct.unpack_from(order + "HHI", data, entry)
        if tag in (_WIDTH, _HEIGHT, _ORIENTATION) and tag not in found and number == 1:
            (found[tag],) = struct.unpack_from(order + _TAG_FORMS[kind], data, entry + 8)
    width, height = found[_WIDTH], found[_HEIGHT]
    return (height, width, 1) if 5 <= found.get(_ORIENTATION, 1) <= 8 else (width, height, 1)


def brands(data: bytes) -> set[bytes]:
    """Major and compatible brands of a file of boxes; none for another one."""
    if data[4:8] != b"ftyp":
        return set()
    (size,) = struct.unpack_from(">I", data, 0)
    body = data[8 : min(size, 8 + 4 * 64)]
    return {body[at : at + 4] for at in range(0, len(body) - 3, 4) if at != 4}


def is_avif(data: bytes) -> bool:
    return bool(brands(data) & {b"avif", b"avis"})


def read_avif(data: bytes) -> tuple[int, int, int]:
    """The primary picture: its properties are those that its association names, counted from 1."""
    meta = _inside(data, 0, len(data), b"meta")
    start, end = meta[0] + 4, meta[1]
    at, _ = _inside(data, start, end, b"pitm")
    (primary,) = struct.unpack_from(">I" if data[at] else ">H", data, at + 4)
    iprp = _inside(data, start, end, b"iprp")
    properties = list(_boxes(data, *_inside(data, *iprp, b"ipco")))
    size, turns, mirror = None, 0, None
    for index in _associated(data, *_inside(data, *iprp, b"ipma"), primary):
        name, at, _ = properties[index - 1] if index else (b"", 0, 0)
        if name == b"ispe":
            size = struct.unpack_from(">II", data, at + 4)
        elif name == b"irot":
            turns = data[at] & 3
        elif name == b"imir":
            mirror = data[at] & 1
    if size is None:
        raise ValueError("no size")
    return *size, _TURNED[turns, mirror]


def _associated(data: bytes, at: int, end: int, item: int) -> list[int]:
    """Numbers of an item's properties."""
    version, is_wide = data[at], data[at + 3] & 1
    (count,) = struct.unpack_from(">I", data, at + 4)
    at += 8
    for _ in range(min(count, MAX_STEPS)):
        (owner,) = struct.unpack_from(">I" if version else ">H", data, at)
        at += 4 if version else 2
        number, width = data[at], 2 if is_wide else 1
        at += 1
        if owner == item:
            mask = 0x7FFF if is_wide else 0x7F
            return [int.from_bytes(data[at + i * width : at + (i + 1) * width], "big") & mask for i in range(number)]
        at += number * width
        if at > end:
            break
    return []


def _inside(data: bytes, start: int, end: int, wanted: bytes) -> tuple[int, int]:
    """Where the body of the first box of that name begins and ends."""
    for name, body, stop in _boxes(data, start, end):
        if name == wanted:
            return body, stop
    raise ValueError(f"no box {wanted!r}")


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, where its body begins, where it ends) of boxes behind one another."""
    for _ in range(MAX_STEPS):
        if start + 8 > end:
            return
        size, name = struct.unpack_from(">I4s", data, start)
        body = start + 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, body)
            body += 8
        stop = end if size == 0 else start + size
        if stop < body:
            raise ValueError("a box that is smaller than its head")
        yield name, body, min(stop, end)
        start = stop
