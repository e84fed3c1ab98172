"""What a process did when: the last spans in a ring of bounded size, and all of them as JSON lines where `write_spans`
was called. There are numbers and names of requests in them, and nothing of what was asked or answered.

A line is an object with `name`, `rank`, `start` and `stop` (seconds on the host's monotonic clock, the same for all
processes of a host), the thread as `lane`, and what else there is to say.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, Generic, TypeVar

import msgspec

logger = logging.getLogger(__name__)
T = TypeVar("T")
Item = tuple[str, int]
"""request id, item"""
MAX_SPANS, MAX_BYTES = 20_000, 16 * 2**20
MAX_FILE_BYTES = 2**30
"""Of what one process writes by `write_spans`: some millions of spans."""
MAX_NAMES = 64
"""Of requests, and of items, in a span; how many there were is in its numbers."""
JOINED = ("decode", "take part")
JOIN_S, NEXT_S = 0.01, 0.002
"""Such steps, shorter than that and close behind one another, are one span in the ring: on a GPU there are hundreds a
second, also of a rank that has nothing to do but to take part in those of others."""


class Span(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """`items`: those whose rows were made, moved or used. `numbers`: `tokens`, `rows`, .."""

    name: str
    lane: str
    start: float
    stop: float
    requests: list[str] = []
    items: list[Item] = []
    numbers: dict[str, int] = {}

    @property
    def num_bytes(self) -> int:
        """No less than it takes in memory."""
        return 700 + 90 * len(self.requests) + 200 * len(self.items) + 100 * len(self.numbers)

    def joined(self, behind: Span) -> Span | None:
        """Both as one; None where they are to be told apart."""
        if self.name not in JOINED or self.name != behind.name or self.lane != behind.lane:
            return None
        is_next = behind.start - self.stop < NEXT_S and behind.stop - self.start < JOIN_S
        if not is_next or self.requests != behind.requests:
            return None
        tokens = self.numbers.get("tokens", 0) + behind.numbers.get("tokens", 0)
        numbers = {"tokens": tokens, "steps": self.numbers.get("steps", 1) + behind.numbers.get("steps", 1)}
        return msgspec.structs.replace(self, stop=behind.stop, numbers=numbers)


class Ring(Generic[T]):
    """The last entries, each with a number, from 0; those that have no room any more are counted. For any thread."""

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._entries: deque[tuple[T, int]] = deque()
        self._lock = threading.Lock()
        self.num_bytes = self.num_added = self._num_read = 0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: T, num_bytes: int) -> None:
        with self._lock:
            self._add(entry, num_bytes)

    def _add(self, entry: T, num_bytes: int) -> None:
        self._entries.append((entry, num_bytes))
        self.num_added += 1
        self.num_bytes += num_bytes
        while len(self._entries) > self._max_entries or self.num_bytes > self._max_bytes:
            self.num_bytes -= self._entries.popleft()[1]

    def after(self, number: int, most: int) -> tuple[list[T], int, int]:
        """At most `most` entries from `number` on, the number behind them, and how many from `number` on are gone."""
        with self._lock:
            first = self.num_added - len(self._entries)
            start = min(max(number, first), self.num_added)
            found = [entry for entry, _ in itertools.islice(self._entries, start - first, start - first + most)]
            self._num_read = max(self._num_read, start + len(found))
            return found, start + len(found), max(0, first - number)


class SpanRing(Ring[Span]):
    """Steps that nobody has read yet may still be joined."""

    def add_span(self, span: Span) -> None:
        with self._lock:
            if self._entries and self._num_read < self.num_added:
                last, num_bytes = self._entries[-1]
                if (joined := last.joined(span)) is not None:
                    self._entries[-1] = joined, num_bytes
                    return
            self._add(span, span.num_bytes)


ring = SpanRing(MAX_SPANS, MAX_BYTES)
"""Of this process."""
_file: IO[bytes] | None = None
_rank = -1
_lock = threading.Lock()


def write_spans(folder: Path, rank: int) -> None:
    """From now on this process writes `folder/rank-RANK.jsonl`."""
    global _file, _rank
    folder.mkdir(parents=True, exist_ok=True)
    _file, _rank = (folder / f"rank-{rank}.jsonl").open("ab"), rank


@contextlib.contextmanager
def span(
    name: str, *, requests: Sequence[str] = (), items: Collection[Item] = (), **numbers: int
) -> Iterator[list[Item]]:
    """One span, that ends with the block, also by an exception. The block may add to the items it is given."""
    more, start = list(items), time.monotonic()
    try:
        yield more
    finally:
        stop = time.monotonic()
        names = requests or list(dict.fromkeys(request_id for request_id, _ in more))
        if len(names) > MAX_NAMES:
            numbers["num_requests"] = len(names)
        if len(more) > MAX_NAMES:
            numbers["num_items"] = len(more)
        lane = threading.current_thread().name
        done = Span(name, lane, start, stop, list(names[:MAX_NAMES]), more[:MAX_NAMES], numbers)
        ring.add_span(done)
        if _file is not None:
            _write(done)


def _write(done: Span) -> None:
    fields = {name: getattr(done, name) for name in ("name", "lane", "start", "stop", "requests", "items")}
    line = msgspec.json.encode({**fields, "rank": _rank, **done.numbers})
    with _lock:
        _put(line + b"\n")


def _put(line: bytes) -> None:
    """A disk that is full ends the spans, not the work; so does a file that has become large."""
    global _file
    if _file is None:
        return
    why = None
    try:
        _file.write(line)
        _file.flush()
        if _file.tell() >= MAX_FILE_BYTES:
            why = f"the file has {MAX_FILE_BYTES >> 20} MiB"
            _file.close()
    except OSError as error:
        why = error.strerror
    if why is not None:
        logger.warning("no more spans: %s", why)
        _file = None
