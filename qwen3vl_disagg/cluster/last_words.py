"""What clients hear when the frontend dies: a small process beside it holds their connections too, and says it.

The kernel closes the connections of a dead process without a word, so a client cannot tell the end of its answer from
an accident. The frontend hands each connection over (SCM_RIGHTS) with the words that would be right now: a whole 503
where no answer has begun, the last event of a stream. What fits depends on how much has been written, and a process can
die in the middle of that: so shared memory says for each connection which words fit behind how many bytes, before and
after the last write, and the kernel how many bytes there are. Behind any other number of them nothing fits.

The keeper knows nothing of HTTP. When the frontend's end of their socket closes, it says what fits and closes all.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import selectors
import signal
import socket
import struct
import sys
import termios
import time
from collections import deque
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)
MAX_HELD = 1 << 14
"""Connections; those beyond end without words."""
MAX_WORDS = 16 * 2**10
AGAIN_S = 1.0
LINGER_S = 2.0
"""Who was told something may send for so long: closed before, the kernel drops what it was told (RFC 9112, 9.6)."""
_LOOPBACK_S = 1.0
_DROP_BYTES = 64 * 2**10
_HEAD = struct.Struct("<BHB")
"""What is asked, of which connection, the number of the words. The first message is the shared memory alone."""
_HOLD, _SAY, _RELEASE = 1, 2, 3
_TOTAL = struct.Struct("<Q")
_MARK_BYTES = 16
"""Of shared memory, two for each connection: behind how many bytes (8) which words (1) fit; 0 for none."""
_MEMORY_BYTES = MAX_HELD * 2 * _MARK_BYTES
_NUM_WORDS = 3
"""Of a connection: behind what was written before, behind all of it, and those that are to come."""
_TCP_INFO_BYTES, _BYTES_ACKED = 232, 120


def words_door() -> tuple[socket.socket, socket.socket]:
    """The frontend's end and the keeper's, for every life of each: no other process can reach it."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def bytes_written(sock: socket.socket) -> int:
    """That the kernel has taken of this process and others on a TCP connection: what its peer has acknowledged
    (`tcpi_bytes_acked`), and what it has not (SIOCOUTQ). OSError for a socket that is none."""
    while True:
        acked, waits, again = _acked(sock), _unacknowledged(sock), _acked(sock)
        if acked == again:
            return acked + waits


def counts_bytes() -> bool:
    """Whether this kernel counts what a peer has acknowledged: not every one that has the field fills it."""
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as listener,
            socket.create_connection(listener.getsockname(), timeout=_LOOPBACK_S) as near,
            listener.accept()[0] as far,
        ):
            before, end = bytes_written(far), time.monotonic() + _LOOPBACK_S
            far.sendall(b"?")
            near.recv(1)
            while _unacknowledged(far) and time.monotonic() < end:
                time.sleep(0.001)
            return bytes_written(far) == before + 1
    except OSError:
        return False


def _acked(sock: socket.socket) -> int:
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    if len(info) < _BYTES_ACKED + _TOTAL.size:
        raise OSError("the kernel does not count bytes")
    return int(_TOTAL.unpack_from(info, _BYTES_ACKED)[0])


def _unacknowledged(sock: socket.socket) -> int:
    return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, b"\0" * 4), sys.byteorder)


# ---- the frontend's end ----


class LastWords:
    """The frontend's way to the keeper. Without one, or while it is lost, everything works and nothing is said."""

    def __init__(self, door: socket.socket | None = None) -> None:
        self._door = door
        if door is not None and not counts_bytes():
            logger.warning("the kernel does not count a connection's bytes: if the frontend dies, nobody says so")
            self._door = None
        self._line: _Line | None = None
        self._next_try = 0.0
        self._begin()

    def _begin(self) -> None:
        """A line of one's own, its other end handed through the door: a keeper that is not there now finds it."""
        self._next_try = time.monotonic() + AGAIN_S
        if self._door is None:
            return
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs, contextlib.ExitStack() as stack:
                stack.enter_context(ours)
                line = _Line(ours)
                socket.send_fds(self._door, [b"line"], [theirs.fileno()], socket.MSG_DONTWAIT)
                stack.pop_all()
            self._line = line
        except OSError as error:
            logger.warning("nobody keeps last words: %s", error)

    def hold(self, sock: socket.socket) -> Held | None:
        """Give a connection into keeping; None where that cannot be. The next keeper is asked where one was lost."""
        if (self._line is None or self._line.is_lost) and time.monotonic() >= self._next_try:
            self._line = None
            self._begin()
        return None if self._line is None else self._line.hold(sock)


