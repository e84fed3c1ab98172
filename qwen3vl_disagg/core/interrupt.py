"""Ctrl-C where nothing is to be saved: the process leaves at once, and says nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_INTERRUPTED = 130
"""What a shell makes of a process that SIGINT ended."""


def leave(number: int, frame: FrameType | None) -> None:
    """Handler of a signal. No exception: imports catch them, and what they had begun would tell of it."""
    os._exit(EXIT_INTERRUPTED)


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """While this process imports and loads. Elsewhere than in the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
