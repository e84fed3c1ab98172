"""States as tables: what each means, what may follow, and how long it may last. The docs are printed from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qwen3vl_disagg.protocol.session_events import SessionLimits


@dataclass(frozen=True)
class State:
    """`seconds`: how long it may last, and `then` what follows; None: until the request's deadline."""

    meaning: str
    leaves_by: str
    next: tuple[str, ...]
    seconds: Callable[[SessionLimits], float] | None = None
    then: str = ""


def check_transition(states: Mapping[str, State], old: str, new: str) -> None:
    """RuntimeError for a step that the table does not have."""
    if new not in states[old].next:
        raise RuntimeError(f"no way from {old} to {new}")
