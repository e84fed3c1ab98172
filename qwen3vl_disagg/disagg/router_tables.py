"""What the router remembers of requests and their items, and its limits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from qwen3vl_disagg.core.requests import VisualItem


@dataclass(frozen=True)
class RouterLimits:
    max_waiting: int = 64
    """Requests that have no token yet."""
    max_waiting_tokens: int = 1 << 20
    """Their tokens, prompt and output at most."""
    max_attempts: int = 3
    """Encodings of one item that may fail before its request does."""
    encode_wait_s: float = 30.0
    """How long an item waits for an encode rank when none is there."""


@dataclass
class Item:
    visual: VisualItem
    state: Literal["idle", "waiting", "encoding", "received"] = "idle"
    attempt: int = 0
    encode_rank: int = -1
    failures: int = 0
    failed_on: set[tuple[int, int]] = field(default_factory=set)
    """(encode rank, its incarnation) of failed attempts."""
    wait_until: float = math.inf
    is_decoded: bool = False

    @property
    def num_patches(self) -> int:
        return math.prod(self.visual.grid)


@dataclass
class Request:
    language_rank: int
    items: list[Item]
    num_tokens: int
    deadline: float
    num_received_tokens: int = 0
