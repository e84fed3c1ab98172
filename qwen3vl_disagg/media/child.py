"""A decoding child: jobs from standard input, pixels to standard output, until the parent closes or is gone."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator, Sequence
from importlib import import_module
from itertools import chain

import msgspec
from PIL import AvifImagePlugin

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.media import sandbox
from qwen3vl_disagg.media.image_headers import FORMATS
from qwen3vl_disagg.media.images import MAX_BYTES, decode_rgb
from qwen3vl_disagg.media.video import MAX_VIDEO_BYTES, end_note, probe_video, sniff_container, video_frames
from qwen3vl_disagg.media.wire import (
    LENGTH_BYTES,
    Done,
    Job,
    MediaRefused,
    Picture,
    Ready,
    Reply,
    body_length,
    pack,
    read_exactly,
)

_PARENT_CHECK_S = 5.0
# CPU time that a job may take: 2.5 times or more what the most costly honest files took (a flat PNG of 64 megapixels,
# noise as WebP; noise as H.264 and VP9, flat HEVC), so that a slow core is not taken for a hostile file.
_BASE_S = 0.5
_S_PER_BYTE = 40e-9
_S_PER_PIXEL = 50e-9
_S_PER_VIDEO_BYTE = 300e-9
_S_PER_VIDEO_PIXEL = 10e-9


def run(job: Job, data: bytes) -> Iterator[tuple[Reply, memoryview | bytes]]:
    """What to answer, header and bytes. InputError for bad media.

    The CPU budget is set by what the media declare, and lifted before the last answer: the child that gave it lives on.
    """
    if job.image is not None:
        sandbox.allow_cpu(_BASE_S + _S_PER_BYTE * len(data) + _S_PER_PIXEL * job.image.width * job.image.height)
        notes: list[str] = []
        image = decode_rgb(data, notes, job.image)
        levels = image.tobytes()
        sandbox.allow_cpu(0)
        yield Picture(image.height, image.width, "; ".join(notes)), levels
        return
    budget = _BASE_S + _S_PER_VIDEO_BYTE * len(data)
    sandbox.allow_cpu(budget)
    if not job.indices:
        info = probe_video(data)
        sandbox.allow_cpu(0)
        yield info, b""
        return
    for frame_HWC in video_frames(
        data, job.indices, lambda pixels: sandbox.allow_cpu(budget + _S_PER_VIDEO_PIXEL * pixels)
    ):
        yield Picture(*frame_HWC.shape[:2]), frame_HWC.data
    sandbox.allow_cpu(0)
    yield Done(end_note(data, sniff_container(data) or "")), b""


def answer(job: Job, data: bytes) -> Iterator[tuple[Reply, memoryview | bytes]]:
    """`run`, and a refusal where it raises."""
    try:
        yield from run(job, data)
    except InputError as error:
        sandbox.allow_cpu(0)
        yield MediaRefused(error.message, error.status, error.code), b""
    except Exception:  # the bytes are the cause; what went wrong in detail stays inside
        sandbox.allow_cpu(0)
        yield MediaRefused("the media are damaged and cannot be decoded", 400, InputError.code), b""


def is_wanted(parent: int, *, read: Sequence[int] = (), write: Sequence[int] = ()) -> bool:
    """Waits until a pipe is ready. False when the parent is gone, even if others hold its ends of the pipes."""
    while not any(select.select(read, write, [], _PARENT_CHECK_S)):
        if os.getppid() != parent:
            return False
    return True


def write_all(out: int, data: memoryview | bytes, parent: int) -> None:
    """To a pipe that does not block. BrokenPipeError when nobody reads it any more."""
    rest = memoryview(data).cast("B")
    while rest:
        try:
            rest = rest[os.write(out, rest) :]
        except BlockingIOError:
            if not is_wanted(parent, write=[out]):
                raise BrokenPipeError from None


def main() -> None:
    parent = os.getppid()
    out = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not come between the answers
    os.set_blocking(out, False)
    # Before the limits, because the library would import all that it has for a format it does not know yet.
    for plugin in chain.from_iterable(form.plugins for form in FORMATS.values()):
        import_module(f"PIL.{plugin}ImagePlugin")
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # no thread may be started
    sandbox.enter()
    write_all(out, pack(Ready()), parent)
    try:
        while is_wanted(parent, read=[0]):
            job = msgspec.msgpack.decode(read_exactly(0, body_length(read_exactly(0, LENGTH_BYTES))), type=Job)
            if not 0 <= job.num_bytes <= max(MAX_BYTES, MAX_VIDEO_BYTES):
                return
            for reply, payload in answer(job, bytes(read_exactly(0, job.num_bytes))):
                write_all(out, pack(reply), parent)
                write_all(out, payload, parent)
            del reply, payload  # up to 192 MiB that would stay until the next job
    except (EOFError, BrokenPipeError):
        return  # the parent closed


if __name__ == "__main__":
    main()