class _Line:
    """To one life of the keeper. OSError if it cannot be begun."""

    def __init__(self, keeper: socket.socket) -> None:
        self._keeper = keeper
        self.is_lost = False
        self._free = deque(range(MAX_HELD))
        self._unsaid: deque[bytes] = deque()
        """Releases that had no room in the socket."""
        memory = os.memfd_create("last-words")
        try:
            os.ftruncate(memory, _MEMORY_BYTES)
            self._memory = mmap.mmap(memory, _MEMORY_BYTES)
            socket.send_fds(keeper, [b"marks"], [memory])
            keeper.setblocking(False)
        finally:
            os.close(memory)

    def hold(self, sock: socket.socket) -> Held | None:
        if self.is_lost or not self._free or self._unsaid:
            self._release_rest()
            return None
        try:
            total = bytes_written(sock)
        except OSError:
            return None
        index = self._free.popleft()
        if not self._send(_HEAD.pack(_HOLD, index, 0), [sock.fileno()]):
            self._free.append(index)
            return None
        return Held(self, index, total)

    def say(self, index: int, number: int, words: bytes) -> bool:
        return self._send(_HEAD.pack(_SAY, index, number) + words)

    def release(self, index: int) -> None:
        for which in (0, 1):
            self.mark(index, which, 0, 0)
        if not self.is_lost:
            self._unsaid.append(_HEAD.pack(_RELEASE, index, 0))
            self._release_rest()

    def mark(self, index: int, which: int, total: int, number: int) -> None:
        """Words that fit behind so many bytes; 0 for none. At no moment do they fit behind another number."""
        at = (2 * index + which) * _MARK_BYTES
        self._memory[at + _TOTAL.size] = 0
        _TOTAL.pack_into(self._memory, at, total)
        self._memory[at + _TOTAL.size] = number

    def _release_rest(self) -> None:
        while self._unsaid and self._send(self._unsaid[0]):
            self._free.append(_HEAD.unpack(self._unsaid.popleft())[1])

    def _send(self, message: bytes, descriptors: list[int] | None = None) -> bool:
        if self.is_lost:
            return False
        try:
            socket.send_fds(self._keeper, [message], descriptors or [])
        except (BrokenPipeError, ConnectionError) as error:
            logger.warning("last words are kept no more: %s", error)
            self.is_lost = True
            self._unsaid.clear()
            self._keeper.close()
            return False
        except OSError:  # no room; to close would say that this process is dead
            return False
        return True


class Held:
    """One connection in keeping, of which so many bytes are written."""

    def __init__(self, line: _Line, index: int, total: int) -> None:
        self._line, self._index, self._total = line, index, total
        self._which = self._number = self._last_number = 0
        self.mark()

    def prepare(self, words: bytes) -> None:
        """Say this behind the next write, in place of what was to be said; empty: nothing."""
        self._number = 0
        if words and len(words) <= MAX_WORDS:
            self._last_number = self._last_number % 255 + 1
            if self._line.say(self._index, self._last_number, words):
                self._number = self._last_number

    def mark(self) -> None:
        """What was prepared fits already."""
        self._line.mark(self._index, self._which, self._total, self._number)

    def will_write(self, num_bytes: int) -> None:
        """Before each write: until it is done what fitted before still does."""
        if num_bytes:
            self._which, self._total = 1 - self._which, self._total + num_bytes
            self.mark()

    def release(self) -> None:
        """The connection is over; the keeper closes its own end."""
        self._line.release(self._index)


# ---- the keeper ----


@dataclass
class _HeldConnection:
    descriptor: int
    words: deque[tuple[int, bytes]] = field(default_factory=lambda: deque(maxlen=_NUM_WORDS))


