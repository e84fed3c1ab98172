"""A decoding child, both ends of its pipes: a job and a file's bytes to it, pixels back.

What they say is a length, a msgpack header, then raw bytes; both ends check what they read. The parent starts the
child, waits for it with a deadline, and kills it. The child decodes, within limits that it has put on itself, until the
parent closes or is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.media import sandbox
from qwen3vl_disagg.media.image_formats import FORMATS, ImageInfo
from qwen3vl_disagg.media.images import MAX_BYTES, MAX_PIXELS, decode_rgb
from qwen3vl_disagg.media.stop import StopSignal
from qwen3vl_disagg.media.video import (
    MAX_VIDEO_BYTES,
    VideoInfo,
    end_note,
    probe_video,
    sniff_container,
    video_frames,
)

COMMAND = (sys.executable, "-P", "-B", "-m", "qwen3vl_disagg.media.child")

_FEW_THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_MEMORY_BACK = {"MALLOC_MMAP_THRESHOLD_": str(8 * 2**20)}
"""So that glibc returns what a large picture took; what a small one takes is kept, which is faster."""
_PACKAGE = Path(__file__).parent.parent.parent
_START_S = 30.0
_SLICE_S = 0.1
"""As long is waited before the StopSignal is looked at again."""
_PIPE_BYTES = 2**20
_CRASHES = frozenset(
    {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGSYS, signal.SIGTRAP}
)
"""Signals that a process brings upon itself."""

MAX_HEADER_BYTES = 2**20
LENGTH_BYTES = 4

_PARENT_CHECK_S = 5.0
# CPU time that a job may take: 2.5 times or more what the most costly honest files took (a flat PNG of 64 megapixels,
# noise as WebP; noise as H.264 and VP9, flat HEVC), so that a slow core is not taken for a hostile file.
_BASE_S = 0.5
_S_PER_BYTE = 40e-9
_S_PER_PIXEL = 50e-9
_S_PER_VIDEO_BYTE = 300e-9
_S_PER_VIDEO_PIXEL = 10e-9


# -- what they say


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
_REPLIES = msgspec.msgpack.Decoder(Reply)


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


# -- the parent's end


class ChildFailed(Exception):
    """The child cannot go on and must be killed: it was too slow, it ended, was killed by others (by the system that
    had no memory left, for one), or it said what no child says."""

    def __init__(self, why: Literal["slow", "ended", "killed", "nonsense"]) -> None:
        super().__init__(why)
        self.why = why


class ChildProcess:
    """One child. Not thread-safe; only `kill` may be called from elsewhere.

    `what` it decodes is noted by its owner. `patience_s` is how long the child may still keep us waiting; time in which
    nobody waits for it does not count. What sends and receives raises Stopped when the job is stopped; the
    child is of no use then.
    """

    def __init__(
        self,
        stop: StopSignal,
        *,
        command: Sequence[str] | None = None,
        replies: msgspec.msgpack.Decoder[Any] = _REPLIES,
        start_s: float | None = None,
        errors_are_shown: bool = False,
    ) -> None:
        """Returns when the child is ready. If it does not get there, nothing of it is left behind.

        `command`: of another child than a decoding one. `replies`: decodes what it says, `Ready` first.
        `errors_are_shown`: its standard error is ours.
        """
        self.stop, self.patience_s, self.what = stop, start_s or _START_S, ""
        self._replies = replies
        path = [str(_PACKAGE), *(entry for entry in sys.path if entry)]
        environment = {"PYTHONPATH": os.pathsep.join(path), **_FEW_THREADS, **_MEMORY_BACK}
        if "LD_LIBRARY_PATH" in os.environ:
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        self.process = subprocess.Popen(
            command or COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if errors_are_shown else subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
            env=environment,
            start_new_session=True,  # a signal to our group, Ctrl-C for example, is not for the child
        )
        try:
            self._greet()
        except BaseException:
            self.close()
            raise

    def _greet(self) -> None:
        """Prepares the pipes and waits for the child's first word."""
        if self.process.stdin is None or self.process.stdout is None:
            raise OSError("no pipes")
        self._stdin, self._stdout = self.process.stdin.fileno(), self.process.stdout.fileno()
        for fd in (self._stdin, self._stdout):
            os.set_blocking(fd, False)
            with contextlib.suppress(OSError):  # the user's share of large pipes is used up: small ones do
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        if not isinstance(self.receive(), Ready):
            raise ChildFailed("nonsense")

    def send(self, job: msgspec.Struct, data: bytes | bytearray, patience_s: float, stop: StopSignal) -> None:
        """A job and what follows it. No view of `data` is left when this ends, however it does."""
        self.patience_s, self.stop = patience_s, stop
        for part in (pack(job), data):
            sent = 0
            with memoryview(part) as view:
                while sent < len(part):
                    self.stop.check()
                    try:
                        sent += os.write(self._stdin, view[sent:])
                    except BlockingIOError:
                        self._wait(self._stdin, select.POLLOUT)
                    except BrokenPipeError:
                        raise self._ended() from None

    def receive(self) -> Any:
        """The next header. ChildFailed if it is none."""
        try:
            body = self._read(body_length(self._read(LENGTH_BYTES).data))
            return self._replies.decode(body.data)
        except ValueError as error:  # also what msgspec raises
            raise ChildFailed("nonsense") from error

    def receive_pixels(self, header: Picture) -> np.ndarray:
        """The `[H, W, 3]` uint8 that follow."""
        try:
            header.check()
        except ValueError as error:
            raise ChildFailed("nonsense") from error
        return self._read(header.height * header.width * 3).reshape(header.height, header.width, 3)

    def receive_bytes(self, size: int) -> bytes:
        """The bytes that a header announced."""
        return self._read(size).tobytes()

    def kill(self) -> None:
        """Ends the child at once and waits for it."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Ends the child and gives its pipes back."""
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def _read(self, size: int) -> np.ndarray:
        data = np.empty(size, np.uint8)
        rest = data.data
        while rest:
            self.stop.check()
            try:
                count = os.readv(self._stdout, [rest])
            except BlockingIOError:
                self._wait(self._stdout, select.POLLIN)
                continue
            if not count:
                raise self._ended()
            rest = rest[count:]
        return data

    def _wait(self, fd: int, event: int) -> None:
        """Until the pipe is ready, or it is time to look at the StopSignal again."""
        started = time.monotonic()
        poll = select.poll()
        poll.register(fd, event)
        is_there = poll.poll(1000 * max(0.0, min(self.patience_s, self.stop.seconds_left(), _SLICE_S)))
        self.patience_s -= time.monotonic() - started
        if not is_there and self.patience_s <= 0:
            raise ChildFailed("slow")

    def _ended(self) -> ChildFailed:
        """Its CPU time ran out, it crashed, or others ended it."""
        try:
            status = self.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return ChildFailed("nonsense")
        if status == -signal.SIGPROF:
            return ChildFailed("slow")
        return ChildFailed("killed" if status < 0 and -status not in _CRASHES else "ended")


# -- the child's end


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
    import_module("PIL.AvifImagePlugin").DEFAULT_MAX_THREADS = 1  # type: ignore[attr-defined]  # no thread may be started
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
