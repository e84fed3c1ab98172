"""Clips of every container and codec, and files that are no clip, or one that is not accepted.

Each is (how to make it, what must come of it): ((width, height), number of frames), or (HTTP status, part of the
message). All are made with PyAV when they are asked for.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from tests.support.media_bytes import SIZE, clip, encode, joined, picture, sound

Clip = tuple[Callable[[], bytes], tuple[Any, Any]]

N = 8
TURNED = (SIZE[1], SIZE[0])
NO_CLIP, BAD_CODEC, DAMAGED = "not a clip", "codec", "damaged"
X265 = {"preset": "ultrafast", "x265-params": "log-level=none:pools=none"}
AV1 = {"preset": "12", "svtav1-params": "lp=1"}


def patched(data: bytes, box: bytes, at: int, value: bytes) -> bytes:
    """An MP4 file in which the bytes at this distance from the name of a box are others."""
    start = data.index(box) + at
    return data[:start] + value + data[start + len(value) :]


def moving(num_frames: int = 30) -> list[np.ndarray]:
    """Frames that do not compress away."""
    blocks = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    still = blocks.repeat(8, 0).repeat(8, 1)
    return [np.roll(still, shift, axis=1) for shift in range(num_frames)]


def rubbish_inside(data: bytes) -> bytes:
    """A clip whose frames are noise between the right headers."""
    start, end = data.index(b"mdat") + 16, data.index(b"moov") - 8
    noise = np.random.default_rng(0).integers(0, 256, end - start, dtype=np.uint8).tobytes()
    return data[:start] + noise + data[end:]


def with_hidden_frame() -> bytes:
    """VP8 whose fourth frame is only referred to, and never shown."""
    packets: list[bytes] = []
    data = clip("libvpx", "webm", frames=moving(N), edit=lambda _, packet: packets.append(bytes(packet)))
    at = data.index(packets[3])
    return data[:at] + bytes([data[at] & ~0x10]) + data[at + 1 :]


def without_first(data: bytes, count: int, form: str = "matroska") -> bytes:
    """A clip without its first packets, as copying from the middle of a stream gives it."""
    import av

    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format=form) as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        for packet in packets[count:]:
            packet.stream = stream
            out.mux(packet)
    return buffer.getvalue()


def uneven(number: int, packet: Any) -> None:
    """Makes the time between frames grow."""
    packet.pts = packet.dts = number * number


def long_and_large(num_frames: int) -> bytes:
    """Frames of 16 megapixels that are all but the first like the one before."""
    packets: list[bytes] = []
    still = [np.zeros((4000, 4000, 3), np.uint8)] * 2
    clip("mpeg4", "avi", frames=still, edit=lambda _, packet: packets.append(bytes(packet)))
    return joined([packets[0], *packets[1:2] * (num_frames - 1)], (4000, 4000), "mpeg4")


def small_jpeg(size: tuple[int, int] = (16, 16)) -> bytes:
    return encode(Image.new("RGB", size, "red"), "JPEG")


CLIPS: dict[str, Clip] = {
    "mp4 H.264": (clip, (SIZE, N)),
    "mp4 H.264 that refers ahead": (lambda: clip(frames=moving(), options={"bf": "3"}), (SIZE, 30)),
    "mp4 H.264 full chroma, odd size": (lambda: clip(size=(97, 65), pix_fmt="yuv444p"), ((97, 65), N)),
    "mp4 H.264 10 bits": (lambda: clip(pix_fmt="yuv420p10le"), (SIZE, N)),
    "mp4 HEVC": (lambda: clip("libx265", options=X265), (SIZE, N)),
    "mp4 AV1": (lambda: clip("libsvtav1", options=AV1), (SIZE, N)),
    "mp4 turned left": (lambda: clip(turn=90), (TURNED, N)),
    "mp4 upside down": (lambda: clip(turn=180), (SIZE, N)),
    "mp4 turned right": (lambda: clip(turn=-90), (TURNED, N)),
    "mp4 turned a little": (lambda: clip(turn=30), (SIZE, N)),
    "mp4 of two frames": (lambda: clip(num_frames=2), (SIZE, 2)),
    "mp4 of uneven times": (lambda: clip(options={"bf": "0"}, edit=uneven), (SIZE, N)),
    "mp4 of a forged duration": (lambda: patched(clip(), b"mvhd", 20, b"\x7f\xff\xff\xff"), (SIZE, N)),
    "mp4 of a forged count of times": (lambda: patched(clip(), b"stts", 12, b"\x7f\xff\xff\xff"), (SIZE, N)),
    "mp4 that names another file": (lambda: patched(clip(), b"url ", 7, b"\0"), (SIZE, N)),
    "mov H.264": (lambda: clip(container="mov"), (SIZE, N)),
    "webm VP8": (lambda: clip("libvpx", "webm"), (SIZE, N)),
    "webm VP8 with a hidden frame": (with_hidden_frame, (SIZE, N - 1)),
    "webm VP9": (lambda: clip("libvpx-vp9", "webm"), (SIZE, N)),
    "webm cut": (lambda: _cut(clip("libvpx", "webm", frames=moving(40))), (SIZE, None)),
    "mkv H.264": (lambda: clip(container="matroska"), (SIZE, N)),
    "avi MPEG-4": (lambda: clip("mpeg4", "avi"), (SIZE, N)),
    "avi Motion JPEG": (lambda: joined([encode(picture(), "JPEG")] * N), (SIZE, N)),
    "gif clip": (lambda: clip("gif", "gif", pix_fmt="rgb8"), (SIZE, N)),
    "no clip": (lambda: b"", (400, "empty")),
    "clip of text": (lambda: b"hello, I am an mp4", (400, NO_CLIP)),
    "clip over the limit": (lambda: b"\0\0\0\x18ftypisom" + bytes(48 * 2**20), (413, "the limit")),
    "playlist": (lambda: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", (400, NO_CLIP)),
    "list of files": (lambda: b"ffconcat version 1.0\nfile /etc/passwd\n", (400, NO_CLIP)),
    "transport stream": (lambda: clip(container="mpegts"), (400, NO_CLIP)),
    "flash": (lambda: clip("libx264", "flv"), (400, NO_CLIP)),
    "a still picture": (lambda: encode(picture(), "PNG"), (400, NO_CLIP)),
    "mkv FFV1": (lambda: clip("ffv1", "matroska"), (400, BAD_CODEC)),
    "avi uncompressed": (lambda: clip("rawvideo", "avi"), (400, BAD_CODEC)),
    "mov PNG": (lambda: clip("png", "mov", pix_fmt="rgb24"), (400, BAD_CODEC)),
    "mp4 of sound alone": (sound, (400, "no video stream")),
    "mp4 cut": (lambda: _cut(clip(frames=moving())), (400, DAMAGED)),
    "mp4 of rubbish": (lambda: rubbish_inside(clip(frames=moving())), (400, DAMAGED)),
    "mp4 of a forged count of frames": (lambda: patched(clip(), b"stsz", 12, b"\x7f\xff\xff\xff"), (400, DAMAGED)),
    "mp4 of forged sizes": (
        lambda: patched(clip(frames=moving()), b"stsz", 8, struct.pack(">II", 1, 10**6)),
        (400, DAMAGED),
    ),
    "avi without frames": (lambda: _without_frames(joined([small_jpeg(SIZE)])), (400, "no frames")),
    "avi of 20,001 frames": (lambda: joined([small_jpeg()] * 20_001, (16, 16)), (400, "limit of 20000 frames")),
    "avi of large frames": (lambda: joined([small_jpeg((4100, 4100))]), (400, "pixels, the limit")),
    "avi of 10,000 megapixels": (lambda: long_and_large(600), (400, "too much to decode")),
    "avi whose size changes": (
        lambda: joined([small_jpeg(SIZE)] * 8 + [small_jpeg(TURNED)] * 8),
        (400, "size of the frames changes"),
    ),
}


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _without_frames(avi: bytes) -> bytes:
    """An AVI file whose list of frames is another thing."""
    return avi.replace(b"00dc", b"JUNK").replace(b"idx1", b"JUNK")
