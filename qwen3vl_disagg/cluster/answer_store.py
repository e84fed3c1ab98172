"""Answers that were made, kept for a while for whoever asks again: a ring in memory that outlives the frontend.

A frontend that dies in the middle of a write leaves what was whole before. Nothing is touched on disk, and pages that
hold nothing cost nothing.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
import time
from dataclasses import dataclass

STORE_BYTES = 32 * 2**20
STORE_S = 600.0
"""So long an answer is kept, if newer ones leave it room."""
KEY_BYTES = 32
_HEAD = struct.Struct(f"<Qd{KEY_BYTES}s")
"""The entry's bytes in all, when it was written (`time.monotonic`, one clock for a host), its key."""


class _Ends(ctypes.Structure):
    """Of what is there, counted from the first byte ever written."""

    _fields_ = (("start", ctypes.c_uint64), ("stop", ctypes.c_uint64))


@dataclass(frozen=True)
class _Whereabouts:
    start: int
    num_bytes: int
    written_at: float


class AnswerStore:
    """Make one before forking. One process writes at a time; the next one calls `read_all` when it begins."""

    def __init__(self, num_bytes: int = STORE_BYTES) -> None:
        self._size = num_bytes
        self._memory = mmap.mmap(-1, ctypes.sizeof(_Ends) + num_bytes)
        self._ends = _Ends.from_buffer(self._memory)
        self._places: dict[bytes, _Whereabouts] = {}

    def read_all(self) -> None:
        """Find what an earlier process has left."""
        self._places.clear()
        at = int(self._ends.start)
        while at < int(self._ends.stop):
            num_bytes, written_at, key = _HEAD.unpack(self._bytes(at, _HEAD.size))
            self._places[key] = _Whereabouts(at, num_bytes, written_at)
            at += num_bytes

    def put(self, key: bytes, value: bytes) -> bool:
        """Keep it under `key` (KEY_BYTES), in place of what was there; whether there was room: a quarter at most."""
        num_bytes = _HEAD.size + len(value)
        if num_bytes > self._size // 4:
            return False
        start, stop = int(self._ends.start), int(self._ends.stop)
        while stop + num_bytes - start > self._size:
            length, _, oldest = _HEAD.unpack(self._bytes(start, _HEAD.size))
            if (place := self._places.get(oldest)) is not None and place.start == start:
                del self._places[oldest]
            start += length
        self._ends.start = start  # before anything of it is written over
        now = time.monotonic()
        self._write(stop, _HEAD.pack(num_bytes, now, key) + value)
        self._ends.stop = stop + num_bytes  # after all of it is there
        self._places[key] = _Whereabouts(stop, num_bytes, now)
        return True

    def get(self, key: bytes) -> bytes | None:
        place = self._places.get(key)
        if place is None or time.monotonic() > place.written_at + STORE_S:
            return None
        return self._bytes(place.start + _HEAD.size, place.num_bytes - _HEAD.size)

    def _bytes(self, at: int, num_bytes: int) -> bytes:
        first, base = at % self._size, ctypes.sizeof(_Ends)
        num_first = min(num_bytes, self._size - first)
        return self._memory[base + first : base + first + num_first] + self._memory[base : base + num_bytes - num_first]

    def _write(self, at: int, data: bytes) -> None:
        first, base = at % self._size, ctypes.sizeof(_Ends)
        num_first = min(len(data), self._size - first)
        self._memory[base + first : base + first + num_first] = data[:num_first]
        self._memory[base : base + len(data) - num_first] = data[num_first:]
