"""Logging is the standard library's. What the processes of a job say goes to stderr, with the name of who says it."""

from __future__ import annotations

import logging
import sys


class _Stderr(logging.Handler):
    """Writes to what `sys.stderr` is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


_handler = _Stderr()


def start_logging(name: str = "") -> None:
    """From now on this process, and what it forks, logs lines `NAME: TEXT`. A later call gives it another name.

    A program that imports the package and does not call this decides for itself where the log goes.
    """
    _handler.setFormatter(logging.Formatter(f"{name}: %(message)s" if name else "%(message)s"))
    logging.getLogger().addHandler(_handler)
    logging.getLogger("qwen3vl_disagg").setLevel(logging.INFO)
