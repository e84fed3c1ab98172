"""Which rank gets what: the two choices of the router, as functions of its tables."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from qwen3vl_disagg.core.requests import VisualItem


@dataclass
class EncodeRankState:
    incarnation: int
    links: set[int] = field(default_factory=set)
    """Language ranks that it can send to."""
    epochs: dict[int, int] = field(default_factory=dict)
    """Language rank -> epoch of the link to it."""
    jobs: dict[tuple[str, int], int] = field(default_factory=dict)
    """(request, item) being encoded -> its work."""
    under_way: Counter[str] = field(default_factory=Counter)
    """Digests of the contents that it works on now, as it says."""
    is_leaving: bool = False
    """It gets nothing new, and goes when `jobs` is empty."""
    is_dismissed: bool = False
    pace: float | None = None
    """Seconds for a unit of work, of late: from the assignment to the last row."""

    def learn(self, seconds: float, work: int) -> None:
        """So long took what was assigned with this much to do."""
        pace = seconds / max(1, work)
        self.pace = pace if self.pace is None else self.pace + 0.2 * (pace - self.pace)

    @property
    def work(self) -> int:
        return sum(self.jobs.values())


@dataclass
class LanguageRankState:
    kv_tokens: int = 0
    last_used: int = 0
    requests: dict[str, int] = field(default_factory=dict)
    """Request -> tokens."""
    load: int = 0
    """The tokens of all of them."""

    def add(self, request_id: str, num_tokens: int) -> None:
        self.requests[request_id] = num_tokens
        self.load += num_tokens

    def remove(self, request_id: str) -> None:
        self.load -= self.requests.pop(request_id)


def choose_language_rank(ranks: Mapping[int, LanguageRankState], candidates: Set[int]) -> int:
    """The one with the fewest tokens under way, then the longest unused."""

    def load(rank: int) -> tuple[int, int, int]:
        return ranks[rank].load, ranks[rank].last_used, rank

    return min(candidates, key=load)


def encode_work(visual: VisualItem) -> int:
    """What an item costs an encode rank, in patches: those that go through the tower, and those of the frames that are
    decoded on the way there, of a clip's file all up to the last one that is looked at.

    64 x 64 pixels of 16 x 16: an image 2 * 16; 4 frames (2 in time) of which the last is number 29: (2 + 30) * 16.
    """
    frames, height, width = visual.grid
    num_decoded = 1 if visual.modality == "image" else len(visual.frames) or frames
    if visual.frames and not visual.is_frame_list:
        num_decoded = visual.frames[-1] + 1
    return (frames + num_decoded) * height * width


def choose_encode_rank(digest: str, work: int, candidates: Mapping[int, EncodeRankState]) -> int:
    """By content, so that the same image meets the same rank and its cache, unless that rank is busy.

    Busy: it has at least this item more to do than the least loaded one. Then encoding there costs no more time than
    waiting here would. So the images of one request spread over idle ranks.
    """
    load = {rank: state.work for rank, state in candidates.items()}
    by_content = max(candidates, key=lambda rank: _affinity(digest, rank))
    least = min(candidates, key=lambda rank: (load[rank], -_affinity(digest, rank)))
    return least if load[by_content] - load[least] >= work else by_content


def _affinity(digest: str, rank: int) -> int:
    """Highest-random-weight hashing: a rank that comes or goes moves only the items that are its own."""
    return int.from_bytes(hashlib.blake2b(f"{digest}/{rank}".encode(), digest_size=8).digest(), "big")
