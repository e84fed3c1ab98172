"""Readers of image headers: width, height and orientation (EXIF's, 1 .. 8) as they stand in the file. Pure Python,
bounded work, no pixels.

The decoder library's own `open` is not used for this: on hostile headers it decompresses profiles, copies metadata
again and again and allocates whole canvases. Here each walk takes at most MAX_STEPS steps and copies next to nothing.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress

MAX_STEPS = 10_000
"""Segments, chunks, blocks, tags or boxes that are walked over before the size must be known."""
MAX_PROFILE_BYTES = 2**20
"""As much of a text is looked at, compressed or not."""
MAX_HEX_BYTES = 150_000
"""Of EXIF in hexadecimal lines, of which there are at most 64 KiB."""
MAX_RUBBISH = 256
"""Bytes between two JPEG segments that belong to neither."""

_WIDTH, _HEIGHT, _ORIENTATION = 256, 257, 274
TIFF_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
_TAG_FORMS = {1: "B", 3: "H", 4: "I"}
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_JPEG_MARKER = re.compile(rb"\xff([^\x00\xff])", re.DOTALL)
_JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_BARE = frozenset({0x01, *range(0xD0, 0xD9)})
_JPEG_SCAN, _JPEG_END, _JPEG_APP1 = 0xDA, 0xD9, 0xE1
_EXIF, _JPEG_XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"


_TURNED: dict[int | None, tuple[int, ...]] = {None: (1, 8, 3, 6), 0: (4, 5, 2, 7), 1: (2, 7, 4, 5)}
"""Axis of the mirror that follows (0 top to bottom, 1 left to right), quarter turns against the clock -> EXIF's."""


class BadHeader(ValueError):
    """Not an image of a known format, or one whose header ends early or goes on too long."""


def _tags(tiff: bytes) -> Iterator[tuple[int, int, int | None]]:
    """(tag, how many values, the first one) of the first directory; None for what is no whole number."""
    order = TIFF_ORDERS[tiff[:4]]
    (at,) = struct.unpack_from(order + "I", tiff, 4)
    (count,) = struct.unpack_from(order + "H", tiff, at)
    for entry in range(at + 2, at + 2 + 12 * min(count, MAX_STEPS), 12):
        tag, kind, number = struct.unpack_from(order + "HHI", tiff, entry)
        form = _TAG_FORMS.get(kind)
        yield tag, number, struct.unpack_from(order + form, tiff, entry + 8)[0] if form else None


def exif_orientation(exif: bytes) -> int | None:
    """The orientation in the first directory of an EXIF block; None if none is told, 1 for one that does not exist."""
    with suppress(struct.error, KeyError):  # damaged metadata does not make the picture unusable
        for tag, _, value in _tags(exif.removeprefix(_EXIF)):
            if tag == _ORIENTATION:
                return value if value is not None and 1 <= value <= 8 else 1
    return None


def _orientation(exif: bytes | None, xmp: bytes | None) -> int:
    """EXIF first; XMP only where EXIF says nothing."""
    value = exif_orientation(exif) if exif else None
    if value is None and xmp and (match := _XMP_ORIENTATION.search(xmp, 0, MAX_PROFILE_BYTES)):
        value = int(match[1])
    return value if value is not None and 1 <= value <= 8 else 1


def read_jpeg(data: bytes) -> tuple[int, int, int]:
    at, size, exif, xmp = 2, None, None, None
    for _ in range(MAX_STEPS):
        found = _JPEG_MARKER.search(data, at, at + MAX_RUBBISH)
        if found is None:
            break
        marker, at = found[1][0], found.end()
        if marker in (_JPEG_SCAN, _JPEG_END):
            if size is None:
                break
            return *size, _orientation(exif, xmp)
        if marker in _JPEG_BARE:
            continue
        (length,) = struct.unpack_from(">H", data, at)
        if marker in _JPEG_SIZES:
            if size is not None:
                raise BadHeader("two frame headers")
            height, width = struct.unpack_from(">HH", data, at + 3)
            size = width, height
        elif marker == _JPEG_APP1:
            if exif is None and data.startswith(_EXIF, at + 2):
                exif = data[at + 2 : at + length]
            elif xmp is None and data.startswith(_JPEG_XMP, at + 2):
                xmp = data[at + 2 : at + length]
        at += max(length, 2)
    raise BadHeader("no picture in the JPEG file")


