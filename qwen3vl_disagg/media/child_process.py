"""The parent's end of one decoding child: it is started, spoken to with a deadline, and killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from qwen3vl_disagg.media.stop import StopSignal
from qwen3vl_disagg.media.wire import LENGTH_BYTES, Picture, Ready, Reply, body_length, pack

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
_REPLIES = msgspec.msgpack.Decoder(Reply)


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
