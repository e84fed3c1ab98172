"""A link between two hosts with delay, loss and a rate, as `tc netem` makes one, for kernels that do not have that: two
TUN devices, and a process that carries packets from one to the other.

    python -m tests.support.slow_link FD_A FD_B DELAY_S LOSS BITS_PER_S SEED
"""

from __future__ import annotations

import collections
import fcntl
import os
import random
import select
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import pytest

from tests.support.hosts import TwoHosts

_TUN, _TUNSETIFF, _IFF_TUN, _IFF_NO_PI = Path("/dev/net/tun"), 0x400454CA, 0x0001, 0x1000
MAX_PACKETS = 1000
"""That wait in one direction; more are dropped. netem's default."""


@dataclass(frozen=True)
class Line:
    """Of each direction: seconds, share of packets that are lost, bits a second."""

    delay_s: float = 0.05
    loss: float = 0.01
    bits_per_s: float = 20e6
    seed: int = 0


class SlowHosts(TwoHosts):
    """Skips the test where there are no TUN devices."""

    def __init__(self, line: Line) -> None:
        super().__init__()
        self._line, self._fds = line, list[int]()
        self._carrier: subprocess.Popen[bytes] | None = None

    def _join(self) -> None:
        if not os.access(_TUN, os.R_OK | os.W_OK):
            self.__exit__(None, None, None)
            pytest.skip(f"no {_TUN}: a slow link cannot be made")
        self._fds = [_device(self._ends[host]) for host in ("a", "b")]
        how = (self._line.delay_s, self._line.loss, self._line.bits_per_s, self._line.seed)
        command = [sys.executable, "-m", "tests.support.slow_link", *map(str, (*self._fds, *how))]
        self._carrier = subprocess.Popen(command, pass_fds=self._fds)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        if self._carrier is not None:
            self._carrier.kill()
            self._carrier.wait(10)
            self._carrier = None


def _device(name: str) -> int:
    fd = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH14s", name.encode(), _IFF_TUN | _IFF_NO_PI, b""))
    return fd


class Direction:
    """Packets on their way: each leaves when those before it have, and arrives `delay_s` later, or never."""

    def __init__(self, line: Line, seed: int) -> None:
        self._line, self._random = line, random.Random(seed)
        self._on_the_way: collections.deque[tuple[float, bytes]] = collections.deque()
        self._free_at = 0.0

    def put(self, packet: bytes, now: float) -> None:
        num_queued = sum(1 for due, _ in self._on_the_way if due - self._line.delay_s > now)
        if num_queued >= MAX_PACKETS or self._random.random() < self._line.loss:
            return
        self._free_at = max(now, self._free_at) + 8 * len(packet) / self._line.bits_per_s
        self._on_the_way.append((self._free_at + self._line.delay_s, packet))

    @property
    def due(self) -> float:
        return self._on_the_way[0][0] if self._on_the_way else float("inf")

    def take(self, now: float) -> list[bytes]:
        packets = []
        while self.due <= now:
            packets.append(self._on_the_way.popleft()[1])
        return packets


def carry(a: int, b: int, line: Line) -> None:
    """Until it is killed."""
    ways = {a: (b, Direction(line, line.seed)), b: (a, Direction(line, line.seed + 1))}
    while True:
        due = min(direction.due for _, direction in ways.values())
        wait_s = None if due == float("inf") else max(0.0, due - time.monotonic())
        ready, _, _ = select.select(list(ways), [], [], wait_s)
        for fd in ready:
            _read(fd, ways[fd][1])
        for to, direction in ways.values():
            for packet in direction.take(time.monotonic()):
                _write(to, packet)


def _read(fd: int, direction: Direction) -> None:
    for _ in range(64):
        try:
            packet = os.read(fd, 65536)
        except OSError:  # nothing more, or the device is down
            return
        direction.put(packet, time.monotonic())


def _write(fd: int, packet: bytes) -> None:
    try:
        os.write(fd, packet)
    except OSError:  # the device is down, and the packet lost
        return


if __name__ == "__main__":
    first, second, *how = sys.argv[1:]
    carry(int(first), int(second), Line(*map(float, how[:3]), seed=int(how[3])))
