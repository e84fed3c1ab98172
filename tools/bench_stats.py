"""Figures from raw times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise


def percentile(values: Sequence[float], percent: float) -> float:
    """The least value that `percent` of all are not above (nearest rank): always one that was seen."""
    if not values or not 0 <= percent <= 100:
        raise ValueError(f"percentile {percent} of {len(values)} values")
    rank = max(1, math.ceil(percent / 100 * len(values)))
    return sorted(values)[rank - 1]


def decode_rate(stamps: Sequence[Sequence[float]]) -> float:
    """Tokens/s while all requests of a batch are being decoded, from the times of each one's tokens.

    The window opens with the last first token and closes with the first last token: prefill of some requests beside
    the decoding of others stays out, and so does the end, where the batch is no longer full.
    """
    opens, closes = max(times[0] for times in stamps), min(times[-1] for times in stamps)
    if not opens < closes:
        raise ValueError(f"some requests end at {closes:.3f} s before all have begun at {opens:.3f} s")
    return sum(opens < time <= closes for times in stamps for time in times) / (closes - opens)


def whole_rate(stamps: Sequence[Sequence[float]]) -> float:
    """Tokens/s from the first token of any request to the last of any, the very first tokens not counted."""
    first, last = min(times[0] for times in stamps), max(times[-1] for times in stamps)
    return sum(len(times) - 1 for times in stamps) / (last - first)


def gaps(stamps: Sequence[Sequence[float]]) -> list[float]:
    """Seconds between neighbouring tokens of each request."""
    return [later - earlier for times in stamps for earlier, later in pairwise(times)]
