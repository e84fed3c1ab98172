"""What processes hold over time, and whether it grows. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

WARM_S = 300.0
"""What comes before is not looked at, or half of a run that is shorter than twice that."""
YOUNG_S = 60.0
"""Nor is this much of a life that began later: whoever has just been started grows."""
MIN_SPAN_S, MIN_SAMPLES = 50.0, 5
"""Of a life behind that; there is no slope in a shorter one."""


@dataclass(frozen=True)
class Sample:
    """Of one process. `started` tells lives with the same pid apart; `anon`: bytes (RssAnon)."""

    at: float
    name: str
    pid: int
    started: int
    anon: int
    descriptors: int
    threads: int


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the straight line with the least squares, per hour; points are (seconds, value)."""
    if len(points) < 2:
        raise ValueError(f"a slope of {len(points)} points")
    mean_t = sum(t for t, _ in points) / len(points)
    mean_v = sum(v for _, v in points) / len(points)
    spread = sum((t - mean_t) ** 2 for t, _ in points)
    if spread == 0:
        raise ValueError("a slope of points at one time")
    return sum((t - mean_t) * (v - mean_v) for t, v in points) / spread * 3600


def warm_up(seconds: float) -> float:
    return min(WARM_S, seconds / 2)


def lives(samples: Iterable[Sample]) -> dict[tuple[str, int, int], list[Sample]]:
    """(name, pid, start) -> its samples in order of time."""
    found: dict[tuple[str, int, int], list[Sample]] = {}
    for sample in sorted(samples, key=lambda one: one.at):
        found.setdefault((sample.name, sample.pid, sample.started), []).append(sample)
    return found


@dataclass(frozen=True)
class Growth:
    """Of one process after the warm-up: MiB, descriptors and threads at its end, and what came to them in an hour."""

    name: str
    pid: int
    seconds: float
    mib: float
    mib_per_hour: float
    descriptors: int
    descriptors_per_hour: float
    threads: int
    threads_per_hour: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def growth(samples: Iterable[Sample], seconds: float) -> list[Growth]:
    """Of each process that lived long enough, by name."""
    found = []
    warm = warm_up(seconds)
    for (name, pid, _), life in lives(samples).items():
        late = [sample for sample in life if sample.at >= max(warm, life[0].at + YOUNG_S)]
        if len(late) < MIN_SAMPLES or late[-1].at - late[0].at < MIN_SPAN_S:
            continue
        last, rates = late[-1], []
        for values in ("anon", "descriptors", "threads"):
            rates.append(slope([(sample.at, float(getattr(sample, values))) for sample in late]))
        sizes = (last.anon / 2**20, rates[0] / 2**20, last.descriptors, rates[1], last.threads, rates[2])
        found.append(Growth(name, pid, late[-1].at - late[0].at, *sizes))
    return sorted(found, key=lambda one: (one.name, one.pid))
