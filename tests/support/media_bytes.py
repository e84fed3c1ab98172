"""Image and clip files made on the spot, byte by byte where an encoder would not make them."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

SIZE = (96, 64)
"""(width, height) of the pictures and clips of the catalogue, unless they are about size."""

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
GREY, COLOUR, PALETTE, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6
_CHANNELS = {GREY: 1, COLOUR: 3, PALETTE: 1, GREY_ALPHA: 2, COLOUR_ALPHA: 4}
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""(first column, first row, column step, row step) of each pass."""


def picture(size: tuple[int, int] = SIZE, mode: str = "RGB") -> Image.Image:
    """A smooth picture, darker towards the top left, so that every orientation looks different."""
    width, height = size
    levels = np.zeros((height, width, 4), np.uint8)
    levels[..., 0] = np.linspace(40, 240, width)[None]
    levels[..., 1] = np.linspace(20, 220, height)[:, None]
    levels[..., 2] = 128
    levels[..., 3] = np.linspace(0, 255, width)[None]
    return Image.fromarray(levels).convert(mode)


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int, depth: int = 8, colour: int = COLOUR, interlaced: bool = False) -> bytes:
    return PNG_MAGIC + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))


def png(
    values: Any,
    depth: int = 8,
    colour: int = COLOUR,
    *,
    chunks: Iterable[tuple[bytes, bytes]] = (),
    interlaced: bool = False,
) -> bytes:
    """A PNG of these samples `[H, W]` or `[H, W, C]`, unfiltered, with more chunks before its pixels."""
    samples = np.asarray(values)
    samples = samples.reshape(*samples.shape[:2], _CHANNELS[colour])
    height, width = samples.shape[:2]
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    rows = b""
    for left, top, across, down in passes:
        part = samples[top::down, left::across]
        if part.size:
            rows += b"".join(b"\0" + _pack_row(row.reshape(-1), depth) for row in part)
    extra = b"".join(chunk(kind, body) for kind, body in chunks)
    pixels = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return png_header(width, height, depth, colour, interlaced) + extra + pixels


def _pack_row(row: np.ndarray, depth: int) -> bytes:
    if depth >= 8:
        return row.astype(">u2" if depth == 16 else "u1").tobytes()
    bits = (row[:, None].astype(np.uint8) >> np.arange(depth - 1, -1, -1, dtype=np.uint8)) & 1
    return np.packbits(bits.reshape(-1)).tobytes()


def png_claiming(width: int, height: int) -> bytes:
    """A few bytes that claim to be a huge picture."""
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return png_header(width, height) + pixels


def exif(orientation: int, *, order: str = "<") -> bytes:
    """An EXIF block with nothing but the orientation."""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"Exif\0\0" + mark + struct.pack(order + "IH", 8, 1) + entry + b"\0" * 4


def exif_of_many_tags(num_tags: int, num_bytes: int) -> bytes:
    """An EXIF block whose tags all claim the same bytes, so that copying them takes num_tags * num_bytes."""
    entries = b"".join(struct.pack("<HHII", 0x8000 + i % 0x7000, 7, num_bytes, 8) for i in range(num_tags))
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, num_tags) + entries + b"\0" * num_bytes


def segment(marker: int, body: bytes) -> bytes:
    """A JPEG segment."""
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def after_start(jpeg: bytes, *segments: bytes) -> bytes:
    """A JPEG with these segments in front of all others."""
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def ycck(jpeg: bytes) -> bytes:
    """A CMYK JPEG whose marker says that its first three components are luma and chroma."""
    at = jpeg.index(b"Adobe") + 11
    return jpeg[:at] + b"\2" + jpeg[at + 1 :]


def with_many_scans(jpeg: bytes, count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:last] + jpeg[last:-2] * count + jpeg[-2:]


def bmp(pixels: bytes, width: int, height: int, bits: int, *, compression: int = 0, palette: bytes = b"") -> bytes:
    """A BMP file with a header of 40 bytes; a negative height goes from top to bottom."""
    offset = 14 + 40 + len(palette)
    colours = len(palette) // 4
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(pixels), 0, 0, colours, 0)
    return struct.pack("<2sIHHI", b"BM", offset + len(pixels), 0, 0, offset) + info + palette + pixels


@contextlib.contextmanager
def ordinary_priority() -> Iterator[None]:
    """For encoders: libsvtav1 makes the thread that opens it a real-time one where it may, and with it all that this
    process starts later, ranks of other tests among them."""
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def clip(
    codec: str = "libx264",
    container: str = "mp4",
    *,
    frames: Sequence[np.ndarray] | None = None,
    num_frames: int = 8,
    size: tuple[int, int] = SIZE,
    rate: Any = 8,
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    turn: int = 0,
    edit: Callable[[int, Any], None] = lambda number, packet: None,
) -> bytes:
    """A clip that grows brighter from frame to frame; `edit` may change each packet before it is written."""
    import av

    if frames is None:
        width, height = size
        levels = [30 + 200 * i // max(num_frames, 1) for i in range(num_frames)]
        frames = [np.full((height, width, 3), level, np.uint8) for level in levels]
    height, width = frames[0].shape[:2] if len(frames) else (size[1], size[0])
    buffer = io.BytesIO()
    with ordinary_priority(), av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.options = {"threads": "1", **(options or {})}
        if turn:
            stream.set_display_rotation(turn)
        packets = [p for f in frames for p in stream.encode(av.VideoFrame.from_ndarray(f, format="rgb24"))]
        for number, packet in enumerate([*packets, *stream.encode()]):
            edit(number, packet)
            out.mux(packet)
    return buffer.getvalue()


def joined(packets: Sequence[bytes], size: tuple[int, int] = SIZE, codec: str = "mjpeg", form: str = "avi") -> bytes:
    """A clip of these packets as they are: with Motion JPEG a list of JPEG files, whatever their sizes."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as out:
        stream = out.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = (*size, "yuvj420p" if codec == "mjpeg" else "yuv420p")
        for number, data in enumerate(packets):
            packet = av.Packet(data)
            packet.stream, packet.pts, packet.dts, packet.is_keyframe = stream, number, number, not number
            packet.time_base = Fraction(1, 8)
            out.mux(packet)
    return buffer.getvalue()


def sound(container: str = "mp4", codec: str = "aac") -> bytes:
    """A tenth of a second of silence, and no picture."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=16000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        for packet in [*stream.encode(silence), *stream.encode()]:
            out.mux(packet)
    return buffer.getvalue()
