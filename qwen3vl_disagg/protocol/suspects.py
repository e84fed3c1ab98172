"""Images and clips that encode ranks died over: which are to be tried alone, and which never again. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field


@dataclass
class _Record:
    """`num_deaths`: of ranks that had nothing else under way."""

    num_deaths: int
    until: float


@dataclass
class Suspects:
    """By content digest, for `memory_s` since the last death.

    Contents that were under way together when a rank died are tried again, each alone. Only a death alone is charged;
    with `max_deaths` of these a content is condemned. One that was encoded is cleared.
    """

    max_deaths: int
    memory_s: float
    max_remembered: int
    _records: OrderedDict[str, _Record] = field(default_factory=OrderedDict)

    def died(self, under_way: Collection[str], now: float) -> list[str]:
        """A rank died with these under way; those that are condemned by that."""
        condemned = []
        for digest in under_way:
            record = self._find(digest, now) or _Record(0, 0.0)
            record.num_deaths += len(under_way) == 1
            record.until = now + self.memory_s
            self._records[digest] = record
            self._records.move_to_end(digest)
            if record.num_deaths == self.max_deaths:
                condemned.append(digest)
        while len(self._records) > self.max_remembered:
            self._records.popitem(last=False)
        return condemned

    def cleared(self, digest: str) -> None:
        self._records.pop(digest, None)

    def is_suspect(self, digest: str, now: float) -> bool:
        return self._find(digest, now) is not None

    def num_deaths(self, digest: str, now: float) -> int:
        record = self._find(digest, now)
        return 0 if record is None else record.num_deaths

    def is_condemned(self, digest: str, now: float) -> bool:
        return self.num_deaths(digest, now) >= self.max_deaths

    def _find(self, digest: str, now: float) -> _Record | None:
        record = self._records.get(digest)
        if record is not None and now >= record.until:
            del self._records[digest]
            return None
        return record
