"""What outlives a process: some bytes of memory that its slot shares with every child it forks in its place."""

from __future__ import annotations

import ctypes
import mmap
import secrets
import time

from qwen3vl_disagg.cluster.answer_store import AnswerStore
from qwen3vl_disagg.transport.control import Address

_MAX_HOST_BYTES = 255


class _Shared(ctypes.Structure):
    """Zeros at first."""

    _fields_ = (
        ("is_announced", ctypes.c_bool),
        ("num_joined", ctypes.c_uint32),
        ("stopped_at", ctypes.c_double),
        ("beat_at", ctypes.c_double),
        ("store_host", ctypes.c_char * (_MAX_HOST_BYTES + 1)),
        ("store_port", ctypes.c_uint32),
    )


class Use:
    """Whether a child was of use in this life: its slot makes one before forking, the child marks it."""

    def __init__(self) -> None:
        self._mark = mmap.mmap(-1, 1)

    def begin(self) -> None:
        """A life begins."""
        self._mark[0] = 0

    def mark(self) -> None:
        self._mark[0] = 1

    def __bool__(self) -> bool:
        return bool(self._mark[0])


class JobMemory:
    """Make one before forking; a child's writes are seen by the parent and by later children.

    One frontend writes at a time. One that dies in the middle of a write leaves the old value, or none.
    """

    def __init__(self) -> None:
        self._shared = _Shared.from_buffer(mmap.mmap(-1, ctypes.sizeof(_Shared)))
        self.answers = AnswerStore()
        self.job = secrets.token_hex(8)
        """Tells this job's numbers from those of an earlier one at the same address."""

    @property
    def is_announced(self) -> bool:
        """Whether the ready line has been printed."""
        return bool(self._shared.is_announced)

    def announce(self) -> None:
        self._shared.is_announced = True

    @property
    def stopped_at(self) -> float | None:
        """When the slot was told to end (`time.monotonic`, one clock for a host); None before."""
        return self._shared.stopped_at or None

    def stop(self) -> None:
        """Now, unless it was earlier."""
        self._shared.stopped_at = self.stopped_at or time.monotonic()

    def beat(self) -> None:
        """The frontend gets on."""
        self._shared.beat_at = time.monotonic()

    def expect_no_beat(self) -> None:
        """A frontend is about to begin: nothing is known of it until its first beat."""
        self._shared.beat_at = 0.0

    @property
    def silent_s(self) -> float:
        """Seconds since the last beat; 0 before the first one."""
        beat_at = float(self._shared.beat_at)
        return time.monotonic() - beat_at if beat_at else 0.0

    @property
    def num_joined(self) -> int:
        """How many numbers of joining ranks have been given out."""
        return int(self._shared.num_joined)

    def count_joined(self) -> int:
        """One more; the number before it, from 0. Never the same twice, also when the frontend dies right after."""
        self._shared.num_joined += 1
        return self.num_joined - 1

    @property
    def store_address(self) -> Address | None:
        """Where ranks meet, once it has been told."""
        port = int(self._shared.store_port)
        return (self._shared.store_host.decode(), port) if port else None

    @store_address.setter
    def store_address(self, address: Address) -> None:
        """ValueError for what cannot be an address."""
        host, port = address[0].encode(), address[1]
        if not 0 < len(host) <= _MAX_HOST_BYTES or b"\0" in host or not 0 < port < 1 << 16:
            raise ValueError(f"a store at {address[0]!r}, port {port}")
        self._shared.store_port = 0  # none, until both are there
        self._shared.store_host = host
        self._shared.store_port = port
