"""Stop strings: where the text of an answer ends."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from qwen3vl_disagg.core.errors import InputError


@lru_cache(maxsize=1)
def _beginnings(stops: tuple[str, ...]) -> frozenset[str]:
    """Of these, but none whole. All answers of a request, made one after another, have the same set."""
    return frozenset(stop[:n] for stop in stops for n in range(1, len(stop)))


class StopMatcher:
    """Looks for stop strings in a text that comes in pieces, wherever the borders of the pieces are.

    The text ends before the stop string that is complete first; of two complete at the same character, before the
    longer one. What may be the beginning of a stop string is held back: always less than the longest of them.
    `keeps_stop`: it ends behind it. InputError if one is empty.
    """

    def __init__(self, stops: Sequence[str], *, keeps_stop: bool = False) -> None:
        if not all(stops):
            raise InputError("a stop string is empty", param="stop")
        self._stops, self._keeps_stop = tuple(stops), keeps_stop
        self._beginnings = _beginnings(self._stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.complete: str | None = None
        """The one that ended the text."""

    @property
    def is_complete(self) -> bool:
        return self.complete is not None

    def push(self, piece: str, *, may_stop: bool = True) -> str:
        """The text that became certain. With `may_stop` false, a stop string complete within this piece is text."""
        if self.is_complete:
            return ""
        text, before = self._held + piece, len(self._held)
        if may_stop and piece:
            # What ends within the piece begins at most its length - 1 before it.
            starts = [(text.find(stop, max(0, before - len(stop) + 1)), stop) for stop in self._stops]
            found = min(((start + len(stop), start, stop) for start, stop in starts if start >= 0), default=None)
            if found is not None:
                self.complete, self._held = found[2], ""
                return text[: found[0] if self._keeps_stop else found[1]]
        longest = min(self._longest - 1, len(text))
        num_held = next((n for n in range(longest, 0, -1) if text[-n:] in self._beginnings), 0)
        certain = len(text) - num_held
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """What was held back: nothing comes after it."""
        held, self._held = self._held, ""
        return held
