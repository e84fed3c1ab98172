"""Copies between a GPU and pinned memory of the host, on a stream beside the one that computes. The host waits for none
of them but by an event.

Pinned memory comes from PyTorch's cache of it. That hands a piece out again only when the copies from and into it have
run, so a tensor that is dropped while a copy is under way is no danger, and what is in use is bounded by who holds it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Downloads:
    """From a GPU to the host."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def start(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], torch.cuda.Event]:
        """Copies of `tensors` as the current stream leaves them; their bytes are there when the event is. Nothing that
        is queued behind this call has to wait for them."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        copies = []
        with torch.cuda.stream(self._stream):
            for x in tensors:
                copies.append(torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True))
                x.record_stream(self._stream)
        return copies, self._stream.record_event()


class Uploads:
    """From the host into `blocks` on a GPU, which are filled and read again and again.

    A block is granted anew as soon as the host knows that it is used up, and the GPU may be behind. So nothing is
    written before all reads that were queued by then (`Arrival`) have run. One stream reads.
    """

    def __init__(self, blocks: Sequence[Tensor]) -> None:
        self._device = blocks[0].device
        self._stream = torch.cuda.Stream(self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # which has made them
        for x in blocks:
            x.record_stream(self._stream)
        self._read: torch.cuda.Event | None = None

    def start(self, target: Tensor, source: Tensor) -> None:
        """Fill `target`, a part of the blocks, from pinned memory."""
        if self._read is not None:
            self._stream.wait_event(self._read)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def arrival(self) -> Arrival:
        """Of all that was started before."""
        return Arrival(self, self._stream.record_event())

    @contextlib.contextmanager
    def reading(self, event: torch.cuda.Event) -> Iterator[None]:
        """The current stream waits for `event`, then reads blocks. The host waits for nothing."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(event)
        try:
            yield
        finally:
            self._read = stream.record_event()


@dataclass(frozen=True)
class Arrival:
    """When rows are in their blocks."""

    uploads: Uploads
    event: torch.cuda.Event

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """Around all that reads them."""
        return self.uploads.reading(self.event)
