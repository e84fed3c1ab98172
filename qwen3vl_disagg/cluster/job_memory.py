"""What a job remembers when its frontend dies: a few bytes of memory that slot 0 shares with every frontend it forks.

One frontend writes at a time. Each value is written before what says that it is there, so that one which dies in the
middle leaves the old value, or none.
"""

from __future__ import annotations

import mmap
import secrets
import struct
import time

from qwen3vl_disagg.transport.control import Address

_ANNOUNCED = 0
_COUNT = struct.Struct("<I")
_COUNT_AT = 4
_PORT_AT = 8
_HOST_BYTES_AT = 12
_HOST_AT = 16
_MAX_HOST_BYTES = 255
_TIME = struct.Struct("<d")
_STOPPED_AT = _HOST_AT + _MAX_HOST_BYTES
NUM_BYTES = _STOPPED_AT + _TIME.size


class JobMemory:
    """Make one before forking; a child's writes are seen by the parent and by later children."""

    def __init__(self) -> None:
        self._bytes = mmap.mmap(-1, NUM_BYTES)
        self.job = secrets.token_hex(8)
        """Tells this job's numbers from those of an earlier one at the same address."""

    @property
    def is_announced(self) -> bool:
        """Whether the ready line has been printed."""
        return bool(self._bytes[_ANNOUNCED])

    def announce(self) -> None:
        self._bytes[_ANNOUNCED] = 1

    @property
    def stopped_at(self) -> float | None:
        """When the slot was told to end (`time.monotonic`, one clock for a host); None before."""
        return _TIME.unpack_from(self._bytes, _STOPPED_AT)[0] or None

    def stop(self) -> None:
        """Now, unless it was earlier."""
        if self.stopped_at is None:
            _TIME.pack_into(self._bytes, _STOPPED_AT, time.monotonic())

    @property
    def num_joined(self) -> int:
        """How many numbers of joining ranks have been given out."""
        return int(_COUNT.unpack_from(self._bytes, _COUNT_AT)[0])

    def count_joined(self) -> int:
        """One more; the number before it, from 0. Never the same twice, also when the frontend dies right after."""
        before = self.num_joined
        _COUNT.pack_into(self._bytes, _COUNT_AT, before + 1)
        return before

    @property
    def store_address(self) -> Address | None:
        """Where ranks meet, once it has been told."""
        num_bytes = self._bytes[_HOST_BYTES_AT]
        if not num_bytes:
            return None
        host = bytes(self._bytes[_HOST_AT : _HOST_AT + num_bytes]).decode()
        return host, int(_COUNT.unpack_from(self._bytes, _PORT_AT)[0])

    @store_address.setter
    def store_address(self, address: Address) -> None:
        """ValueError for what cannot be an address."""
        host, port = address[0].encode(), address[1]
        if not 0 < len(host) <= _MAX_HOST_BYTES or not 0 < port < 1 << 16:
            raise ValueError(f"a store at {address[0]!r}, port {port}")
        self._bytes[_HOST_BYTES_AT] = 0
        self._bytes[_HOST_AT : _HOST_AT + len(host)] = host
        _COUNT.pack_into(self._bytes, _PORT_AT, port)
        self._bytes[_HOST_BYTES_AT] = len(host)
