"""Logging is the standard library's. What the processes of a job say goes to stderr, with the name of who says it: as
text or as JSON."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

LogFormat = Literal["text", "json"]
_FIELDS, _IS_PROSE = "q3vl_fields", "q3vl_is_prose"
_events = logging.getLogger("qwen3vl_disagg.events")


def write_line(stream: TextIO, line: str) -> None:
    """Write it with its end in one piece, and at once: other processes have the same stream, and `print` makes two."""
    stream.write(line + "\n")
    stream.flush()


class _Stderr(logging.Handler):
    """Writes to what `sys.stderr` is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            write_line(sys.stderr, self.format(record))
        except Exception:
            self.handleError(record)


class _Text(logging.Formatter):
    """`NAME: TEXT`; fields as `name=value`."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name}: %(message)s" if name else "%(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = {} if getattr(record, _IS_PROSE, False) else getattr(record, _FIELDS, {})
        return " ".join([super().formatMessage(record), *(f"{name}={value}" for name, value in fields.items())])


class _Json(logging.Formatter):
    """One object: `time` (UTC), `level`, `process`, `message`, and the fields."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname.lower(), "process": self._name, "message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line | getattr(record, _FIELDS, {}))  # which has a way to write what is no character


_handler = _Stderr()
_format: LogFormat = "text"


def use_log_format(log_format: LogFormat) -> None:
    """Of what this process, and what it forks, logs after its next `start_logging`."""
    global _format
    _format = log_format


def log_format() -> LogFormat:
    return _format


def start_logging(name: str = "") -> None:
    """From now on this process, and what it forks, logs lines `NAME: TEXT`. A later call gives it another name.

    A program that imports the package and does not call this decides for itself where the log goes.
    """
    _handler.setFormatter(_Json(name) if _format == "json" else _Text(name))
    logging.getLogger().addHandler(_handler)
    logging.getLogger("qwen3vl_disagg").setLevel(logging.INFO)


def say(message: str, fields: dict[str, Any]) -> None:
    """A line about something that happened, with its fields."""
    _events.info(message, extra={_FIELDS: fields})


def tell(message: str, fields: dict[str, Any]) -> None:
    """The same where the message has in words what the fields say: these are for JSON alone."""
    _events.info(message, extra={_FIELDS: fields, _IS_PROSE: True})
