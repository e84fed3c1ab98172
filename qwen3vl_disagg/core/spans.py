"""What a rank did when, as JSON lines: one object a span with `name`, `rank`, `start` and `stop` (seconds on the host's
monotonic clock, the same for all processes of a host) and what else it is about. Off until `write_spans` was called.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

logger = logging.getLogger(__name__)
_file: IO[bytes] | None = None
_rank = -1
_lock = threading.Lock()


def write_spans(folder: Path, rank: int) -> None:
    """From now on this process writes `folder/rank-RANK.jsonl`."""
    global _file, _rank
    folder.mkdir(parents=True, exist_ok=True)
    _file, _rank = (folder / f"rank-{rank}.jsonl").open("ab"), rank


@contextlib.contextmanager
def span(name: str, **fields: Any) -> Iterator[None]:
    """Write one line when the block ends, also by an exception."""
    if _file is None:
        yield
        return
    start = time.monotonic()
    try:
        yield
    finally:
        line = msgspec.json.encode({"name": name, "rank": _rank, "start": start, "stop": time.monotonic(), **fields})
        with _lock:
            _put(line + b"\n")


def _put(line: bytes) -> None:
    """A disk that is full ends the spans, not the work."""
    global _file
    if _file is None:
        return
    try:
        _file.write(line)
        _file.flush()
    except OSError as error:
        logger.warning("no more spans: %s", error.strerror)
        _file = None
