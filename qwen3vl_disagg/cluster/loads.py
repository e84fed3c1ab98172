"""What each rank has to do, as it last said, and which of them gets nowhere."""

from __future__ import annotations

from collections.abc import Iterator

from qwen3vl_disagg.cluster.registry import RankKey
from qwen3vl_disagg.protocol.messages import EncodeLoad, LanguageLoad

Load = LanguageLoad | EncodeLoad
STUCK_S = 10.0
"""A language rank that could step and has not for so long, or for LONGER times its longest step, serves nobody."""
LONGER = 3.0


class Loads:
    """Of the ranks that are there. Times are in seconds on any clock that does not go back."""

    def __init__(self) -> None:
        self._loads: dict[RankKey, tuple[Load, float]] = {}
        """With the time since which it has not stepped, though it could have."""

    def __iter__(self) -> Iterator[tuple[RankKey, Load]]:
        return ((key, load) for key, (load, _) in self._loads.items())

    def note(self, key: RankKey, load: Load, now: float) -> None:
        before, since = self._loads.get(key, (None, now))
        stands = False
        if isinstance(load, LanguageLoad) and isinstance(before, LanguageLoad):
            stands = before.can_step and load.num_steps == before.num_steps
        self._loads[key] = load, since if stands else now

    def forget(self, key: RankKey) -> None:
        self._loads.pop(key, None)

    def sums(self) -> dict[str, float]:
        """Of the ranks of a role together."""
        loads = [load for load, _ in self._loads.values()]
        language = [load for load in loads if isinstance(load, LanguageLoad)]
        encode = [load for load in loads if isinstance(load, EncodeLoad)]
        pages = sum(load.kv_pages for load in language)
        return {
            "running": sum(load.running for load in language),
            "waiting": sum(load.waiting for load in language),
            "kv_cache": round(sum(load.kv_pages_used for load in language) / max(pages, 1), 3),
            "encoding": sum(load.running for load in encode),
            "to_encode": sum(load.waiting for load in encode),
        }

    def stuck(self, now: float) -> list[str]:
        """Why nobody should send requests."""
        return [
            f"{role} rank {rank} has not stepped for {now - since:.0f} s"
            for (role, rank), (load, since) in sorted(self._loads.items())
            if isinstance(load, LanguageLoad)
            and load.can_step
            and now - since >= max(STUCK_S, LONGER * load.longest_step_s)
        ]
