"""Images that are made to cost time or memory: (how to make it, HTTP status, part of the message)."""

from __future__ import annotations

import zlib

import numpy as np
from PIL import Image

from tests.support.media_bytes import (
    COLOUR,
    after_start,
    chunk,
    encode,
    picture,
    png,
    segment,
    with_many_scans,
)
from tests.support.media_images import DAMAGED, NO_IMAGE, Bad

SLOW = "too long"


def png_with(*chunks: tuple[bytes, bytes]) -> bytes:
    return png(np.zeros((64, 64, 3)), 8, COLOUR, chunks=chunks)


def zeros(num_bytes: int) -> bytes:
    """That many zeros, compressed to a thousandth."""
    return zlib.compress(bytes(num_bytes))


def many_scans() -> bytes:
    flat = encode(Image.new("RGB", (2000, 2000), "teal"), "JPEG", progressive=True)
    return with_many_scans(flat, 3000)


def many_segments() -> bytes:
    """A million pieces of EXIF: joining them one by one would copy half a terabyte."""
    return after_start(encode(picture(), "JPEG"), segment(0xE1, b"Exif\0\0x") * 1_000_000)


def many_chunks() -> bytes:
    one = chunk(b"teSt", b"")
    return png_with((b"teSt", b"")).replace(one, one * 1_000_000)


HOSTILE_IMAGES: dict[str, Bad] = {
    "jpeg of 3,000 scans": (many_scans, 504, SLOW),
    "jpeg of a million segments": (many_segments, 400, NO_IMAGE),
    "jpeg of fill bytes": (lambda: b"\xff\xd8" + b"\xff" * (19 * 2**20), 400, NO_IMAGE),
    "jpeg of rubbish": (lambda: b"\xff\xd8\xff" + b"\0\xff" * (9 * 2**20), 400, NO_IMAGE),
    "png text that inflates": (lambda: png_with((b"zTXt", b"a\0\0" + zeros(50 * 2**20))), 400, DAMAGED),
    "png note that inflates": (lambda: png_with((b"iTXt", b"a\0\1\0\0\0" + zeros(50 * 2**20))), 400, DAMAGED),
    "png profiles that inflate": (
        lambda: png_with(*[(b"iCCP", b"a\0\0" + zeros(2**20 - 1))] * 9000),
        504,
        SLOW,
    ),
    "png of a million chunks": (many_chunks, 400, NO_IMAGE),
    "gif of a million notes": (
        lambda: b"GIF89a\x40\0\x40\0\0\0\0" + b"!\xfe\1x\0" * 1_000_000 + encode(picture(mode="P"), "GIF")[13:],
        400,
        NO_IMAGE,
    ),
    "gif of one endless note": (lambda: b"GIF89a\x40\0\x40\0\0\0\0!\xfe" + b"\1x" * 2_000_000, 400, NO_IMAGE),
    "webp of a million parts": (
        lambda: b"RIFF\0\0\0\x10WEBPVP8X\x0a\0\0\0\x0c\0\0\0\x3f\0\0\x3f\0\0" + b"JUNK\0\0\0\0" * 1_000_000,
        400,
        DAMAGED,
    ),
}
