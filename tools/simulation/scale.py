"""Bounds of production that small clusters never reach, made as small as the clusters for one schedule."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

from qwen3vl_disagg.language import kept_answers
from qwen3vl_disagg.protocol import layout, payload_time, session

Bounds = Sequence[tuple[Any, str, float]]
"""(module, name, value)"""

SLOW_S = 3.0
"""What the bytes of a payload may take at `_SLOW`."""
_SHORT_RUNS: Bounds = ((layout, "RUN_BYTES", 8),)
_FEW_RUNS: Bounds = ((layout, "MAX_RUNS", 2), (session, "MAX_RUNS", 2))
_SLOW: Bounds = (
    (payload_time, "FLOOR_RATE", 128.0),
    (payload_time, "KNOWN_BYTES", 200),
    (payload_time, "LATELY_BYTES", 600),
)
_FEW_KEPT: Bounds = ((kept_answers, "MAX_KEPT", 2),)
_SHORT_KEPT: Bounds = ((kept_answers, "MAX_KEPT_SIZE", 40),)


def draw_bounds(rng: Random, *, are_kept: bool) -> Bounds:
    """Those of one schedule; half of them have production's."""
    bounds: list[tuple[Any, str, float]] = []
    for some in (_SHORT_RUNS, _FEW_RUNS, _SLOW):
        if rng.random() < 0.15:
            bounds += some
    if are_kept:
        bounds += rng.choice(((), (), _FEW_KEPT, _SHORT_KEPT))
    return bounds


def moving_s(bounds: Bounds) -> float:
    """Seconds that the bytes of a payload may take at most."""
    return SLOW_S if any(module is payload_time for module, _, _ in bounds) else 0.1


@contextlib.contextmanager
def bounded(bounds: Bounds) -> Iterator[None]:
    """With these in place of production's."""
    before = [(module, name, getattr(module, name)) for module, name, _ in bounds]
    try:
        for module, name, value in bounds:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
