"""What a decoding child and its parent say to each other: a length, a msgpack header, then raw bytes.

Both ends check what they read. The child's end is blocking; the parent's is in qwen3vl_disagg.media.child_process.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import msgspec

from qwen3vl_disagg.media.image_headers import ImageInfo
from qwen3vl_disagg.media.images import MAX_PIXELS
from qwen3vl_disagg.media.video import VideoInfo

MAX_HEADER_BYTES = 2**20
LENGTH_BYTES = 4


class Job(msgspec.Struct, frozen=True):
    """Followed by `num_bytes` of an image, whose header has been read, or of a clip.

    Of a clip, the frames of `indices` are decoded; without any, it is told what the clip holds.
    """

    num_bytes: int
    image: ImageInfo | None = None
    indices: Sequence[int] = ()


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The first word of a child."""


class MediaRefused(msgspec.Struct, frozen=True, tag="refused"):
    """The fields of an InputError."""

    message: str
    status: int
    code: str


class Picture(msgspec.Struct, frozen=True, tag="pixels"):
    """Followed by height * width * 3 bytes, `[H, W, 3]` uint8. `note`: what of the file is not in them."""

    height: int
    width: int
    note: str = ""

    def check(self) -> None:
        """ValueError for a size that no picture can have."""
        if self.height < 1 or self.width < 1 or self.height * self.width > MAX_PIXELS:
            raise ValueError(f"{self.width} x {self.height} pixels")


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The last of the frames has been said. `note`: as of `Picture`."""

    note: str = ""


Reply = Ready | MediaRefused | Picture | VideoInfo | Done


def pack(message: msgspec.Struct) -> bytes:
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def body_length(head: bytearray | memoryview) -> int:
    """Of the header that follows. ValueError if that is more than a header may have."""
    length = int.from_bytes(head, "big")
    if not 0 < length <= MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes")
    return length


def read_exactly(fd: int, size: int) -> bytearray:
    """EOFError if the other end closes before."""
    data = bytearray(size)
    rest = memoryview(data)
    while rest:
        count = os.readv(fd, [rest])
        if not count:
            raise EOFError
        rest = rest[count:]
    return data
