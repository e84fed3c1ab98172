"""Which events come when: a list that follows from the seed alone, and is there before anything is started."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qwen3vl_disagg.core.errors import InputError

Draw = Callable[[random.Random], dict[str, Any]]
MIN_GAP_S = 0.2


@dataclass(frozen=True)
class Event:
    """`at`: seconds after clients began. `args` decide everything about it that can be decided beforehand: `pick` is a
    number in [0, 1) that chooses among the ranks there are then, `seed` chooses questions."""

    at: float
    kind: str
    args: Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """How often it is in a deck of events, and what is drawn for it."""

    count: int
    draw: Draw


def _nothing(_: random.Random) -> dict[str, Any]:
    return {}


def _pick(rng: random.Random) -> dict[str, Any]:
    return {"pick": round(rng.random(), 4)}


def _stop(rng: random.Random) -> dict[str, Any]:
    return {**_pick(rng), "seconds": round(rng.uniform(1, 20), 2)}


def _partition(rng: random.Random) -> dict[str, Any]:
    """Half are shorter than what is taken for a death (10 s), some longer than what a rank survives (30 s)."""
    return {"seconds": round(rng.choice([rng.uniform(0.5, 8), rng.uniform(8, 40)]), 2)}


def _burst(rng: random.Random) -> dict[str, Any]:
    return {"count": rng.randint(30, 80), "seed": rng.randrange(2**31)}


def _bad_input(rng: random.Random) -> dict[str, Any]:
    return {"count": rng.randint(4, 12), "first": rng.randrange(1000)}


def _hang_up(rng: random.Random) -> dict[str, Any]:
    after_s = [round(rng.expovariate(1.0) * 0.7, 3) for _ in range(rng.randint(3, 10))]
    return {"after_s": after_s, "seed": rng.randrange(2**31)}


def _slow(rng: random.Random) -> dict[str, Any]:
    return {"count": rng.randint(2, 5), "pause_s": round(rng.uniform(0.05, 0.6), 3), "seed": rng.randrange(2**31)}


KINDS: dict[str, Kind] = {
    "kill-encode": Kind(6, _pick),
    "stop-encode": Kind(4, _stop),
    "kill-frontend": Kind(2, _nothing),
    "burst": Kind(3, _burst),
    "bad-input": Kind(3, _bad_input),
    "hang-up": Kind(3, _hang_up),
    "slow-clients": Kind(2, _slow),
    "join": Kind(4, _nothing),
    "leave": Kind(2, _pick),
    "kill-join": Kind(1, _pick),
    "partition": Kind(2, _partition),
    "kill-language": Kind(1, _pick),
}


def schedule(
    seed: int, seconds: float, every_s: float, *, calm_s: float = 0.0, only: Collection[str] = ()
) -> list[Event]:
    """Events from `calm_s` on, before `seconds`, one every `every_s` on average; of the kinds of `only`, or of all.

    A longer schedule begins with the shorter one. Kinds are dealt from a shuffled deck, so none stays away for long.
    """
    rng = random.Random(f"chaos {seed}")
    deck: list[str] = []
    events: list[Event] = []
    at = calm_s
    while True:
        at += max(MIN_GAP_S, rng.expovariate(1 / every_s))
        if not deck:
            deck = [name for name, kind in KINDS.items() if not only or name in only for _ in range(kind.count)]
            rng.shuffle(deck)
        kind = deck.pop()
        event = Event(round(at, 3), kind, KINDS[kind].draw(rng))
        if at >= seconds:
            return events
        events.append(event)


def line_of(event: Event, what: str, **more: Any) -> dict[str, Any]:
    """An event in a log: `what` is `plan` where it is to come, `did` or `skipped` where it has."""
    return {"what": what, "at": event.at, "kind": event.kind, "args": dict(event.args), **more}


def events_of(lines: Iterable[str]) -> tuple[dict[str, Any], list[Event]]:
    """The settings of a logged run, and what it did: each event when it came, with the rank that it hit.

    What was planned and did not come is left out. InputError for what is no log.
    """
    settings: dict[str, Any] | None = None
    events: list[Event] = []
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
            if line["what"] == "run":
                settings = dict(line["settings"])
            elif line["what"] in ("did", "skipped"):
                if line["kind"] not in KINDS:
                    raise KeyError(line["kind"])
                hit = {"target": line["target"]} if line.get("target") else {}
                events.append(Event(float(line["at"]), line["kind"], {**line["args"], **hit}))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"line {number} is none of a log of this command: {error!r}", param="replay") from None
    if settings is None:
        raise InputError("there is no line that says what was run", param="replay")
    return settings, sorted(events, key=lambda event: event.at)
