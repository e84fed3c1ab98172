"""What happened, kept and written to the log as it happens: one JSON object a line."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Self

from tools.chaos_parts.growth import Sample
from tools.chaos_parts.schedule import Event, line_of
from tools.chaos_parts.verdicts import Happening, Outcome


class Record:
    """From any thread. Times are seconds after `begin`, which is when clients begin."""

    def __init__(self, log: Path | None) -> None:
        self._lock = threading.Lock()
        self._file: IO[str] | None = None if log is None else log.open("w")
        self._started = time.monotonic()
        self.outcomes: list[Outcome] = []
        self.happenings: list[Happening] = []
        self.samples: list[Sample] = []
        self.troubles: list[str] = []
        """What ought not to be, beside the verdicts."""
        self.skipped: list[tuple[str, str]] = []
        """Kind of event, and why it did not come."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def begin(self) -> None:
        self._started = time.monotonic()

    def now(self) -> float:
        return time.monotonic() - self._started

    def line(self, fields: Mapping[str, Any]) -> None:
        """Into the log; `t` is when."""
        text = json.dumps({"t": round(self.now(), 3), **fields}, ensure_ascii=False) + "\n"
        with self._lock:
            if self._file is not None:
                self._file.write(text)
                self._file.flush()

    def plan(self, settings: Mapping[str, Any], events: Sequence[Event]) -> None:
        self.line({"what": "run", "settings": dict(settings)})
        for event in events:
            self.line(line_of(event, "plan"))

    def outcome(self, outcome: Outcome) -> None:
        with self._lock:
            self.outcomes.append(outcome)
        self.line({"what": "outcome", **asdict(outcome)})

    def did(self, event: Event, start: float, until: float, target: str = "", note: str = "") -> None:
        with self._lock:
            self.happenings.append(Happening(event.kind, start, until))
        done = Event(round(start, 3), event.kind, event.args)
        self.line(line_of(done, "did", until=round(until, 3), target=target, note=note))

    def skip(self, event: Event, reason: str) -> None:
        with self._lock:
            self.skipped.append((event.kind, reason))
        self.line(line_of(Event(round(self.now(), 3), event.kind, event.args), "skipped", reason=reason))

    def trouble(self, text: str) -> None:
        with self._lock:
            self.troubles.append(text)
        self.line({"what": "trouble", "text": text})

    def say(self, text: str) -> None:
        self.line({"what": "note", "text": text})

    def sample(self, samples: Sequence[Sample]) -> None:
        with self._lock:
            self.samples += samples
        for one in samples:
            self.line({"what": "sample", **asdict(one)})
