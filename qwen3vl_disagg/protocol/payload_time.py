"""How long bytes may take: a time for everything else, and their size at the least rate that is asked of the way. Pure.

A way of which little is known may be as slow as FLOOR_RATE. One that has moved enough has to keep a part of the rate
that it has shown, so that what stands still is noticed sooner the faster the way is. What is asked is always less than
what was seen: nobody is given up for being as slow as before.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOOR_RATE = 256 * 1024.0
"""Bytes a second: 2 Mbit/s."""
SLOWER = 8.0
"""By this a way may become slower, within one payload, than it was."""
KNOWN_BYTES = 1 << 20
"""So many must have come before anything follows from it: small payloads say how long the way is, not how wide."""
LATELY_BYTES = 64 << 20
"""What came before these weighs half as much, and less."""


@dataclass(slots=True)
class LinkPace:
    """What one link has moved lately, and in which time."""

    num_bytes: float = 0.0
    seconds: float = 0.0

    def learn(self, num_bytes: int, seconds: float) -> None:
        """So many bytes have come, in so long."""
        self.num_bytes += num_bytes
        self.seconds += max(seconds, 0.0)
        if self.num_bytes > LATELY_BYTES:
            self.num_bytes, self.seconds = self.num_bytes / 2, self.seconds / 2

    @property
    def least_rate(self) -> float:
        """Bytes a second that are asked of it."""
        if self.num_bytes < KNOWN_BYTES:
            return FLOOR_RATE
        return max(FLOOR_RATE, self.num_bytes / max(self.seconds, 1e-6) / SLOWER)


def moving_s(num_bytes: int, pace: LinkPace | None = None) -> float:
    """Seconds that so many bytes may take on the way, beside all else."""
    return num_bytes / (FLOOR_RATE if pace is None else pace.least_rate)
