"""How much of prompts goes between two tokens of others: as much as a target for that gap leaves room for. Pure."""

from __future__ import annotations

from collections import deque

from qwen3vl_disagg.core.settings import GapTarget, default_gap_ms

LEAST, QUANTUM = 16, 16
_MOST_FACTOR = 4.0
_STEPS = 3


class Pace:
    """`chunk`: tokens of prompts in a step while others wait for their next token, from what steps took.

    A gap is a decode step and a chunk. `target_ms` is for both together; `auto`: `_STEPS` times the decode step, as a
    stream that is that much slower for a while still reads as one, or what `default_gap_ms` has, if that is more; and
    never fewer tokens than the first chunk has, with which kernels work well (with fewer, a step still reads all
    weights: a smaller gap for much less throughput). A quarter of the target is the prompts' own, however long a decode
    step takes, so that they come to an end.

    What a chunk takes is not proportional to its tokens (weights are read once for all), so the chunk goes half of the
    way, in its logarithm, to what the last one promises.
    """

    def __init__(self, chunk: int, most: int, target_ms: GapTarget, *, is_cuda: bool) -> None:
        self.most = most
        self._least = min(chunk if target_ms == "auto" else LEAST, most)
        self._target_s = None if target_ms == "auto" else target_ms / 1e3
        self._default_s = default_gap_ms(is_cuda=is_cuda) / 1e3
        self._decodes: deque[float] = deque(maxlen=5)
        self._decode_s = 0.0
        self._exact = float(chunk)
        self.chunk = min(chunk, most)

    @property
    def target_s(self) -> float:
        return max(self._default_s, _STEPS * self._decode_s) if self._target_s is None else self._target_s

    def decoded(self, seconds: float) -> None:
        """A decode step took so long. The middle of the last ones counts: the very first waits for much."""
        self._decodes.append(seconds)
        self._decode_s = sorted(self._decodes)[(len(self._decodes) - 1) // 2]

    def prefilled(self, tokens: int, seconds: float) -> None:
        """Chunks of so many tokens together took so long."""
        room = max(self.target_s - self._decode_s, self.target_s / 4)
        if tokens > self.chunk or (tokens < self.chunk and seconds <= room):
            return  # one for a crowd says nothing about others, nor a short one, unless it was too slow itself
        factor = tokens * room / max(seconds, 1e-6) / self._exact
        self._exact *= min(max(factor, 1 / _MOST_FACTOR), _MOST_FACTOR) ** 0.5
        self._exact = min(max(self._exact, self._least), self.most)
        self.chunk = min(max(self._least, round(self._exact / QUANTUM) * QUANTUM), self.most)