def _inflate(data: bytes, limit: int) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, limit)
    except zlib.error:
        return b""


def _png_text(kind: bytes, body: bytes, limit: int) -> bytes:
    """The text of a tEXt, zTXt or iTXt chunk, cut at so many bytes."""
    _, _, rest = body.partition(b"\0")
    if kind == b"tEXt":
        return rest[:limit]
    if kind == b"zTXt":
        return _inflate(rest[1:], limit)
    is_compressed, (_, _, after) = rest[:1] == b"\1", rest[2:].partition(b"\0")
    text = after.partition(b"\0")[2]
    return _inflate(text, limit) if is_compressed else text[:limit]


def _hex_profile(text: bytes) -> bytes:
    """EXIF as some tools write it into a text chunk: a title and a length, then hexadecimal lines."""
    digits = b"".join(text.split(b"\n", 3)[3:]).translate(None, b"\n")
    try:
        return bytes.fromhex(digits[: len(digits) // 2 * 2].decode("latin-1"))
    except ValueError:
        return b""


def read_png(data: bytes) -> tuple[int, int, int]:
    """Orientation counts only where it stands before the pixels, so that the header suffices."""
    if data[12:16] != b"IHDR":
        raise BadHeader("the PNG file does not begin with its size")
    width, height = struct.unpack_from(">II", data, 16)
    at, exif, profile, xmp = 8, None, None, None
    for _ in range(MAX_STEPS):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind in (b"IDAT", b"fdAT"):
            return width, height, _orientation(exif or profile, xmp)
        if kind == b"IEND":
            break
        body = at + 8
        if kind == b"eXIf" and exif is None:
            exif = data[body : body + length]
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            if xmp is None and data.startswith(b"XML:com.adobe.xmp\0", body):
                xmp = _png_text(kind, data[body : body + length], MAX_PROFILE_BYTES)
            elif profile is None and data.startswith(b"Raw profile type exif\0", body):
                profile = _hex_profile(_png_text(kind, data[body : body + length], MAX_HEX_BYTES))
        at = body + length + 4
    raise BadHeader("no pixels in the PNG file")


def read_webp(data: bytes) -> tuple[int, int, int]:
    kind = data[12:16]
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF, 1
    if kind == b"VP8L" and data[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, 1
    if kind != b"VP8X" or len(data) < 30:
        raise BadHeader("no picture in the WebP file")
    width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    found: dict[bytes, bytes] = {}
    at = 12
    for _ in range(MAX_STEPS):
        if at + 8 > len(data) or len(found) == 2:
            break
        name, length = struct.unpack_from("<4sI", data, at)
        if name in (b"EXIF", b"XMP ") and name not in found:
            found[name] = data[at + 8 : at + 8 + length]
        at += 8 + length + length % 2
    return width, height, _orientation(found.get(b"EXIF"), found.get(b"XMP "))


def read_gif(data: bytes) -> tuple[int, int, int]:
    """The size of the screen, or larger where the first picture reaches out of it."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    is_inside = False
    for _ in range(MAX_STEPS):
        kind = data[at]
        if is_inside:  # an extension, whose parts begin with their lengths; none ends it
            at += 1 + kind
            is_inside = kind > 0
            continue
        if kind == 0x2C:
            left, top, across, down = struct.unpack_from("<4H", data, at + 1)
            return max(width, left + across), max(height, top + down), 1
        if kind == 0x3B:
            break
        if kind != 0x21:
            at += 1  # a stray byte between two blocks
            continue
        at += 2
        is_inside = True
    raise BadHeader("no picture in the GIF file")


def read_bmp(data: bytes) -> tuple[int, int, int]:
    (header,) = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<HH" if header == 12 else "<Ii", data, 18)
    return width, abs(height), 1


def read_tiff(data: bytes) -> tuple[int, int, int]:
    """The first page. Its size is that after the orientation, which the library applies itself."""
    found: dict[int, int] = {}
    for tag, number, value in _tags(data):
        if tag in (_WIDTH, _HEIGHT, _ORIENTATION) and tag not in found and number == 1:
            if value is None:
                raise ValueError("no whole number")
            found[tag] = value
    width, height = found[_WIDTH], found[_HEIGHT]
    return (height, width, 1) if 5 <= found.get(_ORIENTATION, 1) <= 8 else (width, height, 1)


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
    return *size, _TURNED[mirror][turns]


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
