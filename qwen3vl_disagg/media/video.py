"""Clips -> RGB frames with PyAV, which is imported on first use (extra `video`).

Runs in a decoding child; other processes ask qwen3vl_disagg.media.decoding. Only containers and codecs of the two lists
below, read from memory: nothing that names another file or address is ever opened.

Times are those of the packets; what the headers declare about rate, duration and number of frames is not believed.
A packet that the end of the file cuts off is left out, wherever frames are counted or decoded.

Rules: rotation by quarter turns is applied, mirroring is not; pixels are taken as square; transparency is dropped;
colours become RGB as swscale does by default, which is what the reference's PyAV backend gives.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from fractions import Fraction
from typing import Any

import msgspec
import numpy as np

from qwen3vl_disagg.core.errors import InputError

MAX_VIDEO_BYTES = 48 * 2**20
MAX_FRAME_PIXELS = 16 * 2**20
MAX_FRAMES = 20_000
MAX_CLIP_PIXELS = 2**33
"""Pixels of all frames together: 20,000 frames of 640 x 480 fit, and two minutes of 1920 x 1080 at 30 a second."""

UNKNOWN_FPS = 24.0
"""Frames a second of a clip that does not say."""
MAX_FPS = 1000.0

CONTAINERS = ("mp4", "mov", "webm", "mkv", "avi", "gif")
_WITH_TABLES = ("mp4", "mov")
"""Their tables list each frame: with less than half of these a file that ends early is refused."""
CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg4", "mjpeg", "gif"})
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_MAX_BOXES = 10_000
_EBML, _SEGMENT = b"\x1aE\xdf\xa3", b"\x18S\x80g"


class VideoInfo(msgspec.Struct, frozen=True, tag="clip"):
    """What a clip holds, counted and not only declared.

    `format` is the container ("mp4", "mov", "webm", "mkv", "avi", "gif"). Width and height are pixels as shown, after
    the rotation that the file asks for. Frames 0 .. num_frames - 1 can be had, in display order. `fps` is the rate,
    that of an uneven clip the mean one; 24.0 if nothing tells. `times` of an uneven clip: seconds of each frame, rising
    from 0; else empty.
    """

    format: str
    width: int
    height: int
    num_frames: int
    fps: float
    times: tuple[float, ...] = ()


def check_clip_bytes(data: bytes) -> None:
    """InputError for no bytes, or more than a clip may have."""
    if not data:
        raise InputError("the clip is empty (0 bytes)")
    if len(data) > MAX_VIDEO_BYTES:
        raise InputError(f"the clip has {len(data)} bytes, the limit is {MAX_VIDEO_BYTES}", status=413)


def sniff_container(data: bytes) -> str | None:
    """The container that the content tells, or None if it is none of ours."""
    if data[4:8] in _MP4_BOXES:
        return "mov" if data[4:8] != b"ftyp" or data[8:12] == b"qt  " else "mp4"
    if data.startswith(_EBML):
        return "webm" if b"webm" in data[:64] else "mkv"
    if data.startswith(b"RIFF") and data[8:12] == b"AVI ":
        return "avi"
    return "gif" if data.startswith((b"GIF87a", b"GIF89a")) else None


def probe_video(data: bytes) -> VideoInfo:
    """What the clip holds: all packets are counted and the first frame is decoded. InputError for a bad clip."""
    with _opened(data) as (container, stream, name):
        times: list[int | None] = []
        for packet in container.demux(stream):
            if _is_shown(packet, stream.codec_context.name):
                times.append(packet.dts if packet.pts is None else packet.pts)
            if len(times) > MAX_FRAMES:
                raise InputError(f"the clip has more than the limit of {MAX_FRAMES} frames")
        if not times:
            raise InputError("the clip has no frames")
        if name in _WITH_TABLES and 2 * len(times) < stream.frames and end_note(data, name):
            raise InputError(f"the clip is damaged or cut off: {len(times)} of its {stream.frames} frames are there")
        tick, declared = stream.time_base, stream.average_rate
    with _opened(data) as (container, stream, _):
        frame = next(_decoded(container, stream), None)
        if frame is None:
            raise InputError("the clip has no frames that can be decoded")
        height, width = _shown_size(frame)
    num_frames = len(times) - _num_before(times, frame.pts)
    if num_frames * height * width > MAX_CLIP_PIXELS:
        raise InputError(f"the clip has {num_frames} frames of {width} x {height} pixels, which is too much to decode")
    in_order = sorted(times, key=lambda at: -1 if at is None else at)[-num_frames:]
    fps, seconds = frame_times(in_order, tick, declared)
    return VideoInfo(name, width, height, num_frames, fps, seconds)


def video_frames(
    data: bytes, indices: Sequence[int], starting: Callable[[int], None] = lambda pixels: None
) -> Iterator[np.ndarray]:
    """The frames of these strictly rising indices in display order, `[H, W, 3]` uint8, all of one size.

    `starting` is called with the pixels of all frames that will be decoded, before most of them are. InputError for a
    bad clip, for one whose size changes, and for an index behind its last frame.
    """
    wanted = iter(indices)
    index = next(wanted, None)
    with _opened(data) as (container, stream, _):
        from av.video.reformatter import VideoReformatter

        size, reformatter = None, VideoReformatter()
        for number, frame in enumerate(_decoded(container, stream)):
            if index is None:
                return
            if size is None:
                size = _shown_size(frame)
                starting((indices[-1] + 1) * size[0] * size[1])
            if _shown_size(frame) != size:
                raise InputError("the size of the frames changes within the clip")
            if number == index:
                rgb_HWC = reformatter.reformat(frame, format="rgb24").to_ndarray()
                yield np.ascontiguousarray(np.rot90(rgb_HWC, _quarter_turns(frame)))
                index = next(wanted, None)
    if index is not None:
        raise InputError(f"frame {index} is not in the clip, or cannot be decoded")


@contextmanager
def _opened(data: bytes) -> Iterator[tuple[Any, Any, str]]:
    """(container, its video stream, container name), whatever goes wrong with them an InputError."""
    check_clip_bytes(data)
    name = sniff_container(data)
    if name is None:
        raise InputError("not a clip of an allowed container (MP4, MOV, WebM, MKV, AVI, GIF)")
    try:
        import av
    except ImportError:
        raise InputError("clips need PyAV: pip install 'qwen3vl-disagg[video]'", code="not_installed") from None
    av.logging.set_level(av.logging.PANIC)
    demuxer = {"mkv": "matroska", "webm": "matroska"}.get(name, name)
    limits = {"protocol_whitelist": "none", "format_whitelist": demuxer, "codec_whitelist": ",".join(sorted(CODECS))}
    try:
        with closing(av.open(io.BytesIO(data), format=demuxer, options=limits)) as container:
            yield container, _video_stream(container), name
    except InputError:
        raise
    except MemoryError:
        raise InputError("the clip needs more memory than decoding it may take") from None
    except Exception as error:  # whatever the library raises, the bytes are the cause; its text stays inside
        raise InputError("the clip is damaged or cut off and cannot be decoded") from error


def _video_stream(container: Any) -> Any:
    import av

    cover = av.stream.Disposition.attached_pic
    stream = next((stream for stream in container.streams.video if not stream.disposition & cover), None)
    if stream is None:
        raise InputError("the clip has no video stream")
    context = stream.codec_context
    if context is None or context.name not in CODECS:
        raise InputError("the clip's codec is not one of H.264, HEVC, VP8, VP9, AV1, MPEG-4, Motion JPEG, GIF")
    _check_size(context.height, context.width)
    context.thread_count = 1
    return stream


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """The frames of all packets that are whole."""
    for packet in container.demux(stream):
        if not packet.is_corrupt:
            yield from packet.decode()


def _is_shown(packet: Any, codec: str) -> bool:
    """Whether a packet is a frame that is shown: not the empty one at the end, nor one that only others refer to, nor
    one that the end of the file cuts off."""
    if not packet.size or packet.is_discard or packet.is_corrupt:
        return False
    return codec != "vp8" or bool(bytes(packet)[0] & 0x10)


def _num_before(times: Sequence[int | None], first: int | None) -> int:
    """How many frames stand before the first that is shown: a clip that was cut has some that refer to what is gone.

    `times` are those of all packets in the order of the file, where such frames come first, or next to the first shown.
    """
    count = 0
    for time in times:
        if time is None or first is None or time > first:
            break
        count += time < first
    return count


def _quarter_turns(frame: Any) -> int:
    """Turns of 90 degrees against the clock."""
    return round(frame.rotation / 90) % 4 if frame.rotation % 90 == 0 else 0


def _shown_size(frame: Any) -> tuple[int, int]:
    """(height, width) after rotation. InputError if that is too large."""
    _check_size(frame.height, frame.width)
    return (frame.width, frame.height) if _quarter_turns(frame) % 2 else (frame.height, frame.width)


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_FRAME_PIXELS:
        raise InputError(f"the clip's frames have {height * width} pixels, the limit is {MAX_FRAME_PIXELS}")


# -- when frames are shown


def sane_fps(rate: Fraction | None) -> float:
    """Frames a second as a file tells; UNKNOWN_FPS if it does not, or not within 1 / 1000 .. 1000."""
    fps = float(rate or 0)
    return fps if 1 / MAX_FPS <= fps <= MAX_FPS else UNKNOWN_FPS


def frame_times(
    ticks: Sequence[int | None], tick: Fraction | None, declared: Fraction | None
) -> tuple[float, tuple[float, ...]]:
    """(frames a second, seconds of each frame from the first one on).

    `ticks`: times of the frames in display order, in units of `tick` seconds. The declared rate counts where no frame
    is off by more than half of one; else the mean rate, if that is true of it; else the times themselves are given,
    with the mean rate. They are empty for clips of an even rate. Where packets have no times, the declared rate counts.
    """
    known = [at for at in ticks if at is not None]
    if not tick or len(known) < max(len(ticks), 2) or known[-1] <= known[0]:
        return sane_fps(declared), ()
    seconds = [float((at - known[0]) * tick) for at in known]
    mean = min(max((len(known) - 1) / seconds[-1], 1 / MAX_FPS), MAX_FPS)
    for rate in (float(declared or 0), mean):
        if 1 / MAX_FPS <= rate <= MAX_FPS and _is_even(seconds, rate, float(tick)):
            return rate, ()
    return mean, tuple(seconds)


def _is_even(seconds: Sequence[float], rate: float, tick: float) -> bool:
    slack = 0.5 / rate + tick
    return all(abs(at - number / rate) <= slack for number, at in enumerate(seconds))


# -- whether a file ends before its container says


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
