"""Pictures whose file lacks its end, or is damaged on the way: what a viewer still shows of them.

Nothing here is tried before the library has refused the file as it is. What is there is found by loading twice, over
two backgrounds (or with two continuations of the file): pixels that differ came from no file.
"""

from __future__ import annotations

import re
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha512

import numpy as np
from PIL import Image, ImageFile

from qwen3vl_disagg.media.image_formats import ImageFormat, Mending

_MIN_WEBP_BYTES = 0.75
"""Of the bytes, which a WebP declares."""
_GREY = 128
_MAX_PNG_CHUNKS = 100_000
_PNG_START = 8
_SCAN = re.compile(rb"\xff\xda")
_AFTER_SCAN = re.compile(rb"\xff[\xc4\xda\xd9\xdb\xdd\xfe]")
_WEBP_ALPHA = 0x10
_WEBP_ROOM = 2**16
_MAX_WEBP_PARTS = 10_000
_FILLERS = (b"\0", b"\xb5", b"\xff", b"\x80", b"\xaa", *(sha512(bytes([i])).digest() for i in range(64)))
_FILLING_S = 0.3
"""CPU time for trying these; a lossless picture needs luck."""
WITHOUT_END = "the file lacks its end; the picture is whole"

Opener = Callable[[bytes], ImageFile.ImageFile]


@dataclass(frozen=True)
class Loaded:
    """A picture in the file's own mode, and which of its pixels the file holds: `there` `[H, W]`, None for all."""

    image: Image.Image
    note: str = ""
    """What is missing, or was left out."""
    there: np.ndarray | None = None
    region: tuple[int, int, int, int] | None = None
    """Of a GIF: left, top, right, bottom of its first picture on the screen."""


def cover(rgb: Image.Image, there: np.ndarray) -> Image.Image:
    """With what is missing as its neighbour to the left or above where that is there (interlaced files), else grey."""
    levels, there = np.array(rgb), there.copy()
    for axis in (1, 0):
        ahead, behind = _shifted(axis)
        gaps = ~there[ahead] & there[behind]
        levels[ahead][gaps] = levels[behind][gaps]
        there[ahead] |= gaps
    levels[~there] = _GREY
    return Image.fromarray(levels)


