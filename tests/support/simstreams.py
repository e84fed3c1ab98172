"""Streams of the device of `simcuda`: what was launched on one is there for another once the host has waited for it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch


class SimStream:
    """Operators run at once, and count as done when somebody has waited for the stream. `priority`: as CUDA has it, a
    lower number goes first."""

    def __init__(self, device: object = None, priority: int = 0) -> None:
        if priority > 0:
            raise RuntimeError(f"priority {priority}: 0 is the least")
        self.priority, self.num_launched, self.num_done, self.num_waits = priority, 0, 0, 0

    def synchronize(self) -> None:
        self.num_done = self.num_launched
        self.num_waits += 1


class Streams:
    """Of a device; each thread has its own current one."""

    def __init__(self) -> None:
        self._of_thread = threading.local()
        self.default = SimStream()

    @property
    def current(self) -> SimStream:
        return getattr(self._of_thread, "stream", self.default)

    @contextlib.contextmanager
    def using(self, stream: SimStream) -> Iterator[None]:
        before = self.current
        self._of_thread.stream = stream
        try:
            yield
        finally:
            self._of_thread.stream = before

    def _synchronize(self, device: object = None) -> None:
        self.default.synchronize()

    def tag(self, x: Any) -> None:
        """A tensor, or some, made or written on the current stream."""
        self.current.num_launched += 1
        for part in x if isinstance(x, (list, tuple)) else [x]:
            if hasattr(part, "elem"):
                part.made = self.current, self.current.num_launched

    def look(self, tensors: Iterable[Any], problem: Callable[[str], Exception]) -> None:
        """Raises where one was made on another stream that nobody has waited for since."""
        for x in tensors:
            stream, number = getattr(x, "made", (self.current, 0))
            if stream is not self.current and number > stream.num_done:
                raise problem("made on another stream, for which nobody has waited")

    @contextlib.contextmanager
    def simulated(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(torch.cuda, "Stream", SimStream))
            stack.enter_context(mock.patch.object(torch.cuda, "stream", self.using))
            stack.enter_context(mock.patch.object(torch.cuda, "synchronize", self._synchronize))
            yield
