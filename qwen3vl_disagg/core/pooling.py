"""What may be wanted of a prompt in place of an answer."""

from __future__ import annotations

import math
import struct

import msgspec


class Pooling(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of the final hidden state of a prompt's last token.

    Without `tokens` a vector: its first `dimensions` numbers (0: all), made of length 1. With them a score: the logit
    of the first of these less that of the second.
    """

    tokens: tuple[int, int] | None = None
    dimensions: int = 0


def read_vector(raw: bytes) -> tuple[float, ...]:
    """The numbers of a vector, as ranks tell it."""
    return struct.unpack(f"<{len(raw) // 4}f", raw)


def read_score(raw: bytes) -> float:
    """What the difference of two logits says, from 0 to 1: the share of the first of both."""
    [difference] = read_vector(raw)
    small = math.exp(-abs(difference))
    return (1 if difference >= 0 else small) / (1 + small)
