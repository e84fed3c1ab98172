"""What a client saw of a request, and what that means. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

Verdict = Literal["right", "refused", "broken", "left", "cut", "failed", "wrong", "lost", "hung"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
MEANING: dict[Verdict, str] = {
    "right": "the answer that one process gives; of bad input a typed 4xx",
    "refused": "a typed 429, 503 or 504",
    "broken": "a stream that ended with such an error",
    "left": "the client hung up",
    "cut": "the connection ended without an answer's end or an error, as the frontend or the job died",
    "failed": "a typed 500",
    "wrong": "another answer, or an error that says what is not so",
    "lost": "the same, and no death explains it",
    "hung": "no byte in the time that the server has for the whole request",
}
FAULTS: tuple[Verdict, ...] = ("failed", "wrong", "lost", "hung")

Ending = Literal["whole", "cut", "silent", "left"]
REFUSALS = {"rate_limit_error", "service_unavailable_error", "timeout_error"}
SUSPECTED = "harmful_media"
"""The code of an image over which three encode ranks died alone: killed from outside, an innocent one can be it."""
DEATHS = ("kill-frontend", "kill-language", "job-ended")
"""After these a connection may end without a word."""
AFTER_S = 10.0
"""So long after its end an event is still near."""
SLACK_S = 1.0
"""Between the clocks of what was done and of who saw it."""


@dataclass
class Reply:
    """What came back. `error`: the typed one of a body or of a stream's last event; `texts`: of each answer."""

    ending: Ending = "cut"
    status: int | None = None
    is_typed: bool = False
    """JSON, with an error's four fields, where `status` is not 200."""
    error: dict[str, Any] | None = None
    retry_after: str | None = None
    texts: list[str] | None = None
    note: str = ""
    seconds_to_first: float | None = None
    """Until the first token of a stream."""


def judge(expected: Sequence[str] | None, reply: Reply) -> tuple[Verdict, str]:
    """And why. `expected` None: it was bad input."""
    if reply.ending == "silent":
        return "hung", reply.note
    if reply.ending == "left":
        return "left", ""
    if reply.error is None and reply.ending == "cut":
        return "cut", reply.note
    if reply.status == 200 and reply.error is None:
        if expected is None:
            return "wrong", "bad input was answered"
        return ("right", "") if reply.texts == list(expected) else ("wrong", reply.note or _difference(expected, reply))
    return _judge_error(expected, reply)


def _difference(expected: Sequence[str], reply: Reply) -> str:
    return f"expected {list(expected)!r}, got {reply.texts!r}"


def _judge_error(expected: Sequence[str] | None, reply: Reply) -> tuple[Verdict, str]:
    error = reply.error or {}
    kind, code = str(error.get("type")), str(error.get("code"))
    said = f"{reply.status} {code}: {error.get('message')}"
    if not reply.is_typed:
        return "wrong", f"status {reply.status} without a typed error {reply.note}"
    if kind in REFUSALS:
        if reply.status == 200:
            return "broken", said
        if reply.status in (429, 503) and not _is_seconds(reply.retry_after):
            return "wrong", f"Retry-After {reply.retry_after!r}, {said}"
        return "refused", said
    if kind == "server_error":
        return "failed", said
    if expected is None:
        return ("right", "") if reply.status is not None and 400 <= reply.status < 500 else ("wrong", said)
    return ("refused" if code == SUSPECTED else "wrong"), said


def _is_seconds(text: str | None) -> bool:
    return text is not None and text.isascii() and text.isdigit() and 1 <= int(text) <= 120


@dataclass(frozen=True)
class Happening:
    """An event that took place, from `start` to `until`, in seconds after clients began."""

    kind: str
    start: float
    until: float


@dataclass(frozen=True)
class Outcome:
    """Of one request that was sent."""

    start: float
    end: float
    name: str
    """Of the request, in the pool or the list of bad ones."""
    kind: str
    verdict: Verdict
    status: int | None = None
    code: str = ""
    note: str = ""
    attempt: int = 0
    """How often it was refused before."""
    near: str = ""
    seconds_to_first: float | None = None


def near(happenings: Iterable[Happening], outcome: Outcome) -> str:
    """The kind of event that a request met: a death if there is one, else the last that began; `none`."""
    met = [
        event
        for event in happenings
        if event.start <= outcome.end + SLACK_S and event.until + AFTER_S >= outcome.start - SLACK_S
    ]
    deaths = [event for event in met if explains(event, outcome)]
    latest = max(deaths or met, key=lambda event: event.start, default=None)
    return "none" if latest is None else latest.kind


def explains(event: Happening, outcome: Outcome) -> bool:
    """Whether this death may have ended the request's connection."""
    is_met = event.start <= outcome.end + SLACK_S and event.until >= outcome.start - SLACK_S
    return event.kind in DEATHS and is_met


def settle(happenings: Sequence[Happening], outcomes: Iterable[Outcome]) -> list[Outcome]:
    """With what was near; what was cut with no death to explain it is lost."""
    settled = []
    for outcome in outcomes:
        is_lost = outcome.verdict == "cut" and not any(explains(one, outcome) for one in happenings)
        verdict: Verdict = "lost" if is_lost else outcome.verdict
        settled.append(replace(outcome, verdict=verdict, near=outcome.near or near(happenings, outcome)))
    return settled


def count(outcomes: Iterable[Outcome]) -> dict[str, Counter[str]]:
    """Kind of event near it -> verdicts, `all` last; each has `asked`, too."""
    found: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        for name in (outcome.near, "all"):
            found.setdefault(name, Counter()).update([outcome.verdict, "asked"])
    whole = found.pop("all", Counter())
    return {**{name: found[name] for name in sorted(found)}, "all": whole}


def is_good(outcomes: Iterable[Outcome]) -> bool:
    """No fault among those that `settle` gave."""
    return not any(one.verdict in FAULTS for one in outcomes)
