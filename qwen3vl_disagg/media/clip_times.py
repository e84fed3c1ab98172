"""When a clip's frames are shown, from the times of its packets; which rate that is. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

UNKNOWN_FPS = 24.0
"""Frames a second of a clip that does not say."""
MAX_FPS = 1000.0


def sane_fps(rate: Fraction | None) -> float:
    """Frames a second as a file tells; UNKNOWN_FPS if it does not, or not within 1 / 1000 .. 1000."""
    fps = float(rate or 0)
    return fps if 1 / MAX_FPS <= fps <= MAX_FPS else UNKNOWN_FPS


def frame_times(
    ticks: Sequence[int | None], tick: Fraction | None, declared: Fraction | None
) -> tuple[float, tuple[float, ...]]:
    """(frames a second, seconds of each frame from the first one on).

    `ticks`: times of the frames in display order, in units of `tick` seconds. The declared rate counts where no frame
    is off by more than half of one; else the mean rate, if that is true of it; else the times themselves are given,
    with the mean rate. They are empty for clips of an even rate. Where packets have no times, the declared rate counts.
    """
    known = [at for at in ticks if at is not None]
    if not tick or len(known) < max(len(ticks), 2) or known[-1] <= known[0]:
        return sane_fps(declared), ()
    seconds = [float((at - known[0]) * tick) for at in known]
    mean = min(max((len(known) - 1) / seconds[-1], 1 / MAX_FPS), MAX_FPS)
    for rate in (float(declared or 0), mean):
        if 1 / MAX_FPS <= rate <= MAX_FPS and _is_even(seconds, rate, float(tick)):
            return rate, ()
    return mean, tuple(seconds)


def _is_even(seconds: Sequence[float], rate: float, tick: float) -> bool:
    slack = 0.5 / rate + tick
    return all(abs(at - number / rate) <= slack for number, at in enumerate(seconds))


def nearest_frames(times: Sequence[float], count: int) -> list[int]:
    """`count` strictly rising frames, nearest to times spread evenly from the first to the last one's."""
    last, found, at = len(times) - 1, list[int](), 0
    for number in range(count):
        wanted = times[-1] * number / max(count - 1, 1)
        while at < last and times[at + 1] <= wanted:
            at += 1
        is_next_nearer = at < last and times[at + 1] - wanted < wanted - times[at]
        # No frame twice, and as many left as are still wanted.
        low, high = (found[-1] + 1 if found else 0), last - (count - 1 - number)
        found.append(min(max(at + is_next_nearer, low), high))
    return found