def _shifted(axis: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    before = (slice(None),) * axis
    return (*before, slice(1, None)), (*before, slice(None, -1))


def note_of(form: ImageFormat, data: bytes) -> str:
    """Of a picture that loads: whether its file's last mark is missing, which the library does not look at."""
    start = max(data.rfind(form.end_after), 0) if form.end_after else 0
    return WITHOUT_END if form.end and data.find(form.end, start) < 0 else ""


def load_partial(form: ImageFormat, data: bytes, opener: Opener) -> Loaded:
    """What is there of a file that the library refuses. Raises whatever the library does for what cannot be mended,
    ValueError where less than its share is there."""
    if form.mending is None:
        raise ValueError("a format whose damaged files are refused")
    return _MENDING[form.mending](data, opener, form.min_share)


@contextmanager
def _tolerant() -> Iterator[None]:
    """A setting of the whole library, so nothing else may be loading: children do one thing at a time."""
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


def _over(image: ImageFile.ImageFile, level: int) -> Image.Image:
    """Loaded as far as the file goes, over a background of this level."""
    prepare = image.load_prepare

    def prepare_background() -> None:
        prepare()
        bands = len(image.im.mode) if image.im.mode in ("RGB", "RGBA", "CMYK", "LA") else 1
        image.im.paste(level if bands == 1 else (level,) * bands, (0, 0, *image.im.size))

    image.load_prepare = prepare_background  # type: ignore[method-assign]
    with _tolerant():
        image.load()
    return image


def _load_over_backgrounds(data: bytes, opener: Opener, min_share: float) -> Loaded:
    image, other = _over(opener(data), 0), _over(opener(data), 1)
    return _judged(image, _equal(image, other), min_share)


def _equal(image: Image.Image, other: Image.Image) -> np.ndarray:
    """`[H, W]` bool"""
    same = np.asarray(image) == np.asarray(other)
    return same.all(axis=2) if same.ndim == 3 else same


def _judged(image: Image.Image, there: np.ndarray, min_share: float) -> Loaded:
    share = float(there.mean())
    if share < min_share:
        raise ValueError(f"{share:.0%} of the picture is there")
    if there.all():
        return Loaded(image, WITHOUT_END)
    missing = max(1, round(100 * (1 - share)))
    return Loaded(image, f"the file ends early or is damaged: {missing} % of the picture is missing", there)


# -- PNG


def _load_png(data: bytes, opener: Opener, min_share: float) -> Loaded:
    """Chunks that do not matter for the picture and have a wrong checksum are left out, as viewers do."""
    mended, skipped = _without_bad_chunks(data)
    try:
        image = opener(mended)
        image.load()
    except Exception:
        return _load_over_backgrounds(mended, opener, min_share)
    return Loaded(image, f"damaged chunks of the file were skipped: {', '.join(skipped)}")


def _without_bad_chunks(data: bytes) -> tuple[bytes, list[str]]:
    parts, skipped, at = [data[:_PNG_START]], list[str](), _PNG_START
    for _ in range(_MAX_PNG_CHUNKS):
        if at + 12 > len(data):
            break
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if kind[0] & 0x20 and (end > len(data) or zlib.crc32(data[at + 4 : end - 4]) != _checksum(data, end)):
            skipped.append(kind.decode("latin-1") if kind.isalpha() else "?")
        else:
            parts.append(data[at:end])
        at = end
    parts.append(data[at:])
    return b"".join(parts), sorted(set(skipped))


def _checksum(data: bytes, end: int) -> int:
    return int.from_bytes(data[end - 4 : end], "big")


# -- JPEG


def _load_jpeg(data: bytes, opener: Opener, min_share: float) -> Loaded:
    """With the missing end supplied. In a file of one scan the rows that come without it are there, and the row of
    blocks behind them as far as it goes; one of several scans is whole, if less fine, when each component had one."""
    with _tolerant():
        image = opener(data)
        image.load()
    if len(_SCAN.findall(data)) > 1 and (components := _components_scanned(data)):
        if components < len(image.getbands()):
            raise ValueError("not all components are there")
        return Loaded(image, "the file ends early: the picture is whole, finer detail may be missing")
    found = []
    for level in (0, 1):
        rows = opener(data)
        block = 8 * max((layer[2] for layer in getattr(rows, "layer", [])), default=2)
        rows.load_read = rows.fp.read  # type: ignore[attr-defined, union-attr] # without the end that the library adds
        found.append(_over(rows, level))
    there = _equal(*found)
    num_rows = int(there.all(axis=1).cumprod().sum())
    there[:] = np.arange(len(there))[:, None] < -(-num_rows // block) * block + block  # some rows come a bit later
    if there.all():
        return Loaded(image, f"the file lacks its end: of its last {block} rows a part may be missing")
    return _judged(image, there, min_share)


def _components_scanned(data: bytes) -> int:
    """How many components had a first scan that is followed by something. 0 for a file whose scans cannot be read."""
    done: set[int] = set()
    for scan in _SCAN.finditer(data):
        at = scan.end() + 2
        count = data[at] if at < len(data) else 0
        if not 1 <= count <= 4 or not _AFTER_SCAN.search(data, at):
            continue
        done |= set(data[at + 1 : at + 1 + 2 * count : 2])
    return len(done)


# -- WebP


def _load_webp(data: bytes, opener: Opener, min_share: float) -> Loaded:
    """The first picture alone, continued in several ways where it ends early: two that decode tell what is there.

    Decoders stop at the end of the bytes, so a continuation is longer than what is missing.
    """
    head, name, picture, length = _webp_picture(data)
    missing = length - len(picture)
    if missing > length * (1 - _MIN_WEBP_BYTES):
        raise ValueError(f"{missing} of {length} bytes are missing")
    images, until = list[Image.Image](), time.process_time() + _FILLING_S
    for filler in _FILLERS if missing else (b"",):
        riff = b"WEBP" + head + _webp_part(name, picture + filler * (2 * missing + _WEBP_ROOM))
        with suppress(OSError, EOFError, ValueError, SyntaxError):
            image = opener(b"RIFF" + struct.pack("<I", len(riff)) + riff)
            image.load()
            images.append(image)
        if len(images) == 2 or time.process_time() > until:
            break
    if not missing and images:
        return Loaded(images[0], WITHOUT_END)
    first, other = images
    rows = _equal(first, other).all(axis=1).cumprod().astype(bool)
    return _judged(first, np.repeat(rows[:, None], first.width, axis=1), min_share)


def _webp_picture(data: bytes) -> tuple[bytes, bytes, bytes, int]:
    """(parts before it, kind, bytes, length as declared) of the first picture, that of an animation made a still."""
    head, at = b"", 12
    for _ in range(_MAX_WEBP_PARTS):
        name, length = struct.unpack_from("<4sI", data, at)
        body = data[at + 8 : at + 8 + length]
        if name in (b"VP8 ", b"VP8L"):
            return head, name, body, length
        if name == b"VP8X":
            head += _webp_part(name, bytes([body[0] & _WEBP_ALPHA]) + body[1:])
        elif name == b"ALPH":
            head += _webp_part(name, body)
        elif name == b"ANMF":
            length = 16  # its own parts follow, of which the first is the picture
        at += 8 + length + length % 2
    raise ValueError("no picture")


def _webp_part(name: bytes, body: bytes) -> bytes:
    return struct.pack("<4sI", name, len(body)) + body + b"\0" * (len(body) % 2)


_MENDING: dict[Mending, Callable[[bytes, Opener, float], Loaded]] = {
    "png": _load_png,
    "jpeg": _load_jpeg,
    "webp": _load_webp,
    "rows": _load_over_backgrounds,
}