def keep_words(door: socket.socket) -> int:
    """The body of the keeper's process: until it is told to end and no frontend or told client is left. Its status."""
    with selectors.DefaultSelector() as selector:
        is_ending = False
        wake, waker = socket.socketpair()
        waker.setblocking(False)
        signal.set_wakeup_fd(waker.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
        selector.register(wake, selectors.EVENT_READ)
        selector.register(door, selectors.EVENT_READ)
        speakers: dict[socket.socket, _Speaker] = {}
        lingering = _Lingering(selector)
        while (time_left := lingering.time_left()) is not None or speakers or not is_ending:
            for key, _ in selector.select(time_left):
                sock = key.fileobj
                if sock is wake:
                    is_ending = True
                    wake.recv(64)
                elif sock is door:
                    for descriptor in socket.recv_fds(door, 16, 1)[1]:
                        speaker = socket.socket(fileno=descriptor)
                        speakers[speaker] = _Speaker()
                        selector.register(speaker, selectors.EVENT_READ)
                elif isinstance(sock, socket.socket) and sock not in speakers:
                    lingering.drop_what_came(sock)
                elif isinstance(sock, socket.socket) and not speakers[sock].take(sock):
                    selector.unregister(sock)
                    sock.close()
                    lingering.add(speakers.pop(sock).speak())
    return 0


class _Lingering:
    """Connections on which all is said, until the client ends them."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self._selector = selector
        self._ends: dict[socket.socket, float] = {}
        """In the order in which they end."""

    def add(self, clients: list[socket.socket]) -> None:
        for client in clients:
            client.setblocking(False)
            self._selector.register(client, selectors.EVENT_READ)
            self._ends[client] = time.monotonic() + LINGER_S

    def time_left(self) -> float | None:
        """Until the next one's is over; those whose is are closed."""
        now = time.monotonic()
        while self._ends:
            client, end = next(iter(self._ends.items()))
            if end > now:
                return end - now
            self._close(client)
        return None

    def drop_what_came(self, client: socket.socket) -> None:
        try:
            if client.recv(_DROP_BYTES):
                return
        except BlockingIOError:
            return
        except OSError as error:
            logger.debug("a client that was told has gone: %s", error)
        self._close(client)

    def _close(self, client: socket.socket) -> None:
        self._selector.unregister(client)
        client.close()
        del self._ends[client]


class _Speaker:
    """What one frontend has given into keeping."""

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._kept: dict[int, _HeldConnection] = {}

    def take(self, sock: socket.socket) -> bool:
        """One message; whether there may be more."""
        try:
            message, descriptors, _, _ = socket.recv_fds(sock, _HEAD.size + MAX_WORDS, 1)
        except OSError:
            return False
        if self._memory is None:
            return self._begin(descriptors)
        if len(message) < _HEAD.size:
            return False
        kind, index, number = _HEAD.unpack_from(message)
        if kind in (_HOLD, _RELEASE) and index in self._kept:
            os.close(self._kept.pop(index).descriptor)
        if kind == _HOLD and descriptors:
            self._kept[index] = _HeldConnection(descriptors[0])
        elif kind == _SAY and index in self._kept:
            self._kept[index].words.append((number, message[_HEAD.size :]))
        return True

    def _begin(self, descriptors: list[int]) -> bool:
        if descriptors and os.fstat(descriptors[0]).st_size == _MEMORY_BYTES:
            self._memory = mmap.mmap(descriptors[0], _MEMORY_BYTES)
        for descriptor in descriptors:
            os.close(descriptor)
        return self._memory is not None

    def speak(self) -> list[socket.socket]:
        """The frontend is gone: what fits is said, everything else is closed. Those who were told something."""
        told = []
        for index, kept in self._kept.items():
            client, is_told = socket.socket(fileno=kept.descriptor), False
            with contextlib.suppress(OSError):
                if words := self._fitting(index, kept, client):
                    client.send(words, socket.MSG_DONTWAIT)
                    is_told = True
                client.shutdown(socket.SHUT_WR)
            if is_told:
                told.append(client)
            else:
                client.close()
        if told:
            logger.warning("the frontend died: told %d clients, whose requests were under way", len(told))
        self._kept.clear()
        return told

    def _fitting(self, index: int, kept: _HeldConnection, client: socket.socket) -> bytes:
        """b"": nothing fits behind what was written."""
        if self._memory is None:
            return b""
        words, total = dict(kept.words), bytes_written(client)
        for at in (2 * index * _MARK_BYTES, (2 * index + 1) * _MARK_BYTES):
            number = self._memory[at + _TOTAL.size]
            if number and _TOTAL.unpack_from(self._memory, at)[0] == total:
                return words.get(number, b"")
        return b""
