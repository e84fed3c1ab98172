"""What the router remembers of requests and their items, and its limits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.protocol.placement import encode_work


@dataclass(frozen=True)
class RouterLimits:
    max_waiting: int = 1024
    """Requests that have no token yet."""
    max_waiting_tokens: int = 1 << 20
    """Their cost (`Admission`); or, if that is more,"""
    max_waiting_fills: int = 8
    """so many times what the language ranks hold at once."""
    max_attempts: int = 3
    """Encodings of one item that may fail before its request does. Deaths of encode ranks are not among these."""
    encode_wait_s: float = 30.0
    """How long an item waits for an encode rank when none is there."""
    max_deaths: int = 3
    """Encode ranks that may die over an image or clip alone before it is refused."""
    suspect_s: float = 600.0
    """How long that is remembered."""
    max_suspects: int = 1024
    """Images and clips of which it is remembered."""


@dataclass
class Item:
    visual: VisualItem
    state: Literal["idle", "waiting", "encoding", "received"] = "idle"
    attempt: int = 0
    encode_rank: int = -1
    failures: int = 0
    failed_on: set[tuple[int, int]] = field(default_factory=set)
    """(encode rank, its incarnation) of failed attempts."""
    lost_with: set[tuple[int, int]] = field(default_factory=set)
    """Those of whom nothing is known but that a link is gone."""
    wait_until: float = math.inf
    is_decoded: bool = False

    @property
    def work(self) -> int:
        return encode_work(self.visual)


@dataclass
class Request:
    language_rank: int
    items: list[Item]
    num_tokens: int
    deadline: float
    num_received_tokens: int = 0


def harmful(visual: VisualItem) -> InputError:
    """What is said of an image or clip that encode ranks died over."""
    message = f"this {visual.modality} ended the process that encodes it, each time it was tried"
    return InputError(message, param=visual.param, code="harmful_media")
